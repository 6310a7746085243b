"""What acts on a model's output: the one definition that every cache key and every recorded fingerprint goes by.

Where it cannot be known (a hook or a module of code that is not in the key) the identity is None, and nothing is cached.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_modules
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nt_utils.models.view import is_adapter_layer, is_sharded, tensor_of

if TYPE_CHECKING:
    from nt_utils.models.language import LanguageModel

KNOWN_CODE = ("torch", "transformers", "peft", "accelerate")
SMALL = 2**20  # bytes of a tensor whose every place is told apart
REMEMBERED = 16  # fingerprints a model can be put back to without hashing

# ------------------------------------------------------------------------------------------------------- weights


class _Stamp(NamedTuple):
    """What a tensor's hash is kept by: as long as all of it stands still, so does the tensor's content.

    The weak reference keeps the number of a freed storage from being given out again. torch's version counts in-place
    writes; writes through ``.data``, which it does not count, change the sums.
    """

    storage: StorageWeakRef
    layout: tuple
    version: int
    sums: int


class _Known(NamedTuple):
    stamps: dict[str, _Stamp | None]
    hashes: dict[str, str]
    before: dict[str, dict[str, str]]  # fingerprint of all -> hash of each, oldest first


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def weights_fingerprint(model: nn.Module) -> str:
    """Hash over the names and values of all weights as they are now; only tensors that changed are hashed again.

    Sharded weights are gathered one by one, so every process must ask at the same time; nothing is kept of them.
    """
    if is_sharded(model):
        return _combined({name: _hash(tensor) for name, tensor in _tensors(model)})
    known = _KNOWN.setdefault(model, _Known({}, {}, {}))
    found: dict[str, str] = {}
    for name, tensor in _tensors(model):
        stamp = _stamp(tensor)
        if stamp is None or known.stamps.get(name) != stamp:
            known.stamps[name], known.hashes[name] = stamp, _hash(tensor)
        found[name] = known.hashes[name]
    total = _combined(found)
    known.before.pop(total, None)
    known.before[total] = found
    while len(known.before) > REMEMBERED:
        del known.before[next(iter(known.before))]
    return total


def weights_changed(model: nn.Module, known: str | None = None, names: Collection[str] | None = None) -> None:
    """Forget the kept hashes; or, for a caller that put weights back bit for bit, take those of fingerprint ``known``.

    ``names``: the weights that this is about (None: all).
    """
    entry = _KNOWN.get(model)
    if entry is None:
        return
    about = [(name, tensor) for name, tensor in _tensors(model) if names is None or name in names]
    for name, tensor in about:
        entry.stamps.pop(name, None)
        if (kept := entry.before.get(known or "", {}).get(name)) is not None:
            entry.hashes[name], entry.stamps[name] = kept, _stamp(tensor)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(value, Tensor):
            owner, _, leaf = name.rpartition(".")
            found = tensor_of(model.get_submodule(owner), leaf) if value.is_meta else value
            if found is not None:
                yield name, found


def _stamp(tensor: Tensor) -> _Stamp | None:
    """None where a tensor's content cannot be told to stand still."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference() or not tensor.is_contiguous():
        return None
    layout = (tensor.device, tensor.dtype, tensor.shape, tensor.storage_offset())
    return _Stamp(StorageWeakRef(tensor.untyped_storage()), layout, tensor._version, _sums(tensor.detach()))


