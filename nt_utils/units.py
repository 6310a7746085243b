"""Every FFN channel and attention head is one of four kinds of unit [SSAH, section 3]: a partition of the model.

``SCU`` safety-critical, ``UCU`` utility-critical, ``CU`` complex, ``RU`` redundant; older versions of the paper call the
first two ESU and EUU (exclusive safety, exclusive utility). :func:`nt_utils.selection.units` makes a map from scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nt_utils.errors import InputError
from nt_utils.files import damage_reported, read_sealed, write_sealed
from nt_utils.neurons import POOL, NeuronSet, NeuronSpace, Site, site_of

CATEGORIES = ("SCU", "UCU", "CU", "RU")
OLDER_NAMES = {"ESU": "SCU", "EUU": "UCU"}
FORMAT = "nt_utils.units.1"


def category(name: str) -> str:
    """A category's present name; raises InputError for one that is none."""
    found = OLDER_NAMES.get(name, name)
    if found not in CATEGORIES:
        raise InputError(f"category: got {name!r}; allowed: {', '.join([*CATEGORIES, *OLDER_NAMES])}")
    return found


@dataclass(frozen=True, eq=False)
class UnitMap:
    """The category of every unit.

    Args:
        space: the model's neurons.
        labels: (layer, kind) -> int [width], positions in CATEGORIES, for every ffn and o site: one label a channel.
        head_dim: channels of one attention head; all channels of a head have the head's label. 1 = each o_proj
            channel is a unit of its own.
        weights: fingerprint of the weights the scores were taken from (recorded, not demanded).
        meta: how it was made; JSON-able.

    Raises:
        InputError: a site is missing or of another width, a label that is none, or a head with two labels.
    """

    space: NeuronSpace
    labels: Mapping[Site, Tensor]
    head_dim: int = 1
    weights: str = ""
    meta: Mapping = field(default_factory=dict)

    def __post_init__(self):
        kept = {}
        for site in self.space.sites(POOL):
            if site not in self.labels:
                raise InputError(f"labels: layer {site[0]}, {site[1]} has none; every unit needs exactly one category")
            values, width = torch.as_tensor(self.labels[site]).detach().cpu().long(), self.space.width(site)
            if tuple(values.shape) != (width,):
                raise InputError(f"labels: {site} needs [{width}], got {list(values.shape)}")
            if values.min() < 0 or values.max() >= len(CATEGORIES):
                raise InputError(f"labels: {site} holds a number outside 0 to {len(CATEGORIES) - 1}")
            heads = values.reshape(-1, self._step(site))
            if not (heads == heads[:, :1]).all():
                raise InputError(f"labels: layer {site[0]}: an attention head has channels of two categories")
            kept[site] = values.to(torch.uint8)
        if set(self.labels) - set(kept):
            raise InputError("labels: units are channels of kinds ffn and o")
        object.__setattr__(self, "labels", kept)

    def _step(self, site: Site) -> int:
        """Channels of one unit of a site."""
        if site[1] == "ffn":
            return 1
        if self.head_dim < 1 or self.space.width(site) % self.head_dim:
            raise InputError(f"head_dim: {self.space.width(site)} channels are no multiple of {self.head_dim}")
        return self.head_dim

    # -- reading off

    def units(self, site: Site) -> Tensor:
        """Label of each unit of a site, int64 [units]: a channel each, a head each for o."""
        return self.labels[site].long()[:: self._step(site)]

    def flat(self) -> Tensor:
        """Labels of all units, int64 [units of the model], in the order of ``space.sites(POOL)``."""
        return torch.cat([self.units(site) for site in self.labels])

    def __len__(self) -> int:
        return self.flat().numel()

    def __eq__(self, other) -> bool:
        return isinstance(other, UnitMap) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def set(self, *names: str) -> NeuronSet:
        """The channels (FFN channels and o_proj inputs) of the units of these categories, older names included."""
        wanted = torch.tensor([CATEGORIES.index(category(n)) for n in names])
        masks = {site: torch.isin(values.long(), wanted) for site, values in self.labels.items()}
        return NeuronSet(self.space, masks, self.weights, {"rule": "units", "categories": [category(n) for n in names]})

    def counts(self) -> dict[str, int]:
        """Units of each category."""
        found = torch.bincount(self.flat(), minlength=len(CATEGORIES)).tolist()
        return dict(zip(CATEGORIES, found, strict=True))

    def shares(self) -> dict[str, float]:
        """Share of the units (0 to 1) in each category; they add up to 1."""
        return {name: n / len(self) for name, n in self.counts().items()}

    def rows(self) -> list[dict]:
        """One row a layer, kind ("ffn channel", "attention head" or "attention channel") and category: count, units."""
        attention = "attention head" if self.head_dim > 1 else "attention channel"
        found = []
        for site in self.labels:
            units = self.units(site)
            unit = "ffn channel" if site[1] == "ffn" else attention
            for i, name in enumerate(CATEGORIES):
                count = int((units == i).sum())
                found.append({"layer": site[0], "unit": unit, "category": name, "count": count, "units": len(units)})
        return found

    @property
    def fingerprint(self) -> str:
        """Short hash of architecture, unit size and labels."""
        digest = hashlib.sha256(f"{self.space.architecture} {self.head_dim}".encode())
        for site, values in self.labels.items():
            digest.update(repr(site).encode() + values.numpy().tobytes())
        return digest.hexdigest()[:16]

    # -- files

    def save(self, path) -> Path:
        """Write safetensors with space, categories and fingerprints in a checksummed header; atomic."""
        header = {
            "format": FORMAT,
            "space": self.space.to_json(),
            "categories": json.dumps(CATEGORIES),
            "head_dim": str(self.head_dim),
            "weights": self.weights,
            "fingerprint": self.fingerprint,
            "meta": json.dumps(dict(self.meta), sort_keys=True),
        }
        return write_sealed(path, {f"{layer}.{kind}": v for (layer, kind), v in self.labels.items()}, header)

    @classmethod
    def load(cls, path, space: NeuronSpace | None = None) -> UnitMap:
        """Read a map, one that names its categories ESU and EUU included.

        Raises InputError when the file is damaged or, given ``space``, of another architecture.
        """
        header, tensors = read_sealed(path, "nt_utils.units.")
        with damage_reported(path):
            found = NeuronSpace.from_json(header["space"])
            found.check(f"{path}: made for", space)
            order = torch.tensor([CATEGORIES.index(category(n)) for n in json.loads(header["categories"])])
            labels = {site_of(name): order[values.long()] for name, values in tensors.items()}
            loaded = cls(found, labels, int(header["head_dim"]), header["weights"], json.loads(header["meta"]))
        if loaded.fingerprint != header.get("fingerprint"):
            raise InputError(f"{path}: damaged file: its labels do not match its fingerprint")
        return loaded


