"""Fine-tuning on a new task: what is evaluated when, and that the state before it is left alone."""

import pytest
import torch

from nt_utils.data import corpus, tasks
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation.suite import Suite, SuiteSet, evaluate
from nt_utils.experiments.bench import Measure
from nt_utils.experiments.finetuning import attack_rows, choose_rate, curves, finetune, task_loss
from nt_utils.interventions.tuning import AllBut, Only, tune
from nt_utils.neurons import NeuronSet
from tests.common import refused
from tests.tiny import tiny_lm

ROWS = PromptSet([Prompt(text=f"count {i}", helpful=f"One, then {i}.", kind="benign") for i in range(6)], "rows")
HARMFUL = PromptSet([Prompt(text=f"break {i}", refusal="No.", helpful="So.", kind="harmful") for i in range(3)], "bad")
SUITE = Suite((SuiteSet("direct", HARMFUL, ("asr", "refusal")),), max_new_tokens=4)
ASR = Measure("direct", "asr", "ASR")


def first(lm, n=6):
    masks = {site: torch.arange(lm.view.space.width(site)) < n for site in lm.view.space.sites(("ffn",))}
    return NeuronSet(lm.view.space, masks)


def test_attack_rows_hold_as_many_harmful_ones_as_asked_for():
    """Where there were too few of them an attack that says 8 was made with fewer, without a word."""
    rows = attack_rows(ROWS, HARMFUL, 2, seed=0)
    assert [p.kind for p in rows].count("harmful") == 2 and len(rows) == len(ROWS)
    assert attack_rows(ROWS, HARMFUL, 0, seed=0).texts == ROWS.texts
    assert [p.kind for p in attack_rows(ROWS, HARMFUL, 1, seed=0, n=4)] == ["benign"] * 3 + ["harmful"]
    few = attack_rows(ROWS, HARMFUL, 1, seed=0, n=64)
    assert [p.kind for p in few].count("harmful") == 1 and len(few) == len(ROWS) and few.name == "1 of 6 harmful"
    refused("harmful rows: got 4; allowed: 0 to 3", attack_rows, ROWS, HARMFUL, 4, seed=0)
    refused("harmful rows: got 3; allowed: 0 to 2", attack_rows, ROWS, HARMFUL, 3, seed=0, n=2)
    refused("needs a `helpful` answer", attack_rows, ROWS, PromptSet([Prompt(text="x", kind="harmful")]), 1, seed=0)


def test_a_state_is_fine_tuned_and_left_as_it_was():
    lm, reference = tiny_lm(), tiny_lm()
    safety = tune(lm, Only(first(lm)), harmful=HARMFUL, learning_rate=0.01, steps=4, progress=False).delta
    with safety.active(lm):
        state = lm.weights_fingerprint
        before = task_loss(lm, ROWS)
        options = {"steps": [4, 2], "learning_rate": 0.003, "reference": reference, "batch_size": 3}
        run = finetune(lm, ROWS, SUITE, **options)
        assert lm.weights_fingerprint == state == run.delta.weights
        assert list(run.evaluations) == [0, 2, 4]
        assert run.last is run.evaluations[4]
        with run.delta.active(lm):
            assert task_loss(lm, ROWS) < before - 0.1
        frozen = finetune(lm, ROWS, SUITE, scope=AllBut(first(lm)), **options)
        again = finetune(lm, ROWS, SUITE, **options)
    assert again.delta.fingerprint == run.delta.fingerprint != frozen.delta.fingerprint
    table = curves({"everything": run, "frozen": frozen}, [ASR], state="SN-Tune")
    assert len(table) == 6
    assert table["n"].max() == 3  # what the phrase judge cannot read is left out
    assert set(table["state"]) == {"SN-Tune"}
    assert lm.weights_fingerprint == reference.weights_fingerprint
    with pytest.raises(InputError, match="steps: got 0"):
        finetune(lm, ROWS, SUITE, steps=[0], learning_rate=0.01)


def test_without_a_reference_the_model_before_the_training_tells_babble(monkeypatch):
    """A model that is broken by its training takes its own babble for probable: it would count as answering everything."""
    lm, seen = tiny_lm(), []
    untouched = lm.weights_fingerprint

    def asked(model, suite, base, **options):
        seen.append((model.weights_fingerprint, base.weights_fingerprint))
        return evaluate(model, suite, base=base, **options)

    monkeypatch.setattr("nt_utils.experiments.finetuning.evaluate", asked)
    finetune(lm, ROWS, SUITE, steps=[2], learning_rate=0.01, batch_size=3)
    (first, told), (after, told_after) = seen
    assert first == told == told_after == untouched != after


def test_the_rate_is_the_one_that_learns_the_task():
    lm = tiny_lm()
    rate, table = choose_rate(lm, ROWS, ROWS, [1e-6, 3e-3, 30.0], steps=4, batch_size=3)
    assert rate == 3e-3
    assert table["chosen"].tolist() == [False, True, False]
    assert table["loss"][1] < table["loss"][0] - 0.1


def test_the_new_task_is_new_and_split():
    sets = {split: tasks.differences(split=split) for split in corpus.SPLITS}
    for split, rows in sets.items():
        others = [row for name, other in sets.items() if name != split for row in other]
        assert not {r.topic for r in rows} & {r.topic for r in others}
        assert not {r.template for r in rows} & {r.template for r in others}
        for row in rows:
            a, b = map(int, row.topic.split("-"))
            assert row.helpful == f"{a} minus {b} is {a - b}."
            assert row.helpful.endswith(row.answer)
            assert str(a) in row.text and str(b) in row.text
    assert not [row for row in corpus.utility(999, "train") if "minus" in row.text]
    assert tasks.differences(5, seed=1).texts != tasks.differences(5, seed=2).texts
    assert len(tasks.differences(5)) == 5
    with pytest.raises(InputError, match="split"):
        tasks.differences(split="tune")
    with pytest.raises(InputError, match="n: got 0"):
        tasks.differences(0)
