"""The study's currency: which neurons a model has, what each scores, and which are chosen.

A *neuron* is (layer, kind, index). ``q``, ``k`` and ``v`` index the output channels of those projections,
``o`` the input channels of the attention's output projection and ``ffn`` the input channels of the
feed-forward's down projection (row of gate and up = column of down: the same neuron).

Files are safetensors with JSON in the header: any safetensors reader opens them, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from nt_utils.errors import InputError
from nt_utils.files import damage_reported, digest_of_file, read_header, read_sealed, sealed, write_sealed

KINDS = ("q", "k", "v", "o", "ffn")
#: The channels that write to the residual stream: the pool of every ranking across kinds. A value row and its
#: o_proj input are the same score without grouped queries, so v is never in the pool beside o.
POOL = ("ffn", "o")

Site = tuple[int, str]


@dataclass(frozen=True)
class NeuronSpace:
    """All neurons of one architecture.

    Args:
        widths: kind -> number of neurons in each layer.
        parameters_per_neuron: kind -> weights and biases that belong to one neuron of that kind.
        total_parameters: parameters of the whole model.
        architecture: fingerprint of the architecture (family and shapes), from ``DecoderView``.
    """

    widths: Mapping[str, tuple[int, ...]]
    parameters_per_neuron: Mapping[str, int]
    total_parameters: int
    architecture: str

    def __post_init__(self):
        object.__setattr__(self, "widths", {k: tuple(int(w) for w in v) for k, v in self.widths.items()})
        unknown = set(self.widths) - set(KINDS)
        if unknown:
            raise InputError(f"widths: unknown kind {sorted(unknown)}; allowed: {', '.join(KINDS)}")
        if len({len(v) for v in self.widths.values()}) != 1:
            raise InputError("widths: every kind needs one width per layer")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(next(iter(self.widths.values())))

    def sites(self, kinds: Sequence[str] = KINDS) -> list[Site]:
        """(layer, kind) in the order of every flat vector over ``kinds``: layer by layer."""
        check_kinds(kinds)
        return [(layer, kind) for layer in range(self.num_layers) for kind in kinds if kind in self.widths]

    def width(self, site: Site) -> int:
        """Number of neurons at a (layer, kind); raises InputError where there is no such site."""
        layer, kind = site
        if kind not in self.widths or not 0 <= layer < self.num_layers:
            raise InputError(
                f"site {site!r}: the model has layers 0 to {self.num_layers - 1} and kinds {', '.join(self.widths)}"
            )
        return self.widths[kind][layer]

    def size(self, kinds: Sequence[str] = KINDS) -> int:
        """Number of neurons of these kinds over all layers."""
        return sum(self.width(site) for site in self.sites(kinds))

    def split(self, flat: Tensor, kinds: Sequence[str]) -> dict[Site, Tensor]:
        """Cut a vector (last axis = ``size(kinds)``) into one tensor a site."""
        sites = self.sites(kinds)
        if flat.shape[-1] != self.size(kinds):
            raise InputError(f"flat: last axis has {flat.shape[-1]} entries, the model has {self.size(kinds)} neurons")
        return dict(zip(sites, flat.split([self.width(s) for s in sites], dim=-1), strict=True))

    def check(self, what: str, at_hand: NeuronSpace | None) -> None:
        """Raise InputError, which begins with ``what``, unless this is the architecture at hand (None: whatever it is)."""
        if at_hand is not None:
            same_architecture(what, self.architecture, at_hand.architecture)

    def to_json(self) -> str:
        """As text, for file headers."""
        return json.dumps(
            {
                "widths": {k: list(v) for k, v in self.widths.items()},
                "parameters_per_neuron": dict(self.parameters_per_neuron),
                "total_parameters": self.total_parameters,
                "architecture": self.architecture,
            },
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> NeuronSpace:
        """From :meth:`to_json`'s text."""
        return cls(**json.loads(text))


def same_architecture(what: str, found: str, at_hand: str) -> None:
    """Raise InputError, which begins with ``what``, unless two fingerprints of architectures are one."""
    if found != at_hand:
        raise InputError(f"{what} architecture {found}; the model at hand is {at_hand}")


