"""Which neurons are modulated, how many and how strongly, without training [NT, tunable mechanism].

**A neuron that ranks high for both safety and utility** goes to the list in which it stands higher (the same place: to
safety), and the other list moves on to its next neuron, so that both counts hold (:func:`assign`; ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nt_utils.errors import InputError, check_choice, check_count
from nt_utils.interventions.modulation import BOUNDS, Modulation
from nt_utils.neurons import POOL, NeuronSet
from nt_utils.selection import Ranking
from nt_utils.work import track


def assign(safety: Ranking, utility: Ranking, n_safety: int, n_utility: int) -> tuple[NeuronSet, NeuronSet]:
    """The top ``n_safety`` and ``n_utility`` neurons as disjoint sets of exactly these sizes.

    Both lists are walked place by place; a neuron goes to the list that reaches it first, at the same place to safety.

    Raises:
        InputError: a count that is negative, or more neurons than there are.
    """
    _check_rankings(safety, utility)
    size = safety.values.numel()
    for name, count in (("n_safety", n_safety), ("n_utility", n_utility)):
        check_count(name, count, 0, size, ", the neurons of the pool")
    if not 1 <= n_safety + n_utility <= size:
        raise InputError(
            f"n_safety, n_utility: {n_safety} + {n_utility} neurons; allowed: from 1 to {size} in all, the neurons of the pool"
        )
    orders = [torch.sort(r.values, descending=True, stable=True).indices.tolist() for r in (safety, utility)]
    chosen: tuple[list[int], list[int]] = ([], [])
    taken: set[int] = set()
    for place in range(size):
        for role, count in enumerate((n_safety, n_utility)):
            neuron = orders[role][place]
            if len(chosen[role]) < count and neuron not in taken:
                chosen[role].append(neuron)
                taken.add(neuron)
    first, second = (
        NeuronSet.from_flat(r.space, picks, r.kinds, meta={"rule": r.name})
        for r, picks in zip((safety, utility), chosen, strict=True)
    )
    return first, second


def whole_layers(by: Ranking, layers: int) -> NeuronSet:
    """Every neuron of the ``layers`` layers whose neurons rank highest on average: the layer-level baseline."""
    blocks = by.space.split(by.values.double(), by.kinds)
    mean = {
        layer: float(torch.cat([v for (i, _), v in blocks.items() if i == layer]).mean())
        for layer in range(by.space.num_layers)
    }
    check_count("layers", layers, 1, len(mean))
    best = sorted(mean, key=lambda layer: -mean[layer])[:layers]
    masks = {s: torch.ones_like(v, dtype=torch.bool) for s, v in blocks.items() if s[0] in best}
    return NeuronSet(by.space, masks, meta={"rule": f"layers {sorted(best)}"})


def _check_rankings(safety: Ranking, utility: Ranking) -> None:
    for name, found in (("safety", safety), ("utility", utility)):
        wrong = sorted(set(found.kinds) - set(POOL))
        if wrong:
            raise InputError(f"{name}: ranks {', '.join(wrong)} rows; alpha acts on {', '.join(POOL)} channels only")
    if (safety.space.architecture, safety.kinds) != (utility.space.architecture, utility.kinds):
        raise InputError("utility: ranks other neurons than safety (architecture or kinds differ)")


@dataclass(frozen=True)
class Preset:
    """A setting of the dial: shares of the pool (0 to 1)."""

    safety_share: float
    utility_share: float


#: More safety neurons for safety-critical use, more utility neurons where utility comes first [NT, tunable mechanism];
#: the counts are ours: a tenth of the pool in all.
PRESETS = {"safety-first": Preset(0.07, 0.03), "utility-first": Preset(0.03, 0.07)}


def dial(
    safety: Ranking,
    utility: Ranking,
    n_safety: int,
    n_utility: int,
    strength: float = 1.0,
    *,
    learnt: Modulation | None = None,
    start: tuple[float, float] = (1.2, 0.9),
    name: str = "",
) -> Modulation:
    """An intervention for any number of neurons and any strength, without training.

    Args:
        safety, utility: the rankings the neurons are taken from (see :func:`assign`).
        strength: 0 = the untouched model, 1 = alpha as it stands, between: ``1 + strength (alpha - 1)``; above 1 it
            goes on, up to the bounds (those of ``learnt`` where it is given, else ``BOUNDS``).
        learnt: a trained modulation. A neuron it holds in the same role takes its alpha, any other the mean alpha of its
            role there. Without it, or for a role it lacks, ``start`` = (safety, utility) is used.

    Raises:
        InputError: see :func:`assign`; a strength that is negative or not finite; a modulation of another architecture.
    """
    if not (isinstance(strength, (int, float)) and math.isfinite(strength) and strength >= 0):
        raise InputError(f"strength: got {strength!r}; allowed: a number from 0")
    sets = assign(safety, utility, n_safety, n_utility)
    if learnt is not None and learnt.space.architecture != safety.space.architecture:
        raise InputError("learnt: made for another architecture than the rankings")
    bounds, weights = (BOUNDS, "") if learnt is None else (learnt.bounds, learnt.weights)
    full = torch.cat([_role_alpha(role, chosen, learnt, start[role]) for role, chosen in enumerate(sets)])
    alpha = (1 + strength * (full - 1)).clamp(*bounds)
    meta = {"n_safety": n_safety, "n_utility": n_utility, "strength": strength}
    return Modulation(*sets, alpha, bounds, name or f"dial {n_safety}+{n_utility} x{strength:g}", weights, meta)


def _role_alpha(role: int, chosen: NeuronSet, learnt: Modulation | None, start: float) -> Tensor:
    """Alpha of a role's neurons: learnt where it was learnt, else that role's mean, else ``start``."""
    if learnt is None:
        return torch.full((len(chosen),), float(start))
    known = (learnt.safety, learnt.utility)[role]
    values = (learnt.safety_alpha, learnt.utility_alpha)[role]
    other = float(values.mean()) if len(known) else float(start)
    table = dict(zip(known, values.tolist(), strict=True))
    return torch.tensor([table.get(neuron, other) for neuron in chosen], dtype=torch.float32)


def preset(name: str, safety: Ranking, utility: Ranking, *, learnt: Modulation | None = None, **more) -> Modulation:
    """The dial at a named setting, "safety-first" or "utility-first" (at least one neuron of each role)."""
    check_choice("preset", name, PRESETS)
    setting, size = PRESETS[name], safety.values.numel()
    n_safety, n_utility = (max(1, round(share * size)) for share in (setting.safety_share, setting.utility_share))
    return dial(safety, utility, n_safety, n_utility, learnt=learnt, name=name, **more)


def sweep(
    safety: Ranking,
    utility: Ranking,
    n_safety: Iterable[int],
    n_utility: Iterable[int],
    strengths: Iterable[float],
    measure: Callable[[Modulation | None], Mapping[str, float]],
    *,
    progress: bool = True,
    **more,
) -> pd.DataFrame:
    """``measure`` over the grid of the dial's settings, one row each, the untouched model (0, 0, 0) first.

    Args:
        measure: intervention (None = untouched) -> named numbers, such as rates from an evaluation.
        more: what :func:`dial` takes besides.
    """
    strengths, n_utility = list(strengths), list(n_utility)
    grid = [(s, u, x) for s in n_safety for u in n_utility if s + u for x in strengths if x]
    rows = [{"n_safety": 0, "n_utility": 0, "strength": 0.0, **measure(None)}]
    for s, u, strength in track(grid, desc="sweep", unit="setting", disable=not progress):
        setting = dial(safety, utility, s, u, strength, **more)
        rows.append({"n_safety": s, "n_utility": u, "strength": float(strength), **measure(setting)})
    return pd.DataFrame(rows)


def mark_dominated(table: pd.DataFrame, lower: Sequence[str] = (), higher: Sequence[str] = ()) -> pd.DataFrame:
    """The table with a column ``dominated``: another row is as good in every named column and better in one.

    Args:
        lower, higher: columns in which less, or more, is better. A row with NaN in one of them is dominated.
    """
    missing = [column for column in [*lower, *higher] if column not in table]
    if missing or not (lower or higher):
        raise InputError(f"lower, higher: no such column: {', '.join(missing) or 'none was named'}")
    cost = np.column_stack([table[[*lower]].to_numpy(float), -table[[*higher]].to_numpy(float)])
    no_worse = (cost[:, None] <= cost[None]).all(-1)
    better = (cost[:, None] < cost[None]).any(-1)
    return table.assign(dominated=(no_worse & better).any(0) | np.isnan(cost).any(1))