def flow(before: UnitMap, after: UnitMap) -> list[dict]:
    """How units change category: one row a pair of categories with count, share of all units, share of ``before``'s.

    The counts of a row's category add up to its size in ``before``, those of a column's to its size in ``after``.

    Raises:
        InputError: two architectures, or heads in one and channels in the other.
    """
    if before.space.architecture != after.space.architecture or before.head_dim != after.head_dim:
        raise InputError("flow: the two maps are of different units (architecture, or heads against channels)")
    a, b = before.flat(), after.flat()
    table = torch.bincount(a * len(CATEGORIES) + b, minlength=len(CATEGORIES) ** 2).reshape(len(CATEGORIES), -1)
    sizes = table.sum(1).tolist()
    return [
        {
            "before": CATEGORIES[i],
            "after": CATEGORIES[j],
            "count": int(table[i, j]),
            "share": int(table[i, j]) / len(a),
            "share_of_before": int(table[i, j]) / max(sizes[i], 1),
        }
        for i in range(len(CATEGORIES))
        for j in range(len(CATEGORIES))
    ]


def with_inputs(neurons: NeuronSet, head_dim: int) -> NeuronSet:
    """Attention heads with the rows that feed them: what freezing a whole head means.

    Added are the query rows of every head of which all o channels are in the set, and the key and value rows of a
    key/value head when all query heads that share it are. FFN neurons own their gate and up rows already.
    """
    space, masks = neurons.space, dict(neurons.masks)
    for layer in range(space.num_layers):
        whole = neurons.mask((layer, "o")).reshape(-1, head_dim).all(1)
        groups = whole.reshape(space.width((layer, "v")) // head_dim, -1).all(1)
        for kind, heads in (("q", whole), ("k", groups), ("v", groups)):
            masks[layer, kind] = neurons.mask((layer, kind)) | heads.repeat_interleave(head_dim)
    return NeuronSet(space, masks, neurons.weights, neurons.meta)


def shared_prompts(calibration: Sequence[str], evaluation: Sequence[str]) -> None:
    """Refuse calibration prompts that the evaluation also holds.

    Raises:
        InputError: with how many, and the first one.
    """
    seen = set(evaluation)
    shared = [text for text in calibration if text in seen]
    if shared:
        raise InputError(
            f"calibration: {len(shared)} of {len(calibration)} prompts are also evaluated on (the first: {shared[0]!r}); "
            "use another split or source"
        )
