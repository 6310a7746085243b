"""What of a model is trained: the neurons of a set, everything but them, everything, or LoRA adapters.

`Only(neurons).start(lm)` (and likewise `AllBut`, `Everything`, `LoRA`) prepares the model for training and returns a
`Training` whose `parameters` are ordinary `nn.Parameter`s registered on the model, so that any loop, the Hugging Face
`Trainer` and accelerate see them. `finish()` makes the model the base again, bit for bit, and returns the trained
entries as a `Delta`. [SN] section 4 trains safety neurons so (SN-Tune), or safety minus foundation neurons (RSN-Tune:
`Only(safety - foundation)`); `AllBut` freezes a set under fine-tuning ([SSAH] section 4).

Precision: one rule for every arm
---------------------------------
A **master** in float32 (float64 in a float64 model) holds what is trained, and so do its gradient and the optimiser's
state. Before each forward of its module its cast to the model's dtype is written over the stored entries, so that the
module computes with the merged weight itself: a forward under training and one of the merged model are the same
computation, equal bit for bit in every dtype. A parameter that is trained whole and stored in float32 or float64 is its
own master. The master is the weight's value, not its difference from the base: weight decay acts as in ordinary
fine-tuning.

How rows and columns are trained
--------------------------------
The module's own weight is frozen; a node after its output passes the output through and, in the backward pass, computes
the gradient of the master alone (`grad[:, rows]^T @ x` for rows, `grad^T @ x[:, columns]` for columns). Gradients and
optimiser state thus have the size of the slices, no dense gradient of a weight ever exists, and nothing that an
optimiser does (weight decay, momentum, clipping) can reach any other entry. The complement works the same way.

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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from nt_utils import hooks
from nt_utils.errors import InputError, check_choice, check_count
from nt_utils.interventions.delta import Delta, LowRank, Part, put, take
from nt_utils.interventions.parallel import averaged
from nt_utils.interventions.precision import master_dtype
from nt_utils.models import OWNED, DecoderView, LanguageModel, Projection, is_sharded
from nt_utils.neurons import NeuronSet

#: Which sides of a neuron are trained. q, k and v have input rows only (with their biases), o has output columns only,
#: an FFN neuron has both: its rows of gate and up, its column of down.
SIDES = ("input", "output", "both")

# ------------------------------------------------------------------------------------------------------ what is trained


class _Tap(torch.autograd.Function):
    """The output unchanged; in the backward pass the gradient of the masters, from the output's gradient and x."""

    @staticmethod
    def forward(ctx, output, x, weight, bias, rows):
        ctx.rows, ctx.index, ctx.with_bias = rows, rows.index.to(output.device), bias is not None
        x = x.to(output.device)
        ctx.save_for_backward(x if rows.side == "input" else x.index_select(-1, ctx.index))
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,), rows = ctx.saved_tensors, ctx.rows
        if rows.sharded:  # the weight was gathered anew; the module's own backward pass follows this one
            rows.write()
        part = grad.flatten(0, -2)  # [batch * tokens, outputs]
        if rows.side == "input":
            part = part.index_select(-1, ctx.index)
        part, x = part.to(rows.dtype), x.flatten(0, -2).to(rows.dtype)
        weight = x.t() @ part if rows.transposed else part.t() @ x
        return grad, None, weight, part.sum(0) if ctx.with_bias else None, None


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


def _master(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().to(master_dtype(values.dtype), copy=True))


