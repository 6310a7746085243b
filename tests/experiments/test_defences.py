"""Defences and fine-tuning attacks on them, run for real on a tiny model."""

import dataclasses

import pandas as pd
import pytest
import torch

from nt_utils.data.records import PromptSet
from nt_utils.evaluation.suite import Suite, SuiteSet
from nt_utils.experiments import comparison, defences, definitions, modulation, units
from nt_utils.experiments.bench import Bench, Measure
from nt_utils.experiments.defences import Defence, FineTuning
from nt_utils.interventions.steering import SystemPrompt
from nt_utils.interventions.tuning import Only
from nt_utils.neurons import POOL, NeuronSet
from nt_utils.study.parameters import DEFENCES
from nt_utils.units import with_inputs
from tests.tiny import tiny_lm

ASR, REFUSED = Measure("direct", "asr", "ASR"), Measure("direct", "refusal", "refused")
HARMFUL = definitions.answered(PromptSet.of([f"Break thing {i}?" for i in range(12)], "bad", kind="harmful"))
BENIGN = definitions.answered(PromptSet.of([f"Mend thing {i}?" for i in range(20)], "good", kind="benign"))


@pytest.fixture(scope="module")
def bench():
    lm = tiny_lm()
    lm.model.config.max_position_embeddings = 1024
    return Bench(
        lm, Suite((SuiteSet("direct", HARMFUL[:4], ("asr", "refusal")),), "tiny", max_new_tokens=2), [ASR, REFUSED]
    )


def neurons(lm, n=4):
    return NeuronSet.from_flat(lm.view.space, range(n), POOL)


def test_an_attack_acts_on_top_of_a_defence_and_leaves_nothing(bench):
    lm, effort = bench.lm, comparison.Effort(0.01, 2, batch_size=4)
    before = lm.weights_fingerprint
    tuned = comparison.trained(lm, Only(neurons(lm), sides="output"), HARMFUL, BENIGN, effort)
    attack = FineTuning("task", BENIGN, [0.01], [1, 2], batch_size=4)
    for action in (tuned, comparison.amplify(neurons(lm), 2.0), SystemPrompt("Be kind."), None):
        found = defences._attacked(lm, Defence("x", action), attack, 0.01)
        assert sorted(found) == [1, 2]
        both = defences.then(action, found[2])
        with both.active(lm):
            lm.model(**lm.encode(["a"]).inputs)
            assert lm.weights_fingerprint not in (before, tuned.key)
        assert lm.weights_fingerprint == before
        assert found[2].key in both.key


def test_what_is_frozen_stays(bench):
    frozen = neurons(bench.lm)
    attack = FineTuning("task", BENIGN, [0.01], [2], batch_size=4)
    delta = defences._attacked(bench.lm, Defence("x", frozen=frozen), attack, 0.01)[2]
    plain = bench.lm.view.weight(0, "ffn")[:, :4].clone()
    with delta.active(bench.lm):
        assert torch.equal(bench.lm.view.weight(0, "ffn")[:, :4], plain)
        assert not torch.equal(bench.lm.view.weight(0, "ffn")[:, 4:], plain)


def test_frozen_units_grow_from_the_critical_ones_and_hold_their_inputs(bench):
    lm = bench.lm
    scores, _ = units.scored(lm, HARMFUL, BENIGN)
    made = scores.map({"SCU": 0.2, "UCU": 0.1, "RU": 0.2})
    found = defences.frozen_units(made, scores, 0.25, lm.view.head_dim)
    assert list(found) == [d for d in DEFENCES if d.startswith("freeze")]
    scu, top, everything = found.values()
    assert set(made.set("SCU")) <= set(scu) < set(top) < set(everything)
    assert set(everything) == set(with_inputs(made.set("SCU", "CU"), lm.view.head_dim))
    added = set(top) - set(scu)
    assert added <= set(with_inputs(made.set("CU"), lm.view.head_dim))


class FakeBench:
    """ASR and utility by the name of what acts."""

    lm = None

    def __init__(self, outcomes):
        self.outcomes = outcomes

    def __call__(self, action):
        asr, utility = self.outcomes[action]
        return type("E", (), {"rate": lambda _, s, m: type("R", (), {"value": asr if m == "asr" else utility})})()


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({1: (0.4, 0.9), 2: (0.9, 0.1)}, {"rate": 0.1, "step": 1}),  # the worse one has broken the model
        ({1: (0.4, 0.9), 2: (0.9, 0.8)}, {"rate": 0.1, "step": 2}),
        ({1: (0.0, 0.9), 2: (0.9, 0.1)}, {"rate": 0.0, "step": 0}),  # nothing useful is worse than no attack
    ],
)
def test_the_worst_case_keeps_the_model_useful(monkeypatch, points, expected):
    monkeypatch.setattr(defences, "_attacked", lambda lm, defence, attack, rate: {k: k for k in points})
    monkeypatch.setattr(defences, "then", lambda first, second: second)
    bench = FakeBench({None: (0.1, 1.0), **points})
    attack = FineTuning("task", BENIGN, [0.1], [1, 2], floor=0.8)
    _, where = defences.worst_case(
        bench, Defence("none"), attack, Measure("d", "asr", "a"), Measure("d", "helpful", "u")
    )
    assert where == expected


def test_every_defence_is_built_and_judged(bench):
    pytest.importorskip("peft")
    lm = bench.lm
    found = modulation.given_material(lm, *[(HARMFUL, BENIGN)] * 3, max_new_tokens=2)
    sets = {"SN-Tune": neurons(lm), "RU budget": neurons(lm, 8)}
    setting = defences.Setting([0.01], [0.001], [1], 1, [0.5], batch_size=4)
    before = lm.weights_fingerprint
    frozen = {"freeze SCU": neurons(lm, 2), "freeze SCU and CU": neurons(lm)}
    made = defences.build(lm, found, sets, frozen, setting, max_new_tokens=2)
    assert lm.weights_fingerprint == before
    sizes = defences.size_table(lm, made).set_index("defence")["trained"]
    assert sizes["none"] == sizes["system prompt"] == sizes["freeze SCU"] == sizes["freeze SCU and CU"] == 0
    assert [d.frozen for d in made if d.frozen] == list(frozen.values())
    assert 0 < sizes["SN-Tune"] < sizes["RU budget"] < sizes["full tuning"]
    assert 0 < sizes["NeuronTune, safety-first"] < sizes["SN-Tune"]
    attack = FineTuning("task", BENIGN, [0.01], [1], batch_size=4)
    table = defences.defence_table(bench, made, [attack], ASR, REFUSED)
    assert set(table["metric"]) == {"ASR", "refused", "ASR after task", "refused after task"}
    assert len(table) == 4 * len(made)
    front = comparison.frontier_table(table, {"p": ("refused", "ASR")}, "refused", 0.8)
    assert front["defence"].tolist() == [d.name for d in made]
    spent = defences.spent_table(lm, made, HARMFUL.texts[:2], repeats=1)
    assert isinstance(spent, pd.DataFrame)
    lost = defences.build(
        lm, found, {}, {}, dataclasses.replace(setting, full_rates=[1e30], wanted=["full tuning"]), max_new_tokens=2
    )
    table = defences.defence_table(bench, lost, [attack], ASR, REFUSED).set_index("defence")
    assert table["value"].isna().tolist() == [False] * 4 + [True] * 4, "a defence that diverged has rows without values"
    assert (spent["inference"] > 0).all()
