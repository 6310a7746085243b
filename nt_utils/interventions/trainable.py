"""What of a model is trained: the neurons of a set, everything but them, everything, or LoRA adapters.

`Only(neurons).start(lm)` (and likewise `AllBut`, `Everything`, `LoRA`) prepares the model for training and returns a
`Training` whose `parameters` are ordinary `nn.Parameter`s registered on the model, so that any loop, the Hugging Face
`Trainer` and accelerate see exactly them. `finish()` makes the model the base again, bit for bit, and returns the
trained entries as a `Delta`. [SN] section 4 trains safety neurons so (SN-Tune), or safety minus foundation neurons
(RSN-Tune: `Only(safety - foundation)`); `AllBut` freezes a set under fine-tuning ([SSAH] section 4).

How a slice is trained
----------------------
A float32 **master** holds the trained rows or columns of a weight. Before each forward of its module their cast to the
model's dtype is written over the stored entries, so that the module computes with the merged weight itself: a forward
under training and one of the merged model are the same computation, equal bit for bit in every dtype. (A correction
added to the base's output would round differently, visibly so in bf16.) The module's own weight is frozen; a node after
its output passes the output through and, in the backward pass, computes the gradient of the master alone
(`grad[:, rows]^T @ x` for rows, `grad^T @ x[:, columns]` for columns). Gradients and optimiser state thus have the size
of the slices, no dense gradient of a weight ever exists, and nothing that an optimiser does (weight decay, momentum,
clipping) can reach any other entry. The complement works the same way with the complementary rows or columns.

The master is the weight's value, not its difference from the base: weight decay acts as in ordinary fine-tuning.

Works with gradient checkpointing, autocast and DistributedDataParallel (tried with two processes on a CPU). A model spread
over several devices (`device_map`) is provided for but untried; chosen weights that are offloaded are refused. A model that
FSDP2 has sharded (`nt_utils.interventions.parallel.shard`) can train `Only`: a module's weight is whole while its block
runs, and the masters are written over the gathered copy, again in the backward pass, for which it is gathered anew; the
shards themselves never change. Masters lie whole in every process and their gradients are averaged over the processes as
they come. Other sharding (FSDP1, ZeRO-3, tensor parallelism, FSDP2 after the start) is refused. Checkpoints that a Trainer writes during
training hold the masters beside the model and are for resuming; a plain checkpoint is what `delta.merge(lm)` leaves.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from nt_utils import hooks
from nt_utils.errors import InputError
from nt_utils.interventions.delta import Delta, Part, put, take
from nt_utils.interventions.parallel import averaged
from nt_utils.models import OWNED, DecoderView, LanguageModel, Projection, is_sharded
from nt_utils.neurons import NeuronSet

#: Which sides of a neuron are trained. q, k and v have input rows only (with their biases), o has output columns only,
#: an FFN neuron has both: its rows of gate and up, its column of down.
SIDES = ("input", "output", "both")


# ------------------------------------------------------------------------------------------------------ one slice


class _Tap(torch.autograd.Function):
    """The output unchanged; in the backward pass the gradient of the masters, from the output's gradient and x."""

    @staticmethod
    def forward(ctx, output, x, weight, bias, index, side, transposed, rewrite):
        x = x.to(output.device)
        ctx.save_for_backward(x if side == "input" else x.index_select(-1, index), index)
        ctx.side, ctx.transposed, ctx.with_bias, ctx.rewrite = side, transposed, bias is not None, rewrite
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, index = ctx.saved_tensors
        if ctx.rewrite is not None:  # the weight was gathered anew; the module's own backward pass follows this one
            ctx.rewrite()
        part = grad.flatten(0, -2)  # [batch * tokens, outputs]
        if ctx.side == "input":
            part = part.index_select(-1, index)
        x = x.flatten(0, -2).to(part.dtype)
        weight = (x.t() @ part if ctx.transposed else part.t() @ x).to(ctx.dtypes[0])
        bias = part.float().sum(0).to(ctx.dtypes[1]) if ctx.with_bias else None
        return grad, None, weight, bias, None, None, None, None


def _sharded(name: str) -> InputError:
    return InputError(
        f"model: {name} is sharded by ZeRO-3, FSDP version 1, tensor parallelism or after the training started; allowed: "
        "one device, a device_map, DistributedDataParallel, or nt_utils.interventions.parallel.shard before the start"
    )


