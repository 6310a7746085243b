"""From scores to neuron sets: the selection rules and the controls every chosen set is compared with.

Each rule gives every neuron one number (a :class:`Ranking`), so that a set of any size, and a dose curve,
comes from the same numbers. Sources: [SN] Zhao et al., ICLR 2025, Eq. 2 and its published code;
``contrast`` and the controls are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_utils.errors import InputError, check_choice, check_count
from nt_utils.neurons import KINDS, POOL, NeuronScores, NeuronSet, NeuronSpace, Site
from nt_utils.scoring.attribution import aggregate
from nt_utils.scoring.fluctuation import Fluctuation
from nt_utils.units import CATEGORIES, UnitMap, category


@dataclass(frozen=True)
class Ranking:
    """One number per neuron, higher = chosen earlier. ``values``: float ``[space.size(kinds)]``."""

    space: NeuronSpace
    kinds: tuple[str, ...]
    values: Tensor
    name: str = ""

    def top(self, n: int) -> NeuronSet:
        """The ``n`` neurons with the highest values (ties: the earlier neuron)."""
        size = self.values.numel()
        check_count("n", n, 1, size, f", the neurons of {self.kinds}")
        order = torch.sort(self.values, descending=True, stable=True).indices
        return self._set(order[:n])

    def top_share(self, share: float) -> NeuronSet:
        """The top ``share`` (0 to 1) of these neurons, at least one: 1% of the units is 1% of this pool."""
        if not 0 < share <= 1:
            raise InputError(f"share: got {share!r}; allowed: above 0, at most 1")
        return self.top(max(1, round(share * self.values.numel())))

    def at_least(self, value: float) -> NeuronSet:
        """Every neuron whose value reaches ``value``."""
        return self._set((self.values >= value).nonzero().flatten())

    def _set(self, indices: Tensor) -> NeuronSet:
        return NeuronSet.from_flat(self.space, indices, self.kinds, meta={"rule": self.name})


def _needed(rho: float, n_prompts: int) -> int:
    if not 0 < rho <= 1:
        raise InputError(f"rho: got {rho!r}; allowed: above 0, at most 1 (1 = every prompt)")
    return max(1, math.ceil(rho * n_prompts - 1e-9))


def consistency(
    scores: NeuronScores,
    rho: float = 1.0,
    kinds: Sequence[str] = KINDS,
    per: str = "projection",
    relative: bool = False,
) -> Ranking:
    """How high a neuron ranks on at least ``rho`` of the prompts [SN, the rule of its code].

    The value is minus the rank (1 = most important) that the neuron reaches or betters on ``rho`` of the prompts,
    within its (layer, projection) or, with ``per="pool"``, over all of ``kinds``. A neuron is in the top-k of
    ``rho`` of the prompts exactly when its value is at least ``-k``. ``relative`` divides the rank by the number of
    neurons it is taken among, so that one value serves projections of different widths.
    """
    need = _needed(rho, scores.n_prompts)
    check_choice("per", per, ("projection", "pool"))
    blocks = [scores.matrix(kinds)] if per == "pool" else [scores.get(*site) for site in scores.space.sites(kinds)]
    reached = [_ranks(b).sort(dim=0).values[need - 1].double() for b in blocks]
    values = torch.cat([-r / r.numel() if relative else -r for r in reached])
    return Ranking(scores.space, tuple(kinds), values, f"consistent rho={rho:g} per {per}")


def _ranks(values: Tensor) -> Tensor:
    """Rank of each column within its row, 1 = largest; ties go to the earlier column. ``[n, width]``, int64."""
    order = torch.sort(values, dim=1, descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    places = torch.arange(1, values.shape[1] + 1).expand_as(order)
    return ranks.scatter_(1, order, places)


def consistent(
    scores: NeuronScores, k: int | float, rho: float = 1.0, kinds: Sequence[str] = KINDS, per: str = "projection"
) -> NeuronSet:
    """Neurons in the top ``k`` on at least ``rho`` of the prompts; rho = 1 is the paper's rule [SN].

    ``k`` is a whole number of neurons, or a share (0 to 1) of the neurons the rank is taken among.
    """
    if isinstance(k, bool) or not ((isinstance(k, int) and k >= 1) or (isinstance(k, float) and 0 < k <= 1)):
        raise InputError(f"k: got {k!r}; allowed: a whole number, at least 1, or a share above 0 and at most 1.0")
    return consistency(scores, rho, kinds, per, relative=isinstance(k, float)).at_least(-k)


def importance_reached(scores: NeuronScores, rho: float = 1.0, kinds: Sequence[str] = KINDS) -> Ranking:
    """The importance a neuron reaches on at least ``rho`` of the prompts (rho = 1: its smallest)."""
    need = _needed(rho, scores.n_prompts)
    columns = [scores.get(*site).sort(dim=0, descending=True).values[need - 1] for site in scores.space.sites(kinds)]
    return Ranking(scores.space, tuple(kinds), torch.cat(columns), f"threshold rho={rho:g}")


def threshold(scores: NeuronScores, epsilon: float, rho: float = 1.0, kinds: Sequence[str] = KINDS) -> NeuronSet:
    """Neurons whose importance is at least ``epsilon`` on at least ``rho`` of the prompts [SN, Eq. 2]."""
    if not epsilon >= 0:
        raise InputError(f"epsilon: got {epsilon!r}; allowed: 0 or more")
    return importance_reached(scores, rho, kinds).at_least(epsilon)


def contrast(harmful: NeuronScores, benign: NeuronScores, kinds: Sequence[str] = POOL) -> Ranking:
    """How much more a neuron matters on harmful than on benign prompts (this project's rule).

    Each prompt's scores are divided by their mean over the pool, then averaged over the harmful and over the benign
    prompts; the value is the difference. Meant for importance over the last prompt tokens, and for harmful and
    benign prompts that share their templates, so that the difference is the topic's and not the wording's.
    """
    if harmful.space.architecture != benign.space.architecture:
        raise InputError("benign: scored on another architecture than harmful")
    if harmful.meta.get("positions") != benign.meta.get("positions"):
        raise InputError("benign: scored at other positions than harmful")

    def mean(scores: NeuronScores) -> Tensor:
        values = scores.matrix(kinds).double()
        return (values / values.mean(dim=1, keepdim=True).clamp_min(1e-30)).mean(dim=0)

    return Ranking(harmful.space, tuple(kinds), mean(harmful) - mean(benign), "contrast")


def mean_importance(scores: NeuronScores, kinds: Sequence[str] = POOL) -> Ranking:
    """Average importance over the prompts."""
    return Ranking(scores.space, tuple(kinds), scores.matrix(kinds).mean(dim=0), "mean importance")


def attributed(scores: NeuronScores, how: str = "signed", name: str = "attribution") -> Ranking:
    """Neurons of the pool by attribution, averaged over the attack classes (``how``: signed or absolute) [NT, stage 1]."""
    kinds = tuple(kind for kind in POOL if kind in scores.kinds)
    return Ranking(scores.space, kinds, aggregate(scores, how, kinds), f"{name}, {how}")


def set_difference(safety: NeuronScores, utility: NeuronScores, p: float, kinds: Sequence[str] = POOL) -> Ranking:
    """Important on safety data and not on utility data [Wei et al. 2024, section 3.3].

    The paper takes the top q% on safety data minus the top p% on utility data. Here p is given (a share of the neurons,
    0 to 1) and every q follows from the ranking: neurons outside the utility data's top p in the order of their mean
    safety score, then those inside, so that any n of them are the set difference with the q that leaves n. **Ours**: both
    tops are taken over all of ``kinds``, where the paper compares the weights of one matrix row with each other.
    """
    if safety.space.architecture != utility.space.architecture:
        raise InputError("utility: scored on another architecture than safety")
    if not 0 <= p < 1:
        raise InputError(f"p: got {p!r}; allowed: 0 or more, below 1 (a share of the neurons)")
    score = mean_importance(safety, kinds).values
    useful = torch.zeros(score.numel(), dtype=torch.bool)
    order = torch.sort(mean_importance(utility, kinds).values, descending=True, stable=True).indices
    useful[order[: round(p * score.numel())]] = True
    ranks = _ranks(score[None])[0].double()
    return Ranking(safety.space, tuple(kinds), -(ranks + score.numel() * useful), f"set difference p={p:g}")


def root_mean_square(scores: NeuronScores, kinds: Sequence[str] = POOL) -> Ranking:
    """Root mean square over tokens, from sums of squares a prompt (``scoring.activation_change``) [Chen et al. 2024]."""
    if "tokens" not in scores.meta:
        raise InputError("scores: these are no sums of squares with their numbers of tokens; use activation_change")
    tokens = sum(scores.meta["tokens"][row] for row in scores.rows)
    values = (scores.matrix(kinds).double().sum(dim=0) / tokens).sqrt()
    return Ranking(scores.space, tuple(kinds), values, "activation change")


# ----------------------------------------------------------------------------------------------------- units

#: Shares of the units that make the first three groups; the rest is CU (methods.md section 3; ours).
PROPORTIONS = {"SCU": 0.03, "UCU": 0.10, "RU": 0.20}
SCORES = ("weighted variance", "variance", "mean square")
CONTRASTS = ("difference", "log ratio")


@dataclass(frozen=True)
class UnitScores:
    """Normalised scores of every unit on safety and on utility data, and how units are ranked by them [SSAH, section 3].

    Attributes:
        safety, utility: float64 [units], in the order of ``space.sites(POOL)``; each (layer, kind) has mean 1.
        head_dim: channels of an attention unit (1: channels are units).
    """

    space: NeuronSpace
    safety: Tensor
    utility: Tensor
    head_dim: int
    contrast: str = "difference"

    def __post_init__(self):
        check_choice("contrast", self.contrast, CONTRASTS)

    @property
    def difference(self) -> Tensor:
        """How much more a unit does on safety data: the difference of the scores (the paper), or their log ratio."""
        if self.contrast == "difference":
            return self.safety - self.utility
        tiny = torch.finfo(torch.float64).tiny  # a channel that never moves has score 0 on both: ratio 1
        return (self.safety + tiny).log() - (self.utility + tiny).log()

    def order(self, name: str) -> Tensor:
        """Units from the first candidate of SCU (highest contrast), UCU (lowest) or RU (lowest sum) to the last."""
        key = {"SCU": -self.difference, "UCU": self.difference, "RU": self.safety + self.utility}
        if category(name) not in key:
            raise InputError(f"category: got {name!r}; SCU, UCU and RU are ranked, CU is the rest")
        return torch.sort(key[category(name)], stable=True).indices

    def neurons(self, units: Tensor) -> NeuronSet:
        """The channels of these units (positions)."""
        chosen = torch.zeros(self.safety.numel(), dtype=torch.bool)
        chosen[units] = True
        return NeuronSet(self.space, {site: mask.bool() for site, mask in self._channels(chosen).items()})

    def _channels(self, flat: Tensor) -> dict[Site, Tensor]:
        steps = {site: 1 if site[1] == "ffn" else self.head_dim for site in self.space.sites(POOL)}
        parts = flat.split([self.space.width(site) // step for site, step in steps.items()])
        return {site: p.repeat_interleave(step) for (site, step), p in zip(steps.items(), parts, strict=True)}

    def map(self, proportions: Mapping[str, float] | None = None, weights: str = "", **meta) -> UnitMap:
        """Assign every unit: the top SCU share by contrast, the last UCU share, of the others the least active RU share.

        Args:
            proportions: shares of the units for SCU, UCU and RU (and CU, which must be the rest); PROPORTIONS if None.

        Raises:
            InputError: shares that are negative, exceed 1, overlap or do not add up; or a group that comes out empty.
        """
        shares = check_proportions(PROPORTIONS if proportions is None else proportions)
        n = self.safety.numel()
        labels = torch.full((n,), CATEGORIES.index("CU"))
        free = torch.ones(n, dtype=torch.bool)
        for name in ("SCU", "UCU", "RU"):
            order = self.order(name)
            order = order[free[order]][: _count(name, shares[name], n, int(free.sum()))]
            labels[order], free[order] = CATEGORIES.index(name), False
        if not free.any():
            raise InputError(f"CU: none of the {n} units is left for it; lower the shares of SCU, UCU or RU")
        meta = {"proportions": shares, "contrast": self.contrast, **meta}
        return UnitMap(self.space, self._channels(labels), self.head_dim, weights, meta)


def unit_scores(
    safety: Fluctuation,
    utility: Fluctuation,
    *,
    score: str = "weighted variance",
    contrast: str = "difference",
    heads: bool = True,
) -> UnitScores:
    """Scores of every unit from the statistics on safety and on utility data [SSAH, section 3].

    Args:
        score: "weighted variance" (Var ||W||^2, the default), "variance", or "mean square" (E[x^2] ||W||^2); an attention
            head's is the sum of its channels'. Each is divided by its mean over the (layer, kind).
        contrast: "difference" of the normalised scores, as the paper has it, or their "log ratio".
        heads: attention heads as units; False: o_proj channels.

    Raises:
        InputError: an unknown name, or statistics of two architectures.
    """
    check_choice("score", score, SCORES)
    if safety.space.architecture != utility.space.architecture:
        raise InputError("utility: its statistics are of another architecture than safety's")
    head_dim = safety.head_dim if heads else 1

    def values(statistics: Fluctuation) -> Tensor:
        found = []
        for layer, kind in safety.space.sites(POOL):
            raw = statistics.variance(layer, kind)
            if score == "mean square":
                raw = raw + statistics.mean(layer, kind) ** 2
            if score != "variance":
                raw = raw * statistics.readers[layer, kind]
            raw = raw.reshape(-1, head_dim).sum(1) if kind == "o" else raw
            found.append(raw / raw.mean().clamp_min(torch.finfo(torch.float64).tiny))
        return torch.cat(found)

    return UnitScores(safety.space, values(safety), values(utility), head_dim, contrast)


def check_proportions(proportions: Mapping[str, float]) -> dict[str, float]:
    """Shares of SCU, UCU and RU under their present names; raises InputError where they make no partition."""
    shares = {category(name): float(value) for name, value in proportions.items()}
    if len(shares) != len(proportions):
        raise InputError(f"proportions: a category is named twice in {', '.join(proportions)}")
    if missing := {"SCU", "UCU", "RU"} - set(shares):
        raise InputError(f"proportions: no share for {', '.join(sorted(missing))}; give SCU, UCU and RU")
    for name, value in shares.items():
        if not 0 < value < 1:
            raise InputError(f"proportions: {name} is {value:g}; allowed: above 0 and below 1")
    rest = 1 - (shares["SCU"] + shares["UCU"] + shares["RU"])
    if rest < -1e-9:
        raise InputError(f"proportions: SCU, UCU and RU overlap: together {1 - rest:g}, at most 1 is there")
    if "CU" in shares and abs(shares["CU"] - rest) > 1e-6:
        raise InputError(f"proportions: they add up to {sum(shares.values()):g}, not 1; CU is the rest, {rest:g}")
    return {name: shares[name] for name in ("SCU", "UCU", "RU")}


def _count(name: str, share: float, n: int, free: int) -> int:
    found = min(round(share * n), free)
    if found < 1:
        raise InputError(
            f"{name}: {100 * share:g}% of {n} units, {free} of them free, is none; raise its share to at least {100 / n:.2g}%"
        )
    return found


@dataclass(frozen=True)
class Cost:
    """What pruning a set costs: how much less safe and how much less useful the model is (differences of rates)."""

    safety: float
    utility: float


def find_proportions(
    scores: UnitScores,
    cost: Callable[[NeuronSet], Cost],
    shares: Sequence[float],
    *,
    safety: float = 0.3,
    utility: float = 0.1,
    free: float = 0.05,
) -> tuple[dict[str, float], list[dict]]:
    """Grow each group until pruning it costs a stated amount, as the paper sets its proportions [SSAH, section 3].

    SCU is the smallest of the shares at which safety falls by at least ``safety``; UCU the smallest at which utility falls
    by at least ``utility``; RU the largest up to which neither has fallen by more than ``free``. A group that never gets
    there takes the largest share (SCU, UCU), one that starts above it the smallest (RU). Each leaves the smallest share to
    those after it, so that the three are at most 90% of the units.

    Args:
        cost: evaluates a model with these channels pruned, on a development set.
        shares: the candidates, from 0 to 1; each group is grown along them in rising order.
    Returns:
        The proportions, and one row a step: category, share, safety (fall), utility (fall), chosen.
    """
    steps = sorted(shares)
    if not steps or not 0 < steps[0] <= 0.3 or steps[-1] >= 1:
        raise InputError(f"shares: got {list(shares)!r}; allowed: above 0 and below 1, the smallest at most 0.3")
    n, rows = scores.safety.numel(), []
    chosen: dict[str, float] = {}
    enough = {
        "SCU": lambda c: c.safety >= safety,
        "UCU": lambda c: c.utility >= utility,
        "RU": lambda c: max(c.safety, c.utility) > free,
    }
    for place, (name, done) in enumerate(enough.items()):
        order, last = scores.order(name), steps[0]
        room = 0.9 - sum(chosen.values()) - (len(enough) - 1 - place) * steps[0] + 1e-9
        for share in (share for share in steps if share <= room):
            found = cost(scores.neurons(order[: _count(name, share, n, n)]))
            rows.append({"category": name, "share": share, "safety": found.safety, "utility": found.utility})
            stop = done(found)
            if not (name == "RU" and stop):
                last = share
            if stop:
                break
        chosen[name] = last
    return chosen, [{**row, "chosen": row["share"] == chosen[str(row["category"])]} for row in rows]


# -------------------------------------------------------------------------------------------------- controls


def matched_random(
    chosen: NeuronSet, draws: int = 20, seed: int = 0, *, avoid: bool = True, unit: Mapping[Site, int] | None = None
) -> list[NeuronSet]:
    """Random sets with as many neurons per layer and kind as ``chosen``.

    They are drawn from the neurons not chosen. Where a site has too few of those (more than half of it is chosen), they are
    drawn from all of that site's neurons and overlap ``chosen`` as chance has it; ``meta["overlapping"]`` names such sites.

    Args:
        avoid: False draws from all neurons at every site.
        unit: site -> neurons that are drawn together (the channels of an attention head); 1 where it is not given.
    """
    check_count("draws", draws)
    generator = torch.Generator().manual_seed(seed)
    return [
        _matched(chosen, lambda site, free: torch.rand(len(free), generator=generator), avoid, unit)
        for _ in range(draws)
    ]


def foundation_control(chosen: NeuronSet, general: NeuronScores, rho: float = 1.0) -> NeuronSet:
    """The most important foundation neurons outside ``chosen``, as many per layer and kind [SN, foundation neurons].

    Where more than half of a site is chosen, its most important neurons, chosen or not.
    """
    kinds = [k for k in KINDS if k in general.kinds]
    reached = general.space.split(importance_reached(general, rho, kinds).values, kinds)
    return _matched(chosen, lambda site, free: -reached[site][free])


def importance_matched(chosen: NeuronSet, benign: NeuronScores) -> NeuronSet:
    """For each chosen neuron another of its layer and kind with the nearest mean importance on benign prompts.

    Greedy, the most important chosen neuron first, no neuron twice; where more than half of a site is chosen, any other
    neuron of it may be taken.
    """
    _check_not_empty(chosen)
    masks = {}
    for site, mask in chosen.masks.items():
        mean = benign.get(*site).mean(dim=0)
        wanted = mask.nonzero().flatten()
        free = ~mask if 2 * len(wanted) <= len(mask) else torch.ones_like(mask)
        picked = torch.zeros_like(mask)
        for index in wanted[torch.argsort(mean[wanted], descending=True, stable=True)]:
            distance = (mean - mean[index]).abs().masked_fill(~free, math.inf)
            others = free.clone()
            others[index] = False
            if others.any():  # a neuron is its own match only where no other is left
                distance[index] = math.inf
            nearest = int(distance.argmin())
            picked[nearest], free[nearest] = True, False
        masks[site] = picked
    return NeuronSet(chosen.space, masks, meta={"rule": "importance-matched"})


def _check_not_empty(chosen: NeuronSet) -> None:
    if not len(chosen):
        raise InputError("chosen: the neuron set is empty; nothing to match")


def _matched(
    chosen: NeuronSet,
    order: Callable[[Site, Tensor], Tensor],
    avoid: bool = True,
    unit: Mapping[Site, int] | None = None,
) -> NeuronSet:
    """As many units per site as ``chosen``, outside it where possible, those with the smallest ``order(site, free)`` first."""
    _check_not_empty(chosen)
    masks, overlapping = {}, []
    for site, mask in chosen.masks.items():
        width = (unit or {}).get(site, 1)
        taken = mask[::width]
        free, need = (~taken).nonzero().flatten(), int(taken.sum())
        if not avoid or need > len(free):
            free = torch.arange(len(taken))
            overlapping.append(f"{site[0]}.{site[1]}")
        picked = torch.zeros_like(taken)
        picked[free[torch.argsort(order(site, free), stable=True)[:need]]] = True
        masks[site] = picked.repeat_interleave(width)
    return NeuronSet(chosen.space, masks, meta={"rule": "matched", "overlapping": overlapping})


def expected_jaccard(a: NeuronSet, b: NeuronSet) -> float:
    """Jaccard of ``a`` with a random set that has ``b``'s count in every layer and kind, by expected overlap.

    The overlap of a random set is hypergeometric at each site; the ratio of expectations is used, which is close
    to the expected ratio for sets of more than a few neurons.
    """
    overlap = 0.0
    for site in dict.fromkeys([*a.masks, *b.masks]):
        overlap += int(a.mask(site).sum()) * int(b.mask(site).sum()) / a.space.width(site)
    union = len(a) + len(b) - overlap
    return overlap / union if union else 1.0
