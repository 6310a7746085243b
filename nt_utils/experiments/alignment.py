"""What notebook 04 asks of units: freezing them, what fine-tuning makes of them, aligning by few, leaning to refusal.

[SSAH] is Li & Kim, ICLR 2026, arXiv 2410.10862. Fine-tuning itself is :mod:`nt_utils.experiments.finetuning`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nt_utils import work
from nt_utils.data.records import Prompt
from nt_utils.errors import InputError
from nt_utils.evaluation import metrics
from nt_utils.evaluation.suite import Evaluation, Suite, clusters_of
from nt_utils.experiments.bench import Bench, Finding, Measure, middle, rates
from nt_utils.experiments.finetuning import DIVERGED, FineTuned, Scope, diverged_rows, finetune
from nt_utils.experiments.units import Calibration, random_like
from nt_utils.interventions.delta import Delta
from nt_utils.interventions.precision import copied
from nt_utils.interventions.tuning import AllBut, Everything, LoRA, Only, Tuned, tune
from nt_utils.models import LanguageModel, pad
from nt_utils.neurons import NeuronSet
from nt_utils.selection import UnitScores
from nt_utils.units import CATEGORIES, UnitMap, flow, with_inputs

# ------------------------------------------------------------------------------------------------------ freezing


def top_complex(units: UnitMap, scores: UnitScores, share: float) -> NeuronSet:
    """The ``share`` (0 to 1) of the complex units that are most active on safety data (ours: the paper says top CU)."""
    if not 0 < share <= 1:
        raise InputError(f"share: got {share!r}; allowed: above 0, at most 1")
    complex_units = (units.flat() == CATEGORIES.index("CU")).nonzero().flatten()
    order = torch.sort(scores.safety[complex_units], descending=True, stable=True).indices
    return scores.neurons(complex_units[order[: max(1, round(share * len(complex_units)))]])


def frozen_sets(units: UnitMap, scores: UnitScores, share: float, draws: int, seed: int) -> dict[str, NeuronSet]:
    """What the paper freezes, and layer-matched random units: as many as SCU with the top complex units."""
    critical = units.set("SCU")
    guarded = critical | top_complex(units, scores, share)
    return {
        "freeze SCU": critical,
        f"freeze SCU + top {100 * share:g}% CU": guarded,
        "freeze SCU + all CU": critical | units.set("CU"),
        **_random("freeze random", units, guarded, draws, seed),
    }


def _random(name: str, units: UnitMap, like: NeuronSet, draws: int, seed: int) -> dict[str, NeuronSet]:
    """Random units that match a set: name, or where there are several name 1, name 2, ... -> units."""
    drawn = random_like(units, like, draws, seed)
    return {name if draws == 1 else f"{name} {i}": neurons for i, neurons in enumerate(drawn, 1)}


def freezing(neurons: NeuronSet, head_dim: int) -> AllBut:
    """Train everything but these units: FFN channels whole, heads with their query rows (and key/value rows they own)."""
    return AllBut(with_inputs(neurons, head_dim), name="freeze")


#: Adapters are fine-tuned at about ten times the learning rate of full tuning (arXiv 2106.09685, appendix D).
LORA_FACTOR = 10


def attack(
    lm: LanguageModel,
    rows: Sequence[Prompt],
    suite: Suite,
    scopes: Mapping[str, Scope],
    learning_rates: Sequence[float],
    keep: Sequence[str] = (),
    *,
    reference: LanguageModel | None = None,
    held_out: Sequence[Prompt] = (),
    **options,
) -> dict[tuple[str, float], FineTuned]:
    """Fine-tune under every scope at every learning rate (LoRA: times LORA_FACTOR): (arm, rate) -> what came of it.

    Of the arms in ``keep`` the delta of the :func:`best_run` is kept; all of them would be as large as that many models.
    One call with one scope is "freeze these, fine-tune, evaluate". ``reference``, ``held_out`` and options (steps,
    batch_size, seed): see :func:`nt_utils.experiments.finetuning.finetune`. Raises InputError where an arm is to be kept and
    nothing is held out.
    """
    if keep and not len(held_out):
        raise InputError("held_out: is empty; the delta to keep is the one with the smallest loss on these rows")
    options |= {"reference": copied(lm) if reference is None else reference, "held_out": held_out}  # one for all arms
    found: dict[tuple[str, float], FineTuned] = {}
    start = None
    for arm, scope in work.parts(scopes):
        for rate in learning_rates:
            used = rate * LORA_FACTOR if isinstance(scope, LoRA) else rate
            with work.part(f"rate {used:g}"):
                found[arm, used] = finetune(lm, rows, suite, learning_rate=used, scope=scope, start=start, **options)
            start = found[arm, used].evaluations[0]
            kept = best_run(found, arm) if arm in keep else None
            for (name, _), run in found.items():
                if name == arm and run is not kept:
                    run.tuned.final = None
    return found


def best_run(runs: Mapping[tuple[str, float], FineTuned], arm: str) -> FineTuned:
    """An arm at the rate that a fine-tuner would take: the smallest loss on held-out rows after the last step."""

    def loss(run: FineTuned) -> float:
        return math.inf if run.tuned.diverged is not None else run.losses[max(run.losses)]

    return min((run for (name, _), run in runs.items() if name == arm), key=loss)


def attack_table(runs: Mapping[tuple[str, float], FineTuned], measures: Sequence[Measure], **labels) -> pd.DataFrame:
    """All points of the sweep: labels, arm, learning_rate, step, loss (of held-out rows), metric, value, low, high, n.

    A training that diverged ends with a row a measure without a value.
    """
    rows = []
    for (arm, rate), run in runs.items():
        for step, found in run.evaluations.items():
            more = {**labels, "arm": arm, "learning_rate": rate, "step": step, "loss": run.losses.get(step, np.nan)}
            rows += rates(found, measures, **more)
        rows += diverged_rows(run, measures, **labels, arm=arm, learning_rate=rate, loss=np.nan)
    return pd.DataFrame(rows)


#: Share of its starting loss by which an arm's held-out loss has to fall for the arm to count as learning the task.
LEARNT = 0.02


def learnt(run: FineTuned, loss: float) -> bool:
    """Whether this held-out loss of a training says that it has learnt the task."""
    return loss <= (1 - LEARNT) * run.losses[min(run.losses)]


@dataclass(frozen=True)
class Point:
    """One place in a sweep, at an evaluated step or between two of them.

    Attributes:
        weights: evaluated step -> its weight (one step, or two with weights that add up to 1);
        loss: held-out loss of the task there, nats a token.
    """

    arm: str
    learning_rate: float
    weights: Mapping[int, float]
    loss: float
    run: FineTuned

    @property
    def step(self) -> float:
        """Training steps, interpolated."""
        return sum(step * weight for step, weight in self.weights.items())

    def values(self, measure: Measure, nearest: bool = False) -> np.ndarray:
        """One outcome a prompt, interpolated between the steps, or at the nearest evaluated one."""
        weights = {max(self.weights, key=lambda step: self.weights[step]): 1.0} if nearest else self.weights
        found = {step: self.run.evaluations[step].values(measure.set, measure.metric) for step in weights}
        return np.sum([weight * found[step].to_numpy(float) for step, weight in weights.items()], axis=0)

    def rate(self, measure: Measure) -> float:
        """The rate, interpolated between the steps."""
        found = self.run.evaluations
        return sum(
            weight * found[step].rate(measure.set, measure.metric).value for step, weight in self.weights.items()
        )


def worst_points(
    runs: Mapping[tuple[str, float], FineTuned], asr: Measure, utility: Measure, floor: float
) -> dict[str, Point]:
    """A bounded attacker: of each arm the point with the highest ASR among those that keep utility at or above the floor.

    The grid of rates and steps is the sweep's. An arm without such a point has none: fine-tuning that breaks the model
    attacks nobody.
    """
    found: dict[str, Point] = {}
    for (arm, rate), run in runs.items():
        for step in filter(None, run.evaluations):
            point = Point(arm, rate, {step: 1.0}, run.losses.get(step, np.nan), run)
            if point.rate(utility) >= floor and (arm not in found or point.rate(asr) > found[arm].rate(asr)):
                found[arm] = point
    return found


def equal_loss_points(
    runs: Mapping[tuple[str, float], FineTuned], target: float | None = None
) -> tuple[float, dict[str, Point]]:
    """Each arm where it has learnt the task as far as all arms have: equal loss on held-out rows of the task.

    Every arm is taken at the rate that brings its held-out loss down furthest. The target is the loss that even the slowest
    arm that learns the task reaches (one whose loss never falls by LEARNT of its start has no point); an arm's point lies
    where its loss first comes down to the target, between two evaluated steps in a straight line. A ``target`` that is
    given (that of a training with more arms) stands, and an arm that does not reach it has no point.

    Returns:
        The target in nats a token, and arm -> its point.
    """
    best: dict[str, tuple[float, FineTuned]] = {}
    for (arm, rate), run in runs.items():
        if len(run.losses) > 1 and (arm not in best or min(run.losses.values()) < min(best[arm][1].losses.values())):
            best[arm] = (rate, run)
    best = {arm: (rate, run) for arm, (rate, run) in best.items() if learnt(run, min(run.losses.values()))}
    if target is None:
        target = max((min(run.losses.values()) for _, run in best.values()), default=math.nan)
    found = {}
    for arm, (rate, run) in best.items():
        steps = sorted(run.losses)
        at = next((i for i, step in enumerate(steps) if run.losses[step] <= target), None)
        if at is None:
            continue
        weights = {steps[at]: 1.0}
        if at:
            above, below = run.losses[steps[at - 1]], run.losses[steps[at]]
            weight = (above - target) / (above - below)
            weights = {steps[at - 1]: 1 - weight, steps[at]: weight}
        found[arm] = Point(arm, rate, {step: w for step, w in weights.items() if w}, target, run)
    return target, found


def points_table(chosen: Mapping[str, Sequence[Point]], measures: Sequence[Measure], **labels) -> pd.DataFrame:
    """Table 2 of the paper: labels, arm, learning_rate, step, loss, metric, value, low, high, n; intervals are over topics."""
    rows = []
    for arm, (first, *_) in chosen.items():
        more = {**labels, "arm": arm, "learning_rate": first.learning_rate, "step": first.step, "loss": first.loss}
        for m in measures:
            found = point_difference(chosen, arm, None, m)
            rows.append({**more, "metric": m.label, **(found or metrics.NOTHING)._asdict()})
    return pd.DataFrame(rows)


def point_difference(
    chosen: Mapping[str, Sequence[Point]], arm: str, other: str | None, measure: Measure
) -> metrics.Interval | None:
    """An arm's rate minus another's (None: minus nothing), over topics and trainings; None where one has no point.

    ``chosen``: arm -> its point in each training.
    """
    if not chosen.get(arm) or (other is not None and not chosen.get(other)):
        return None
    clusters = clusters_of(next(iter(chosen[arm][0].run.evaluations.values())).rows, measure.set)

    def difference(nearest: bool) -> metrics.Interval:
        after = np.stack([p.values(measure, nearest) for p in chosen[arm]])
        controls = np.zeros((1, after.shape[1]))
        if other is not None:
            controls = np.stack([p.values(measure, nearest) for p in chosen[other]])
        return metrics.clustered_difference(controls, after, clusters)

    found = difference(nearest=False).as_wide_as(difference(nearest=True))
    return found if other is not None else found.within(0.0, 1.0)


def by_arm(
    trainings: Sequence[Mapping[str, Point]], runs: Sequence[Mapping[tuple[str, float], FineTuned]]
) -> dict[str, list[Point]]:
    """Arm -> its point in each training that it was part of, for arms that have one in all of these."""
    found: dict[str, list[Point]] = {}
    for arm in trainings[0]:
        tried = [points for points, run in zip(trainings, runs, strict=True) if any(arm == a for a, _ in run)]
        if all(arm in points for points in tried):
            found[arm] = [points[arm] for points in tried]
    return found


def freezing_findings(
    equal: Mapping[str, Mapping[str, Sequence[Point]]], guarded: str, asr: Measure
) -> Iterator[Finding]:
    """What is said of A5 (freezing, each fine-tuning set a row) and A6 (adapters, on benign rows), at equal held-out loss."""
    for row in ("benign rows", "10% harmful rows"):
        found = point_difference(equal.get(row, {}), guarded, "full", asr)
        yield Finding("A5", row, "safety", found or "an arm did not learn the task, or the study has no such rows")
    found = point_difference(equal["benign rows"], "LoRA", "full", asr)
    yield Finding("A6", "", "safety", found or "an arm did not learn the task")


# ----------------------------------------------------------------------------------------------------- transfer


def flow_table(maps: Mapping[str, tuple[UnitMap, UnitMap]]) -> pd.DataFrame:
    """The flows of several pairs of maps: change, before, after, count, share, share_of_before."""
    return pd.DataFrame([{"change": name, **row} for name, pair in maps.items() for row in flow(*pair)])


def moved_share(
    before: Calibration,
    after: Calibration,
    proportions: Mapping[str, float],
    source: str,
    target: str,
    draws: int,
    seed: int,
    **options,
) -> metrics.Interval:
    """Share of ``source`` units that become ``target``, minus the share that does so by other prompts alone.

    For each draw a random half of the calibration prompts maps both models, and the other half maps the first model
    again. The interval is the middle 95% of the draws; n is the number of draws.
    """
    rng, values = np.random.default_rng(seed), []
    half = before.groups // 2
    for _ in range(draws):
        order = rng.permutation(before.groups).tolist()
        own, rest = order[:half], order[half : 2 * half]
        start = before.scores(own, **options).map(proportions)
        moved, resampled = (
            next(r["share_of_before"] for r in flow(start, made) if (r["before"], r["after"]) == (source, target))
            for made in (after.scores(own, **options).map(proportions), before.scores(rest, **options).map(proportions))
        )
        values.append(moved - resampled)
    return middle(values)


def flow_finding(
    run: FineTuned,
    before: Calibration,
    after: Calibration | None,
    proportions: Mapping[str, float],
    draws: int,
    seed: int,
) -> Finding:
    """What is said of A7: the share of SCU that a fine-tuning turns into CU (see :func:`moved_share`), where it has learnt
    its task. ``after``: of the fine-tuned model; None where the training diverged."""
    if after is None or not learnt(run, run.losses[max(run.losses)]):
        return Finding("A7", "", "share", "full fine-tuning did not learn the task at any learning rate")
    return Finding("A7", "", "share", moved_share(before, after, proportions, "SCU", "CU", draws, seed))


# ----------------------------------------------------------------------------------------------------- alignment


@dataclass(frozen=True)
class Aligned:
    """One way of aligning: the rate that was chosen on the development split, the tuning, its evaluation.

    Where the training diverged at every rate before its first evaluated step, the rate is NaN, the evaluation None, and the
    tuning the last one that was tried.
    """

    learning_rate: float
    tuned: Tuned
    evaluation: Evaluation | None


def budget_scopes(units: UnitMap, head_dim: int, draws: int, seed: int) -> dict[str, Scope]:
    """Aligning by everything, by the redundant units, by as many random ones, by the utility-critical ones."""
    redundant = units.set("RU")
    sets = {"RU": redundant, **_random("random", units, redundant, draws, seed), "UCU": units.set("UCU")}
    chosen = {name: Only(with_inputs(s, head_dim), name=name) for name, s in sets.items()}
    return {"full": Everything(), **chosen}


def align(
    dev: Bench,
    test: Bench,
    scopes: Mapping[str, Scope],
    harmful: Sequence[Prompt],
    benign: Sequence[Prompt],
    learning_rates: Sequence[float],
    asr: Measure,
    utility: Measure,
    steps: int,
    **options,
) -> dict[str, Aligned]:
    """Align an unaligned model under each scope, at the rate and the step with the most utility minus ASR on development
    prompts: one rule for every scope. A scope that diverges at every rate has no evaluation.

    Args:
        dev, test: benches of the unaligned model on the development and on the test prompts.
        steps: the most steps; a quarter and half of them are looked at too.
        options: of :func:`nt_utils.interventions.tuning.tune` (batch_size, benign_share, seed).
    """
    stops = sorted({max(1, steps // 4), max(1, steps // 2), steps})

    def score(delta: Delta) -> float:
        return dev.rate(utility, delta).value - dev.rate(asr, delta).value

    found = {}
    for name, scope in work.parts(scopes):
        tried: list[tuple[float, float, Tuned, Delta]] = []
        for rate in learning_rates:
            more = {"steps": steps, "every": stops, "snapshots": True, **options}
            tuned = tune(dev.lm, scope, harmful=harmful, benign=benign, learning_rate=rate, **more)
            tried += [(score(delta), rate, tuned, delta) for step, delta in tuned.snapshots.items() if step]
        if tried:
            _, rate, tuned, delta = max(tried, key=lambda t: t[0])
            found[name] = Aligned(rate, tuned, test(delta))
        else:
            found[name] = Aligned(np.nan, tuned, None)
    return found


def budget_findings(trainings: Sequence[Mapping[str, Aligned]], asr: Measure, utility: Measure) -> Iterator[Finding]:
    """What is said of A8: aligned by RU alone minus full alignment, averaged over the trainings."""
    done = {name: [e for t in trainings if (e := t[name].evaluation) is not None] for name in ("RU", "full")}
    if lost := [name for name, evaluations in done.items() if len(evaluations) < len(trainings)]:
        yield from (Finding("A8", "", p, f"{' and '.join(lost)}: {DIVERGED}") for p in ("safety", "utility"))
        return
    for part, measure in (("safety", asr), ("utility", utility)):
        found = {
            name: [e.values(measure.set, measure.metric).to_numpy(float) for e in evaluations]
            for name, evaluations in done.items()
        }
        clusters = clusters_of(done["RU"][0].rows, measure.set)
        yield Finding("A8", "", part, metrics.clustered_difference(found["full"], found["RU"], clusters))


def budget_table(base: Evaluation, found: Mapping[str, Aligned], measures: Sequence[Measure]) -> pd.DataFrame:
    """Table 4 of the paper, with safety: arm, learning_rate, trained (share of parameters), metric, value, low, high, n.

    An arm that diverged at every rate has rows without a rate and without values.
    """
    rows = rates(base, measures, arm="unaligned", learning_rate=np.nan, trained=0.0)
    for name, a in found.items():
        rows += rates(a.evaluation, measures, arm=name, learning_rate=a.learning_rate, trained=a.tuned.share)
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------------- direction


def last_states(
    lm: LanguageModel, prompts: Sequence[str], openings: Sequence[str] | None, tokens: int = 4, batch_size: int = 32
) -> Tensor:
    """Hidden state of the last token after the embedding and after each block, float32 [prompts, layers + 1, hidden].

    Args:
        openings: first words of a response a prompt, cut to ``tokens`` tokens and put after it; None: the query alone.
    """
    heads = lm.tokens(lm.render(list(prompts)))
    tails: list[list[int]] = [[] for _ in heads]
    if openings is not None:
        tails = [t[:tokens] for t in lm.tokenizer(list(openings), add_special_tokens=False)["input_ids"]]
    rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
    found = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        lengths = [len(head) for head in heads[part]]
        batch = pad(rows[part], pad_id=lm.pad_id, side="left", prompt_lengths=lengths).to(lm.device)
        with torch.no_grad():
            states = lm.model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
        found.append(torch.stack([s[:, -1].float().cpu() for s in states], dim=1))
    return torch.cat(found)


def leaning(query: Tensor, refusal: Tensor, compliance: Tensor, baseline: Tensor | None = None) -> np.ndarray:
    """How much nearer the query's state is to its refusal's than to its compliance's [SSAH, section 3, Fig. 2-4].

    ``cos(query, query + refusal) - cos(query, query + compliance)``, [prompts, layers + 1]: positive = nearer refusal.
    ``baseline`` [layers + 1, hidden] is taken from all three states first (**ours**, asked for by reviewers: what all
    queries share, whatever follows them).
    """
    shift = 0 if baseline is None else baseline
    cosine = torch.nn.functional.cosine_similarity
    states = [s.double() - shift for s in (query, refusal, compliance)]
    return (cosine(states[0], states[1], dim=-1) - cosine(states[0], states[2], dim=-1)).numpy()


def direction_values(
    lm: LanguageModel,
    harmful: Sequence[Prompt],
    benign: Sequence[Prompt],
    refusal: str,
    compliance: str,
    tokens: int = 4,
) -> dict[str, np.ndarray]:
    """Leaning on harmful queries by variant, each [prompts, layers + 1].

    Variants: "as in the paper"; "query-only baseline subtracted" (the mean state of harmful and benign queries alone); and
    "minus benign queries" (the mean leaning of benign queries, which the words' own meaning moves as much).

    Args:
        refusal, compliance: opening words for prompts that come without responses of their own.
    """

    def states(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
        texts = [p.text for p in prompts]
        ends = [p.refusal or refusal for p in prompts], [p.helpful or compliance for p in prompts]
        refused, complied = (last_states(lm, texts, end, tokens) for end in ends)
        return last_states(lm, texts, None), refused, complied

    bad, good = states(harmful), states(benign)
    baseline = torch.cat([bad[0], good[0]]).double().mean(0)
    plain = leaning(*bad)
    return {
        "as in the paper": plain,
        "query-only baseline subtracted": leaning(*bad, baseline),
        "minus benign queries": plain - leaning(*good).mean(0),
    }


def direction_table(values: Mapping[str, Mapping[str, np.ndarray]], topics: Sequence[str]) -> pd.DataFrame:
    """model -> variant -> leaning as a table: model, variant, layer (0 = embedding), value, low, high, n (prompts).

    Intervals are over topics.
    """
    rows = []
    for model, variants in values.items():
        for variant, found in variants.items():
            for layer in range(found.shape[1]):
                interval = over_topics(found[:, layer], topics)
                rows.append((model, variant, layer, *interval))
    return pd.DataFrame(rows, columns=["model", "variant", "layer", "value", "low", "high", "n"])


def lean_finding(leanings: Mapping[str, Mapping[str, np.ndarray]], topics: Sequence[str]) -> Finding:
    """What is said of A1: leaning of the aligned model minus the unaligned one's, mean over the layers, over topics."""
    variant = "query-only baseline subtracted"
    if "unaligned" not in leanings:
        return Finding("A1", "", "lean", "this model has no unaligned counterpart")
    change = leanings["aligned"][variant] - leanings["unaligned"][variant]
    return Finding("A1", "", "lean", over_topics(change[:, 1:].mean(axis=1), topics))


def over_topics(values: np.ndarray, topics: Sequence[str]) -> metrics.Interval:
    """Mean with an interval over topics ("" = a topic of its own)."""
    return metrics.clustered_difference(np.zeros((1, len(values))), values, _clusters(topics))


def _clusters(topics: Sequence[str]) -> np.ndarray:
    return pd.factorize(pd.Series([t or f"prompt {i}" for i, t in enumerate(topics)]))[0]


def probe_table(
    states: Mapping[str, Tensor], labels: Sequence[bool], topics: Sequence[str], folds: int, seed: int
) -> pd.DataFrame:
    """Cross-validated accuracy of a linear probe at each layer: does the state before the answer tell refusal?

    Args:
        states: model -> last-token states of the queries [prompts, layers + 1, hidden]; labels: whether the model under
            study refuses; topics: prompts of a topic stay in one fold.
    Returns:
        Columns model, layer, value (accuracy), low, high (over topics), n, majority (accuracy of the commoner answer).
        Empty when all labels agree: nothing to tell apart.
    """
    y = np.asarray(labels, dtype=float)
    majority = max(y.mean(), 1 - y.mean())
    rows = []
    if majority < 1:
        groups = _clusters(topics)
        part = np.random.default_rng(seed).permutation(groups.max() + 1)[groups] % folds
        for model, found in states.items():
            for layer in range(found.shape[1]):
                guesses = _ridge_guesses(found[:, layer].double().numpy(), y, part)
                rows.append((model, layer, *metrics.rate(guesses == (y > 0.5), groups), majority))
    return pd.DataFrame(rows, columns=["model", "layer", "value", "low", "high", "n", "majority"])


def _ridge_guesses(x: np.ndarray, y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Each prompt's class by a ridge classifier (least squares on +-1, penalty 1 a dimension) fitted on the other folds."""
    guesses = np.zeros(len(y), dtype=bool)
    for k in np.unique(fold):
        train, held = fold != k, fold == k
        mean, spread = x[train].mean(0), x[train].std(0) + 1e-8
        a, b = (x[train] - mean) / spread, 2 * y[train] - 1
        # The kernel form: prompts are fewer than a large model's dimensions.
        weights = np.linalg.solve(a @ a.T + a.shape[1] * np.eye(len(a)), b - b.mean())
        guesses[held] = ((x[held] - mean) / spread) @ a.T @ weights + b.mean() > 0
    return guesses
