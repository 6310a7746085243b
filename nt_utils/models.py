"""Loading a causal language model, and one uniform handle on the projections of every supported family.

How to add a family
-------------------
1. Add one :class:`Family` entry to ``FAMILIES`` under the config's ``model_type``: the path of the layer list, the
   paths of the projections inside a layer, how fused projections are laid out (``FUSED``) and, if the attention
   normalises queries and keys, over what (``qk_norm="head"`` or ``"full"``). Nothing else names a family.
2. Add one tiny random config to ``tests/tiny.py`` (``CONFIGS``). Every parametrised test (reconstruction of fused
   weights, hooks, exact scores of every neuron against brute force, padding) then runs on it.
3. A fused layout that no family has yet needs one function in ``FUSED``; the test that rebuilds the fused weight
   with ``torch.equal`` covers it.

The attention must go through transformers' ``AttentionInterface``, use rotate-half rotary embeddings (whole head or
its first part) or none, and have one dense feed-forward block. Anything else is refused by name.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nt_utils.errors import InputError, ModelError, gate_message
from nt_utils.neurons import KINDS, NeuronSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# ------------------------------------------------------------------------------------------------------ families


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts; paths are relative to the model (``layers``) or to one layer (the rest).

    ``qkv``: three paths, or one path of a fused projection whose layout ``fused`` names (a key of ``FUSED``).
    ``ffn_in``: the projections into the feed-forward's hidden channels (gate and up; one fused; or one plain).
    ``gated``: whether a hidden channel has two rows in there (gate and up).
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    fused: str = ""
    o: str = "self_attn.o_proj"
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gated: bool = True
    down: str = "mlp.down_proj"
    qk_norm: str = ""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(qk_norm="head"),
    "gemma2": Family(),
    "gemma3_text": Family(qk_norm="head"),
    "olmo2": Family(qk_norm="full"),
    "granite": Family(),
    "phi3": Family(qkv=("self_attn.qkv_proj",), fused="in sequence", ffn_in=("mlp.gate_up_proj",)),
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        attention="attention",
        qkv=("attention.query_key_value",),
        fused="by head",
        o="attention.dense",
        ffn_in=("mlp.dense_h_to_4h",),
        gated=False,
        down="mlp.dense_4h_to_h",
    ),
    "gpt2": Family(
        layers="transformer.h",
        attention="attn",
        qkv=("attn.c_attn",),
        fused="in sequence",
        o="attn.c_proj",
        ffn_in=("mlp.c_fc",),
        gated=False,
        down="mlp.c_proj",
    ),
}


def _rows_in_sequence(view: DecoderView) -> dict[str, slice | Tensor]:
    """All queries, then all keys, then all values (Phi-3, GPT-2)."""
    q, k = view.num_heads * view.head_dim, view.num_kv_heads * view.head_dim
    return {"q": slice(0, q), "k": slice(q, q + k), "v": slice(q + k, q + 2 * k)}


def _rows_by_head(view: DecoderView) -> dict[str, slice | Tensor]:
    """Query, key and value of the first head, then of the second, ... (GPT-NeoX)."""
    rows = torch.arange(3 * view.num_heads * view.head_dim).view(view.num_heads, 3, view.head_dim)
    return {name: rows[:, i].reshape(-1) for i, name in enumerate("qkv")}


FUSED: dict[str, Callable] = {"in sequence": _rows_in_sequence, "by head": _rows_by_head}


#: Which weights a neuron owns: kind -> (role of the projection, side); "input" = its row, "output" = its column.
OWNED = {
    "q": (("q", "input"),),
    "k": (("k", "input"),),
    "v": (("v", "input"),),
    "o": (("o", "output"),),
    "ffn": (("gate", "input"), ("up", "input"), ("ffn", "output")),
}


# --------------------------------------------------------------------------------------------------- projections


@dataclass(frozen=True)
class Projection:
    """One logical projection, possibly some rows of a fused module.

    Attributes:
        module: the module that holds the weight.
        rows: which of the module's output channels belong to this projection; None = all.
        transposed: the module stores its weight [inputs, outputs] (GPT-2's Conv1D).
    """

    module: nn.Module
    rows: slice | Tensor | None = None
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs], as nn.Linear keeps it; a view where the layout allows it."""
        weight = tensor_of(self.module, "weight")
        assert weight is not None, "a projection has a weight: the view checked it"
        weight = weight.t() if self.transposed else weight
        return weight if self.rows is None else weight[self._rows(weight)]

    @property
    def bias(self) -> Tensor | None:
        """[outputs] or None."""
        bias = tensor_of(self.module, "bias")
        return bias if bias is None or self.rows is None else bias[self._rows(bias)]

    def take(self, output: Tensor) -> Tensor:
        """This projection's channels of the module's output [..., all outputs]."""
        return output if self.rows is None else output[..., self._rows(output)]

    def put(self, output: Tensor, part: Tensor) -> Tensor:
        """A new output of the module in which this projection's channels are ``part``."""
        if self.rows is None:
            return part
        if isinstance(self.rows, slice):
            after = output[..., self.rows.stop :]
            return torch.cat([output[..., : self.rows.start], part, after], dim=-1)
        return output.index_copy(-1, self._rows(output), part)

    def _rows(self, like: Tensor):
        return self.rows.to(like.device) if isinstance(self.rows, Tensor) else self.rows


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A module's weight or bias, also where accelerate has offloaded it (then from the CPU or the disk)."""
    value = getattr(module, name, None)
    if value is None or not value.is_meta:
        return value
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        kept = getattr(part, "weights_map", None)
        if kept is not None:
            return kept[name]
    raise ModelError(f"model: {type(module).__name__}.{name} has no values (a meta tensor); load the weights first")


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the weights only (FSDP2's, tensor parallelism's)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes (an offloaded one holds no weights of its own)."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


class DecoderView:
    """One handle on the decoder layers of every supported family.

    Args:
        model: a ``transformers`` causal language model (or its decoder).

    Raises:
        ModelError: the family is not supported, a declared part is missing, or the weights are quantised.

    Attributes:
        num_layers, hidden_size, num_heads, num_kv_heads, head_dim: shapes, from the config.
        space: the model's :class:`~nt_utils.neurons.NeuronSpace`.
    """

    def __init__(self, model: PreTrainedModel):
        config: Any = model.config
        self.family_name: str = config.model_type
        self.family = check_family(config)
        self.model = model
        self.config = config
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim: int = getattr(config, "head_dim", None) or self.hidden_size // self.num_heads
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self.layers = self._find_layers()
        self._fused_rows = FUSED[self.family.fused](self) if self.family.fused else {}
        self._table = [self._projections(layer) for layer in range(self.num_layers)]
        self._check_widths()

    # -- parts

    def _find_layers(self) -> nn.ModuleList:
        paths = [self.family.layers, self.family.layers.split(".", 1)[-1]]  # a bare decoder has no "model." in front
        for path in paths:
            layers = _follow(self.model, path)
            if isinstance(layers, nn.ModuleList):
                break
        else:
            raise ModelError(f"model: family {self.family_name!r} has no part {self.family.layers!r}")
        if len(layers) != self.num_layers:
            raise ModelError(f"model: {len(layers)} decoder layers found, the config says {self.num_layers}")
        return layers

    def _part(self, layer: int, path: str) -> nn.Module:
        part = _follow(self.layers[layer], path)
        if part is None:
            raise ModelError(
                f"model: layer {layer} of family {self.family_name!r} has no part {path!r} "
                "(a mixture of experts or another layout is not supported)"
            )
        return part

    def _projection(self, layer: int, path: str, rows=None) -> Projection:
        module = self._part(layer, path)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            kind = getattr(weight, "dtype", type(weight).__name__)
            raise ModelError(
                f"model: layer {layer}, {path} holds {kind} weights; quantised weights cannot be scored exactly: "
                "load the model in float32, bfloat16 or float16"
            )
        return Projection(module, rows, transposed=type(module).__name__ == "Conv1D")

    def _projections(self, layer: int) -> dict[str, Projection]:
        family = self.family
        paths = dict(zip("qkv", family.qkv * 3 if len(family.qkv) == 1 else family.qkv, strict=False))
        table = {kind: self._projection(layer, paths[kind], self._fused_rows.get(kind)) for kind in "qkv"}
        table["o"] = self._projection(layer, family.o)
        table["ffn"] = self._projection(layer, family.down)
        width = table["ffn"].weight.shape[1]
        if family.gated and len(family.ffn_in) == 1:
            table["gate"] = self._projection(layer, family.ffn_in[0], slice(0, width))
            table["up"] = self._projection(layer, family.ffn_in[0], slice(width, 2 * width))
        else:
            names = ("gate", "up") if family.gated else ("up",)
            table.update({n: self._projection(layer, p) for n, p in zip(names, family.ffn_in, strict=True)})
        return table

    def _check_widths(self) -> None:
        wanted = {
            "q": (self.num_heads * self.head_dim, self.hidden_size),
            "k": (self.num_kv_heads * self.head_dim, self.hidden_size),
            "v": (self.num_kv_heads * self.head_dim, self.hidden_size),
            "o": (self.hidden_size, self.num_heads * self.head_dim),
        }
        for layer, table in enumerate(self._table):
            for kind, shape in wanted.items():
                if tuple(table[kind].weight.shape) != shape:
                    raise ModelError(
                        f"model: layer {layer}, projection {kind} has shape {tuple(table[kind].weight.shape)}; "
                        f"the config of family {self.family_name!r} asks for {shape}"
                    )

    # -- access

    def projection(self, layer: int, role: str) -> Projection:
        """The projection behind a kind (q, k, v, o, ffn = the down projection) or ``gate`` / ``up``."""
        if not 0 <= layer < self.num_layers:
            raise InputError(f"layer: got {layer}; the model has layers 0 to {self.num_layers - 1}")
        if role not in self._table[layer]:
            raise InputError(f"kind: got {role!r}; this model has {', '.join(self._table[layer])}")
        return self._table[layer][role]

    def weight(self, layer: int, role: str) -> Tensor:
        """Weight [outputs, inputs]: a neuron is a row for q, k, v (gate, up) and a column for o and ffn."""
        return self.projection(layer, role).weight

    def bias(self, layer: int, role: str) -> Tensor | None:
        """Bias [outputs] of the projection, or None."""
        return self.projection(layer, role).bias

    def attention(self, layer: int) -> nn.Module:
        """The attention module (what is called with the block's input)."""
        return self._part(layer, self.family.attention)

    def qk_norm(self, layer: int) -> tuple[nn.Module, nn.Module] | None:
        """The query and key norms between projection and rotary embedding, or None."""
        if not self.family.qk_norm:
            return None
        return self._part(layer, self.family.q_norm), self._part(layer, self.family.k_norm)

    @property
    def device(self) -> torch.device:
        """Where the first layer's input goes."""
        return device_of(self.model.get_input_embeddings())

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has a gate beside its up projection."""
        return self.family.gated

    @cached_property
    def space(self) -> NeuronSpace:
        """All neurons of this model, with what each of them owns in parameters."""
        widths = {
            kind: tuple(self.weight(i, kind).shape[kind in ("o", "ffn")] for i in range(self.num_layers))
            for kind in KINDS
        }
        total = sum(p.numel() for p in self.model.parameters())
        return NeuronSpace(widths, self._owned(), total, self._architecture(widths))

    def _owned(self) -> dict[str, int]:
        def row(role: str) -> int:
            return self.weight(0, role).shape[1] + (self.bias(0, role) is not None)

        into = [role for role in ("gate", "up") if role in self._table[0]]
        owned = {kind: row(kind) for kind in "qkv"}
        return {**owned, "o": self.hidden_size, "ffn": self.hidden_size + sum(map(row, into))}

    def _architecture(self, widths: dict) -> str:
        shape = (
            self.hidden_size,
            self.num_layers,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            sorted(widths.items()),
        )
        return f"{self.family_name}-{hashlib.sha256(repr(shape).encode()).hexdigest()[:12]}"


def decoder(model: PreTrainedModel) -> nn.Module:
    """The model without its output head, for passes in which nobody reads the logits."""
    return getattr(model, model.base_model_prefix, model)


def _follow(module: nn.Module, path: str) -> nn.Module | None:
    part: Any = module
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def check_family(config) -> Family:
    """The family's declaration. Raises ModelError naming the family and what it lacks."""
    name = getattr(config, "model_type", None) or type(config).__name__
    known = ", ".join(FAMILIES)
    if any(getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ModelError(
            f"model: family {name!r} has a mixture-of-experts feed-forward block, which is not supported; supported: {known}"
        )
    if name not in FAMILIES:
        raise ModelError(
            f"model: family {name!r} is not supported: it has no entry with the paths of its projections; supported: {known}"
        )
    if getattr(config, "quantization_config", None):
        raise ModelError("model: its weights are quantised; load an unquantised checkpoint")
    return FAMILIES[name]


# ------------------------------------------------------------------------------------------------- language model


@dataclass(frozen=True)
class Encoded:
    """A padded batch.

    Attributes:
        input_ids, attention_mask: int64 [batch, tokens].
        position_ids: int64 [batch, tokens], counted from the first real token (learned positions need it).
        prompt_lengths: tokens of the rendered prompt (template included) in each row.
        lengths: real tokens in each row (prompt and response).
        side: where the padding is, "left" or "right".
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    prompt_lengths: tuple[int, ...]
    lengths: tuple[int, ...]
    side: str

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of the first real token in each row."""
        width = self.input_ids.shape[1]
        return tuple(width - n if self.side == "left" else 0 for n in self.lengths)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    def to(self, device) -> Encoded:
        """The same batch on a device."""
        tensors = {name: value.to(device) for name, value in self.inputs.items()}
        return Encoded(**tensors, prompt_lengths=self.prompt_lengths, lengths=self.lengths, side=self.side)


def pad(rows: Sequence[Sequence[int]], *, pad_id: int, side: str, prompt_lengths: Sequence[int]) -> Encoded:
    """Token lists to a padded batch."""
    if side not in ("left", "right"):
        raise InputError(f"side: got {side!r}; allowed: left, right")
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, span] = torch.tensor(row, dtype=torch.long)
        mask[i, span] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Encoded(ids, mask, positions, tuple(prompt_lengths), tuple(len(row) for row in rows), side)


_FINGERPRINTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer, chat template and view.

    ``system_prompt`` stands before every prompt; a template without a system role gets it in front of the user's text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    system_prompt: str | None = None
    _marker: str = field(default="\u2063text\u2063", repr=False)

    @property
    def label(self) -> str:
        """What tables call it: its hub id, or its folder's name; where the folder lies differs between machines."""
        path = Path(self.name).expanduser()
        return path.resolve().name if path.is_dir() else self.name

    @cached_property
    def view(self) -> DecoderView:
        """The uniform handle on its projections."""
        return DecoderView(self.model)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return device_of(self.model.get_input_embeddings())

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    # -- text

    def set_system_prompt(self, text: str | None) -> None:
        """Another system prompt from now on; None or "" for none."""
        self.system_prompt = text or None
        self.__dict__.pop("_system_role", None)  # whether the template shows it was looked up for the old one

    def _messages(self, prompt: str, system_role: bool) -> list[dict]:
        if not self.system_prompt:
            return [{"role": "user", "content": prompt}]
        if system_role:
            return [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": prompt}]
        return [{"role": "user", "content": f"{self.system_prompt}\n\n{prompt}"}]

    @cached_property
    def _system_role(self) -> bool:
        """Whether the template accepts a system message (Gemma's raises)."""
        try:
            text = self.tokenizer.apply_chat_template(self._messages("x", True), tokenize=False)
        except Exception:  # templates raise errors of their own making
            return False
        return not self.system_prompt or self.system_prompt in text

    def _apply(self, messages: list[dict], **more) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **more))

    def render(self, prompts: Sequence[str], responses: Sequence[str] | None = None) -> list[str]:
        """The text the model reads: the chat template with its generation prompt, then the response if given.

        A model without a template (a base model) gets the plain text and a line break; responses follow directly.
        """
        _check_texts(prompts, responses)
        heads = [self._head(prompt) for prompt in prompts]
        if responses is None:
            return heads
        return [head + response + self._end for head, response in zip(heads, responses, strict=True)]

    def _head(self, prompt: str) -> str:
        if not self.has_template:
            return f"{self.system_prompt}\n{prompt}\n" if self.system_prompt else f"{prompt}\n"
        return self._apply(self._messages(prompt, self._system_role), add_generation_prompt=True)

    @cached_property
    def _end(self) -> str:
        """What ends a response: the template's end of turn, or the end-of-text token."""
        if self.has_template:
            messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": self._marker}]
            tail = self._apply(messages).rpartition(self._marker)[2].rstrip()
            if tail:
                return tail
        return self.tokenizer.eos_token or ""

    # -- tokens

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts (a template writes its own special tokens; plain text gets the tokenizer's)."""
        return self.tokenizer(list(texts), add_special_tokens=not self.has_template)["input_ids"]

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each rendered prompt, template included."""
        return [len(row) for row in self.tokens(self.render(prompts))]

    def encode(self, prompts: Sequence[str], responses: Sequence[str] | None = None, side: str = "left") -> Encoded:
        """Render and tokenize into a padded batch on the CPU.

        Prompt and response are tokenized apart, so that the prompt's tokens are the same with and without a response.

        Raises:
            InputError: no prompts, or one that is longer than the model's context.
        """
        heads = self.tokens(self.render(prompts))
        rows = heads
        if responses is not None:
            _check_texts(prompts, responses)
            ends = self.tokenizer([r + self._end for r in responses], add_special_tokens=False)["input_ids"]
            rows = [head + end for head, end in zip(heads, ends, strict=True)]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for i, row in enumerate(rows):
            if not row:
                raise InputError(f"prompts: number {i} has no tokens")
            if limit and len(row) > limit:
                raise InputError(f"prompts: number {i} has {len(row)} tokens; the model's context holds {limit}")
        return pad(rows, pad_id=self.pad_id, side=side, prompt_lengths=[len(head) for head in heads])

    @property
    def pad_id(self) -> int:
        """The id that fills padded places."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)

    @cached_property
    def suffix_length(self) -> int:
        """Tokens that follow the user's text in every prompt: end of turn and assistant header (at least 1)."""
        rows = self.tokens(self.render(["a", "7 ?", "One more, longer text.", "zu"]))
        shortest = min(map(len, rows))
        same = 0
        while same < shortest and len({row[-1 - same] for row in rows}) == 1:
            same += 1
        return max(same, 1)

    @property
    def weights_fingerprint(self) -> str:
        """Hash over the names and values of all weights as they are now.

        torch counts the in-place changes of every tensor: while counts and addresses stand still the hash is kept.
        Whoever writes through ``.data``, which torch does not count, calls :meth:`weights_changed`.
        Sharded weights are gathered one by one, so every process must ask at the same time; nothing is kept.
        """
        if is_sharded(self.model):
            return self._hash_weights()
        tensors = [*self.model.parameters(), *self.model.buffers()]
        stamp = tuple((t.data_ptr(), t._version) for t in tensors)
        known = _FINGERPRINTS.get(self.model)
        if known is None or known[0] != stamp:
            known = _FINGERPRINTS[self.model] = (stamp, self._hash_weights())
        return known[1]

    def weights_changed(self) -> None:
        """Forget the kept fingerprint."""
        _FINGERPRINTS.pop(self.model, None)

    def _hash_weights(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            if value.is_meta:
                owner, _, leaf = name.rpartition(".")
                value = tensor_of(self.model.get_submodule(owner), leaf)
            value = value.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            flat = value.cpu().contiguous().reshape(-1)
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def _check_texts(prompts: Sequence[str], responses: Sequence[str] | None) -> None:
    if isinstance(prompts, str) or not len(prompts):
        raise InputError("prompts: need a list with at least one text")
    if responses is not None and len(responses) != len(prompts):
        raise InputError(f"responses: got {len(responses)} for {len(prompts)} prompts")


# -------------------------------------------------------------------------------------------------------- loading


def check_source(source, revision: str | None = None):
    """Read the config only: does the model exist, is it reachable, is its family supported?

    Returns the config. Raises ModelError in one line, before any weight is touched.
    """
    from transformers import AutoConfig

    source = _expanded(source)
    path = Path(source)
    is_folder = path.is_dir()
    if is_folder and not (path / "config.json").is_file():
        raise ModelError(f"model: the folder {source} holds no config.json")
    looks_local = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
    if not is_folder and looks_local:
        raise ModelError(f"model: no folder {source}")
    try:
        config = AutoConfig.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "gated repo" in str(error):
            raise ModelError(f"model: {gate_message(str(source))}") from error
        where = (
            "its config.json cannot be read"
            if is_folder
            else "not found on the hub, or the hub is unreachable and it is not cached"
        )
        raise ModelError(f"model: {source}: {where} ({_first_line(error)})") from error
    check_family(config)
    return config


def _expanded(source) -> str:
    return str(Path(source).expanduser()) if str(source).startswith("~") else str(source)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load(
    source,
    *,
    dtype: str | torch.dtype = "auto",
    device_map="auto",
    system_prompt: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Load a model and its tokenizer from a local folder or the hub.

    Args:
        source: folder or hub id.
        dtype: "auto" keeps the checkpoint's on an accelerator; on the CPU half precision becomes float32 where the
            memory allows it (several times faster there). Or a torch dtype or its name.
        device_map: as in transformers; "auto" uses accelerators if there are any.
        system_prompt: stands before every prompt.

    Raises:
        ModelError: see :func:`check_source`; or no tokenizer is there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _expanded(source)
    config = check_source(source, revision)
    if device_map == "auto" and not torch.cuda.is_available():
        device_map = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            str(source),
            revision=revision,
            dtype=_choose_dtype(dtype, config, device_map),
            device_map=device_map,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model: {source} could not be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return LanguageModel(model.eval(), tokenizer, str(source), system_prompt)


def _choose_dtype(dtype, config, device_map):
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        chosen = getattr(torch, str(dtype), None)
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point or chosen.itemsize < 2:
            raise InputError(f"dtype: got {dtype!r}; allowed: auto, float32, bfloat16, float16")
        return chosen
    stored = getattr(config, "dtype", None)
    if device_map is None and stored in (torch.float16, torch.bfloat16) and _fits_in_float32(config):
        return torch.float32
    return stored or "auto"


def _fits_in_float32(config) -> bool:
    """Whether a float32 copy takes less than half of the machine's memory (parameters estimated from the config)."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    estimate = layers * (4 * hidden**2 + 3 * hidden * inner) + 2 * config.vocab_size * hidden
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return False
    return 4 * estimate < memory / 2
