"""One uniform handle on the projections of every supported family."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nt_utils.errors import InputError, ModelError
from nt_utils.models.families import FUSED, check_family
from nt_utils.neurons import KINDS, NeuronSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
