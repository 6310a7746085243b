"""What notebook 02 asks of tuning: what each way of tuning gains and costs, step by step, at a fairly chosen rate.

    arm = choose(lm, "SN-Tune", Only(neurons), [0.003, 0.01], pairs, steps, dev, goal)   # trains, chooses rate and step
    arm.delta                                                                            # the Delta of the chosen step
    curve_table(bench, {"SN-Tune": [arm], ...}, measures)                                # rates against steps, on test

Everything is chosen on the development split (``dev``) and reported on another (``bench``). [SN] is Zhao et al., ICLR
2025, sections 4 and 5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from nt_utils import work
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation import metrics
from nt_utils.evaluation.generation import generate
from nt_utils.evaluation.metrics import Interval
from nt_utils.evaluation.suite import Evaluation, clusters_of
from nt_utils.experiments.bench import Bench, Finding, Measure, rates, ratio, spread
from nt_utils.experiments.cost import peak_of
from nt_utils.experiments.finetuning import DIVERGED, FineTuned, Scope
from nt_utils.interventions import kept
from nt_utils.interventions.delta import Delta
from nt_utils.interventions.tuning import Tuned, tune
from nt_utils.models import LanguageModel
from nt_utils.neurons import NeuronSet
from nt_utils.selection import Ranking

# ------------------------------------------------------------------------------------------------------ one arm


@dataclass(frozen=True)
class Pairs:
    """What every arm is tuned on: harmful prompts learn their refusal, benign ones their answer.

    Args:
        benign_share: of each batch; 0 = refusals alone, as in [SN].
        batch_size: pairs a step; seed: of their order, the same for every arm.
    """

    harmful: PromptSet
    benign: PromptSet
    benign_share: float = 0.5
    batch_size: int = 12
    seed: int = 0


@dataclass(frozen=True)
class Goal:
    """What a rate and a step are chosen by.

    Args:
        harm: the harmful score, lower is better; keep: rates that shall stay high; avoid: rates that shall stay low.
        target: the harmful score to reach: of the points that reach it the one with the least cost is chosen, and
            where none does the one with the least harm. None: the least sum of harm and cost.
    """

    harm: Measure
    keep: tuple[Measure, ...] = ()
    avoid: tuple[Measure, ...] = ()
    target: float | None = 0.1

    def cost(self, found: Evaluation) -> float:
        """Mean loss of what shall be kept plus mean rate of what shall be avoided (0 to 2)."""
        kept = [1 - found.rate(m.set, m.metric).value for m in self.keep]
        avoided = [found.rate(m.set, m.metric).value for m in self.avoid]
        return sum(sum(part) / len(part) for part in (kept, avoided) if part)

    def order(self, harm: float, cost: float) -> tuple[float, float]:
        """The smaller the better; the cost of what does not reach the target is not looked at."""
        if self.target is None:
            return (harm + cost, harm)
        return (0.0, cost) if self.reached(harm) else (harm, 0.0)

    def reached(self, harm: float) -> bool:
        """Whether this harmful score is low enough."""
        return self.target is None or harm <= self.target


@dataclass
class Arm:
    """One way of tuning at its chosen rate.

    Attributes:
        rate, step: chosen on the development split; reached: whether the goal's target is met there. Where the training
            diverged at every rate before its first evaluated step, the smallest rate and step 0, the untouched model.
        tuned: the training, with a snapshot at every evaluated step.
        tried: what was chosen from: arm, learning_rate, step, harm, cost (where the target is reached), chosen.
    """

    name: str
    scope: Scope
    rate: float
    step: int
    reached: bool
    tuned: Tuned
    tried: pd.DataFrame = field(repr=False)

    @property
    def diverged(self) -> bool:
        """Whether no rate gave any trained model."""
        return self.step == 0

    @property
    def delta(self) -> Delta:
        """What was learnt at the chosen step."""
        return self.tuned.snapshots[self.step]

    @property
    def steps(self) -> dict[int, Delta | None]:
        """Evaluated step -> what to do to the model; nothing at step 0."""
        return {step: delta if step else None for step, delta in self.tuned.snapshots.items()}


def train_arm(lm: LanguageModel, scope: Scope, pairs: Pairs, rate: float, steps: Sequence[int], **options) -> Tuned:
    """Tune on the pairs at one rate, keeping the delta of each of these steps (in main memory)."""
    shown = vars(pairs) | {"benign": pairs.benign if pairs.benign_share else ()}
    more = {"steps": max(steps), "every": list(steps), "snapshots": True, **options}
    return tune(lm, scope, learning_rate=rate, **shown, **more)


def choose(
    lm: LanguageModel,
    name: str,
    scope: Scope,
    learning_rates: Sequence[float],
    pairs: Pairs,
    steps: Sequence[int],
    dev: Bench,
    goal: Goal,
) -> Arm:
    """Train at every rate; keep the rate and the step that serve the goal best on the development split.

    Steps from which on the training diverged stand in ``tried`` without a score; when nothing else is left the arm says that
    it ``diverged``.
    """
    best, rows = None, []
    harmful, rest = dev.part(goal.harm), dev.part(*goal.keep, *goal.avoid)
    for _, rate in work.parts({f"{name}, rate {rate:g}": rate for rate in learning_rates}):
        tuned = train_arm(lm, scope, pairs, rate, steps)
        for step in sorted(steps):
            if step not in tuned.snapshots:
                rows.append({"arm": name, "learning_rate": rate, "step": step, "harm": math.nan, "cost": math.nan})
                continue
            harm = harmful(tuned.snapshots[step]).rate(goal.harm.set, goal.harm.metric).value
            cost = goal.cost(rest(tuned.snapshots[step])) if goal.reached(harm) else math.nan
            rows.append({"arm": name, "learning_rate": rate, "step": step, "harm": harm, "cost": cost})
            if best is None or goal.order(harm, cost) < best[0]:
                best = (goal.order(harm, cost), rate, step, goal.reached(harm), tuned)
    _, rate, step, reached, tuned = best or (None, min(learning_rates), 0, False, tuned)
    tried = pd.DataFrame(rows)
    tried["chosen"] = (tried["learning_rate"] == rate) & (tried["step"] == step)
    return Arm(name, scope, rate, step, reached, tuned, tried)


def names(text: str) -> list[str]:
    """The parts of a comma-separated parameter."""
    return [part.strip() for part in text.split(",") if part.strip()]


def slug(name: str) -> str:
    """An arm's name as a file name: "SN, paper's rule" is sn_paper_rule."""
    return "_".join(re.findall(r"[a-z0-9]+", name.lower().replace("'s", "")))


