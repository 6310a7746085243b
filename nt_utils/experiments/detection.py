"""What notebook 01 asks of a set of safety neurons: where it lies, what zeroing it does, whether it is stable.

Scores come in, tables go out; a model is only needed where neurons are zeroed. [SN] is Zhao et al., ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from nt_utils import selection
from nt_utils.evaluation import metrics
from nt_utils.experiments.bench import Action, Bench, Measure
from nt_utils.neurons import NeuronScores, NeuronSet
from nt_utils.selection import Ranking

NONE = "nothing zeroed"


# ---------------------------------------------------------------------------------------------------- where


def where_table(sets: Mapping[str, NeuronSet]) -> pd.DataFrame:
    """Share of each projection's neurons that each set holds: columns rule, layer, kind, count, width, share."""
    rows = []
    for rule, chosen in sets.items():
        for (layer, kind), count in chosen.counts().items():
            width = chosen.space.width((layer, kind))
            rows.append((rule, layer, kind, count, width, count / width))
    return pd.DataFrame(rows, columns=["rule", "layer", "kind", "count", "width", "share"])


def size_table(sets: Mapping[str, NeuronSet]) -> pd.DataFrame:
    """How large each set is: neurons, share of the neurons and of the parameters, shares in attention and early layers.

    ``in_attention``: share of its parameters in q, k, v and o; ``in_first_half``: share of its neurons in the first
    half of the layers.
    """
    rows = []
    for rule, chosen in sets.items():
        owned = chosen.space.parameters_per_neuron
        weights = {kind: n * owned[kind] for kind, n in chosen.per_kind().items()}
        total = max(sum(weights.values()), 1)
        half = sum(chosen.per_layer()[: chosen.space.num_layers // 2])
        rows.append(
            {
                "rule": rule,
                "neurons": len(chosen),
                "share_of_neurons": len(chosen) / chosen.space.size(),
                "share_of_parameters": chosen.share_of_parameters(),
                "in_attention": 1 - weights.get("ffn", 0) / total,
                "in_first_half": half / max(len(chosen), 1),
            }
        )
    return pd.DataFrame(rows)


def place_interval(
    scores: NeuronScores, choose: Callable[[NeuronScores], NeuronSet], column: str, draws: int, seed: int
) -> metrics.Interval:
    """A column of :func:`size_table` for the set all prompts give, with the middle 95% over random halves of the prompts.

    The neurons of a set are not a sample; what varies is which prompts they were found with. n is the number of prompts.
    """
    rng = np.random.default_rng(seed)
    halves = [sorted(rng.permutation(scores.n_prompts)[: scores.n_prompts // 2].tolist()) for _ in range(draws)]
    found = [choose(scores), *(choose(scores.subset(rows)) for rows in halves)]
    if not all(len(chosen) for chosen in found):
        return metrics.Interval(np.nan, np.nan, np.nan, 0)
    value, *others = (float(size_table({"set": chosen}).loc[0, column]) for chosen in found)
    low, high = np.quantile(others, [0.025, 0.975])
    return metrics.Interval(value, min(low, value), max(high, value), scores.n_prompts)


# --------------------------------------------------------------------------------------------- deactivation


def random_rows(bench: Bench, draws: Sequence[Action], name: str, **labels) -> list[dict]:
    """Two rows a measure for a random control: the mean over the draws (t interval over draws) and the largest."""
    rows = []
    for m in bench.measures:
        rates = [bench(d).rate(m.set, m.metric) for d in draws]
        mean = metrics.t_interval([r.value for r in rates])
        low, high = max(mean.low, 0.0), min(mean.high, 1.0)
        top = max(rates, key=lambda r: r.value)
        both = (
            (f"{name}, mean of {len(draws)}", mean.value, low, high, rates[0].n),
            (f"{name}, max of {len(draws)}", *top),
        )
        rows += [
            {**labels, "condition": c, "metric": m.label, "value": v, "low": lo, "high": hi, "n": n}
            for c, v, lo, hi, n in both
        ]
    return rows


def deactivation_table(
    bench: Bench,
    chosen: Mapping[str, NeuronSet],
    controls: Mapping[str, NeuronSet | Sequence[NeuronSet]],
) -> pd.DataFrame:
    """The model as it is, with each chosen set zeroed, and with each control zeroed.

    A control that is a list of sets is a random one: its mean and its maximum are shown. Columns: condition, group
    (none, chosen, control), metric, value, low, high, n.
    """
    rows = bench.rates(None, condition=NONE, group="none")
    for name, neurons in chosen.items():
        rows += bench.rates(neurons, condition=name, group="chosen")
    for name, control in controls.items():
        if isinstance(control, NeuronSet):
            rows += bench.rates(control, condition=name, group="control")
        else:
            rows += random_rows(bench, control, name, group="control")
    return pd.DataFrame(rows)


def dose_table(
    bench: Bench,
    rankings: Mapping[str, Ranking],
    shares: Sequence[float],
    random_of: str,
    draws: int,
    seed: int,
    measures: Sequence[Measure] | None = None,
) -> pd.DataFrame:
    """Rates against the share of the pool that is zeroed, for each ranking and for matched random sets.

    Args:
        random_of: the ranking whose counts per layer and kind the random sets copy.
        draws: random sets at each dose; the value is their mean, low and high their smallest and largest rate.
        measures: other rates than the bench's own.
    """
    rows = []
    for share in sorted(shares):
        for name, ranking in rankings.items():
            rows += bench.rates(ranking.top_share(share), measures, rule=name, share=share)
        matched = selection.matched_random(rankings[random_of].top_share(share), draws, seed)
        for m in measures or bench.measures:
            rates = [bench(d).rate(m.set, m.metric) for d in matched]
            values = [r.value for r in rates]
            rows.append(
                {
                    "rule": f"random, as {random_of}",
                    "share": share,
                    "metric": m.label,
                    "value": float(np.mean(values)),
                    "low": min(values),
                    "high": max(values),
                    "n": rates[0].n,
                }
            )
    return pd.DataFrame(rows)


def possible(controls: Mapping[str, Callable]) -> dict:
    """Every control drawn."""
    return {name: draw() for name, draw in controls.items()}


# ------------------------------------------------------------------------------------------------ languages


def language_table(
    bench: Bench, sets: Mapping[str, NeuronSet], evaluated: Mapping[str, Measure], draws: int, seed: int
) -> pd.DataFrame:
    """ASR in each language with each language's neurons zeroed, and with random sets that match the first language's.

    Args:
        sets: language -> its safety neurons; evaluated: language -> the measure of direct requests in it.
    Returns:
        Columns zeroed, evaluated, value, low, high, n, and the two sets' Jaccard with its chance level.
    """
    (first, a), (second, b) = sets.items()
    overlap = {"jaccard": a.jaccard(b), "chance": selection.expected_jaccard(a, b)}
    conditions: dict[str, NeuronSet | None] = {"nothing": None, f"{first} neurons": a, f"{second} neurons": b}
    rows = []
    for language, measure in evaluated.items():
        for name, neurons in conditions.items():
            value, low, high, n = bench(neurons).rate(measure.set, measure.metric)
            rows.append({"zeroed": name, "evaluated": language, "value": value, "low": low, "high": high, "n": n})
        rates = [bench(d).rate(measure.set, measure.metric) for d in selection.matched_random(a, draws, seed)]
        values = [r.value for r in rates]
        rows.append(
            {
                "zeroed": f"random (min to max of {draws})",
                "evaluated": language,
                "value": float(np.mean(values)),
                "low": min(values),
                "high": max(values),
                "n": rates[0].n,
            }
        )
    return pd.DataFrame(rows).assign(**overlap)


# ------------------------------------------------------------------------------------------------ stability


def stability_table(
    rules: Mapping[str, tuple], share: float, sizes: Sequence[int], draws: int, seed: int
) -> pd.DataFrame:
    """Agreement of the sets that two disjoint random prompt subsets give.

    Args:
        rules: name -> (function(*scores) -> Ranking, scores, ...); the subsets are drawn from the prompts, the same
            ones in every scores object (paired prompts stay paired).
        share: share of the pool that is chosen; sizes: prompts in each subset; draws: pairs of subsets.
    Returns:
        Columns rule, prompts, value (mean Jaccard), low, high (the middle 95% of the pairs: the pairs share one pool of
        prompts, so an interval for their mean would shrink with the number of draws), n (pairs), chance.
        A size of which two subsets do not fit is left out; when none fits, half of the prompts is taken.
    """
    rng = np.random.default_rng(seed)
    available = min(s.n_prompts for _, *scores in rules.values() for s in scores)
    rows = []
    for size in [s for s in sizes if 2 * s <= available] or [available // 2]:
        for name, (function, *scores) in rules.items():
            found = []
            for _ in range(draws):
                order = rng.permutation(available)[: 2 * size].tolist()
                halves = (order[:size], order[size:])
                a, b = (function(*(s.subset(rows_) for s in scores)).top_share(share) for rows_ in halves)
                found.append((a.jaccard(b), selection.expected_jaccard(a, b)))
            overlaps = [overlap for overlap, _ in found]
            low, high = np.quantile(overlaps, [0.025, 0.975])
            chance = float(np.mean([c for _, c in found]))
            rows.append((name, size, float(np.mean(overlaps)), low, high, draws, chance))
    return pd.DataFrame(rows, columns=["rule", "prompts", "value", "low", "high", "n", "chance"])
