"""What notebook 03 asks of a unit map: where its units lie, what pruning them does, on what it depends.

[SSAH] is Li & Kim, ICLR 2026, arXiv 2410.10862; the formulas are in :mod:`nt_utils.selection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd

from nt_utils import selection
from nt_utils.data.records import Prompt
from nt_utils.errors import InputError
from nt_utils.experiments.bench import Bench, Finding, Measure, overlap
from nt_utils.interventions.pruning import Prune
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL, NeuronSet
from nt_utils.scoring.fluctuation import Fluctuation, fluctuation
from nt_utils.selection import Cost, UnitScores, unit_scores
from nt_utils.units import CATEGORIES, UnitMap, shared_prompts

# ------------------------------------------------------------------------------------------------- calibration


#: Which responses are teacher-forced on safety and on utility prompts.
RESPONSES = ("refusal", "helpful")


def statistics(lm: LanguageModel, prompts: Sequence[Prompt], target: str, batch_size: int = 16) -> Fluctuation:
    """Activation statistics over prompt tokens and the teacher-forced responses.

    Args:
        target: the field with the response, "refusal" or "helpful"; "" for prompt tokens alone.
    """
    responses = [getattr(p, target) for p in prompts] if target else None
    return fluctuation(lm, [p.text for p in prompts], responses, batch_size=batch_size, progress=False)


def responses_known(safety: Sequence[Prompt], utility: Sequence[Prompt]) -> tuple[str, str]:
    """RESPONSES where every prompt has its response, else none: one set with and one without would differ by that."""
    pairs = zip(RESPONSES, (safety, utility), strict=True)
    return RESPONSES if all(getattr(p, field) for field, prompts in pairs for p in prompts) else ("", "")


@dataclass(frozen=True)
class Calibration:
    """Statistics of small groups of prompts, from which those of any subset are put together without the model.

    ``safety[i]`` and ``utility[i]`` belong together (paired prompts stay paired); ``size`` prompts in each.
    """

    safety: tuple[Fluctuation, ...]
    utility: tuple[Fluctuation, ...]
    size: int

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        safety: Sequence[Prompt],
        utility: Sequence[Prompt],
        *,
        targets: tuple[str, str] | None = None,
        size: int = 8,
        evaluated: Sequence[str] = (),
    ) -> Calibration:
        """Run the model over both prompt sets in groups of ``size``; a rest that fills no group is left out.

        Args:
            targets: see :func:`statistics`, for each of the two; None: :func:`responses_known`.

        Raises:
            InputError: fewer than two groups, or prompts that are also in ``evaluated``.
        """
        shared_prompts([p.text for p in [*safety, *utility]], evaluated)
        targets = targets or responses_known(safety, utility)
        groups = min(len(safety), len(utility)) // size
        if groups < 2:
            raise InputError(f"calibration: {min(len(safety), len(utility))} prompts; at least {2 * size} are needed")

        def parts(prompts, target):
            return tuple(statistics(lm, prompts[i * size : (i + 1) * size], target, size) for i in range(groups))

        return cls(parts(safety, targets[0]), parts(utility, targets[1]), size)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.safety)

    def merged(self, rows: Sequence[int] | None = None) -> tuple[Fluctuation, Fluctuation]:
        """Statistics on safety and on utility prompts of these groups (None: all)."""
        rows = range(self.groups) if rows is None else rows
        safety, utility = (reduce(Fluctuation.merge, [part[i] for i in rows]) for part in (self.safety, self.utility))
        return safety, utility

    def scores(self, rows: Sequence[int] | None = None, **options) -> UnitScores:
        """Unit scores from these groups; options as for :func:`nt_utils.selection.unit_scores`."""
        return unit_scores(*self.merged(rows), **options)


def scored(
    lm: LanguageModel, safety: Sequence[Prompt], utility: Sequence[Prompt], *, evaluated: Sequence[str] = (), **options
) -> tuple[UnitScores, Fluctuation]:
    """Scores of a model's units, and the utility statistics that pruning takes its means from.

    Args:
        safety: harmful prompts (with their refusals); utility: benign prompts (with their helpful responses).
        evaluated: texts of the evaluation; sharing one with the calibration is refused.
        options: of :func:`nt_utils.selection.unit_scores` (score, contrast, heads).
    """
    shared_prompts([p.text for p in [*safety, *utility]], evaluated)
    targets = responses_known(safety, utility)
    on_safety, on_utility = (statistics(lm, p, t) for p, t in zip((safety, utility), targets, strict=True))
    return unit_scores(on_safety, on_utility, **options), on_utility


# ------------------------------------------------------------------------------------------------------- where


def where_table(units: UnitMap) -> pd.DataFrame:
    """Share of each layer's units in each category: layer, unit, category, count, units, share."""
    table = pd.DataFrame(units.rows())
    return table.assign(share=table["count"] / table["units"])


