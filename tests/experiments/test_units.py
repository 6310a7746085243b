"""The tables of notebook 03, on a tiny model: put together from groups of prompts as from all at once."""

import pytest
import torch

from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation.suite import Suite, SuiteSet
from nt_utils.experiments import units as study_units
from nt_utils.experiments.bench import Bench, Measure
from nt_utils.experiments.units import Calibration
from nt_utils.neurons import POOL
from nt_utils.plots import units as figures
from nt_utils.scoring.importance import importance
from nt_utils.units import CATEGORIES

SHARES = {"SCU": 0.1, "UCU": 0.2, "RU": 0.3}
ASR = Measure("direct", "asr", "direct ASR")
ANSWERED = Measure("direct", "refusal", "refused")


def prompts(word, n=16, **fields):
    return PromptSet([Prompt(text=f"{word} number {i}", **fields) for i in range(n)], word)


HARM = prompts("burn", kind="harmful", refusal="No.", helpful="x")
GOOD = prompts("bake", kind="benign", helpful="Take flour and water.")


@pytest.fixture(scope="module")
def calibration(lm):
    return Calibration.of(lm, HARM, GOOD, size=2)


@pytest.fixture(scope="module")
def units(calibration):
    return calibration.scores().map(SHARES)


@pytest.fixture(scope="module")
def bench(lm):
    suite = Suite(
        (
            SuiteSet(
                "direct", prompts("steal", 6, kind="harmful", helpful="x"), ("asr", "refusal"), "known", correct="known"
            ),
        ),
        max_new_tokens=3,
    )
    return Bench(lm, suite, [ASR, ANSWERED])


def test_groups_put_together_equal_one_pass(lm, calibration):
    scores, means = study_units.scored(lm, HARM, GOOD, evaluated=["other"])
    made = scores.map(SHARES, lm.weights_fingerprint)
    assert made == calibration.scores().map(SHARES)
    assert made.weights == lm.weights_fingerprint
    assert torch.allclose(means.mean(1, "ffn"), calibration.merged()[1].mean(1, "ffn"))
    few = calibration.scores([0, 3]).map(SHARES)
    pick = [0, 1, 6, 7]
    assert few == study_units.scored(lm, HARM[pick], GOOD[pick])[0].map(SHARES) != made
    with_responses, without = calibration, Calibration.of(lm, HARM, GOOD, size=2, targets=("", ""))
    assert with_responses.merged()[0].tokens > without.merged()[0].tokens
    no_answers = prompts("bake", kind="benign")
    assert Calibration.of(lm, HARM, no_answers, size=2).merged()[0].tokens == without.merged()[0].tokens


def test_prompts_that_are_evaluated_on_are_refused(lm):
    for call in (Calibration.of, study_units.scored):
        with pytest.raises(InputError, match="1 of 32 prompts are also evaluated on"):
            call(lm, HARM, GOOD, evaluated=[GOOD[3].text])
    with pytest.raises(InputError, match="at least 40"):
        Calibration.of(lm, HARM, GOOD, size=20)


def test_random_units_match_a_category_and_keep_heads_whole(calibration):
    channels = calibration.scores(heads=False).map({"SCU": 0.2, "UCU": 0.2, "RU": 0.2})
    heads = calibration.scores().map({"SCU": 0.2, "UCU": 0.2, "RU": 0.2})
    for made in (channels, heads):
        for name in CATEGORIES:
            own = made.set(name)
            for drawn in study_units.random_like(made, own, 3, seed=1):
                assert drawn.counts() == own.counts()
                if name != "CU":  # more than half of the units: no room for others
                    assert len(drawn & own) == 0
    for drawn in study_units.random_like(heads, heads.set("CU"), 3, seed=1):
        o = drawn.mask((1, "o")).reshape(-1, 8)
        assert (o.all(1) | ~o.any(1)).all()
    first, second = study_units.random_like(heads, heads.set("SCU"), 2, seed=1)
    assert first != second
    assert study_units.random_like(heads, heads.set("SCU"), 1, seed=1)[0] == first


def test_pruning_tables_and_the_cost_of_growing(bench, calibration, units):
    means = calibration.merged()[1]
    table, controls = study_units.pruning_table(bench, units, means, ["SCU", "RU"], draws=2, seed=0)
    assert len(table) == 2 * (1 + 2 * 3)
    assert set(controls) == {"SCU", "RU"}
    assert table.set_index("condition").loc["RU", "share"].iloc[0] == units.shares()["RU"]
    cost = study_units.pruning_cost(bench, means, ASR, ANSWERED)
    found = cost(units.set("CU"))
    pruned = bench(study_units.pruning(units.set("CU"), means))
    assert found.safety == pruned.rate("direct", "asr").value - bench(None).rate("direct", "asr").value
    assert found.utility == bench(None).rate("direct", "refusal").value - pruned.rate("direct", "refusal").value
    assert not any(mean.any() for mean in study_units.pruning(units.set("CU"), None).means.values())
    rows = [{"category": "SCU", "share": 0.1, "safety": 0.2, "utility": 0.1, "chosen": True}]
    assert study_units.growth_table(rows)["value"].tolist() == [0.2, 0.1]
    for draw, frame in ((figures.units_pruning, table), (figures.units_growth, study_units.growth_table(rows))):
        assert draw(frame).axes


def test_sensitivity_is_between_chance_and_one(calibration, units):
    variants = {"a": {}, "b": {"contrast": "difference"}}
    table = study_units.sensitivity_table(calibration, variants, SHARES, [4, 8, 100], draws=3, seed=0)
    assert sorted(set(table["prompts"])) == [4, 8], "two disjoint sets of 100 of 16 prompts do not exist"
    assert len(table) == 2 * 2 * 4
    assert table["value"].between(0, 1).all()
    assert (table["low"] <= table["high"]).all()
    changed = study_units.agreement_table(
        calibration, {"nothing": lambda rows: calibration.scores(rows).map(SHARES)}, SHARES, draws=3, seed=0
    )
    same = changed[changed["changed"] == "nothing"]
    assert (same["value"] == 1).all()
    other = changed[changed["changed"] != "nothing"]
    assert (other["value"] < 1).any()
    assert figures.units_sensitivity(table).axes
    assert figures.units_agreement(changed).axes


def test_safety_neurons_are_compared_on_the_same_prompts(lm, calibration, tmp_path):
    last, benign, everywhere = (
        importance(lm, p.texts, kinds=POOL, positions=where, path=tmp_path / f"{i}.st", progress=False)
        for i, (p, where) in enumerate(((HARM, "last"), (GOOD, "last"), (HARM, "all")))
    )
    rules = study_units.selection_rules((everywhere, last), benign)
    rules["itself"] = lambda rows, n: calibration.scores([r // 2 for r in rows[::2]]).map(SHARES).set("SCU")
    table = study_units.safety_neurons_table(calibration, rules, SHARES, draws=2, seed=0).set_index("rule")
    assert table.loc["itself", "value"] == 1
    assert table["value"].between(0, 1).all()
    assert table.loc["itself", "neurons"] == table.loc["contrast", "neurons"]


def test_sizes_and_places_add_up(units):
    sizes = study_units.size_table(units).set_index("category")
    assert sizes["units"].sum() == len(units)
    assert sizes["heads"].sum() == 8
    where = study_units.where_table(units)
    assert where.groupby(["layer", "unit"])["share"].sum().tolist() == pytest.approx([1, 1, 1, 1])
    assert figures.units_where(where).axes