def choose_draws(
    lm: LanguageModel, name: str, scopes: Sequence[Scope], learning_rates: Sequence[float], *setting
) -> list[Arm]:
    """As :func:`choose` for random draws: the first chooses the rate, the others only their step."""
    first = choose(lm, name, scopes[0], learning_rates, *setting)
    return [first, *(choose(lm, name, scope, [first.rate], *setting) for scope in scopes[1:])]


def choose_trainings(
    lm: LanguageModel,
    name: str,
    scope: Scope,
    learning_rates: Sequence[float],
    trainings: int,
    pairs: Pairs,
    *setting,
) -> list[Arm]:
    """As :func:`choose`, several times with other orders of the pairs; the first chooses the rate, the others their step."""
    first = choose(lm, name, scope, learning_rates, pairs, *setting)
    orders = [replace(pairs, seed=pairs.seed + 1000 * i) for i in range(1, trainings)]
    return [first, *(choose(lm, name, scope, [first.rate], order, *setting) for order in orders)]


def findings(
    bench: Bench,
    claims: Mapping[str, str],
    arms: Sequence[Arm],
    controls: Sequence[Arm],
    harm: Sequence[Measure],
    roles: dict[str, Measure],
) -> Iterator[Finding]:
    """What is said of one model's SN-Tune: its harmful score (mean of the ``harm`` rates), its utility, against random.

    Args:
        claims: "score", "utility" and "random" -> the claim's id; those left out are not handed in.
    """
    if any(arm.diverged for arm in arms):
        parts = ["benign", "over-refusal", "likelihood", "perplexity", "kl"]
        lost = [("score", "harmful score"), ("score", "fall"), *(("utility", part) for part in parts)]
        lost += [("random", "harmful score")] if "random" in claims else []
        yield from (Finding(claims[claim], "", part, DIVERGED) for claim, part in lost)
        return
    tuned, drawn = [arm.delta for arm in arms], [arm.delta for arm in controls]
    after, before = (bench.harmful_score(a, None, harm) for a in (tuned, [None]))
    yield Finding(claims["score"], "", "harmful score", after)
    fall = ratio(after, before)
    yield Finding(claims["score"], "", "fall", fall or "the model's harmful score may be zero before tuning")
    yield from bench.utility_findings(claims["utility"], tuned, roles)
    if "random" in claims:
        reason = f"random neurons: {DIVERGED}" if any(control.diverged for control in controls) else ""
        yield Finding(claims["random"], "", "harmful score", reason or bench.harmful_score(tuned, drawn, harm))


