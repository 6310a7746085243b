"""One uniform handle on the projections of every supported family."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from nt_utils.errors import InputError, ModelError, first_line
from nt_utils.models.families import FUSED, check_family
from nt_utils.neurons import KINDS, NeuronSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Projection:
    """One logical projection, possibly some rows of a fused module.

    Attributes:
        module: what the model calls; hooks belong here. An adapter layer is one module with its base layer inside.
        rows: which of the module's output channels belong to this projection; None = all.
        name: what messages call it.
    """

    module: nn.Module
    rows: slice | Tensor | None = None
    name: str = "a projection"

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [inputs, outputs] (GPT-2's Conv1D)."""
        return isinstance(getattr(self.module, "base_layer", self.module), Conv1D)

    @property
    def weight(self) -> Tensor:
        """The effective weight [outputs, inputs], as nn.Linear keeps it; a view where the layout allows it."""
        linear = effective(self.module, self.name)
        weight = tensor_of(linear, "weight")
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ModelError(
                f"model: {self.name} holds {getattr(weight, 'dtype', type(weight).__name__)} weights; quantised weights "
                "cannot be scored exactly: load the model in float32, bfloat16 or float16"
            )
        weight = weight.t() if isinstance(linear, Conv1D) else weight
        return weight if self.rows is None else weight[self._rows(weight)]

    @property
    def bias(self) -> Tensor | None:
        """The effective bias [outputs] or None."""
        bias = tensor_of(effective(self.module, self.name), "bias")
        return bias if bias is None or self.rows is None else bias[self._rows(bias)]

    @property
    def parameter(self) -> nn.Parameter:
        """The whole module's weight as it is stored, to be written to.

        Raises:
            ModelError: the module computes with something else too (an adapter, a parametrisation), or is offloaded.
        """
        weight = self.module._parameters.get("weight") if _is_linear(self.module) else None
        if weight is None:
            raise ModelError(
                f"model: {self.name} is an adapter layer or a parametrisation ({_kind(self.module)}); merge it first"
            )
        if weight.is_meta:
            raise ModelError(f"model: the weights of {self.name} are offloaded; load the model whole to change them")
        return weight

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