def size_table(units: UnitMap) -> pd.DataFrame:
    """Units of each category, their share of all units and of the model's parameters (pruned columns and rows)."""
    shares = units.shares()
    return pd.DataFrame(
        [
            {
                "category": name,
                "units": count,
                "share_of_units": shares[name],
                "share_of_parameters": units.set(name).share_of_parameters(),
                "heads": sum(r["count"] for r in units.rows() if r["category"] == name and "attention" in r["unit"]),
            }
            for name, count in units.counts().items()
        ]
    )


# ------------------------------------------------------------------------------------------------------ pruning


def pruning(neurons: NeuronSet, means: Fluctuation | None) -> Prune:
    """Prune to the means, or to zero where there are none."""
    return Prune(neurons) if means is None else Prune.to_mean(neurons, means)


def random_like(units: UnitMap, chosen: NeuronSet, draws: int, seed: int) -> list[NeuronSet]:
    """Random sets with as many units per layer and kind as ``chosen`` (whole units of the map), whole heads included.

    Drawn from the units outside the set, where those are enough, else from all units of the site.
    """
    widths = {site: units.space.width(site) // len(units.units(site)) for site in units.labels}
    return selection.matched_random(chosen, draws, seed, unit=widths)


def pruning_table(
    bench: Bench, units: UnitMap, means: Fluctuation | None, names: Sequence[str], draws: int, seed: int
) -> tuple[pd.DataFrame, dict[str, list[Prune]]]:
    """Table 1 of the paper: the dense model, each category pruned, and random units with the same count per site.

    Args:
        means: what pruned channels are replaced by; None: zero.
    Returns:
        Columns condition, group (none, chosen, control), share (of the units), metric, value, low, high, n; and the
        controls of each category.
    """
    shares, controls = units.shares(), {}
    rows = bench.rates(None, condition="dense", group="none", share=0.0)
    for name in names:
        rows += bench.rates(pruning(units.set(name), means), condition=name, group="chosen", share=shares[name])
        controls[name] = [pruning(s, means) for s in random_like(units, units.set(name), draws, seed)]
        rows += bench.random_rates(controls[name], f"random, matched to {name}", group="control", share=shares[name])
    return pd.DataFrame(rows), controls


def findings(
    bench: Bench,
    units: UnitMap,
    means: Fluctuation | None,
    controls: Mapping[str, Sequence[Prune]],
    safety: Measure,
    utility: Measure,
) -> Iterator[Finding]:
    """What is said of A2 (SCU), A3 (UCU) and A4 (RU): changes of both rates, against random units or against the dense model."""
    against = {
        "A2": ("SCU", {"safety": True, "utility": False}),
        "A3": ("UCU", {"utility": True, "safety": True}),
        "A4": ("RU", {"utility": False, "safety": False}),
    }
    for claim, (name, parts) in against.items():
        action = pruning(units.set(name), means)
        for part, random in parts.items():
            measure = safety if part == "safety" else utility
            others: Sequence = controls[name] if random else [None]
            yield Finding(claim, "", part, bench.excess(action, others, measure))


def pruning_cost(
    bench: Bench, means: Fluctuation | None, safety: Measure, utility: Measure
) -> Callable[[NeuronSet], Cost]:
    """The evaluation that :func:`nt_utils.selection.find_proportions` asks for, on a development set's bench."""

    def rate(action, measure: Measure) -> float:
        return bench.rate(measure, action).value

    def cost(neurons: NeuronSet) -> Cost:
        action = pruning(neurons, means)
        return Cost(rate(action, safety) - rate(None, safety), rate(None, utility) - rate(action, utility))

    return cost


def growth_table(rows: Sequence[Mapping]) -> pd.DataFrame:
    """The steps of :func:`nt_utils.selection.find_proportions` in long form: category, share, chosen, cost, value."""
    table = pd.DataFrame(rows)
    names = {"safety": "rise of direct ASR", "utility": "fall of utility"}
    return table.rename(columns=names).melt(["category", "share", "chosen"], var_name="cost", value_name="value")


# -------------------------------------------------------------------------------------------------- sensitivity


def _overlaps(pairs: Sequence[tuple[UnitMap, UnitMap]], labels: Mapping) -> list[dict]:
    """One row a category: how far the pairs' sets agree."""
    return [{**labels, "category": c, **overlap([(a.set(c), b.set(c)) for a, b in pairs])} for c in CATEGORIES]


def sensitivity_table(
    calibration: Calibration,
    variants: Mapping[str, Mapping],
    proportions: Mapping[str, float],
    sizes: Sequence[int],
    draws: int,
    seed: int,
) -> pd.DataFrame:
    """Agreement of the maps that two disjoint random subsets of the calibration prompts give.

    Args:
        variants: name -> options of the scores; sizes: prompts of each kind in a subset (rounded down to whole groups);
        draws: pairs of subsets.
    Returns:
        Columns variant, prompts, category, value, low, high (middle 95% of the pairs), n (pairs), chance. Sizes of which
        two subsets do not fit are left out; when none fits, half of the prompts is taken.
    """
    rng, rows = np.random.default_rng(seed), []
    most = calibration.groups // 2
    groups = sorted({size // calibration.size for size in sizes if 1 <= size // calibration.size <= most}) or [most]
    for size in groups:
        pairs: dict[str, list] = {name: [] for name in variants}
        for _ in range(draws):
            order = rng.permutation(calibration.groups)[: 2 * size].tolist()
            halves = [calibration.merged(part) for part in (order[:size], order[size:])]
            for name, options in variants.items():
                pairs[name].append(tuple(unit_scores(*half, **options).map(proportions) for half in halves))
        for name in variants:
            rows += _overlaps(pairs[name], {"variant": name, "prompts": size * calibration.size})
    return pd.DataFrame(rows)


def agreement_table(
    calibration: Calibration,
    others: Mapping[str, Callable[[Sequence[int]], UnitMap]],
    proportions: Mapping[str, float],
    draws: int,
    seed: int,
    **options,
) -> pd.DataFrame:
    """How far the map changes when something but the prompts changes: each time both maps come from random halves.

    Args:
        others: what is changed -> function(groups) -> the other map from these groups of calibration prompts.
    Returns:
        As :func:`sensitivity_table`, with ``changed`` in place of variant; its first row changes nothing but the half.
    """
    rng, rows = np.random.default_rng(seed), []
    half, nothing = calibration.groups // 2, "nothing (other half of the prompts)"
    pairs: dict[str, list] = {nothing: [], **{name: [] for name in others}}
    for _ in range(draws):
        order = rng.permutation(calibration.groups).tolist()
        own, rest = sorted(order[:half]), sorted(order[half : 2 * half])
        made = calibration.scores(own, **options).map(proportions)
        pairs[nothing].append((made, calibration.scores(rest, **options).map(proportions)))
        for name, make in others.items():
            pairs[name].append((made, make(own)))
    for name, found in pairs.items():
        rows += _overlaps(found, {"changed": name, "prompts": half * calibration.size})
    return pd.DataFrame(rows)


def safety_neurons_table(
    calibration: Calibration,
    rules: Mapping[str, Callable[[Sequence[int], int], NeuronSet]],
    proportions: Mapping[str, float],
    draws: int,
    seed: int,
    **options,
) -> pd.DataFrame:
    """Agreement of SCU with as many safety neurons by other definitions, both from the same random halves of the prompts.

    Args:
        rules: name -> function(prompt rows, how many) -> the neurons that rule chooses from these prompts.
    Returns:
        Columns rule, value, low, high, n, chance, neurons, in_both.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list] = {name: [] for name in rules}
    half = calibration.groups // 2
    for _ in range(draws):
        own = sorted(rng.permutation(calibration.groups)[:half].tolist())
        prompts = [g * calibration.size + i for g in own for i in range(calibration.size)]
        critical = calibration.scores(own, **options).map(proportions).set("SCU")
        for name, rule in rules.items():
            found[name].append((critical, rule(prompts, len(critical))))
    rows = []
    for name, pairs in found.items():
        both = float(np.mean([len(a & b) for a, b in pairs]))
        size = float(np.mean([len(a) for a, _ in pairs]))
        rows.append({"rule": name, **overlap(pairs), "neurons": size, "in_both": both})
    return pd.DataFrame(rows)


def selection_rules(harmful, benign) -> dict[str, Callable[[Sequence[int], int], NeuronSet]]:
    """Notebook 01's two rules as :func:`safety_neurons_table` takes them.

    Args:
        harmful: (scores over all tokens, scores over the last tokens) on the safety prompts; benign: over the last tokens
            on the utility prompts.
    """
    everywhere, last = harmful
    return {
        "contrast": lambda rows, n: selection.contrast(last.subset(rows), benign.subset(rows)).top(n),
        "as written": lambda rows, n: selection.consistency(everywhere.subset(rows), 1.0, POOL, per="pool").top(n),
    }
