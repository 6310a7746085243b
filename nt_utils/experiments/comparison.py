"""Notebook 06: definitions of a safety neuron side by side. Do they agree, and whose neurons matter?

Tables of agreement against the layer-matched chance level and against each definition's own noise; of what deactivating,
amplifying, training and freezing equal numbers of neurons does; of defences on equal footing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from scipy import stats

from nt_utils import selection, work
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation import metrics
from nt_utils.evaluation.gcg import gcg_attack, random_suffixes
from nt_utils.experiments.bench import Action, Bench, Finding, Measure, intervention_of, middle
from nt_utils.experiments.defences import NONE, Defence, then
from nt_utils.experiments.definitions import DIFFERENCES, Definitions
from nt_utils.experiments.finetuning import Scope
from nt_utils.interventions import Deactivate, modulation
from nt_utils.interventions.delta import Delta
from nt_utils.interventions.tuning import AllBut, Everything, Only, tune
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL, NeuronSet
from nt_utils.scoring.importance import importance
from nt_utils.selection import Ranking

# ------------------------------------------------------------------------------------------------ agreement


def spearman(a: Ranking, b: Ranking, where: torch.Tensor | None = None) -> float:
    """Rank correlation of two rankings over the pool, or over some of it; NaN where one of them is constant."""
    first, second = (r.values.numpy() if where is None else r.values[where].numpy() for r in (a, b))
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(stats.spearmanr(first, second).statistic)


Halves = Sequence[tuple[Mapping[str, Ranking], Mapping[str, Ranking]]]


def agreement_table(definitions: Definitions, halves: Halves, shares: Sequence[float]) -> pd.DataFrame:
    """Agreement of every two definitions, and of each with itself, between disjoint halves of the calibration prompts.

    Both sides of every comparison come from other prompts, so that the diagonal (one definition, two halves) is the noise
    level of the rest of the table.

    Args:
        halves: from :meth:`Definitions.halves`; shares: set sizes, shares of the pool.
    Returns:
        Columns a, b, share, jaccard with low, high (middle 95% of the pairs of halves), all (Jaccard of the sets that all
        prompts give), chance (layer-matched), spearman with spearman_low, spearman_high (of the scores), n (pairs of
        halves), prompts.
    """
    whole, rows = definitions.rankings(), []
    tops = {share: ([tuple(_tops(h, share) for h in pair) for pair in halves], _tops(whole, share)) for share in shares}
    for a, b in itertools.combinations_with_replacement(whole, 2):
        ranks = middle([v for first, second in halves for v in _both(spearman, first, second, a, b)])[:3]
        for share in sorted(shares):
            sets, full = tops[share]
            pairs = [v for first, second in sets for v in _both(_overlap, first, second, a, b)]
            overlaps, chances = zip(*pairs, strict=True)
            at_once = full[a].jaccard(full[b])  # all prompts together
            chance = float(np.mean(chances))
            rows.append((a, b, share, *middle(overlaps)[:3], at_once, chance, *ranks, len(halves), definitions.prompts))
    columns = ["a", "b", "share", "jaccard", "low", "high", "all", "chance"]
    return pd.DataFrame(rows, columns=[*columns, "spearman", "spearman_low", "spearman_high", "n", "prompts"])


def _both(compare, first, second, a, b) -> list:
    """a on one half against b on the other, both ways round."""
    found = [compare(first[a], second[b])]
    return found if a == b else [*found, compare(second[a], first[b])]


def _tops(rankings: Mapping[str, Ranking], share: float) -> dict[str, NeuronSet]:
    return {name: ranking.top_share(share) for name, ranking in rankings.items()}


def _overlap(a: NeuronSet, b: NeuronSet) -> tuple[float, float]:
    """Jaccard and its layer-matched chance level."""
    return a.jaccard(b), selection.expected_jaccard(a, b)


def summary_table(agreement: pd.DataFrame) -> pd.DataFrame:
    """Mean overlap between definitions, within a definition and by chance, at each set size: columns share, which, value."""
    rows = []
    for share, part in agreement.groupby("share"):
        same = part["a"] == part["b"]
        rows += [
            (share, "one definition, other prompts", part[same]["jaccard"].mean()),
            (share, "two definitions", part[~same]["jaccard"].mean()),
            (share, "chance (same layers and kinds)", part[~same]["chance"].mean()),
        ]
    return pd.DataFrame(rows, columns=["share", "which", "value"])


def site_table(rankings: Mapping[str, Ranking], share: float) -> pd.DataFrame:
    """Where each definition's set lies, and how well its scores agree with the others' inside each layer and projection.

    Columns definition, layer, kind, count, width, share (of the projection), spearman (mean over the other definitions).
    """
    rows = []
    for name, ranking in rankings.items():
        chosen = ranking.top_share(share)
        flat = chosen.space.split(torch.arange(ranking.values.numel()), ranking.kinds)
        for (layer, kind), positions in flat.items():
            others = [spearman(ranking, other, positions) for key, other in rankings.items() if key != name]
            known = [v for v in others if v == v]
            count, width = int(chosen.mask((layer, kind)).sum()), chosen.space.width((layer, kind))
            mean = float(np.mean(known)) if known else float("nan")
            rows.append((name, layer, kind, count, width, count / width, mean))
    return pd.DataFrame(rows, columns=["definition", "layer", "kind", "count", "width", "share", "spearman"])


def agreement_interval(halves: Halves, share: float, prompts: int) -> metrics.Interval:
    """Mean overlap of two definitions minus chance, with the middle 95% over the pairs of halves; n: calibration prompts."""
    values = []
    for pair in halves:
        first, second = (_tops(half, share) for half in pair)
        pairs = [v for a, b in itertools.combinations(first, 2) for v in _both(_overlap, first, second, a, b)]
        values.append(float(np.mean([jaccard for jaccard, _ in pairs]) - np.mean([chance for _, chance in pairs])))
    return middle(values, prompts)


def across_data(first: Halves, second: Halves, share: float) -> dict[str, metrics.Interval]:
    """Definition -> Jaccard of its sets from two harmful data sets, with the middle 95% over halves of their prompts.

    The first half of one is compared with the second of the other: the benign prompts are then not the same.
    """
    found = {}
    for name in first[0][0]:
        if name in second[0][0]:
            found[name] = middle(
                [
                    a[name].top_share(share).jaccard(b[name].top_share(share))
                    for one, two in zip(first, second, strict=True)
                    for a, b in zip(one, reversed(two), strict=True)
                ]
            )
    return found


def looking_again(
    lm: LanguageModel,
    bench: Bench,
    defences: Sequence[Defence],
    harmful: PromptSet,
    benign: PromptSet,
    share: float,
    asr: Measure,
    useful: Measure,
) -> dict[str, dict[str, metrics.Interval]]:
    """What an attacker achieves who detects contrast neurons anew in the defended model and zeroes them.

    Defence -> "asr": ASR after that, minus the undefended model's ASR after the same; "utility": what the defence itself
    changes in ``useful``, since a model that answers nothing is no defence.

    The attacker has the weights: the same prompts, the same share of the pool. Defences that only freeze are left out.
    """

    def found_anew(action: Action) -> NeuronSet:
        acting = intervention_of(action)
        with acting.active(lm) if acting is not None else nullcontext():
            first, second = (importance(lm, p.texts, kinds=POOL, positions="last") for p in (harmful, benign))
        return selection.contrast(first, second).top_share(share)

    undefended = Deactivate(found_anew(None))
    return {
        d.name: {
            "asr": bench.excess(then(d.action, Deactivate(found_anew(d.action))), [undefended], asr),
            "utility": bench.change(d.action, useful),
        }
        for _, d in work.parts({d.name: d for d in defences if d.action is not None})
    }


def looked_table(looked: Mapping[str, Mapping[str, metrics.Interval]]) -> pd.DataFrame:
    """What :func:`looking_again` found as rows: defence, part, value, low, high, n."""
    found = [(defence, part, i) for defence, parts in looked.items() for part, i in parts.items()]
    return pd.DataFrame([{"defence": defence, "part": part, **i._asdict()} for defence, part, i in found])


def suffix_table(
    bench: Bench, defences: Sequence[Defence], asr: Measure, n: int, steps: int, width: int, seed: int
) -> pd.DataFrame:
    """What an attacker achieves who seeks a suffix for each request with the defended model's own gradients (GCG).

    Every defence, and the undefended model, answers the same ``n`` requests as they are, with random suffixes and with
    the suffixes that ``steps`` steps of GCG, each with ``width`` candidates, found against it. Columns defence, suffix
    ("none", "random" or "GCG"), value, low, high, n. Defences that only freeze are left out, and those whose learning diverged.
    """
    asked, rows = bench.suite[asr.set], []
    requests = asked.prompts.take(n, seed)
    acting = {d.name: d for d in defences if d.action is not None or d.name == NONE}
    for name, defence in work.parts(acting):
        acts = intervention_of(defence.action)
        found = gcg_attack(bench.lm, requests, steps=steps, search_width=width, intervention=acts, seed=seed)
        suffixes = {"none": requests, "random": random_suffixes(bench.lm, requests, seed=seed), "GCG": found}
        for suffix, prompts in suffixes.items():
            suite = dataclasses.replace(bench.suite, sets=(dataclasses.replace(asked, prompts=prompts),))
            rate = Bench(bench.lm, suite, [asr], judge=bench.judge, judges=bench.judges).rate(asr, defence.action)
            rows.append({"defence": name, "suffix": suffix, **rate._asdict()})
    return pd.DataFrame(rows)


def choose_shares(
    definitions: Definitions, candidates: Sequence[float], dev: Bench, measure: Measure, share: float
) -> pd.DataFrame:
    """The share each set difference leaves out as useful: the one whose set, zeroed, moves ``measure`` most on development.

    Sets ``definitions.utility_shares``. Columns definition, left_out, value, low, high, n, chosen.
    """
    rows, best = [], {}
    for name in DIFFERENCES:
        found = {c: dev.rate(measure, definitions.ranking(name, share=c).top_share(share)) for c in candidates}
        best[name] = max(candidates, key=lambda c: found[c].value)
        rows += [(name, c, *rate, c == best[name]) for c, rate in found.items()]
    definitions.utility_shares = best
    return pd.DataFrame(rows, columns=["definition", "left_out", "value", "low", "high", "n", "chosen"])


# ------------------------------------------------------------------------------------------------ causality

#: What is done with a set of neurons (None: with no set), as an action for the bench.
Act = Callable[[NeuronSet | None], Action]


@dataclass
class Chosen:
    """Equal numbers of neurons from every definition, each with its controls.

    sets: definition -> its neurons; controls: definition -> name -> sets (random ones are several draws).
    """

    sets: dict[str, NeuronSet]
    controls: dict[str, dict[str, list[NeuronSet]]]

    @property
    def alone(self) -> Chosen:
        """The same sets without controls."""
        return Chosen(self.sets, {name: {} for name in self.sets})


def choose(rankings: Mapping[str, Ranking], share: float, draws: int, seed: int, general=None, benign=None) -> Chosen:
    """The top ``share`` of the pool of every ranking, with random sets of the same count per layer and kind.

    Args:
        general, benign: importance scores; with them the foundation and the importance-matched controls are drawn too.
    """
    sets = {name: ranking.top_share(share) for name, ranking in rankings.items()}
    controls = {}
    for name, chosen in sets.items():
        controls[name] = {"random": selection.matched_random(chosen, draws, seed)}
        if general is not None:
            controls[name]["foundation"] = [selection.foundation_control(chosen, general)]
        if benign is not None:
            controls[name]["same importance"] = [selection.importance_matched(chosen, benign)]
    return Chosen(sets, controls)


def amplify(neurons: NeuronSet, factor: float) -> modulation.Modulation:
    """Every neuron's activation times one factor."""
    empty = NeuronSet(neurons.space, {})
    alpha = torch.full((len(neurons),), factor)
    return modulation.Modulation(neurons, empty, alpha, bounds=(0.0, max(3.0, factor)), name=f"times {factor:g}")