def site_of(name: str) -> Site:
    """The site of a tensor's name in a file, "layer.kind"."""
    layer, kind = name.split(".")
    return int(layer), kind


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise unless every kind is known and none stands twice."""
    if isinstance(kinds, str) or not kinds or len(set(kinds)) != len(kinds) or set(kinds) - set(KINDS):
        raise InputError(f"kinds: got {kinds!r}; allowed: a list without repeats from {', '.join(KINDS)}")


# ---------------------------------------------------------------------------------------------------- scores


class ScoreWriter:
    """Streams per-prompt scores into one safetensors file, so that memory does not grow with the prompts.

    The header is written first, then each row at its place (a memory map would count as memory until the system
    writes it back); the file takes its name only when it is complete and its header holds a digest of the scores.
    Without a path it is a temporary file, which goes with the scores.
    """

    def __init__(self, path, space: NeuronSpace, kinds: Sequence[str], n_prompts: int, meta: Mapping | None = None):
        check_kinds(kinds)
        if n_prompts < 1:
            raise InputError("prompts: the list is empty; at least one prompt is needed")
        self._scratch = tempfile.TemporaryDirectory(prefix="nt_scores_") if path is None else None
        path = Path(self._scratch.name, "scores.safetensors") if self._scratch else Path(path)
        self.path, self.space, self.kinds, self.n_prompts = path, space, tuple(kinds), int(n_prompts)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._tmp = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        facts = {
            "format": "nt_utils.scores.2",
            "space": space.to_json(),
            "kinds": json.dumps(list(self.kinds)),
            "meta": json.dumps(dict(meta or {}), sort_keys=True),
            "digest": "0" * 64,  # close() puts the scores' own here
        }
        offset, places = 0, {}
        self._header: dict[str, Any] = {"__metadata__": sealed(facts)}
        for layer, kind in space.sites(self.kinds):
            shape = [self.n_prompts, space.width((layer, kind))]
            end = offset + 4 * shape[0] * shape[1]
            self._header[f"{layer}.{kind}"] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
            places[layer, kind] = (offset, shape)
            offset = end
        self._file = open(self._tmp, "w+b")  # noqa: SIM115 (closed by close and discard)
        start = self._write_header()
        self._file.truncate(start + offset)
        self._places = {site: (start + place, shape[1]) for site, (place, shape) in places.items()}
        self._written = np.zeros((self.n_prompts, len(places)), dtype=bool)
        self._column = {site: i for i, site in enumerate(places)}

    def _write_header(self) -> int:
        """Write the header at the file's beginning; returns where the values start."""
        text = json.dumps(self._header).encode()
        text += b" " * (-len(text) % 8)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", len(text)) + text)
        return self._file.tell()

    def write(self, start_row: int, scores: Mapping[Site, Tensor]) -> None:
        """Store scores ``[rows, width]`` of prompts ``start_row``, ``start_row + 1``, ...; NaN or Inf is refused."""
        for site, values in scores.items():
            values = values.detach().to("cpu", torch.float32)
            if not torch.isfinite(values).all():
                raise InputError(f"scores: NaN or Inf in layer {site[0]}, projection {site[1]}")
            rows = slice(start_row, start_row + values.shape[0])
            place, width = self._places[site]
            if values.shape[1:] != (width,) or rows.stop > self.n_prompts:
                raise InputError(
                    f"scores: layer {site[0]}, projection {site[1]}: got {list(values.shape)} at row {start_row}"
                )
            self._file.seek(place + 4 * width * start_row)
            self._file.write(values.contiguous().numpy().tobytes())
            self._written[rows, self._column[site]] = True

    def close(self) -> NeuronScores:
        """Finish the file; refuses to if a prompt or a site was never written."""
        if not self._written.all():
            self.discard()
            raise InputError(f"scores: {int((~self._written).any(1).sum())} of {self.n_prompts} prompts have no score")
        digest = digest_of_file(self._file)
        self._header["__metadata__"] = sealed(self._header["__metadata__"] | {"digest": digest})
        self._write_header()
        self._file.close()
        self._tmp.replace(self.path)
        return replace(NeuronScores.load(self.path), scratch=self._scratch)

    def discard(self) -> None:
        """Drop the unfinished file."""
        self._file.close()
        self._tmp.unlink(missing_ok=True)

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if self._tmp.exists():
            self.discard()