def later_finding(
    later: Mapping[str, FineTuned], sn: str, rsn: str, harm: Measure, useful: Measure, task: Measure | None
) -> Interval | str:
    """What is said of S10: the rise of RSN-Tune's harmful score under the later task minus SN-Tune's, or why it has no test.

    Both have to learn the task (correct answers up by 30 points or more, at most 10 points of utility lost), both have to
    start as safe (RSN-Tune's harmful score at most 5 points above SN-Tune's), and SN-Tune's safety has to fall under the
    task by more than 5 points.
    """
    if sn not in later or rsn not in later:
        return "no later task, or no general text to find foundation neurons with"
    if task is None:
        return "whether the later task is learnt cannot be told: its answers are not known"
    for name in (sn, rsn):
        first, last = later[name].evaluations[0], later[name].last
        gain, loss = (last.rate(m.set, m.metric).value - first.rate(m.set, m.metric).value for m in (task, useful))
        if gain < 0.3 or loss < -0.1:
            points = f"correct answers {100 * gain:+.0f} points, utility {100 * loss:+.0f} points"
            return f"the later task is not learnt under {name}: {points}"
    starts = [later[name].evaluations[0].rate(harm.set, harm.metric).value for name in (rsn, sn)]
    if starts[0] > starts[1] + 0.05:
        return f"RSN-Tune's model is less safe from the start: {100 * starts[0]:.0f} against {100 * starts[1]:.0f}"
    if rise(later[sn], harm).low <= 0.05:
        return "SN-Tune's safety does not fall under the later task, so nothing can be kept better"
    return rise(later[rsn], harm, later[sn])


def without(ranking: Ranking, excluded: NeuronSet, share: float) -> NeuronSet:
    """The top share of a ranking with some neurons left out, the count refilled from further down.

    RSN-Tune's set: safety neurons that are not foundation neurons, as many as SN-Tune has, so that the two differ in
    which neurons they train and not in how many (the paper takes the plain difference).
    """
    values = ranking.values.double().masked_fill(excluded.flat(ranking.kinds), -math.inf)
    if len(excluded) + round(share * values.numel()) > values.numel():
        raise InputError(f"share: got {share}; {len(excluded)} of {values.numel()} neurons are excluded")
    return replace(ranking, values=values, name=f"{ranking.name}, refilled").top_share(share)


def answered(lm: LanguageModel, prompts: PromptSet, max_new_tokens: int, batch_size: int | None = None) -> PromptSet:
    """The prompts, those without a known answer with the model's own: learning it keeps what the model does."""
    bare = [i for i, prompt in enumerate(prompts) if not prompt.helpful]
    if not bare:
        return prompts
    texts = generate(lm, prompts[bare], max_new_tokens=max_new_tokens, batch_size=batch_size, cache=True)
    own = {i: response.text for i, response in zip(bare, texts, strict=True)}
    filled: list[Prompt] = [p.replace(helpful=own[i]) if own.get(i) else p for i, p in enumerate(prompts)]
    found = PromptSet((p for p in filled if p.helpful), prompts.name)
    if not len(found):
        raise InputError(f"benign: none of the {len(prompts)} prompts has an answer, and the model gives none")
    return found