def _check_whole(parameter: Tensor, name: str) -> None:
    """Refuse ZeRO-3's weights; FSDP2's shards are whole again where they are used."""
    if hasattr(parameter, "ds_id"):
        raise _sharded(name)


def _check_unsharded(lm: LanguageModel, name: str) -> None:
    if is_sharded(lm.model):
        raise InputError(
            f"scope: got {name!r} on a model that is sharded over processes; allowed: Only (SN-Tune, RSN-Tune)"
        )


def _axis(side: str, transposed: bool) -> int:
    """Along which axis of the stored weight a side counts: [outputs, inputs], or [inputs, outputs] if transposed."""
    return int((side == "input") == transposed)


class _Slice:
    """Rows (side "input") or columns ("output") of one module's weight, and the rows' biases.

    Attributes:
        path: the module's name in the model.
        index: int64 [n], ascending: output channels for the input side, input channels for the output side.
        stored: "weight" and "bias" -> the base's entries, in the parameter's own layout and dtype.
        masters: the same in float32, trained; registered on the module as tuned_weight and tuned_bias.
        sharded: FSDP2 holds the weight; it is whole only while the module's block runs.
    """

    def __init__(self, module: nn.Module, path: str, side: str, index: Tensor, transposed: bool):
        self.module, self.path, self.side, self.transposed = module, path, side, transposed
        self.index = index.to(module.get_parameter("weight").device)
        leaves = ["weight", "bias"] if side == "input" and module.bias is not None else ["weight"]
        self.stored = {leaf: take(getattr(module, leaf), self.axis(leaf), self.index) for leaf in leaves}
        self.parameters = {leaf: getattr(module, leaf) for leaf in leaves}
        self.masters = {leaf: nn.Parameter(values.to(torch.float32, copy=True)) for leaf, values in self.stored.items()}
        self.sharded = isinstance(module.get_parameter("weight"), DTensor)
        self._written: tuple | None = None

    def axis(self, leaf: str) -> int:
        """The axis of the parameter, as it is stored, along which the index counts."""
        return 0 if leaf == "bias" else _axis(self.side, self.transposed)

    def register(self) -> None:
        for leaf, master in self.masters.items():
            self.module.register_parameter(f"tuned_{leaf}", master)

    def unregister(self) -> None:
        for leaf in self.masters:
            delattr(self.module, f"tuned_{leaf}")

    def write(self) -> None:
        """The masters' cast over the stored entries, behind autograd's back (no graph is waiting for the old ones)."""
        for leaf, master in self.masters.items():
            if master.dtype != torch.float32:
                raise InputError(f"model: {self.path}.tuned_{leaf} was cast to {master.dtype}; masters are float32")
            parameter = getattr(self.module, leaf)
            if self.sharded:
                self._check_gathered(parameter, leaf)
            elif parameter is not self.parameters[leaf]:  # FSDP puts parameters of its own in their place
                raise _sharded(f"{self.path}.{leaf}")
            _check_whole(parameter, f"{self.path}.{leaf}")
            parameter = parameter.data
            values = master.data.to(parameter.device, parameter.dtype)
            parameter.index_copy_(self.axis(leaf), self.index.to(parameter.device), values)

    def _check_gathered(self, parameter: Tensor, leaf: str) -> None:
        if isinstance(parameter, DTensor):
            raise _sharded(f"{self.path}.{leaf}")
        if parameter.dtype != self.stored[leaf].dtype:
            raise InputError(
                f"model: FSDP gathers {self.path}.{leaf} as {parameter.dtype}, it is stored as {self.stored[leaf].dtype}; "
                "allowed: no mixed precision (load the model in that dtype)"
            )

    def before(self, module: nn.Module, args: tuple) -> None:
        """Pre-forward: bring the module's weight up to date.

        Always when gradients are on, since an optimiser's step may follow that torch does not count as a change;
        without gradients (generation) only after that, or when a tensor changed. A weight that was gathered for this
        call holds the base's entries.
        """
        tensors = [*self.masters.values(), *(getattr(module, leaf) for leaf in self.masters)]
        now = tuple((t.data_ptr(), t._version) for t in tensors)
        if torch.is_grad_enabled() or self.sharded or now != self._written:
            self.write()
            self._written = None if torch.is_grad_enabled() else now

    def after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Post-forward: let gradients through to the masters."""
        if not torch.is_grad_enabled():
            return None
        masters = self.masters["weight"], self.masters.get("bias")
        rewrite = self.write if self.sharded else None
        return _Tap.apply(output, args[0], *masters, self.index.to(output.device), self.side, self.transposed, rewrite)

    def taps(self) -> list[hooks.Hook]:
        """For :func:`nt_utils.hooks.attached`; the tap comes before every other hook on the output."""
        return [hooks.before(self.module, self.before), hooks.after(self.module, self.after, first=True)]

    def parts(self) -> dict[str, Part]:
        """Parameter name -> the entries as they would be stored now."""
        return {
            f"{self.path}.{leaf}": Part(
                self.axis(leaf), self.index.clone(), master.detach().to(self.stored[leaf].dtype)
            )
            for leaf, master in self.masters.items()
        }


# ------------------------------------------------------------------------------------------------------ a training


class Training:
    """A model prepared for training: some slices, some whole parameters, all else frozen.

    Attributes:
        parameters: what is trained; give exactly these to the optimiser (a Trainer finds them by itself).
        base: fingerprint of the weights at the start.

    A context manager: on leaving, unless finished, the model is the base again.
    """

    def __init__(self, lm: LanguageModel, slices: Sequence[_Slice], whole: Iterable[str], meta: dict, name: str):
        if any(n.rpartition(".")[2].startswith("tuned_") for n, _ in lm.model.named_parameters()):
            raise InputError("model: another training holds it; finish that one first")
        self.lm, self.base, self.meta, self.name = lm, lm.weights_fingerprint, meta, name
        self.architecture = lm.view.space.architecture
        named = dict(lm.model.named_parameters())
        self._slices = list(slices)
        self._whole = {n: named[n] for n in whole}
        self._stored = {n: p.detach().clone() for n, p in self._whole.items()}
        self._needed = {n: p.requires_grad for n, p in named.items()}
        self._hooks = ExitStack()
        self._open = True
        for parameter_name, parameter in named.items():
            parameter.requires_grad_(parameter_name in self._whole)
        for part in self._slices:
            part.register()
        taps = [hook for part in self._slices for hook in part.taps()]
        self._hooks.enter_context(hooks.attached(taps, name, must_run=False))
        self._hooks.enter_context(averaged([m for part in self._slices if part.sharded for m in part.masters.values()]))
        lm.weights_changed()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained: give exactly these to the optimiser."""
        return [master for part in self._slices for master in part.masters.values()] + list(self._whole.values())

    @property
    def size(self) -> int:
        """Trained weights and biases."""
        return sum(p.numel() for p in self.parameters)

    @property
    def bytes(self) -> int:
        """Bytes of what is trained, in the precision it is trained in."""
        return sum(p.numel() * p.element_size() for p in self.parameters)

    def delta(self) -> Delta:
        """The trained entries as they are now (copies, in the model's dtype)."""
        self._check_open()
        parts, moved = {}, 0
        for part in self._slices:
            for leaf, (name, entries) in zip(part.masters, part.parts().items(), strict=True):
                entries = replace(entries, values=entries.values.clone())
                parts[name] = entries
                moved += int((entries.values != part.stored[leaf].to(entries.values.device)).sum())
        for name, parameter in self._whole.items():
            parts[name] = Part(0, None, parameter.detach().clone())
            moved += int((parameter.detach() != self._stored[name]).sum())
        return self._new_delta(parts, moved)

    def _new_delta(self, parts: dict[str, Part], moved: int) -> Delta:
        facts = {"architecture": self.architecture, "weights": self.base}
        return Delta(parts, **facts, moved=moved, meta=self.meta, name=self.name)

    def finish(self) -> Delta:
        """The trained entries; the model is the base again, bit for bit, without hooks or added parameters."""
        delta = self.delta()
        self.close()
        return delta

    def merge(self) -> Delta:
        """As `finish`, then merged: the model is plain and holds the trained weights until `delta.unmerge(lm)`."""
        delta = self.finish()
        delta.merge(self.lm)
        return delta

    def close(self) -> None:
        """Make the model the base again. Does nothing the second time."""
        if not self._open:
            return
        self._open = False
        self._hooks.close()
        for part in self._slices:
            part.unregister()
            if part.sharded:  # the masters were written over gathered copies only
                continue
            for leaf, values in part.stored.items():
                put(getattr(part.module, leaf), part.axis(leaf), part.index, values)
        for name, parameter in self._whole.items():
            put(parameter, 0, None, self._stored[name])
            parameter.grad = None
        for name, parameter in self.lm.model.named_parameters():
            parameter.requires_grad_(self._needed.get(name, True))
        self.lm.weights_changed()

    def __enter__(self) -> Training:
        self._check_open()
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._open:
            raise InputError("training: it is finished; start another one")


