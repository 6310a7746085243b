"""One model, one suite, many interventions: each is evaluated once, and rates and paired differences are read off."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from nt_utils.evaluation import metrics
from nt_utils.evaluation.suite import METRICS, Evaluation, Suite, evaluate
from nt_utils.interventions import Deactivate, Intervention
from nt_utils.models import LanguageModel
from nt_utils.neurons import NeuronSet

#: What is done to the model: nothing, zeroing these neurons, or any intervention.
Action = NeuronSet | Intervention | None


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation: a prompt set, a metric in it, and what figures call it."""

    set: str
    metric: str
    label: str


def trimmed(suite: Suite, measures: Sequence[Measure]) -> Suite:
    """The suite without what nobody reads: refusal margins, for one, cost a pass over every set."""
    wanted = {(m.set, m.metric) for m in measures}
    sets = [
        dataclasses.replace(s, metrics=tuple(m for m in s.metrics if (s.name, m) in wanted or m in METRICS), groups=())
        for s in suite.sets
        if "perplexity" not in s.metrics or (s.name, "perplexity") in wanted
    ]
    return dataclasses.replace(suite, sets=tuple(sets))


def rates(found: Evaluation, measures: Sequence[Measure], **labels) -> list[dict]:
    """One row a measure: labels, metric, value, low, high (its interval), n."""
    rows = []
    for m in measures:
        value, low, high, n = found.rate(m.set, m.metric)
        rows.append({**labels, "metric": m.label, "value": value, "low": low, "high": high, "n": n})
    return rows


def difference(controls: Sequence[Evaluation], after: Evaluation, measure: Measure, seed: int = 0) -> metrics.Interval:
    """A rate minus the mean rate of the controls on the same prompts, resampled over topics and controls."""

    def values(found):
        return found.values(measure.set, measure.metric).to_numpy(float)

    clusters = clusters_of(after, measure.set)
    return metrics.clustered_difference([values(c) for c in controls], values(after), clusters, seed=seed)


def clusters_of(found: Evaluation, name: str):
    """Cluster of each prompt of a set, 0, 1, ...: its topic, or itself where it has none."""
    rows = found.rows
    rows = rows[rows["set"] == name]
    topics = rows["topic"].where(rows["topic"] != "", rows["number"].astype(str))
    return pd.factorize(topics)[0]


@dataclass
class Bench:
    """Evaluates a model under interventions; each once. A neuron set stands for zeroing it.

    Args:
        lm: the model; suite: what it is evaluated on; measures: which rates are read off;
        batch_size: prompts generated at once (None: chosen by length).
    """

    lm: LanguageModel
    suite: Suite
    measures: Sequence[Measure]
    batch_size: int | None = None

    def __post_init__(self):
        self._done: dict[str, Evaluation] = {}
        self.suite = trimmed(self.suite, self.measures)

    def __call__(self, action: Action = None) -> Evaluation:
        """The evaluation under this action (None: the model as it is)."""
        intervention = Deactivate(action) if isinstance(action, NeuronSet) else action
        key = intervention.key if intervention is not None else ""
        if key not in self._done:
            self._done[key] = evaluate(
                self.lm, self.suite, intervention=intervention, batch_size=self.batch_size, progress=False
            )
        return self._done[key]

    def part(self, *measures: Measure) -> Bench:
        """The bench of some measures, with their sets alone; without measures itself."""
        if not measures:
            return self
        return Bench(self.lm, self.suite.only(*dict.fromkeys(m.set for m in measures)), measures, self.batch_size)

    def rates(self, action: Action, measures: Sequence[Measure] | None = None, **labels) -> list[dict]:
        """One row a measure: labels, metric, value, low, high (Wilson), n."""
        return rates(self(action), measures or self.measures, **labels)

    def change(self, action: Action, measure: Measure, seed: int = 0) -> metrics.Interval:
        """Rate under the action minus the rate without, paired over prompts, resampled by topic."""
        return self.excess(action, [None], measure, seed)

    def excess(self, action: Action, controls: Sequence[Action], measure: Measure, seed: int = 0) -> metrics.Interval:
        """Rate under the action minus the mean rate of the controls, over topics and control draws."""

        return difference([self(c) for c in controls], self(action), measure, seed)