def _sums(tensor: Tensor) -> int:
    """Sum of a tensor's bits as whole numbers, each times an odd number of its place (modulo 2^64).

    One pass through memory; 64 neighbours of a large tensor share a place.
    """
    flat = tensor.reshape(-1).view(torch.uint8)
    whole = flat[: len(flat) // 512 * 512]
    parts = (whole if whole.data_ptr() % 8 == 0 else whole.clone()).view(torch.int64)
    parts = parts.view(-1, 64).sum(1) if len(flat) > SMALL else parts
    parts = torch.cat([parts, flat[len(whole) :].long()])
    return int((parts * torch.arange(1, 2 * len(parts), 2, device=parts.device)).sum())


def _hash(tensor: Tensor) -> str:
    value = tensor.detach()
    value = value.full_tensor() if isinstance(value, DTensor) else value
    digest = hashlib.sha256(f"{tuple(value.shape)} {value.dtype}".encode())
    digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _combined(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ identity


def identity(lm: LanguageModel, intervention_key: str | None = "") -> str | None:
    """A hash of everything that acts on the model's output, apart from the prompts and how their answers are decoded.

    Weights as they are, config, precision, attention implementation, adapters with their scale and state, tokenizer,
    chat template with its arguments, date and system prompt, generation config, versions of the libraries, and the
    intervention that is going to be applied (its ``key``; "" for none). Taken before the intervention is entered.

    Returns:
        The hash, or None where it cannot be known, and so nothing may be cached: an intervention without a key, hooks on
        the model (whoever registered them), a forward method that was replaced, modules or attention functions of other
        code than torch's, transformers', accelerate's and PEFT's, a model in training mode.
    """
    model = lm.model
    adapters = _adapters(model)
    if intervention_key is None or adapters is None or not _is_known_code(model):
        return None
    config = {**model.config.to_dict(), "attention": getattr(model.config, "_attn_implementation", "")}
    device = lm.device.type
    facts: dict[str, Any] = {
        "weights": weights_fingerprint(model),
        "buffers": _combined({name: _hash(tensor) for name, tensor in _fixed_buffers(model)}),
        "settings": _settings(model),
        "config": {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")},
        "adapters": adapters,
        "text": lm.text_identity,
        "generation": str(getattr(model, "generation_config", "")),
        "device": device,
        "precision": [torch.get_float32_matmul_precision(), torch.is_autocast_enabled(device)],
        "versions": [torch.__version__, transformers.__version__],
        "intervention": intervention_key,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=_plain).encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _settings(model: nn.Module) -> dict[str, dict[str, float]]:
    """The public numbers and switches that modules keep beside the config: an epsilon, a scale of attention."""
    return {
        name: found
        for name, module in model.named_modules()
        if not _follows_the_text(module)
        and (found := {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float)) and k[0] != "_"})
    }


def _adapters(model: nn.Module) -> list | None:
    """Every adapter layer (PEFT) with what is active in it and how strongly; None for a module in training mode."""
    found = []
    for name, module in model.named_modules():
        if module.training:
            return None
        if is_adapter_layer(module):
            scaling = {key: value for key, value in vars(module).items() if "scaling" in key or "dropout" in key}
            state = (module.active_adapters, module.disable_adapters, getattr(module, "merged_adapters", []))
            found.append([name, type(module).__name__, *map(str, state), str(scaling)])
    return [*found, {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}]


def _is_known_code(model: nn.Module) -> bool:
    """Whether only the libraries' own code runs in a forward pass: no hooks, no replaced forward, no modules of others."""
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return False
    attention = ALL_ATTENTION_FUNCTIONS.get(getattr(model.config, "_attn_implementation", ""))
    if attention is not None and not _is_known(attention):
        return False
    for module in model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        own = module.__dict__.get("forward")  # accelerate's moves tensors between devices
        if own is not None and not hasattr(module, "_hf_hook"):
            return False
        if not all(map(_is_known, [type(module), type(module).forward, *hooks])):
            return False
    return True


def _is_known(code) -> bool:
    """Whether a class or function comes from a library whose version is in the key (nt_utils hooks count as others')."""
    return str(getattr(code, "__module__", "")).partition(".")[0] in KNOWN_CODE


def _fixed_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that no checkpoint holds, apart from those that a forward pass itself rewrites (rotary frequencies)."""
    stored = set(model.state_dict())
    for name, buffer in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name not in stored and not buffer.is_meta and not _follows_the_text(owner):
            yield name, buffer


def _follows_the_text(module: nn.Module) -> bool:
    """Whether a forward pass itself rewrites what the module keeps: a rotary embedding that follows the length."""
    return any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope"))