def effect_table(
    bench: Bench,
    chosen: Chosen,
    act: Act,
    untouched: Action = None,
    others: Mapping[str, Action] | None = None,
    **labels,
) -> pd.DataFrame:
    """Rates under ``act(neurons)`` for every definition and its controls.

    The mean of a control's draws is shown with the smallest and the largest. ``others``: what has no neurons, by name.
    Columns: labels, definition, set (chosen, the control's name, or "no neurons"), metric, value, low, high, n.
    """
    rows = bench.rates(untouched, **labels, definition="untouched", set="chosen")
    for name, neurons in work.parts(chosen.sets):
        rows += bench.rates(act(neurons), **labels, definition=name, set="chosen")
        for control, draws in chosen.controls[name].items():
            labels_here = {**labels, "definition": name, "set": control}
            if len(draws) > 1:
                rows += bench.mean_rates([act(d) for d in draws], **labels_here)
            else:
                rows += bench.rates(act(draws[0]), **labels_here)
    for name, action in (others or {}).items():
        rows += bench.rates(action, **labels, definition=name, set="no neurons")
    return pd.DataFrame(rows)


def strongest(dev: Bench, options: Mapping[str, Action]) -> tuple[str, pd.DataFrame]:
    """The option with the highest sum of the bench's measures on development prompts: for an attacker, of attack success
    and of the usefulness that is left.

    Returns:
        Its name, and what was tried: columns option, metric, value, low, high, n, chosen.

    Raises:
        InputError: no option.
    """
    if not options:
        raise InputError("options: nothing to choose from")
    tables = {name: pd.DataFrame(dev.rates(action, option=name)) for name, action in options.items()}
    best = max(tables, key=lambda name: tables[name]["value"].sum())
    return best, pd.concat([t.assign(chosen=name == best) for name, t in tables.items()], ignore_index=True)


