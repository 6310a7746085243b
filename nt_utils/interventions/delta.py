"""What a training changed: the trained entries alone, merged into the base model and taken back bit for bit.

A `Delta` holds, for every weight that was trained, the trained rows or columns *as the model stores them* (bf16 for a
bf16 model), or the two factors of a low-rank change: what was evaluated is what is merged and what is saved. Its tensors
lie in main memory. It fits one base model only, told by both fingerprints (architecture and weights), and is an
intervention: `evaluate(lm, suite, intervention=delta)`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nt_utils.errors import InputError
from nt_utils.files import damage_reported, read_sealed, write_sealed
from nt_utils.models import LanguageModel, is_sharded
from nt_utils.neurons import same_architecture

FORMAT = "nt_utils.delta.2"


@dataclass(frozen=True, eq=False)
class Part:
    """Entries of one parameter.

    axis    0 = rows, 1 = columns of the parameter as it is stored (a bias has axis 0)
    index   int64 [n], which rows or columns, ascending; None = the whole parameter
    values  the entries: the parameter's shape with n in place of its length along `axis`; the parameter's dtype
    """

    axis: int
    index: Tensor | None
    values: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameter."""
        return self.values.dtype

    @property
    def size(self) -> int:
        """Entries that it sets."""
        return self.values.numel()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by name."""
        return {"values": self.values} | ({} if self.index is None else {"index": self.index})

    def entries(self, base: Tensor) -> Tensor:
        """The entries to be stored, given the base's."""
        return self.values.to(base.device)


ROWS = 128
"""Rows of a low-rank change that are computed at a time."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A whole parameter [a, b], as it is stored, to which ``scale * left @ right`` is added.

    left    [a, rank]; right [rank, b]: as they were trained (float32 or float64)
    dtype   of the parameter; the sum is rounded to it once
    """

    left: Tensor
    right: Tensor
    scale: float
    dtype: torch.dtype
    axis = 0
    index = None

    @property
    def size(self) -> int:
        """Number of entries that the product has."""
        return self.left.shape[0] * self.right.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The two factors, by the names they have in a file."""
        return {"left": self.left, "right": self.right}

    def entries(self, base: Tensor) -> Tensor:
        """The entries to be stored, given the base's; computed in float64 where the device has it."""
        wide = torch.float32 if base.device.type == "mps" else torch.float64
        left, right = (t.to(base.device, wide) for t in (self.left, self.right))
        # A few rows at a time: the wide copies of a whole matrix cost fifteen times as much to allocate as to fill.
        pieces = zip(base.split(ROWS), left.split(ROWS), strict=True)
        return torch.cat([torch.addmm(b.to(wide), a, right, alpha=self.scale).to(self.dtype) for b, a in pieces])


def take(parameter: Tensor, axis: int, index: Tensor | None) -> Tensor:
    """A copy of a parameter's rows (axis 0) or columns (axis 1); all of it without an index.

    A sharded parameter is gathered for it: every process must ask at the same time.
    """
    values = parameter.detach()
    values = values.full_tensor() if isinstance(values, DTensor) else values
    return values.clone() if index is None else values.index_select(axis, index.to(values.device))


def put(parameter: Tensor, axis: int, index: Tensor | None, values: Tensor) -> None:
    """Write entries into a parameter, in place; nothing else of it is touched. torch notes the change."""
    values = values.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        if index is None:
            parameter.copy_(values)
        else:
            parameter.index_copy_(axis, index.to(parameter.device), values)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes (0.0 and -0.0 differ, NaN equals itself)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(a.element_size(), torch.int64)
    a, b = (t.detach().contiguous().reshape(-1).view(whole) for t in (a, b))
    return torch.equal(a, b.to(a.device))