# ------------------------------------------------------------------------------------------------------ which entries


@dataclass
class _Place:
    """The entries of a neuron set in one module, on one side."""

    projection: Projection
    path: str
    side: str
    index: Tensor

    def complement(self) -> Tensor:
        """All other rows or columns of the module."""
        weight = self.projection.module.get_parameter("weight")
        keep = torch.ones(weight.shape[_axis(self.side, self.projection.transposed)], dtype=torch.bool)
        keep[self.index] = False
        return keep.nonzero().flatten()

    def slice(self, index: Tensor) -> _Slice:
        return _Slice(self.projection.module, self.path, self.side, index, self.projection.transposed)

    @property
    def frozen(self) -> set[str]:
        """Names of the parameters that have entries of the set."""
        bias = self.side == "input" and self.projection.module.bias is not None
        return {f"{self.path}.weight", *([f"{self.path}.bias"] if bias else [])}


def _places(view: DecoderView, neurons: NeuronSet, sides: str) -> list[_Place]:
    """Where a set's entries lie, one place a module (q, k and v, gate and up may share one) and side."""
    if sides not in SIDES:
        raise InputError(f"sides: got {sides!r}; allowed: {', '.join(SIDES)}")
    if neurons.space.architecture != view.space.architecture:
        raise InputError(
            f"neurons: found on architecture {neurons.space.architecture}; the model at hand is {view.space.architecture}"
        )
    if not len(neurons):
        raise InputError("neurons: the set is empty; nothing would be trained or frozen")
    paths = {module: name for name, module in view.model.named_modules()}
    for module, name in paths.items():
        if isinstance(module, FullyShardedDataParallel):
            raise _sharded(name or "all of it")
    found: dict[tuple, _Place] = {}
    for (layer, kind), mask in neurons.masks.items():
        for role, side in OWNED[kind]:
            if sides not in (side, "both") or (role == "gate" and not view.gated):
                continue
            projection = view.projection(layer, role)
            module, index = projection.module, mask.nonzero().flatten()
            weight = projection.parameter
            _check_whole(weight, f"{paths[module]}.weight")
            if side == "input" and projection.rows is not None:
                rows = projection.rows
                rows = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.cpu()
                index = rows[index]
            place = found.setdefault((module, side), _Place(projection, paths[module], side, index[:0]))
            place.index = torch.cat([place.index, index]).unique()
    if not found:
        raise InputError(
            f"sides: none of the {len(neurons)} neurons has {sides} weights (kinds q, k, v: input; o: output)"
        )
    return list(found.values())