def left_out(every: Sequence[str], done: Sequence[str], what: str) -> str:
    """One sentence on what a preset left out."""
    rest = [name for name in every if name not in done]
    if not rest:
        return f"{what}: all {len(every)}"
    return f"{what}: {len(every) - len(rest)} of {len(every)}, without {', '.join(rest)}"


def excess_table(bench: Bench, chosen: Chosen, measure: Measure, act: Act = lambda neurons: neurons) -> pd.DataFrame:
    """Rate under ``act`` minus the mean of the definition's own matched random sets, whole and per neuron.

    Columns definition, neurons, metric, value, low, high (over topics and draws), n, per_neuron (points a neuron).
    """
    rows = []
    for name, neurons in chosen.sets.items():
        if not (drawn := chosen.controls[name].get("random")):
            continue
        found = bench.excess(act(neurons), [act(d) for d in drawn], measure)
        labels = {"definition": name, "neurons": len(neurons), "metric": measure.label}
        rows.append({**labels, **found._asdict(), "per_neuron": 100 * found.value / len(neurons)})
    return pd.DataFrame(rows)


def hit_table(rankings: Mapping[str, Ranking], effects: Ranking, share: float) -> pd.DataFrame:
    """How well each definition finds the neurons whose zeroing, one at a time, lowers the refusal margin most.

    Columns definition, hits (share of its set among the equally many strongest single neurons) with low and high
    (Wilson), n (neurons of the set), chance, spearman (of its scores with the single effects).
    """
    strongest, rows = effects.top_share(share), []
    for name, ranking in rankings.items():
        chosen = ranking.top_share(share)
        found = metrics.wilson(len(chosen & strongest), len(chosen))
        rows.append((name, found.value, found.low, found.high, found.n, share, spearman(ranking, effects)))
    return pd.DataFrame(rows, columns=["definition", "value", "low", "high", "n", "chance", "spearman"])