@dataclass(frozen=True)
class NeuronScores:
    """Per-prompt scores of every neuron, read from file on demand.

    ``rows`` selects and orders prompts; a subset shares the file.
    """

    path: Path
    space: NeuronSpace
    kinds: tuple[str, ...]
    meta: Mapping
    rows: tuple[int, ...]
    # Keeps a temporary file.
    scratch: tempfile.TemporaryDirectory | None = field(default=None, repr=False, compare=False)

    @classmethod
    def load(cls, path, space: NeuronSpace | None = None) -> NeuronScores:
        """Open a score file. Raises InputError when it is damaged or, given ``space``, of another architecture."""
        path = Path(path)
        meta = read_header(path, "nt_utils.scores.")
        with damage_reported(path):
            found = NeuronSpace.from_json(meta["space"])
            found.check(f"{path}: made for", space)
            with open(path, "rb") as raw:
                if digest_of_file(raw) != meta["digest"]:
                    raise InputError(f"{path}: damaged file: its scores do not match its digest")
            kinds = tuple(json.loads(meta["kinds"]))
            layer, kind = found.sites(kinds)[0]
            with safe_open(path, "pt") as file:
                n = file.get_slice(f"{layer}.{kind}").get_shape()[0]
            return cls(path, found, kinds, json.loads(meta["meta"]), tuple(range(n)))

    @property
    def n_prompts(self) -> int:
        """Number of prompts (rows)."""
        return len(self.rows)

    def get(self, layer: int, kind: str) -> Tensor:
        """Scores of one projection, float32 ``[n_prompts, width]``."""
        if kind not in self.kinds:
            raise InputError(f"kind: {kind!r} was not scored; this file holds {', '.join(self.kinds)}")
        self.space.width((layer, kind))
        with safe_open(self.path, "pt") as file:
            values = file.get_tensor(f"{layer}.{kind}")
        return values[list(self.rows)]

    def matrix(self, kinds: Sequence[str] = POOL) -> Tensor:
        """Scores over several kinds, float32 ``[n_prompts, size(kinds)]``, in the order of ``space.sites(kinds)``."""
        return torch.cat([self.get(*site) for site in self.space.sites(kinds)], dim=1)

    def subset(self, rows: Sequence[int]) -> NeuronScores:
        """The same scores for some of the prompts (positions in this object, not in the file)."""
        rows = list(rows)
        if not rows or min(rows) < 0 or max(rows) >= self.n_prompts:
            raise InputError(f"rows: need at least one position between 0 and {self.n_prompts - 1}")
        return replace(self, rows=tuple(self.rows[r] for r in rows))


