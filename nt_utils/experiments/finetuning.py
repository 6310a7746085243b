"""Fine-tuning attacks: somebody fine-tunes the model further and its safety is measured on the way.

    with sn.delta.active(lm):                                   # any state of the model: merge what was learnt before
        rate, tried = choose_rate(lm, rows, held_out, [3e-4, 1e-3], steps=40)
        run = finetune(lm, rows, suite, steps=[10, 20, 40], learning_rate=rate, reference=base)
        frozen = finetune(lm, rows, suite, steps=[10, 20, 40], learning_rate=rate, scope=AllBut(units))
    curves({"SN-Tune": run, ...}, measures)

Rows learn their `helpful` response. Harmless rows of a new task are the benign fine-tuning of [SN] (section 5) and
[SSAH] (section 4); harmful prompts with their harmless stubs are a harmful attack. ``scope`` says what the fine-tuner
trains: `Everything()`, `AllBut(units)` (a defence: some units frozen), `LoRA(...)`, `Only(...)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from nt_utils import work
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation.likelihood import response_likelihood
from nt_utils.evaluation.suite import Evaluation, Suite, evaluate, make_suite
from nt_utils.experiments.bench import Measure, rates, trimmed
from nt_utils.interventions.delta import Delta
from nt_utils.interventions.precision import copied
from nt_utils.interventions.tuning import AllBut, Everything, LoRA, Only, Tuned, tune
from nt_utils.models import LanguageModel

Scope = Only | AllBut | Everything | LoRA
#: Why an arm has no numbers.
DIVERGED = "the training diverged at every learning rate"


def attack_rows(
    task: Sequence[Prompt], harmful: Sequence[Prompt], bad: int, seed: int, n: int | None = None
) -> PromptSet:
    """What a fine-tuner learns from: at most ``n`` rows of a harmless task (None: all), ``bad`` of them replaced by harmful
    prompts with their harmless stub answers.

    Raises:
        InputError: more harmful rows than there are, or than rows in all; a row without a `helpful` answer.
    """
    n = len(task) if n is None else min(n, len(task))
    most = min(n, len(harmful))
    if not 0 <= bad <= most:
        raise InputError(f"harmful rows: got {bad}; allowed: 0 to {most} ({len(harmful)} prompts, {n} rows in all)")
    rows = PromptSet(
        [*PromptSet(task).take(n - bad, seed), *PromptSet(harmful).take(bad, seed)], f"{bad} of {n} harmful"
    )
    if not all(row.helpful for row in rows):
        raise InputError("rows: every one needs a `helpful` answer (of a harmful prompt: a stub) to be learnt")
    return rows


@dataclass
class FineTuned:
    """What fine-tuning did: an evaluation a step (step 0: before it), the training itself, and the held-out loss of its
    task at the same steps (nats a token; empty where no rows were held out)."""

    evaluations: dict[int, Evaluation]
    tuned: Tuned
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def delta(self) -> Delta:
        """What the fine-tuning changed, on top of the state it started from."""
        return self.tuned.delta

    @property
    def last(self) -> Evaluation:
        """The evaluation at the last step."""
        return self.evaluations[max(self.evaluations)]


def finetune(
    lm: LanguageModel,
    rows: Sequence[Prompt],
    suite: Suite,
    *,
    steps: Sequence[int],
    learning_rate: float,
    scope: Scope | None = None,
    reference: LanguageModel | None = None,
    batch_size: int = 16,
    eval_batch_size: int | None = None,
    seed: int = 0,
    start: Evaluation | None = None,
    held_out: Sequence[Prompt] = (),
    **options,
) -> FineTuned:
    """Fine-tune on the rows' helpful responses and evaluate after each of these steps; `lm` is as before afterwards.

    Args:
        lm: the model in the state that is attacked (merge what was learnt before: ``with delta.active(lm)``).
        steps: when to evaluate, ascending or not; step 0, the state that is attacked, comes by itself. The last step
            ends the training.
        learning_rate: of AdamW, constant; see :func:`choose_rate`.
        scope: what is trained (None: everything).
        reference: the model by which improbable responses are found (None: a copy of `lm` as it is before the training;
            a model under training would take its own babble for probable).
        seed: of the order of the rows, the same for every state that is to be compared.
        start: the evaluation of step 0, where another fine-tuning from this state has made it.
        held_out: rows of the same task that are not trained on; their loss is taken at every evaluated step.
        options: further ones of :func:`nt_utils.interventions.tuning.tune`.

    Raises:
        InputError: as :func:`tune`.
    """
    found: dict[int, Evaluation] = {} if start is None else {0: start}
    losses: dict[int, float] = {}
    reference = copied(lm) if reference is None else reference

    def measure(model: LanguageModel, step: int) -> None:
        if held_out:
            losses[step] = task_loss(model, held_out)
        if step or start is None:
            with work.part(f"step {step}"):
                found[step] = evaluate(model, suite, base=reference, batch_size=eval_batch_size)

    stops = [step for step in steps if step]
    tuned = tune(
        lm,
        scope or Everything(),
        benign=rows,
        learning_rate=learning_rate,
        steps=max(stops, default=0),
        every=stops,
        callback=measure,
        batch_size=batch_size,
        seed=seed,
        **options,
    )
    return FineTuned(found, tuned, losses)


def choose_rate(
    lm: LanguageModel,
    rows: Sequence[Prompt],
    held_out: Sequence[Prompt],
    learning_rates: Sequence[float],
    *,
    steps: int,
    scope: Scope | None = None,
    batch_size: int = 16,
    seed: int = 0,
    **options,
) -> tuple[float, pd.DataFrame]:
    """The rate a fine-tuner would take: the one that learns the task best. Safety has no part in it.

    Args:
        held_out: rows of the same task, not trained on (development split).
    Returns:
        The rate, and a table: learning_rate, loss (nats a token of the held-out responses after the last step; infinite
        where the training diverged), chosen.
    """
    losses = []
    more = {"steps": steps, "batch_size": batch_size, "seed": seed, **options}
    for rate in learning_rates:
        with work.part(f"rate {rate:g}"):
            tuned = tune(lm, scope or Everything(), benign=rows, learning_rate=rate, **more)
        if tuned.diverged is not None:
            losses.append(math.inf)
            continue
        with tuned.delta.active(lm):
            losses.append(task_loss(lm, held_out))
    best = min(range(len(losses)), key=losses.__getitem__)
    table = pd.DataFrame({"learning_rate": list(learning_rates), "loss": losses})
    return learning_rates[best], table.assign(chosen=table.index == best)


def with_task(suite: Suite, task: PromptSet, measures: Sequence[Measure]) -> tuple[Suite, list[Measure]]:
    """The suite of these measures with the new task's test rows, told by their final number where they have one.

    Returns the suite and the measures, with "new task (correct answers)" last where that can be told.
    """
    member = make_suite(benign=task).sets[0]
    measures = list(measures)
    if member.correct:
        measures.append(Measure("task", "helpful", "new task (correct answers)"))
    sets = (*suite.only(*dict.fromkeys(m.set for m in measures if m.set != "task")).sets, replace(member, name="task"))
    whole = replace(suite, sets=sets if member.correct else sets[:-1])
    return trimmed(whole, measures), measures


def task_loss(lm: LanguageModel, rows: Sequence[Prompt], target: str = "helpful") -> float:
    """Mean negative log-likelihood of the rows' responses, in nats a token."""
    totals, counts = response_likelihood(lm, list(rows), [getattr(row, target) for row in rows])
    return float(-totals.sum() / max(counts.sum(), 1))


def curves(runs: Mapping[str, FineTuned], measures: Sequence[Measure], **labels) -> pd.DataFrame:
    """Rates against fine-tuning steps: labels, arm, step, metric, value, low, high, n; no value where it diverged."""
    rows = []
    for arm, run in runs.items():
        for step, found in run.evaluations.items():
            rows += rates(found, measures, **labels, arm=arm, step=step)
        rows += diverged_rows(run, measures, **labels, arm=arm)
    return pd.DataFrame(rows)


def diverged_rows(run: FineTuned, measures: Sequence[Measure], **labels) -> list[dict]:
    """A row a measure that says at which step a training diverged: value, low and high are NaN, n is 0."""
    if run.tuned.diverged is None:
        return []
    return rates(None, measures, **labels, step=run.tuned.diverged)