def _facts(neurons: NeuronSet, sides: str) -> dict[str, Any]:
    return {"neurons": neurons.fingerprint, "n_neurons": len(neurons), "sides": sides}


@dataclass(frozen=True)
class Only:
    """Train the neurons of a set and nothing else: SN-Tune, RSN-Tune and their controls ([SN] section 4).

    Args:
        neurons: any set, of this architecture.
        sides: "input" (rows of q, k, v with their biases, of gate and up), "output" (columns of o and down) or "both".
            A neuron without weights on that side stays untrained.

    Raises (on `start`):
        InputError: empty set, another architecture, no neuron has that side, or its weights are offloaded or sharded
        other than by FSDP2. Weights that are sharded after the start are refused at the next forward pass.
    """

    neurons: NeuronSet
    sides: str = "both"
    name: str = "only"

    def start(self, lm: LanguageModel) -> Training:
        slices = [place.slice(place.index) for place in _places(lm.view, self.neurons, self.sides)]
        return Training(lm, slices, (), {"trained": "only", **_facts(self.neurons, self.sides)}, self.name)


@dataclass(frozen=True)
class AllBut:
    """Train everything except the neurons of a set ([SSAH] section 4: frozen while the rest is fine-tuned).

    The frozen entries are part of no trained parameter, so they keep their bits under any optimiser, weight decay,
    momentum, mixed precision and resuming, and a gradient's norm counts trainable entries only. Modules with frozen
    entries train float32 masters of all their other entries; every other parameter is trained in the model's dtype
    (load in float32, with autocast if wanted, to train those in full precision).
    """

    neurons: NeuronSet
    sides: str = "both"
    name: str = "all but"

    def start(self, lm: LanguageModel) -> Training:
        _check_unsharded(lm, self.name)
        places = _places(lm.view, self.neurons, self.sides)
        frozen = set().union(*(place.frozen for place in places))
        slices = [place.slice(rest) for place in places if len(rest := place.complement())]
        whole = [name for name, _ in lm.model.named_parameters() if name not in frozen]
        return Training(lm, slices, whole, {"trained": "all but", **_facts(self.neurons, self.sides)}, self.name)