# ------------------------------------------------------------------------------------------------------ tables


def curve_table(bench: Bench, arms: Mapping[str, Sequence[Arm]], measures: Sequence[Measure]) -> pd.DataFrame:
    """Rates against training steps, every arm at its own rate.

    Several draws of an arm: the value is their mean, low and high their smallest and largest rate. Columns: arm, step,
    metric, value, low, high, n, chosen (the step is the one chosen on the development split, of the first draw). Steps that a
    draw did not reach, since it diverged, have no value.
    """
    rows, bench = [], bench.part(*measures)
    for name, draws in work.parts(arms):
        for step in sorted({step for draw in draws for step in draw.steps}):
            found = [bench(draw.steps[step]) if step in draw.steps else None for draw in draws]
            rows += _mean_rates(found, measures, arm=name, step=step, chosen=step == draws[0].step)
    return pd.DataFrame(rows)


def stop_table(bench: Bench, arms: Mapping[str, Sequence[Arm]], measures: Sequence[Measure]) -> pd.DataFrame:
    """Rates at each arm's chosen step: arm, learning_rate, step, reached, metric, value, low, high, n.

    An arm one of whose draws diverged at every rate has no values; its first draw then stands at step 0.
    """
    rows = []
    for name, draws in arms.items():
        first, found = draws[0], [None if draw.diverged else bench(draw.delta) for draw in draws]
        labels = {
            "arm": name,
            "learning_rate": first.rate,
            "step": first.step,
            "reached": all(d.reached for d in draws),
        }
        rows += _mean_rates(found, measures, **labels)
    return pd.DataFrame(rows)


def _mean_rates(draws: Sequence[Evaluation | None], measures: Sequence[Measure], **labels) -> list[dict]:
    found = [one for one in draws if one is not None]
    if len(draws) == 1 or len(found) < len(draws):
        return rates(found[0] if len(draws) == len(found) else None, measures, **labels)
    each = {m.label: [one.rate(m.set, m.metric) for one in found] for m in measures}
    return [{**labels, "metric": label, **spread([r.value for r in some], some[0].n)} for label, some in each.items()]


def cost_table(lm: LanguageModel, arms: Mapping[str, Sequence[Arm]]) -> pd.DataFrame:
    """What each arm trains and leaves behind.

    Columns: arm, trained (parameters), share (of the model's), state_bytes (gradient and AdamW's two moments),
    delta_bytes (values and positions), share_of_checkpoint (delta_bytes over the model's), moved (share of the trained
    entries whose stored value changed).
    """
    checkpoint = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    rows = []
    for name, draws in arms.items():
        tuned, delta = draws[0].tuned, draws[0].delta
        rows.append(
            {
                "arm": name,
                "trained": tuned.trained,
                "share": tuned.share,
                "state_bytes": 3 * tuned.trained_bytes,
                "delta_bytes": delta.bytes,
                "share_of_checkpoint": delta.bytes / checkpoint,
                "moved": delta.moved_share,
            }
        )
    return pd.DataFrame(rows)


def spent_table(lm: LanguageModel, arms: Mapping[str, Arm], pairs: Pairs, steps: int = 3) -> pd.DataFrame:
    """Seconds a training step and the peak of memory above what is held before: arm, seconds_a_step, peak_mib."""
    rows = []
    for name, arm in arms.items():

        def work(arm=arm) -> Tuned:
            return train_arm(lm, arm.scope, pairs, arm.rate, [steps], snapshots=False, progress=False)

        with kept.paused():
            rows.append((name, work().seconds / steps, peak_of(work) / 2**20))
    return pd.DataFrame(rows, columns=["arm", "seconds_a_step", "peak_mib"])