def half_counts(curve: pd.DataFrame, metric: str, level: float = 0.5) -> pd.DataFrame:
    """Neurons at which a dose curve first reaches ``level``, interpolated over the logarithm of the count.

    Columns definition, neurons (NaN: never reached), largest (the largest count tried).
    """
    rows = []
    for name, part in curve[curve["metric"] == metric].groupby("rule", sort=False):
        part = part.sort_values("share")
        counts, values = part["neurons"].tolist(), part["value"].tolist()
        at = next((i for i, value in enumerate(values) if value >= level), None)
        reached = float("nan") if at is None else float(counts[at])
        if at:
            step = (level - values[at - 1]) / (values[at] - values[at - 1])
            reached = float(counts[at - 1] * (counts[at] / counts[at - 1]) ** step)
        rows.append((name, reached, max(counts)))
    return pd.DataFrame(rows, columns=["definition", "neurons", "largest"])


# ------------------------------------------------------------------------------------------- training and freezing


@dataclass(frozen=True)
class Effort:
    """One training for every set: equal rows, steps and learning rate, so that only the neurons differ."""

    learning_rate: float
    steps: int
    batch_size: int = 16
    seed: int = 0


def trained(
    lm: LanguageModel, scope: Scope, harmful: Sequence[Prompt], benign: Sequence[Prompt], effort: Effort
) -> Delta:
    """What tuning on refusals and benign answers leaves when only ``scope`` is trained."""
    return tune(lm, scope, harmful=harmful, benign=benign, **vars(effort)).delta