class _Rows:
    """Rows (side "input") or columns ("output") of one module's weight, and the rows' biases.

    Attributes:
        path: the module's name in the model; layer: of the decoder.
        index: int64 [n], ascending: output channels for the input side, input channels for the output side.
        stored: "weight" and "bias" -> the base's entries on the CPU, in the parameter's own layout and dtype.
        masters: the same in the master's precision, trained; registered on the module as tuned_weight and tuned_bias.
        sharded: FSDP2 holds the weight; it is whole only while the module's block runs.
    """

    def __init__(self, module: nn.Module, path: str, layer: int, side: str, index: Tensor, transposed: bool):
        self.module, self.path, self.layer, self.side, self.transposed = module, path, layer, side, transposed
        self.index = index.to(module.get_parameter("weight").device)
        leaves = ["weight", "bias"] if side == "input" and module.bias is not None else ["weight"]
        entries = {leaf: take(getattr(module, leaf), self.axis(leaf), self.index) for leaf in leaves}
        self.parameters = {leaf: getattr(module, leaf) for leaf in leaves}
        self.masters = {leaf: _master(values) for leaf, values in entries.items()}
        self.stored = {leaf: values.cpu() for leaf, values in entries.items()}
        self.dtype = self.masters["weight"].dtype
        self.sharded = isinstance(module.get_parameter("weight"), DTensor)
        self._written: tuple | None = None

    def axis(self, leaf: str) -> int:
        """The axis of the parameter, as it is stored, along which the index counts."""
        return 0 if leaf == "bias" else _axis(self.side, self.transposed)

    def register(self) -> None:
        for leaf, master in self.masters.items():
            self.module.register_parameter(f"tuned_{leaf}", master)

    def restore(self) -> None:
        """The base's entries again, and no masters on the module."""
        for leaf, values in self.stored.items():
            delattr(self.module, f"tuned_{leaf}")
            if not self.sharded:  # the masters were written over gathered copies only
                put(getattr(self.module, leaf), self.axis(leaf), self.index, values)

    def write(self) -> None:
        """The masters' cast over the stored entries, behind autograd's back (no graph is waiting for the old ones)."""
        for leaf, master in self.masters.items():
            if master.dtype != self.dtype:
                raise InputError(
                    f"model: {self.path}.tuned_{leaf} was cast to {master.dtype}; it trains as {self.dtype}"
                )
            name, parameter, stored = f"{self.path}.{leaf}", getattr(self.module, leaf), self.stored[leaf].dtype
            # A weight that was sharded before the start is gathered by now; one that was not stands where it stood.
            if isinstance(parameter, DTensor) if self.sharded else parameter is not self.parameters[leaf]:
                raise _sharded(name)
            if self.sharded and parameter.dtype != stored:
                raise InputError(
                    f"model: FSDP gathers {name} as {parameter.dtype}, it is stored as {stored}; "
                    "allowed: no mixed precision (load the model in that dtype)"
                )
            _check_whole(parameter, name)
            parameter = parameter.data
            values = master.data.to(parameter.device, parameter.dtype)
            parameter.index_copy_(self.axis(leaf), self.index.to(parameter.device), values)

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
        return _Tap.apply(output, args[0], self.masters["weight"], self.masters.get("bias"), self)

    def taps(self) -> list[hooks.Hook]:
        """For :func:`nt_utils.hooks.attached`; the tap comes before every other hook on the output."""
        return [hooks.before(self.module, self.before), hooks.after(self.module, self.after, first=True)]

    def parts(self) -> Iterable[tuple[str, Part, Tensor]]:
        """Each parameter's name, its entries as they would be stored now, and the base's, on the CPU."""
        for leaf, master in self.masters.items():
            base = self.stored[leaf]
            values = master.detach().to(base.dtype).to("cpu", copy=True)
            yield f"{self.path}.{leaf}", Part(self.axis(leaf), self.index.to("cpu", copy=True), values), base


class _Whole:
    """One whole parameter; its master is itself where it is float32 or float64, else a wider one beside it.

    A half-precision parameter keeps computing and gathers its gradient, which moves to the master as soon as it is
    there; the master's cast is written back before each call of a module that holds the parameter (tied ones: several).
    """

    layer = -1  # an embedding lies below every layer

    def __init__(self, name: str, parameter: nn.Parameter, owners: list[tuple[nn.Module, str]]):
        self.name, self.parameter, self.owners = name, parameter, owners
        self.parameters = {"weight": parameter}
        self.stored = parameter.detach().to("cpu", copy=True)
        self.direct = parameter.dtype == master_dtype(parameter.dtype)
        self.masters = {"weight": parameter if self.direct else _master(parameter)}
        self.sharded = False

    def register(self) -> None:
        self.parameter.requires_grad_(True)
        if not self.direct:
            owner, leaf = self.owners[0]
            owner.register_parameter(f"tuned_{leaf}", self.masters["weight"])

    def restore(self) -> None:
        if not self.direct:
            owner, leaf = self.owners[0]
            delattr(owner, f"tuned_{leaf}")
        put(self.parameter, 0, None, self.stored)
        self.parameter.grad = None

    def before(self, module: nn.Module, args: tuple) -> None:
        self.parameter.data.copy_(self.masters["weight"].data)

    def move_gradient(self, parameter: nn.Parameter) -> None:
        """The gradient goes to the master, added to what is there from an earlier backward pass."""
        master, gradient = self.masters["weight"], parameter.grad
        assert gradient is not None, "called when a gradient was accumulated"
        wide = gradient.to(master.dtype)
        master.grad = wide if master.grad is None else master.grad + wide
        parameter.grad = None

    def taps(self) -> list[hooks.Hook]:
        if self.direct:
            return []
        writes = [hooks.before(owner, self.before) for owner, _ in self.owners]
        return [*writes, hooks.after_gradient(self.parameter, self.move_gradient)]

    def parts(self) -> Iterable[tuple[str, Part, Tensor]]:
        values = self.masters["weight"].detach().to(self.stored.dtype).to("cpu", copy=True)
        yield self.name, Part(0, None, values), self.stored