@dataclass(frozen=True)
class Everything:
    """Full fine-tuning, in the model's dtype (load it in float32 for float32 weights). The delta is the whole model."""

    name: str = "full"

    def start(self, lm: LanguageModel) -> Training:
        _check_unsharded(lm, self.name)
        return Training(lm, (), [name for name, _ in lm.model.named_parameters()], {"trained": "full"}, self.name)


# ------------------------------------------------------------------------------------------------------ LoRA


def _peft():
    try:
        import peft
    except ImportError as error:
        raise InputError("LoRA: needs the package peft, which is not installed: pip install peft") from error
    return peft


def _all_projections(view: DecoderView) -> dict[str, Projection]:
    """Module name -> one projection in it, for every weight matrix of the decoder layers."""
    paths = {module: name for name, module in view.model.named_modules()}
    roles = ("q", "k", "v", "o", "gate", "up", "ffn")
    found = [view.projection(i, r) for i in range(view.num_layers) for r in roles if r != "gate" or view.gated]
    return {paths[projection.module]: projection for projection in found}


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on every projection, by PEFT (optional; arXiv 2106.09685). A baseline.

    In training PEFT adds the adapter's output to the base's; the delta holds the merged weights (dense), so the two agree
    up to rounding only.

    Args:
        rank, alpha, dropout: as in the paper.

    Raises (on `start`):
        InputError: peft is not installed, or rank < 1.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    name: str = "lora"

    @classmethod
    def matching(cls, lm: LanguageModel, parameters: int, **more) -> LoRA:
        """The rank whose number of trained parameters is nearest to `parameters` (at least 1); alpha = 2 rank."""
        shapes = [p.module.get_parameter("weight").shape for p in _all_projections(lm.view).values()]
        each = sum(size for shape in shapes for size in shape)
        rank = max(1, round(parameters / each))
        return cls(**{"rank": rank, "alpha": 2.0 * rank, **more})

    def start(self, lm: LanguageModel) -> Training:
        peft = _peft()
        if self.rank < 1:
            raise InputError(f"rank: got {self.rank}; allowed: 1 or more")
        _check_unsharded(lm, self.name)
        return _LoRATraining(lm, self, peft)


class _LoRATraining(Training):
    """Adapters injected into the model in place; the base weights themselves never change."""

    def __init__(self, lm: LanguageModel, scope: LoRA, peft):
        meta = {"trained": "lora", "rank": scope.rank, "alpha": scope.alpha, "dropout": scope.dropout}
        places = _all_projections(lm.view)
        super().__init__(lm, (), (), meta, scope.name)
        self._places = places
        config = peft.LoraConfig(
            r=scope.rank,
            lora_alpha=scope.alpha,
            lora_dropout=scope.dropout,
            target_modules=list(places),
            fan_in_fan_out=any(p.transposed for p in places.values()),
        )
        with warnings.catch_warnings():  # peft asks transformers by an older name, which warns at every adapter
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            self._wrapped: Any = peft.get_peft_model(lm.model, config)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained: give exactly these to the optimiser."""
        return [p for name, p in self.lm.model.named_parameters() if ".lora_" in name]

    def delta(self) -> Delta:
        self._check_open()
        parts, moved = {}, 0
        for path, projection in self._places.items():
            weight = projection.module.get_parameter("weight").detach()
            layer: Any = self.lm.model.get_submodule(path)  # peft's own layer
            with torch.no_grad():
                values = (weight.float() + layer.get_delta_weight("default").float()).to(weight.dtype)
            parts[f"{path}.weight"] = Part(0, None, values)
            moved += int((values != weight).sum())
        return self._new_delta(parts, moved)

    def close(self) -> None:
        if self._open:
            self._wrapped.unload()
        super().close()
