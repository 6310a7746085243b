"""What notebook 02 computes: choices on one split, curves on another, on tiny models and on made-up evaluations."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation import metrics
from nt_utils.evaluation.suite import Suite, SuiteSet
from nt_utils.experiments import tuning
from nt_utils.experiments.bench import Bench, Measure
from nt_utils.experiments.finetuning import with_task
from nt_utils.interventions.tuning import Everything, Only
from nt_utils.neurons import POOL, NeuronSet, NeuronSpace
from nt_utils.selection import Ranking
from tests.tiny import tiny_lm

ASR, UTILITY = Measure("direct", "asr", "ASR"), Measure("benign", "helpful", "utility")
OVER = Measure("borderline", "over_refusal", "over-refusal")
HARMFUL = PromptSet([Prompt(text=f"break {i}", refusal="No.", kind="harmful") for i in range(4)], "bad")
BENIGN = PromptSet([Prompt(text=f"paint {i}", helpful="So.", kind="benign") for i in range(4)], "good")
PAIRS = tuning.Pairs(HARMFUL, BENIGN, 0.5, 4)


@dataclass
class Fake:
    """Ten prompts, two a topic: how many of them are hits of each measure."""

    hits: dict

    def values(self, name, metric):
        return pd.Series(np.arange(10) < self.hits[metric], dtype=float)

    def rate(self, name, metric):
        return metrics.wilson(self.hits[metric], 10)

    @property
    def rows(self):
        return pd.DataFrame({"set": "direct", "topic": [f"t{i // 2}" for i in range(10)], "number": range(10)})


def fake_arm(name, hits, step=2):
    """An arm whose snapshot at a step is its own evaluation."""
    snapshots = {i: Fake({"asr": n}) for i, n in enumerate(hits)}
    tuned = SimpleNamespace(snapshots=snapshots)
    return tuning.Arm(name, None, 0.1, step, True, tuned, pd.DataFrame())


class Look(Bench):
    """A bench whose interventions are evaluations."""

    def __init__(self):
        self.measures = (ASR,)

    def on(self, name, action=None):
        return action if action is not None else Fake({"asr": 10})

    def part(self, *measures):
        return self

    def __call__(self, action=None):
        return self.on("direct", action)


look = Look()


def test_a_goal_takes_the_cheapest_point_that_reaches_the_target():
    goal = tuning.Goal(ASR, (UTILITY,), (OVER,), 0.1)
    found = Fake({"asr": 1, "helpful": 8, "over_refusal": 3})
    assert goal.cost(found) == pytest.approx(0.2 + 0.3)
    assert goal.reached(0.1) and not goal.reached(0.11)
    points = [(0.0, 0.9), (0.1, 0.2), (0.2, 0.0), (0.3, 0.0)]
    assert min(points, key=lambda p: goal.order(*p)) == (0.1, 0.2)
    assert min(points[2:], key=lambda p: goal.order(*p)) == (0.2, 0.0), "none reaches it: the least harm"
    either = tuning.Goal(ASR, target=None)
    assert either.reached(1.0)
    assert min(points, key=lambda p: either.order(*p)) == (0.2, 0.0)
    assert either.cost(found) == 0


def test_curves_average_draws_and_mark_the_chosen_step():
    arms = {"SN": [fake_arm("SN", [10, 4, 0])], "random": [fake_arm("r", [10, 9, 8]), fake_arm("r", [10, 9, 4])]}
    table = tuning.curve_table(look, arms, [ASR]).set_index(["arm", "step"])
    assert table.loc[("SN", 1), "value"] == 0.4
    assert table.loc[("SN", 0), "value"] == 1.0
    assert tuple(table.loc[("random", 2), ["value", "low", "high"]]) == pytest.approx((0.6, 0.4, 0.8))
    assert table["chosen"].tolist() == [False, False, True] * 2
    stops = tuning.stop_table(look, arms, [ASR]).set_index("arm")
    assert stops["value"].tolist() == pytest.approx([0.0, 0.6])
    assert stops.loc["SN", "low"] == 0 < stops.loc["SN", "high"], "one training has Wilson's interval"


def test_equal_harmful_scores_are_met_between_steps():
    goal = tuning.Goal(ASR, target=0.1)
    sn, random, never = fake_arm("SN", [10, 3, 0]), fake_arm("r", [10, 9, 1]), fake_arm("n", [10, 9, 5])
    weights = tuning.crossing(look, sn, ASR, 0.1)
    assert weights == pytest.approx({1: 1 / 3, 2: 2 / 3})
    assert sum(w * sn.tuned.snapshots[s].hits["asr"] for s, w in weights.items()) == pytest.approx(1)
    assert tuning.crossing(look, random, ASR, 0.1) == {2: 1.0}
    assert tuning.crossing(look, never, ASR, 0.1) is None
    assert tuning.crossing(look, sn, ASR, 1.0) == {0: 1.0}
    assert tuning.at_level(look, [sn, random], ASR, 0.1, ASR).sum() == pytest.approx(1)
    assert tuning.at_level(look, [random, never], ASR, 0.1, ASR) is None
    table = tuning.equal_table(look, {"SN": [sn], "never": [never]}, goal, [ASR])
    assert table["arm"].tolist() == ["SN"]
    assert (table["step"][0], table["value"][0]) == pytest.approx((5 / 3, 0.1))
    assert table["low"][0] < 0.1 < table["high"][0]
    assert tuning.equal_table(look, {"never": [never]}, goal, [ASR]).empty


def test_the_rise_under_later_fine_tuning():
    def run(*hits):
        evaluations = {step: Fake({"asr": n}) for step, n in enumerate(hits)}
        return SimpleNamespace(evaluations=evaluations, last=evaluations[max(evaluations)])

    assert tuning.rise(run(1, 3, 5), ASR).value == pytest.approx(0.3)
    difference = tuning.rise(run(1, 3, 5), ASR, run(0, 6, 6))
    assert difference.value == pytest.approx(0.3 - 0.6)
    assert difference.low < -0.3 < difference.high


def test_safety_is_kept_better_only_by_what_was_safe_and_learnt_the_task():
    task, useful = Measure("direct", "helpful", "task"), Measure("direct", "over_refusal", "useful")

    def run(harm, learnt):
        evaluations = {
            i: Fake({"asr": n, "helpful": t, "over_refusal": 0})
            for i, (n, t) in enumerate(zip(harm, learnt, strict=True))
        }
        return SimpleNamespace(evaluations=evaluations, last=evaluations[max(evaluations)])

    def said(sn, rsn):
        return tuning.later_finding({"SN": run(*sn), "RSN": run(*rsn)}, "SN", "RSN", ASR, useful, task)

    sn = ([0, 9, 9], [0, 8, 8])
    assert said(sn, ([0, 1, 1], [0, 8, 8])).value == pytest.approx(-0.8)
    assert "not learnt under RSN" in said(sn, ([0, 0, 0], [0, 0, 0]))
    assert "less safe from the start" in said(sn, ([9, 10, 10], [0, 8, 8]))


def test_a_ranking_without_some_neurons_is_refilled():
    space = NeuronSpace({"o": (4,), "ffn": (6,)}, {"o": 1, "ffn": 1}, total_parameters=10, architecture="toy")
    ranking = Ranking(space, POOL, torch.arange(10.0))
    top = ranking.top_share(0.3)
    kept = tuning.without(ranking, top, 0.3)
    assert len(kept) == len(top) == 3
    assert not len(kept & top)
    assert kept.flat(POOL).nonzero().flatten().tolist() == [4, 5, 6]
    assert tuning.without(ranking, NeuronSet(space, {}), 0.3) == top
    with pytest.raises(InputError, match="share: got 0.8"):
        tuning.without(ranking, top, 0.8)


def test_lists_in_a_parameter():
    assert tuning.names(" full, lora ,") == ["full", "lora"]
    assert tuning.names("") == []


def test_names_become_file_names():
    assert tuning.slug("RSN, paper's rule") == "rsn_paper_rule"
    assert tuning.slug("random, as contrast") == "random_as_contrast"


def test_prompts_without_an_answer_learn_the_models_own(lm):
    prompts = PromptSet([BENIGN[0], Prompt(text="and this?", kind="benign")], "mixed")
    filled = tuning.answered(lm, prompts, 4)
    assert filled[0].helpful == "So."
    assert len(filled) == 1 or filled[1].helpful
    assert tuning.answered(lm, BENIGN, 4) is BENIGN


# ------------------------------------------------------------------------------------------------------ for real


@pytest.fixture(scope="module")
def setting():
    lm = tiny_lm()
    sets = [SuiteSet(name, prompts, ("asr", "refusal")) for name, prompts in (("direct", HARMFUL), ("benign", BENIGN))]
    measures = [ASR, Measure("benign", "refusal", "benign refused")]
    dev = Bench(lm, Suite(tuple(sets), max_new_tokens=4), measures)
    return lm, dev, tuning.Goal(ASR, (), (measures[1],), 0.0)


def neurons(lm, n=4):
    return NeuronSet.from_flat(lm.view.space, range(n), POOL)


def test_an_arm_is_chosen_trained_and_kept(setting):
    lm, dev, goal = setting
    before = lm.weights_fingerprint
    arm = tuning.choose(lm, "SN", Only(neurons(lm), "output"), [0.01, 0.03], PAIRS, [1, 3], dev, goal)
    assert lm.weights_fingerprint == before
    assert list(arm.tuned.snapshots) == [0, 1, 3] == list(arm.steps)
    assert arm.steps[0] is None
    assert arm.delta is arm.tuned.snapshots[arm.step]
    assert len(arm.tried) == 4 and arm.tried["chosen"].sum() == 1
    chosen = arm.tried[arm.tried["chosen"]].iloc[0]
    assert (chosen["learning_rate"], chosen["step"]) == (arm.rate, arm.step)
    assert goal.order(chosen["harm"], chosen["cost"]) == min(
        goal.order(h, c) for h, c in arm.tried[["harm", "cost"]].to_numpy()
    )
    again = tuning.choose(lm, "SN", Only(neurons(lm), "output"), [arm.rate], PAIRS, [1, 3], dev, goal)
    assert again.delta.fingerprint == arm.delta.fingerprint
    draws = tuning.choose_draws(lm, "r", [Everything(), Only(neurons(lm))], [0.01, 0.001], PAIRS, [2], dev, goal)
    assert {d.rate for d in draws} == {draws[0].rate}

    costs = tuning.cost_table(lm, {"SN": [arm], "full": [draws[0]]}).set_index("arm")
    entries = 4 * lm.model.config.hidden_size
    assert costs.loc["SN", "trained"] == entries == arm.delta.size
    assert costs.loc["full", "share"] == pytest.approx(1, abs=0.05)
    assert costs.loc["SN", "share_of_checkpoint"] < 1.5 * costs.loc["SN", "share"]
    assert costs.loc["SN", "state_bytes"] == 24 * entries
    spent = tuning.spent_table(lm, {"SN": arm}, PAIRS, steps=1)
    assert (spent["seconds_a_step"] > 0).all()
    assert lm.weights_fingerprint == before


def test_rates_that_diverge_are_left_out(setting):
    lm, dev, goal = setting
    arm = tuning.choose(lm, "full", Everything(), [1e30, 0.001], PAIRS, [3], dev, goal)
    assert arm.rate == 0.001
    failed = arm.tried[arm.tried["learning_rate"] == 1e30]
    assert failed["step"].tolist() == [3] and failed["harm"].isna().all() and not failed["chosen"].any()


def test_an_arm_that_diverges_at_every_rate_has_rows_that_say_so(setting):
    """Beside one that trains: both stand in every table, and what is claimed of the diverged one has no test."""
    lm, dev, goal = setting
    lost = tuning.choose(lm, "full", Everything(), [1e30, 1e29], PAIRS, [1, 3], dev, goal)
    kept = tuning.choose(lm, "SN", Only(neurons(lm)), [0.01], PAIRS, [1, 3], dev, goal)
    assert lost.diverged and not lost.reached and not kept.diverged
    assert (lost.rate, lost.step, lost.delta.moved) == (1e29, 0, 0)
    assert len(lost.tried) == 4 and lost.tried["harm"].isna().all() and not lost.tried["chosen"].any()
    arms = {"SN": [kept], "full": [lost], "draws": [kept, lost]}
    stops = tuning.stop_table(dev, arms, [ASR]).set_index("arm")
    assert stops["value"].isna().tolist() == [False, True, True] and stops.loc["full", ["step", "n"]].tolist() == [0, 0]
    curves = tuning.curve_table(dev, arms, [ASR]).set_index(["arm", "step"])
    assert curves["value"].isna()["draws"].tolist() == [False, True, True]
    assert curves["value"]["full"].to_dict() == {0: dev.rate(ASR).value}
    assert len(tuning.cost_table(lm, arms)) == 3
    claims = {"score": "S6", "utility": "S7", "random": "S8"}
    found = list(tuning.findings(dev, claims, [lost], [kept], [ASR], {}))
    assert {f.claim for f in found} == set(claims.values()) and all("diverged" in f.found for f in found)


def test_classes_of_attacks_before_and_after(setting):
    lm, *_ = setting
    wrapped = PromptSet([p.replace(attack=a, topic=p.text) for a in ("prefix.1", "fiction.1") for p in HARMFUL], "w")
    bench = Bench(
        lm, Suite((SuiteSet("wrapped", wrapped, ("asr",)),), max_new_tokens=4), [Measure("wrapped", "asr", "a")]
    )
    table = tuning.class_table(bench(None), {"SN": bench(None)})
    assert table["attack"].tolist() == ["all", "fiction", "prefix"] * 2
    assert table["n"].tolist() == [8, 4, 4] * 2
    assert table["state"].unique().tolist() == ["before", "SN"]
    assert table["value"].iloc[0] == pytest.approx(table["value"].iloc[1:3].mean())
    part = bench(None).rows
    by_request = metrics.rate(bench(None).values("wrapped", "asr"), pd.factorize(part["topic"])[0])
    assert tuple(table.loc[0, ["low", "high"]]) == pytest.approx((by_request.low, by_request.high))
    assert by_request != metrics.wilson(int(8 * by_request.value), 8), "two attacks on a request are not two requests"


def test_a_new_task_joins_the_suite(setting):
    _, dev, _ = setting
    task = PromptSet(
        [Prompt(text=f"{i}-1?", helpful=f"It is {i - 1}.", answer=f"{i - 1}", kind="benign") for i in range(4)]
    )
    suite, measures = with_task(dev.suite, task, [ASR])
    assert [s.name for s in suite.sets] == ["direct", "task"]
    assert (measures[-1].set, measures[-1].metric) == ("task", "helpful")
    suite, measures = with_task(dev.suite, BENIGN, [ASR])
    assert [s.name for s in suite.sets] == ["direct"] and measures == [ASR]