def _whole(lm: LanguageModel, excluded: Iterable[str] = ()) -> list[_Whole]:
    """Every parameter of the model but those excluded, tied ones once."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in lm.model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, leaf))
    named = dict(lm.model.named_parameters())
    return [_Whole(name, p, owners[p]) for name, p in named.items() if name not in set(excluded)]


# ------------------------------------------------------------------------------------------------------ a training


class Training:
    """A model prepared for training: some rows and columns, some whole parameters, all else frozen.

    Attributes:
        parameters: what is trained (the masters); give exactly these to the optimiser.
        base: fingerprint of the weights at the start.
        lowest_layer: the first decoder layer with something trained; -1: the embedding too.

    A context manager: on leaving, unless finished, the model is the base again.
    """

    def __init__(self, lm: LanguageModel, pieces: Sequence[_Rows | _Whole], meta: dict, name: str):
        if any(n.rpartition(".")[2].startswith("tuned_") for n, _ in lm.model.named_parameters()):
            raise InputError("model: another training holds it; finish that one first")
        self.lm, self.base, self.meta, self.name = lm, lm.weights_fingerprint, meta, name
        self.architecture = lm.view.space.architecture
        self._pieces = list(pieces)
        trained = {p for piece in self._pieces for p in piece.parameters.values()}
        self._names = {n for n, p in lm.model.named_parameters(remove_duplicate=False) if p in trained}
        self._needed = {n: p.requires_grad for n, p in lm.model.named_parameters()}
        self._hooks = ExitStack()
        self._open = True
        lm.model.requires_grad_(False)
        for piece in self._pieces:
            piece.register()
        taps = [hook for piece in self._pieces for hook in piece.taps()]
        self._hooks.enter_context(hooks.attached(taps, name, must_run=False))
        self._hooks.enter_context(averaged([m for p in self._pieces if p.sharded for m in p.masters.values()]))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained: give exactly these to the optimiser."""
        return [master for piece in self._pieces for master in piece.masters.values()]

    @property
    def lowest_layer(self) -> int:
        """The first decoder layer with something trained; -1 where the embedding may be."""
        return min((piece.layer for piece in self._pieces), default=-1)

    @property
    def size(self) -> int:
        """Trained weights and biases."""
        return sum(p.numel() for p in self.parameters)

    @property
    def bytes(self) -> int:
        """Bytes of what is trained, in the precision it is trained in."""
        return sum(p.nbytes for p in self.parameters)

    def delta(self) -> Delta:
        """The trained entries as they are now: copies in main memory, in the model's dtype."""
        self._check_open()
        found = [part for piece in self._pieces for part in piece.parts()]
        moved = sum(int((part.values != base).sum()) for _, part, base in found)
        return self._new_delta({name: part for name, part, _ in found}, moved)

    def _new_delta(self, parts: dict[str, Part | LowRank], moved: int) -> Delta:
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
        for piece in self._pieces:
            piece.restore()
        for name, parameter in self.lm.model.named_parameters():
            parameter.requires_grad_(self._needed.get(name, True))
        self.lm.weights_changed(self.base, self._names)

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
    layer: int
    side: str
    index: Tensor

    def complement(self) -> Tensor:
        """All other rows or columns of the module."""
        weight = self.projection.module.get_parameter("weight")
        keep = torch.ones(weight.shape[_axis(self.side, self.projection.transposed)], dtype=torch.bool)
        keep[self.index] = False
        return keep.nonzero().flatten()

    def rows(self, index: Tensor) -> _Rows:
        return _Rows(self.projection.module, self.path, self.layer, self.side, index, self.projection.transposed)

    @property
    def frozen(self) -> set[str]:
        """Names of the parameters that have entries of the set."""
        bias = self.side == "input" and self.projection.module.bias is not None
        return {f"{self.path}.weight", *([f"{self.path}.bias"] if bias else [])}