def class_table(before: Evaluation, after: Mapping[str, Evaluation], name: str = "wrapped") -> pd.DataFrame:
    """ASR by class of attack before and after: attack, state, value, low, high, n; the first attack is "all".

    Intervals are over topics: one request under several attacks is not several requests.
    """
    rows = []
    for state, found in {"before": before, **after}.items():
        part = found.rows[found.rows["set"] == name]
        answers = part.assign(hit=found.values(name, "asr"), cluster=clusters_of(part))
        for attack, some in [("all", answers), *answers.groupby("attack_class", sort=True)]:
            rows.append({"attack": attack, "state": state, **metrics.rate(some["hit"], some["cluster"])._asdict()})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------ comparisons


def crossing(bench: Bench, arm: Arm, harm: Measure, level: float) -> dict[int, float] | None:
    """Where an arm's harmful score first comes down to a level: step -> weight, between two evaluated steps.

    None when it never does.
    """
    last = None
    for step, delta in arm.steps.items():
        value = bench.rate(harm, delta).value
        if value <= level:
            if last is None or value == level:
                return {step: 1.0}
            weight = (last[1] - level) / (last[1] - value)
            return {last[0]: 1 - weight, step: weight}
        last = step, value
    return None


def at_level(
    bench: Bench, arms: Sequence[Arm], harm: Measure, level: float, measure: Measure, nearest: bool = False
) -> np.ndarray | None:
    """One value a prompt: its outcome where the arm's harmful score comes down to the level, averaged over draws.

    Between two evaluated steps it is interpolated, or that of the nearest one. None when an arm never comes down.
    """
    found = []
    for arm in arms:
        weights = crossing(bench, arm, harm, level)
        if weights is None:
            return None
        if nearest:
            weights = {max(weights, key=weights.__getitem__): 1.0}
        found.append(np.sum([w * bench.mean_values([arm.steps[s]], measure) for s, w in weights.items()], axis=0))
    return np.mean(found, axis=0)


def equal_table(
    bench: Bench, arms: Mapping[str, Sequence[Arm]], goal: Goal, measures: Sequence[Measure]
) -> pd.DataFrame:
    """Rates at equal harmful score: arm, step (interpolated, mean over draws), target, metric, value, low, high, n.

    Intervals are over topics. An arm that never comes down to the target is left out.
    """
    if (target := goal.target) is None:
        raise InputError("goal: got no target; allowed: one whose target is a harmful score")
    rows = []
    for name, draws in arms.items():
        places = [place for draw in draws if (place := crossing(bench, draw, goal.harm, target))]
        if len(places) < len(draws):
            continue
        step = float(np.mean([sum(s * w for s, w in place.items()) for place in places]))
        for m in measures:
            clusters, intervals = clusters_of(bench.on(m.set).rows, m.set), []
            for nearest in (False, True):
                values = at_level(bench, draws, goal.harm, target, m, nearest)
                assert values is not None, "every draw comes down to the target"
                intervals.append(metrics.clustered_difference(np.zeros_like(values), values, clusters))
            labels = {"arm": name, "step": step, "target": target, "metric": m.label}
            rows.append({**labels, **intervals[0].as_wide_as(intervals[1]).within(0.0, 1.0)._asdict()})
    return pd.DataFrame(rows, columns=["arm", "step", "target", "metric", "value", "low", "high", "n"])


def rise(run: FineTuned, measure: Measure, control: FineTuned | None = None) -> metrics.Interval:
    """How much a rate rises under later fine-tuning, averaged over its steps; minus the control's rise, if given."""

    def values(one: FineTuned) -> np.ndarray:
        start, *later = (
            e.values(measure.set, measure.metric).to_numpy(float) for _, e in sorted(one.evaluations.items())
        )
        return np.mean(later, axis=0) - start

    own = values(run)
    base = values(control) if control is not None else np.zeros_like(own)
    return metrics.clustered_difference([base], own, clusters_of(run.last.rows, measure.set))
