"""The precision of the weights, and whether they fit: decided before anything is loaded."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from nt_utils.errors import InputError, ModelError
from nt_utils.files import atomic, cache_folder
from nt_utils.work import memory

#: Parameters of a model from which on "auto" times both precisions; smaller ones are float32 without a measurement.
TIMED_FROM = 50_000_000
#: What decides how long a layer takes.
SHAPE = tuple(
    "hidden_size intermediate_size n_inner num_attention_heads num_key_value_heads head_dim vocab_size".split()
)


def choose_dtype(dtype: str | torch.dtype, config, *, on_cpu: bool) -> tuple[torch.dtype | str, str]:
    """The precision that weights are loaded in, and why.

    "auto" keeps the checkpoint's on an accelerator. On a CPU it is float32, or, from ``TIMED_FROM`` parameters on, whichever
    of float32 and bfloat16 runs a forward pass faster on this machine (measured once, then kept in the cache, so that the
    notebooks of a study agree): what must be the same everywhere names its dtype.

    Raises:
        InputError: no such dtype.
        ModelError: the weights need more memory than the machine has (CPU only).
    """
    parameters = _parameters(config)
    if dtype != "auto":
        chosen = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point or chosen.itemsize < 2:
            raise InputError(f"dtype: got {dtype!r}; allowed: auto, float32, bfloat16, float16")
        reason = "as asked"
    elif not on_cpu:
        return getattr(config, "dtype", None) or "auto", "the checkpoint's"
    elif parameters < TIMED_FROM:
        chosen, reason = torch.float32, "small model"
    elif 4 * parameters > 0.8 * memory()[0]:
        chosen, reason = torch.bfloat16, "float32 does not fit the memory"
    else:
        seconds = _measured(config)
        chosen = getattr(torch, min(seconds, key=lambda kind: seconds[kind]))
        reason = ", ".join(f"{kind} {value:.3f} s" for kind, value in seconds.items()) + " for two layers"
    if on_cpu:
        needed, (total, free) = chosen.itemsize * parameters, memory()
        if needed > free:
            raise ModelError(
                f"model: its weights take {needed / 2**30:.1f} GiB in {str(chosen)[6:]}; of {total / 2**30:.1f} GiB of memory "
                f"{free / 2**30:.1f} are free: name a smaller dtype or model, or a device_map that offloads"
            )
    return chosen, reason


def _parameters(config) -> int:
    """How many parameters a config asks for, tied ones counted once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())


def _measured(config) -> dict[str, float]:
    """Name of a precision -> seconds of a forward pass on this machine.

    Of notebooks that begin side by side one measures; the others wait for it and take what it wrote.
    """
    shape = [getattr(config, name, None) for name in SHAPE]  # by attribute, since GPT-2's own names are others
    facts = f"{config.model_type} {shape} {platform.machine()} {torch.__version__}"
    path = cache_folder() / "precision" / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
    kept = _kept(path)
    if kept:
        return kept
    # A cache that cannot be written costs the lock and the measurement, not the run.
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{path}.lock"))
        kept = _kept(path)
        if kept:
            return kept
        found = {kind: _seconds(config, getattr(torch, kind)) for kind in ("float32", "bfloat16")}
        with contextlib.suppress(OSError), atomic(path) as tmp:
            tmp.write_text(json.dumps(found), encoding="utf-8")
    return found


def _kept(path: Path) -> dict[str, float] | None:
    """What a measurement wrote, or None where there is none or its file is damaged."""
    try:
        return {str(kind): float(value) for kind, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _seconds(config, dtype: torch.dtype) -> float:
    """Seconds of a forward pass over 4 rows of 64 tokens through two layers of a config's shape, the best of three."""
    small: Any = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size, small.dtype = 2, 256, dtype
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:2]
    model = AutoModelForCausalLM.from_config(small, dtype=dtype).eval()
    ids = torch.zeros(4, 64, dtype=torch.long)
    best = float("inf")
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            model(ids, use_cache=False)
            best = min(best, time.perf_counter() - start)
    return best