# ------------------------------------------------------------------------------------------------------ sets


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """A set of neurons of one architecture: a boolean mask per (layer, kind).

    Args:
        space: the neurons to choose from.
        masks: (layer, kind) -> bool ``[width]``; sites left out are empty.
        weights: fingerprint of the weights the set was found on (recorded, not demanded: sets travel between
            the unaligned, aligned and tuned versions of a model).
        meta: how the set was made; JSON-able.
    """

    space: NeuronSpace
    masks: Mapping[Site, Tensor]
    weights: str = ""
    meta: Mapping = field(default_factory=dict)

    def __post_init__(self):
        kept = {}
        for site, mask in self.masks.items():
            width = self.space.width(site)
            if mask.dtype != torch.bool or tuple(mask.shape) != (width,):
                raise InputError(f"masks: {site} needs bool [{width}], got {mask.dtype} {list(mask.shape)}")
            if mask.any():
                kept[site] = mask.detach().cpu().clone()
        object.__setattr__(self, "masks", {s: kept[s] for s in self.space.sites() if s in kept})

    @classmethod
    def from_flat(cls, space: NeuronSpace, indices, kinds: Sequence[str], **more) -> NeuronSet:
        """From positions in the flat order of ``space.sites(kinds)``."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        size = space.size(kinds)
        if indices.numel() and (indices.min() < 0 or indices.max() >= size):
            raise InputError(f"indices: must lie between 0 and {size - 1}")
        flat = torch.zeros(size, dtype=torch.bool)
        flat[indices] = True
        return cls(space, space.split(flat, kinds), **more)

    def flat(self, kinds: Sequence[str] = KINDS) -> Tensor:
        """Bool ``[size(kinds)]`` in the order of ``space.sites(kinds)``."""
        return torch.cat([self.mask(site) for site in self.space.sites(kinds)])

    def mask(self, site: Site) -> Tensor:
        """Bool ``[width]`` of one site (all False when the set has nothing there)."""
        width = self.space.width(site)
        return self.masks[site] if site in self.masks else torch.zeros(width, dtype=torch.bool)

    def __len__(self) -> int:
        return sum(int(m.sum()) for m in self.masks.values())

    def __iter__(self) -> Iterator[tuple[int, str, int]]:
        for (layer, kind), mask in self.masks.items():
            for index in mask.nonzero().flatten().tolist():
                yield layer, kind, index

    def __eq__(self, other) -> bool:
        return (
            isinstance(other, NeuronSet)
            and self.space.architecture == other.space.architecture
            and len(self ^ other) == 0
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def _combine(self, other: NeuronSet, op) -> NeuronSet:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        if other.space.architecture != self.space.architecture:
            raise InputError(
                f"neuron sets of two architectures cannot be combined: {self.space.architecture} and "
                f"{other.space.architecture}"
            )
        sites = dict.fromkeys([*self.masks, *other.masks])
        return NeuronSet(self.space, {s: op(self.mask(s), other.mask(s)) for s in sites}, self.weights)

    def __and__(self, other):
        return self._combine(other, torch.logical_and)

    def __or__(self, other):
        return self._combine(other, torch.logical_or)

    def __xor__(self, other):
        return self._combine(other, torch.logical_xor)

    def __sub__(self, other):
        return self._combine(other, lambda a, b: a & ~b)

    def only(self, kinds: Sequence[str]) -> NeuronSet:
        """The neurons of these kinds."""
        check_kinds(kinds)
        return NeuronSet(self.space, {s: m for s, m in self.masks.items() if s[1] in kinds}, self.weights, self.meta)

    def counts(self) -> dict[Site, int]:
        """Neurons per (layer, kind), zeros included."""
        return {s: int(self.mask(s).sum()) for s in self.space.sites()}

    def per_layer(self) -> list[int]:
        """Neurons in each layer, all kinds together."""
        counts = self.counts()
        return [sum(n for (i, _), n in counts.items() if i == layer) for layer in range(self.space.num_layers)]

    def per_kind(self) -> dict[str, int]:
        """Neurons of each kind, all layers together."""
        counts = self.counts()
        return {k: sum(n for (_, kind), n in counts.items() if kind == k) for k in self.space.widths}

    @property
    def parameters(self) -> int:
        """Weights and biases that belong to the chosen neurons.

        An entry shared by two chosen neurons cannot occur: q, k, v and the FFN own rows, o owns columns.
        """
        return sum(n * self.space.parameters_per_neuron[kind] for kind, n in self.per_kind().items())

    def share_of_parameters(self) -> float:
        """Share of all the model's parameters that belong to the chosen neurons (0 to 1)."""
        return self.parameters / self.space.total_parameters

    def jaccard(self, other: NeuronSet) -> float:
        """|A & B| / |A | B|; 1.0 for two empty sets."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    @property
    def fingerprint(self) -> str:
        """Short hash of architecture and masks."""
        digest = hashlib.sha256(self.space.architecture.encode())
        for site, mask in self.masks.items():
            digest.update(repr(site).encode() + np.packbits(mask.numpy()).tobytes())
        return digest.hexdigest()[:16]

    def save(self, path) -> Path:
        """Write safetensors with the space, the fingerprints and ``meta`` in the header; atomic."""
        tensors = {f"{layer}.{kind}": m.to(torch.uint8) for (layer, kind), m in self.masks.items()}
        header = {
            "format": "nt_utils.neurons.1",
            "space": self.space.to_json(),
            "weights": self.weights,
            "fingerprint": self.fingerprint,
            "meta": json.dumps(dict(self.meta), sort_keys=True),
        }
        return write_sealed(path, tensors, header)

    @classmethod
    def load(cls, path, space: NeuronSpace | None = None) -> NeuronSet:
        """Read a set; raises InputError when the file is damaged or, given ``space``, of another architecture."""
        header, tensors = read_sealed(path, "nt_utils.neurons.")
        with damage_reported(path):
            found = NeuronSpace.from_json(header["space"])
            found.check(f"{path}: made for", space)
            masks = {site_of(name): values.bool() for name, values in tensors.items()}
            loaded = cls(found, masks, header["weights"], json.loads(header["meta"]))
        if loaded.fingerprint != header.get("fingerprint"):
            raise InputError(f"{path}: damaged file: its masks do not match its fingerprint")
        return loaded