def effective(module: nn.Module, name: str = "a projection") -> nn.Module:
    """The plain linear module whose weight and bias are what ``module`` computes with.

    The module itself where it is one (a torch parametrisation counts: its weight is computed on every reading); of an
    adapter layer (PEFT) a copy with the active adapters merged, checked against the layer's own output.

    Raises:
        ModelError: the module is neither, or its adapter is no change of the weight.
    """
    if _is_linear(module):
        return module
    wrapper: Any = module
    if hasattr(wrapper, "modules_to_save"):  # PEFT trains copies of whole modules too
        active = () if wrapper.disable_adapters else wrapper.active_adapters
        saved = [wrapper.modules_to_save[key] for key in active if key in wrapper.modules_to_save]
        return effective(saved[0] if saved else wrapper.original_module, name)
    if not hasattr(module, "get_base_layer"):
        raise ModelError(
            f"model: {name} is {_kind(module)}, whose weight is not what it computes with; needed: a plain linear layer "
            "(remove what wraps it, or make it permanent)"
        )
    try:
        return _merged(module)
    except Exception as error:  # PEFT's methods raise errors of many kinds where they cannot be merged
        raise ModelError(
            f"model: {name} is an adapter layer ({_kind(module)}); merge it first ({first_line(error)})"
        ) from error


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether a module is an adapter's layer (PEFT), a saved copy of a whole module included.

    Every model of transformers has methods of the same names, so what counts is that they are properties here.
    """
    return isinstance(getattr(type(module), "active_adapters", None), property)


def _merged(layer) -> nn.Module:
    """The base layer of a copy of an adapter layer, with what is active merged into its weight."""
    layer = copy.deepcopy(layer).eval()
    for part in layer.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    base = layer.get_base_layer()
    wide = base.weight.shape[0 if isinstance(base, Conv1D) else 1]
    probe = torch.randn(4, wide, generator=torch.Generator().manual_seed(0)).to(base.weight.device, base.weight.dtype)
    with torch.no_grad():
        output = layer(probe)
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        elif not layer.disable_adapters and not layer.merged:
            layer.merge()
        error = (base(probe) - output).norm() / output.norm()
    if not _is_linear(base) or not error <= 100 * torch.finfo(output.dtype).eps:
        raise ModelError("what it adds is no change of its base layer's weight")
    return base


def _is_linear(module: nn.Module) -> bool:
    """Whether a module computes ``x W + b`` with the very weight it shows."""
    kind = Conv1D if isinstance(module, Conv1D) else nn.Linear
    own_forward = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")  # accelerate's only moves tensors
    if not isinstance(module, kind) or type(module).forward is not kind.forward or own_forward:
        return False
    # Pruning and the older weight norm keep "weight" as an attribute that a hook writes at each call.
    return "weight" in module._parameters or is_parametrized(module, "weight")


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__.split('.')[-2]}.{type(module).__name__}".replace("nn.", "")


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


def check_evaluating(model: nn.Module) -> None:
    """Raise InputError for a model in training mode."""
    if model.training:
        raise InputError("model: it is in training mode (dropout would change the scores); call model.eval() first")


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
        self.layers = self._find_layers()
        self._fused_rows = FUSED[self.family.fused](self) if self.family.fused else {}
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

    def _projections(self, layer: int) -> dict[str, Projection]:
        """The projections as they are now: an adapter may have taken a module's place since the last reading."""
        family = self.family

        def at(path: str, rows=None) -> Projection:
            return Projection(self._part(layer, path), rows, f"layer {layer}, {path}")

        paths = dict(zip("qkv", family.qkv * 3 if len(family.qkv) == 1 else family.qkv, strict=False))
        table = {kind: at(paths[kind], self._fused_rows.get(kind)) for kind in "qkv"}
        table |= {"o": at(family.o), "ffn": at(family.down)}
        if family.gated and len(family.ffn_in) == 1:
            width = self.config.intermediate_size
            table["gate"] = at(family.ffn_in[0], slice(0, width))
            table["up"] = at(family.ffn_in[0], slice(width, 2 * width))
        else:
            names = ("gate", "up") if family.gated else ("up",)
            table |= {name: at(path) for name, path in zip(names, family.ffn_in, strict=True)}
        return table

    def _check_widths(self) -> None:
        wanted = {
            "q": (self.num_heads * self.head_dim, self.hidden_size),
            "k": (self.num_kv_heads * self.head_dim, self.hidden_size),
            "v": (self.num_kv_heads * self.head_dim, self.hidden_size),
            "o": (self.hidden_size, self.num_heads * self.head_dim),
        }
        for layer in range(self.num_layers):
            table = self._projections(layer)
            shapes = {role: tuple(projection.weight.shape) for role, projection in table.items()}
            for kind, shape in wanted.items():
                if shapes[kind] != shape:
                    raise ModelError(
                        f"model: layer {layer}, projection {kind} has shape {shapes[kind]}; "
                        f"the config of family {self.family_name!r} asks for {shape}"
                    )

    # -- access

    def projection(self, layer: int, role: str) -> Projection:
        """The projection behind a kind (q, k, v, o, ffn = the down projection) or ``gate`` / ``up``."""
        if not 0 <= layer < self.num_layers:
            raise InputError(f"layer: got {layer}; the model has layers 0 to {self.num_layers - 1}")
        table = self._projections(layer)
        if role not in table:
            raise InputError(f"kind: got {role!r}; this model has {', '.join(table)}")
        return table[role]

    def weight(self, layer: int, role: str) -> Tensor:
        """Weight [outputs, inputs]: a neuron is a row for q, k, v (gate, up) and a column for o and ffn."""
        return self.projection(layer, role).weight

    def bias(self, layer: int, role: str) -> Tensor | None:
        """Bias [outputs] of the projection, or None."""
        return self.projection(layer, role).bias

    def attention(self, layer: int) -> nn.Module:
        """The attention module (what is called with the block's input)."""
        return self._part(layer, self.family.attention)

    def feed_forward(self, layer: int) -> nn.Module:
        """The feed-forward module (what is called with the block's input)."""
        return self._part(layer, self.family.down.rpartition(".")[0])

    def writer(self, layer: int, kind: str) -> nn.Module:
        """The module whose output the attention (``o``) or feed-forward block (``ffn``) adds to the residual stream."""
        if self.family.block_norms:
            return self._part(layer, self.family.block_norms[kind == "ffn"])
        return self.feed_forward(layer) if kind == "ffn" else self.attention(layer)

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

        into = [role for role in ("gate", "up") if role in self._projections(0)]
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