def _places(view: DecoderView, neurons: NeuronSet, sides: str) -> list[_Place]:
    """Where a set's entries lie, one place a module (q, k and v, gate and up may share one) and side."""
    check_choice("sides", sides, SIDES)
    neurons.space.check("neurons: found on", view.space)
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
            place = found.setdefault((module, side), _Place(projection, paths[module], layer, side, index[:0]))
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
        rows = [place.rows(place.index) for place in _places(lm.view, self.neurons, self.sides)]
        return Training(lm, rows, {"trained": "only", **_facts(self.neurons, self.sides)}, self.name)


@dataclass(frozen=True)
class AllBut:
    """Train everything except the neurons of a set ([SSAH] section 4: frozen while the rest is fine-tuned).

    The frozen entries are part of no trained parameter, so they keep their bits under any optimiser, weight decay,
    momentum, mixed precision and resuming, and a gradient's norm counts trainable entries only. Modules with frozen
    entries train masters of all their other entries, every other parameter is trained whole.
    """

    neurons: NeuronSet
    sides: str = "both"
    name: str = "all but"

    def start(self, lm: LanguageModel) -> Training:
        _check_unsharded(lm, self.name)
        places = _places(lm.view, self.neurons, self.sides)
        frozen = set().union(*(place.frozen for place in places))
        rows = [place.rows(rest) for place in places if len(rest := place.complement())]
        meta = {"trained": "all but", **_facts(self.neurons, self.sides)}
        return Training(lm, [*rows, *_whole(lm, frozen)], meta, self.name)


@dataclass(frozen=True)
class Everything:
    """Full fine-tuning of every parameter. The delta is the whole model."""

    name: str = "full"

    def start(self, lm: LanguageModel) -> Training:
        _check_unsharded(lm, self.name)
        return Training(lm, _whole(lm), {"trained": "full"}, self.name)


# ------------------------------------------------------------------------------------------------------ LoRA


def _all_projections(view: DecoderView) -> dict[str, Projection]:
    """Module name -> one projection in it, for every weight matrix of the decoder layers."""
    paths = {module: name for name, module in view.model.named_modules()}
    roles = ("q", "k", "v", "o", "gate", "up", "ffn")
    found = [view.projection(i, r) for i in range(view.num_layers) for r in roles if r != "gate" or view.gated]
    return {paths[projection.module]: projection for projection in found}


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on every projection, by PEFT (arXiv 2106.09685). A baseline.

    Adapters train in float32 (float64 in a float64 model). The delta keeps their factors; merging adds their product to
    the base's weights and rounds once, so the merged model and the one in training agree up to rounding.

    Args:
        rank, alpha, dropout: as in the paper.

    Raises (on `start`):
        InputError: rank < 1.
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
        check_count("rank", self.rank)
        _check_unsharded(lm, self.name)
        return _LoRATraining(lm, self)


class _LoRATraining(Training):
    """Adapters injected into the model in place; the base weights themselves never change."""

    lowest_layer = 0

    def __init__(self, lm: LanguageModel, scope: LoRA):
        import peft

        meta = {"trained": "lora", "rank": scope.rank, "alpha": scope.alpha, "dropout": scope.dropout}
        self._places = _all_projections(lm.view)
        super().__init__(lm, (), meta, scope.name)
        options: dict[str, Any] = {"r": scope.rank, "lora_alpha": scope.alpha, "lora_dropout": scope.dropout}
        fan_in_fan_out = any(p.transposed for p in self._places.values())
        config = peft.LoraConfig(target_modules=list(self._places), fan_in_fan_out=fan_in_fan_out, **options)
        with warnings.catch_warnings():  # peft asks transformers by an older name, which warns at every adapter
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            self._wrapped: Any = peft.get_peft_model(lm.model, config)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained: give exactly these to the optimiser."""
        return [p for name, p in self.lm.model.named_parameters() if ".lora_" in name]

    def delta(self) -> Delta:
        self._check_open()
        parts: dict[str, Part | LowRank] = {}
        moved = 0
        for path, projection in self._places.items():
            layer: Any = self.lm.model.get_submodule(path)  # peft's own layer
            down, up = (m["default"].weight.detach() for m in (layer.lora_A, layer.lora_B))
            factors = (down.t(), up.t()) if projection.transposed else (up, down)
            left, right = (t.to("cpu", copy=True) for t in factors)
            weight = projection.module.get_parameter("weight").detach()
            part = LowRank(left, right, layer.scaling["default"], weight.dtype)
            parts[f"{path}.weight"] = part
            moved += int((part.entries(weight) != weight).sum())
        return self._new_delta(parts, moved)

    def close(self) -> None:
        if self._open:
            self._wrapped.unload()
        super().close()