class Delta:
    """The trained entries of a model.

    Args:
        parts: name of the parameter -> its entries.
        architecture, weights: fingerprints of the base model.
        moved: how many of the entries differ from the base's (None = not known).
        meta: how it was made; JSON-able.
        name: for tables.

    Raises:
        InputError: no parts.
    """

    def __init__(
        self,
        parts: Mapping[str, Part | LowRank],
        *,
        architecture: str,
        weights: str,
        moved: int | None = None,
        meta: Mapping | None = None,
        name: str = "tuned",
    ):
        if not any(part.size for part in parts.values()):
            raise InputError("delta: it holds no entries; nothing was trained")
        self.parts = dict(parts)
        self.architecture, self.weights = architecture, weights
        self.moved, self.meta, self.name = moved, dict(meta or {}), name
        self._merged: nn.Module | None = None
        self._stored: dict[str, Tensor] = {}  # what its entries were before the merge

    # -- facts

    @property
    def size(self) -> int:
        """Entries that it sets (weights and biases)."""
        return sum(part.size for part in self.parts.values())

    @property
    def bytes(self) -> int:
        """Bytes of what it keeps: values and positions, or factors (the file adds a header)."""
        return sum(t.nbytes for part in self.parts.values() for t in part.tensors.values())

    @property
    def moved_share(self) -> float:
        """Share of the entries whose stored value differs from the base's (0 to 1).

        In bf16 a small learning rate leaves many below the rounding: the master moved, the weight did not.
        """
        return float("nan") if self.moved is None else self.moved / self.size

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the base's fingerprints, the positions and the values."""
        digest = hashlib.sha256(f"{self.architecture} {self.weights}".encode())
        for name, part in sorted(self.parts.items()):
            digest.update(f"{name} {part.axis} {part.dtype} {getattr(part, 'scale', '')}".encode())
            for leaf, tensor in sorted(part.tensors.items()):
                digest.update(f"{leaf} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    @property
    def key(self) -> str:
        """Identifies the intervention in caches."""
        return f"delta-{self.fingerprint}"

    def rounded(self, lm: LanguageModel) -> Delta:
        """The same change of ``lm``, of which its base is a copy in a wider precision: values are rounded once."""
        named = dict(lm.model.named_parameters())
        parts: dict[str, Part | LowRank] = {}
        moved = 0
        for name, part in self.parts.items():
            base = named[name].detach()
            made = (
                replace(part, dtype=base.dtype)
                if isinstance(part, LowRank)
                else replace(part, values=part.values.to(base.dtype))
            )
            entries = take(base, part.axis, part.index)
            moved += int((made.entries(entries) != entries).sum())
            parts[name] = made
        architecture, weights = lm.view.space.architecture, lm.weights_fingerprint
        return Delta(parts, architecture=architecture, weights=weights, moved=moved, meta=self.meta, name=self.name)

    # -- merging

    def check(self, lm: LanguageModel) -> None:
        """Raise InputError unless `lm` is the base model, by architecture and by weights, whole in this process."""
        if is_sharded(lm.model):
            raise InputError("delta: the model is sharded over processes; allowed: the same model loaded plainly")
        same_architecture("delta: made for", self.architecture, lm.view.space.architecture)
        found = lm.weights_fingerprint
        if found != self.weights:
            raise InputError(f"delta: made on weights {self.weights}; the model at hand has weights {found}")

    def merge(self, lm: LanguageModel) -> None:
        """Write the entries into the base model: from then on it is a plain model with the trained weights.

        Every other entry keeps its bits. What interrupts it leaves the base behind. Raises InputError on another base, or when
        it is merged already.
        """
        if self._merged is not None:
            raise InputError("delta: it is merged already; unmerge it first")
        self.check(lm)
        parameters = dict(lm.model.named_parameters(remove_duplicate=False))
        self._merged = lm.model
        try:
            for name, part in self.parts.items():
                base = take(parameters[name], part.axis, part.index)
                self._stored[name] = base.cpu()
                put(parameters[name], part.axis, part.index, part.entries(base))
        except BaseException:  # Ctrl-C and lack of memory among them: a model that is half merged passes for its base
            self._put_back(lm, parameters)
            raise

    def unmerge(self, lm: LanguageModel) -> None:
        """Put the base's entries back, bit for bit (they were kept: adding and subtracting would round).

        The model remembers the hashes of these weights: nothing is hashed again. Raises InputError when it is not merged
        into this model or the merged entries have changed since. When it is interrupted it can be called again.
        """
        if self._merged is not lm.model:
            raise InputError("delta: it is not merged into this model")
        parameters = dict(lm.model.named_parameters(remove_duplicate=False))
        for name, base in self._stored.items():
            part = self.parts[name]
            found = take(parameters[name], part.axis, part.index)
            # The base's entries are there already where an earlier call was interrupted.
            if not same_bits(found, part.entries(base.to(found.device))) and not same_bits(found, base):
                raise InputError(f"delta: {name} was changed after the merge; load the base model again instead")
        self._put_back(lm, parameters)

    def _put_back(self, lm: LanguageModel, parameters: Mapping[str, Tensor]) -> None:
        """Put back what is stored, and forget it only when all of it is back: a call that was interrupted can be repeated."""
        for name, base in self._stored.items():
            put(parameters[name], self.parts[name].axis, self.parts[name].index, base)
        restored = [parameters[name] for name in self._stored]
        lm.weights_changed(self.weights, {n for n, p in parameters.items() if any(p is one for one in restored)})
        self._stored.clear()
        self._merged = None

    @contextmanager
    def active(self, lm: LanguageModel) -> Iterator[None]:
        """Merged inside, the base again outside."""
        self.merge(lm)
        try:
            yield
        finally:
            self.unmerge(lm)

    # -- files

    def save(self, path) -> Path:
        """Write safetensors (what :attr:`bytes` counts) with a JSON header; atomic."""
        low = {name: [part.scale, str(part.dtype)] for name, part in self.parts.items() if isinstance(part, LowRank)}
        header = {
            "format": FORMAT,
            "architecture": self.architecture,
            "weights": self.weights,
            "fingerprint": self.fingerprint,
            "axes": json.dumps({name: part.axis for name, part in self.parts.items()}),
            "low_rank": json.dumps(low),
            "moved": json.dumps(self.moved),
            "name": self.name,
            "meta": json.dumps(self.meta, sort_keys=True),
        }
        tensors = {
            f"{name}:{leaf}": tensor for name, part in self.parts.items() for leaf, tensor in part.tensors.items()
        }
        return write_sealed(path, tensors, header)

    @classmethod
    def load(cls, path, lm: LanguageModel | None = None) -> Delta:
        """Read a delta; given `lm`, only for that base model.

        Raises:
            InputError: no file, damaged, or made on another architecture or other weights.
        """
        header, tensors = read_sealed(path, FORMAT)
        with damage_reported(path):
            low = json.loads(header["low_rank"])
            parts: dict[str, Part | LowRank] = {}
            for name, axis in json.loads(header["axes"]).items():
                if name in low:
                    scale, dtype = float(low[name][0]), getattr(torch, low[name][1].removeprefix("torch."))
                    parts[name] = LowRank(tensors[f"{name}:left"], tensors[f"{name}:right"], scale, dtype)
                else:
                    parts[name] = Part(int(axis), tensors.get(f"{name}:index"), tensors[f"{name}:values"])
            found = cls(
                parts,
                architecture=header["architecture"],
                weights=header["weights"],
                moved=json.loads(header["moved"]),
                meta=json.loads(header["meta"]),
                name=header["name"],
            )
        if found.fingerprint != header.get("fingerprint"):
            raise InputError(f"{path}: damaged file: its values do not match its fingerprint")
        if lm is not None:
            found.check(lm)
        return found