def training(lm: LanguageModel, sides: str, harmful: PromptSet, benign: PromptSet, effort: Effort) -> Act:
    """Train only these neurons on the pairs; what was trained once is kept."""

    @cache
    def act(neurons: NeuronSet | None) -> Action:
        return None if neurons is None else trained(lm, Only(neurons, sides=sides), harmful, benign, effort)

    return act


def freezing(lm: LanguageModel, rows: PromptSet, effort: Effort) -> Act:
    """A fine-tuning attack with these rows that trains everything but these neurons (None: everything)."""
    return cache(lambda neurons: trained(lm, Everything() if neurons is None else AllBut(neurons), (), rows, effort))


# ------------------------------------------------------------------------------------------------ the frontier


def frontier_table(
    table: pd.DataFrame, panels: Mapping[str, tuple[str, str]], useful: str, floor: float
) -> pd.DataFrame:
    """Two metrics of the defence table against each other.

    Args:
        panels: name -> (metric across, metric up), both as the table calls them; a panel without one of them is left out.
        useful, floor: a defence is useful while this metric is at least this share of the undefended (first) model's.
    """
    rows, kept = [], table[table["metric"] == useful].set_index("defence")["value"]
    for panel, (across, up) in panels.items():
        both = [table[table["metric"] == m].set_index("defence") for m in (across, up)]
        for name in both[0].index.intersection(both[1].index, sort=False):
            x, y = (part.loc[name] for part in both)
            places = [one[column] for one in (x, y) for column in ("value", "low", "high")]
            useful_there = bool(kept[name] >= floor * kept.iloc[0])
            rows.append((panel, name, across, up, *places, int(y["n"]), useful_there))
    columns = ["panel", "defence", "x_label", "y_label", "x", "x_low", "x_high", "value", "low", "high", "n", "useful"]
    return pd.DataFrame(rows, columns=columns)


# --------------------------------------------------------------------------------------------------------- claims


def against_direction(
    bench: Bench, neurons: NeuronSet, ablate: Action, asr: Measure, useful: Measure
) -> metrics.Interval | str:
    """How much more these neurons jailbreak than the refusal direction, or why that has no test: two that do nothing are alike."""
    if ablate is None:
        return "no candidate met the bounds of the paper's choice of a direction"
    if bench.jailbroken(ablate, [None], asr, useful).low <= 0:
        return "ablating the refusal direction does not jailbreak this model"
    return bench.jailbroken(neurons, [ablate], asr, useful)


def findings(
    agreement: metrics.Interval,
    direction: metrics.Interval | str,
    across: Mapping[str, metrics.Interval],
    looked: Mapping[str, Mapping[str, metrics.Interval]],
    rows: Mapping[str, Sequence[str]],
) -> Iterator[Finding]:
    """What is said of X1 to X4.

    Args:
        agreement: :func:`agreement_interval`; direction: :func:`against_direction` of the strongest definition;
            across: :func:`across_data`; looked: :func:`looking_again`;
        rows: "X2" -> definitions and "X4" -> defences that are spoken of.
    """
    yield Finding("X1", "", "jaccard", agreement)
    missing = "no second set of harmful prompts, or this definition has no base model"
    yield from (Finding("X2", name, "jaccard", across.get(name, missing)) for name in rows["X2"])
    yield Finding("X3", "", "jailbroken", direction)
    for name, part in itertools.product(rows["X4"], ("asr", "utility")):
        yield Finding("X4", name, part, looked.get(name, {}).get(part, "this defence was left out of the run"))
