"""Adaptive activation adjustment: every chosen neuron's activation times its own alpha [NT, stage 2].

``x_k <- alpha_k x_k`` for N_s safety and N_u utility neurons, base weights frozen: one multiplication a site, whatever
the number of neurons. :mod:`nt_utils.interventions.learning` learns alpha, :mod:`nt_utils.interventions.dial` turns the
number of neurons and the strength without training, :mod:`nt_utils.interventions.export` folds alpha into weights.

Alpha acts on the channels that write to the residual stream (FFN channels and o_proj inputs, the study's pool): there it
folds into the weights that read the channel. Sets with q, k or v rows are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nt_utils import hooks
from nt_utils.errors import InputError
from nt_utils.files import damage_reported, read_sealed, write_sealed
from nt_utils.models import LanguageModel, device_of
from nt_utils.neurons import POOL, NeuronSet, NeuronSpace, Site, site_of

BOUNDS = (0.0, 3.0)
FORMAT = "nt_utils.modulation.2"


@dataclass(frozen=True, eq=False)
class Modulation:
    """Alpha for some neurons; an intervention.

    Args:
        safety, utility: disjoint sets over FFN channels and o_proj inputs; one of them may be empty.
        alpha: float [len(safety) + len(utility)], in the order of iteration, safety first; no unit.
        bounds: smallest and largest alpha allowed.
        name: for tables.
        weights: fingerprint of the weights it was learnt on (recorded; only adapters demand it).
        meta: how it was made; JSON-able.

    Raises:
        InputError: sets that overlap, are both empty or hold q, k or v rows; alpha out of bounds, NaN or of wrong length.
    """

    safety: NeuronSet
    utility: NeuronSet
    alpha: Tensor
    bounds: tuple[float, float] = BOUNDS
    name: str = "modulation"
    weights: str = ""
    meta: Mapping = field(default_factory=dict)

    def __post_init__(self):
        check_sets(self.safety, self.utility)
        check_bounds(self.bounds)
        alpha = torch.as_tensor(self.alpha).detach().to("cpu", torch.float32).clone()
        count = len(self.safety) + len(self.utility)
        if tuple(alpha.shape) != (count,):
            raise InputError(f"alpha: needs one value for each of the {count} neurons, got shape {list(alpha.shape)}")
        low, high = self.bounds
        if not ((alpha >= low) & (alpha <= high)).all():  # NaN fails both
            bad = alpha[~((alpha >= low) & (alpha <= high))][0].item()
            raise InputError(f"alpha: got {bad:g}; allowed: {low:g} to {high:g}")
        object.__setattr__(self, "alpha", alpha)

    @property
    def space(self) -> NeuronSpace:
        """The neurons of its architecture."""
        return self.safety.space

    @cached_property
    def factors(self) -> dict[Site, Tensor]:
        """site -> float32 [width] with alpha at the chosen neurons and 1 elsewhere; sites without neurons are left out."""
        return scatter(places(self.safety, self.utility), self.alpha)

    @property
    def safety_alpha(self) -> Tensor:
        """[len(safety)], in the order of iteration over the set."""
        return self.alpha[: len(self.safety)]

    @property
    def utility_alpha(self) -> Tensor:
        """[len(utility)]."""
        return self.alpha[len(self.safety) :]

    @property
    def key(self) -> str:
        """Hash of what acts: architecture and the factors that are not 1."""
        digest = hashlib.sha256(self.space.architecture.encode())
        for site, values in sorted(self.factors.items()):
            if (values != 1).any():
                digest.update(repr(site).encode() + values.numpy().tobytes())
        return f"modulation-{digest.hexdigest()[:16]}"

    def check(self, lm: LanguageModel) -> None:
        """Raise InputError on another architecture."""
        self.space.check("modulation: made for", lm.view.space)

    def active(self, lm: LanguageModel) -> AbstractContextManager:
        """Multiply while inside; one multiplication a site. Raises InputError on another architecture."""
        self.check(lm)
        acting = {}
        for site, values in self.factors.items():
            if (values != 1).any():  # on the device and in the precision of the site, so that no forward copies them
                projection = lm.view.projection(*site)
                acting[site] = values.to(device_of(projection.module), projection.weight.dtype)
        return hooks.scale(lm.view, acting, self.name) if acting else nullcontext()

    def save(self, path) -> Path:
        """Write one safetensors file; atomic."""
        tensors = {"alpha": self.alpha}
        for role, chosen in (("safety", self.safety), ("utility", self.utility)):
            tensors |= {f"{role}.{layer}.{kind}": m.to(torch.uint8) for (layer, kind), m in chosen.masks.items()}
        header = {
            "format": FORMAT,
            "space": self.space.to_json(),
            "name": self.name,
            "weights": self.weights,
            "bounds": json.dumps(list(self.bounds)),
            "meta": json.dumps(dict(self.meta), sort_keys=True),
            "key": self.key,
        }
        return write_sealed(path, tensors, header)

    @classmethod
    def load(cls, path, space: NeuronSpace | None = None) -> Modulation:
        """Read a modulation; raises InputError when it is damaged or, given ``space``, of another architecture."""
        header, tensors = read_sealed(path, FORMAT)
        masks: dict[str, dict[Site, Tensor]] = {"safety": {}, "utility": {}}
        with damage_reported(path):
            found = NeuronSpace.from_json(header["space"])
            found.check(f"{path}: made for", space)
            alpha = tensors.pop("alpha")
            for name, mask in tensors.items():
                role, _, site = name.partition(".")
                masks[role][site_of(site)] = mask.bool()
            safety, utility = (NeuronSet(found, masks[role], header["weights"]) for role in ("safety", "utility"))
            low, high = json.loads(header["bounds"])
            meta = json.loads(header["meta"])
            return cls(safety, utility, alpha, (low, high), header["name"], header["weights"], meta)


def check_bounds(bounds: tuple[float, float]) -> None:
    """Raise InputError unless the bounds stand around 1."""
    if not (len(bounds) == 2 and math.isfinite(bounds[1]) and 0 <= bounds[0] <= 1 <= bounds[1]):
        raise InputError(f"bounds: got {bounds!r}; allowed: two numbers around 1, the lower one not below 0")


def check_sets(safety: NeuronSet, utility: NeuronSet) -> None:
    """Raise InputError unless alpha can act on these two sets."""
    if safety.space.architecture != utility.space.architecture:
        raise InputError("utility: found on another architecture than safety")
    if not len(safety) and not len(utility):
        raise InputError("safety, utility: both sets are empty; there is nothing to modulate")
    for role, chosen in (("safety", safety), ("utility", utility)):
        wrong = sorted({kind for _, kind in chosen.masks} - set(POOL))
        if wrong:
            raise InputError(f"{role}: holds {', '.join(wrong)} rows; alpha acts on {', '.join(POOL)} channels only")
    both = len(safety & utility)
    if both:
        raise InputError(f"safety, utility: {both} neurons are in both sets; use assign() to share them out")


def places(safety: NeuronSet, utility: NeuronSet) -> dict[Site, tuple[Tensor, Tensor, int]]:
    """site -> (channels, their positions in alpha, width)."""
    found: dict[Site, tuple[list, list, int]] = {}
    for position, (layer, kind, index) in enumerate([*safety, *utility]):
        site = (layer, kind)
        channels, positions, _ = found.setdefault(site, ([], [], safety.space.width(site)))
        channels.append(index)
        positions.append(position)
    return {s: (torch.tensor(c), torch.tensor(p), w) for s, (c, p, w) in found.items()}


def scatter(where: Mapping[Site, tuple[Tensor, Tensor, int]], alpha: Tensor) -> dict[Site, Tensor]:
    """One factor [width] a site; gradients flow back into ``alpha``."""
    return {
        site: alpha.new_ones(width).index_put((channels.to(alpha.device),), alpha[positions.to(alpha.device)])
        for site, (channels, positions, width) in where.items()
    }
