"""The tables of notebook 01: counted by hand on a toy space, and run for real on a tiny model."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch

from nt_utils import hooks, selection
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.evaluation import metrics
from nt_utils.evaluation.suite import Suite, SuiteSet
from nt_utils.experiments import detection
from nt_utils.experiments.bench import Bench, Measure, average, middle, ratio, total
from nt_utils.neurons import POOL, NeuronSet, NeuronSpace, ScoreWriter

SPACE = NeuronSpace(
    {"q": (4, 4), "k": (2, 2), "v": (2, 2), "o": (10, 10), "ffn": (30, 30)},
    {"q": 9, "k": 9, "v": 9, "o": 8, "ffn": 24},
    total_parameters=4000,
    architecture="toy",
)
ASR = Measure("direct", "asr", "direct ASR")
FLUENT = Measure("text", "perplexity", "perplexity")
CHOSEN = NeuronSet.from_flat(SPACE, [0, 1, 32, 41], POOL)


class FakeBench(Bench):
    """Zeroing answers as many of 40 prompts as the chosen neurons it hits, times ten; perplexity grows with the set."""

    def __init__(self):
        self.measures = [ASR, FLUENT]

    def part(self, *measures):
        return self

    def on(self, name, action=None):
        hits = len(action & CHOSEN) if action is not None else 0
        size = len(action) if action is not None else 0
        return FakeEvaluation(np.arange(40) < 10 * hits + size % 3, 10 * (1 + size / 40))


@dataclass
class FakeEvaluation:
    outcomes: np.ndarray
    perplexity: float
    unjudged: int = 0

    def rate(self, name, metric):
        if metric == "perplexity":
            return metrics.Interval(self.perplexity, self.perplexity, self.perplexity, 5)
        return metrics.wilson(int(self.outcomes.sum()), len(self.outcomes))

    def values(self, name, metric):
        return pd.Series(self.outcomes.astype(float))

    @property
    def rows(self):
        n = len(self.outcomes)
        verdicts = [None] * self.unjudged + ["compliance"] * (n - self.unjudged)
        return pd.DataFrame({"set": "direct", "topic": "", "number": range(n), "verdict": verdicts})


@pytest.mark.parametrize(("unjudged", "prompts", "n"), [(2, 40, 40), (3, 40, 0), (1, 12, 12), (2, 12, 0)])
def test_a_comparison_needs_verdicts_on_nearly_all_answers(monkeypatch, unjudged, prompts, n):
    """Answers that no judge could read are left out up to 5%, or one; beyond that they may be what the comparison is about.

    Formerly a single one among fewer than twenty left nothing to compare, and so most claims of a small study untestable.
    """
    bench, on = FakeBench(), FakeBench.on
    few = NeuronSet(SPACE, {(0, "q"): torch.tensor([True, False, False, False])})

    def answers(self, *a):
        found = on(self, *a)
        return replace(found, outcomes=found.outcomes[:prompts], unjudged=unjudged if len(a) > 1 and a[1] else 0)

    monkeypatch.setattr(FakeBench, "on", answers)
    assert bench.excess(few, [None], ASR).n == n


def test_where_and_size_tables_count_neurons():
    chosen = NeuronSet(SPACE, {(0, "q"): torch.tensor([True, True, False, False]), (1, "ffn"): torch.arange(30) < 3})
    where = detection.where_table({"rule": chosen}).set_index(["layer", "kind"])
    assert where.loc[(0, "q"), "share"] == 0.5
    assert where.loc[(1, "ffn"), "count"] == 3
    assert where["count"].sum() == 5
    size = detection.size_table({"rule": chosen, "nothing": NeuronSet(SPACE, {})}).set_index("rule")
    parameters = 2 * 9 + 3 * 24
    assert size.loc["rule", "share_of_parameters"] == pytest.approx(parameters / 4000)
    assert size.loc["rule", "in_attention"] == pytest.approx(2 * 9 / parameters)
    assert size.loc["rule", "in_first_third"] == 0, "two layers have no first third"
    assert size.loc["nothing", "neurons"] == 0


def test_controls_stand_beside_the_chosen_sets():
    bench = FakeBench().part()
    draws = selection.matched_random(CHOSEN, 5, seed=0)
    table = detection.control_table(bench, {"rule": CHOSEN}, {"random": draws, "other": draws[0]})
    rows = table[table["metric"] == ASR.label].set_index("condition")
    assert rows.loc[detection.NONE, "value"] == 0
    assert rows.loc["rule", "value"] == 1
    assert rows.loc["random, max of 5", "value"] == rows.loc["other", "value"] == 1 / 40
    assert set(table["group"]) == {"none", "chosen", "control"}
    assert bench.excess(CHOSEN, draws, ASR).value == pytest.approx(39 / 40)
    assert bench.change(CHOSEN, ASR).value == 1


def ranked():
    """A ranking whose first four neurons are CHOSEN's."""
    values = torch.zeros(SPACE.size(POOL))
    values[CHOSEN.flat(POOL)] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    return selection.Ranking(SPACE, POOL, values)


def test_dose_table_has_every_rule_its_random_sets_and_what_has_no_dose():
    ranking, bench = ranked(), FakeBench()
    controls = {("rule", 0.05): selection.matched_random(ranking.top(4), 3)}
    others = {"rival": ranking.top(2)}
    table = detection.dose_table(bench, {"rule": ranking}, [0.0125, 0.05, 0.9], controls, others, FLUENT)
    asr = table[table["metric"] == ASR.label]
    rule = asr[asr["rule"] == "rule"]
    assert rule["share"].tolist() == [0.0125, 0.05, 0.9]
    assert rule["neurons"].tolist() == [1, 4, 72]
    assert rule["value"].tolist() == [11 / 40, 1, 1]
    assert rule["broken"].tolist() == [False, False, True], "perplexity is 10 (1 + size / 40); the bound is 15"
    unmeasured = detection.dose_table(bench, {"rule": ranking}, [0.0125, 0.05, 0.9], controls, others)
    pd.testing.assert_frame_equal(unmeasured, table.drop(columns="broken"))  # formerly it said that nothing was broken
    random = asr[asr["rule"] == "random, matched to rule"]
    assert random[["share", "value", "low", "high"]].to_numpy() == pytest.approx(np.array([[0.05] + [1 / 40] * 3]))
    assert asr[asr["rule"] == "rival"]["share"].isna().all()
    assert asr[asr["rule"] == detection.NONE][["share", "value"]].to_numpy().tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.0125, 0.05, 0.9], 0.0125),  # the first dose raises ASR by 27 points
        ([0.05, 0.0125], 0.0125),  # whatever their order
        ([0.5, 0.9], 0.5),  # no dose is within the bound: the smallest
    ],
)
def test_primary_dose_is_the_smallest_that_answers_within_the_bound(shares, expected):
    rows = detection.primary_dose(FakeBench(), "rule", ranked(), shares, ASR, FLUENT)
    assert [row["share"] for row in rows if row["primary"]] == [expected]


def test_primary_dose_without_effect_is_the_largest_within_the_bound():
    nothing = selection.Ranking(SPACE, POOL, -ranked().values)  # CHOSEN comes last
    rows = detection.primary_dose(FakeBench(), "rule", nothing, [0.0125, 0.1, 0.9], ASR, FLUENT)
    assert [row["share"] for row in rows if row["primary"]] == [0.1]
    assert len(rows) == 3


def test_jailbroken_is_the_sum_of_what_is_answered_more_and_lost_less():
    bench = FakeBench()
    found = bench.jailbroken(CHOSEN, [None], ASR, ASR)
    assert found.value == 2 * bench.change(CHOSEN, ASR).value
    parts = [metrics.Interval(1.0, 0.7, 1.4, 5), metrics.Interval(2.0, 1.6, 2.3, 9)]
    assert total(*parts) == pytest.approx((3.0, 3.0 - 0.5, 3.0 + 0.5, 5))


def test_what_is_made_of_intervals_has_the_fewest_of_their_degrees_of_freedom():
    few, many = metrics.Interval(0.5, 0.4, 0.6, 5, 3), metrics.Interval(0.4, 0.3, 0.5, 9)
    made = total(few, many), average(few, many), ratio(many, few)
    assert [found.freedom for found in made] == [3, 3, 3]
    assert middle([0.1, 0.2, 0.3, np.nan]).freedom == 2


def test_thirds_and_blocks_split_a_set_by_place():
    space = NeuronSpace({"o": (4,) * 6, "ffn": (10,) * 6}, {"o": 1, "ffn": 1}, 100, "six")
    values = torch.arange(space.size(POOL)).double()
    ranking = selection.Ranking(space, POOL, values)
    masks = {(0, "ffn"): torch.arange(10) < 5, (5, "ffn"): torch.arange(10) < 2, (3, "o"): torch.arange(4) < 1}
    chosen = NeuronSet(space, masks)
    first, last = detection.thirds(chosen, ranking)
    assert sorted(first) == [(0, "ffn", 3), (0, "ffn", 4)], "as many as the smaller part, best first"
    assert sorted(last) == [(5, "ffn", 0), (5, "ffn", 1)]
    attention, ffn = detection.by_block(chosen)
    assert (len(attention), len(ffn)) == (1, 7)
    early = NeuronSet(space, {(0, "ffn"): torch.arange(10) < 5})
    assert [len(part) for part in detection.thirds(early, ranking)] == [0, 0]


def test_factorial_ends_in_contrast_and_in_the_threshold_rule(tmp_path):
    harmful = {name: scores(tmp_path, f"h{i}", 1.0) for i, name in enumerate(detection.FACTORS["positions"])}
    benign = {name: scores(tmp_path, f"benign{i}", 1.0) for i, name in enumerate(detection.FACTORS["positions"])}
    found = detection.factorial(harmful, benign)
    assert len(found) == 16
    contrast = selection.contrast(harmful["last tokens"], benign["last tokens"])
    assert torch.equal(found["last tokens", "minus benign", "mean prompt", "normalised"].values, contrast.values)
    written = selection.importance_reached(harmful["all tokens"], 1.0, POOL)
    assert torch.equal(found["all tokens", "harmful alone", "every prompt", "raw"].values, written.values.double())
    table = detection.factorial_table(FakeBench(), found, [0.4], ASR, ASR, FLUENT, 0, seed=0)
    assert len(table) == 16
    assert table["value"].nunique() > 1


def test_single_neurons_read_the_models_own_activations(lm):
    text = "say it"
    neurons = [detection.Neuron(0, "ffn", 2), detection.Neuron(1, "o", 1)]
    found = detection.activations(lm, text, neurons)
    batch = lm.encode([text])
    with torch.no_grad(), hooks.capture(lm, [(1, "o")]) as seen:
        lm.model(**batch.inputs)
    assert found["o 1:1"].to_numpy() == pytest.approx(seen[1, "o"][0, :, 1].numpy())
    assert len(found) == batch.lengths[0]
    ranking = selection.Ranking(lm.view.space, POOL, torch.arange(lm.view.space.size(POOL)).float())
    table = detection.neuron_table(lm, ranking, 3, [text], ["say that"])
    assert [detection.Neuron(*row) for row in table[["layer", "kind", "index"]].itertuples(index=False)] == (
        detection.largest(ranking.values, ranking.space, POOL, 3)
    )
    assert next(zip(table["layer"], table["kind"], table["index"], strict=True)) in set(ranking.top(1))


def scores(tmp_path, name, noise, n=24):
    generator = torch.Generator().manual_seed(len(name))
    signal = torch.rand(SPACE.size(POOL), generator=generator)
    with ScoreWriter(tmp_path / name, SPACE, POOL, n, {"positions": "all"}) as writer:
        for row in range(n):
            values = signal + noise * torch.rand(signal.shape, generator=generator)
            writer.write(row, SPACE.split(values[None], POOL))
        return writer.close()


def test_stability_is_one_without_noise_and_near_chance_with_nothing_else(tmp_path):
    rules = {
        "sure": (selection.mean_importance, scores(tmp_path, "sure", 0.0)),
        "blind": (selection.mean_importance, scores(tmp_path, "blind!", 1000.0)),
    }
    table = detection.stability_table(rules, 0.1, [4, 12, 13], draws=6, seed=0)
    assert sorted(set(table["prompts"])) == [4, 12], "two disjoint subsets of 13 of 24 prompts do not exist"
    sure, blind = (table[table["rule"] == r] for r in ("sure", "blind"))
    assert (sure["value"] == 1).all()
    assert (blind["value"] < 0.35).all()
    assert ((blind["low"] <= blind["value"]) & (blind["value"] <= blind["high"])).all()
    assert (table["n"] == 6).all()
    many = detection.stability_table(rules, 0.1, [4], draws=60, seed=0)
    width = many[many["rule"] == "blind"].eval("high - low").iloc[0]
    assert width > 0.05, "more draws must not buy a shorter interval"
    assert set(detection.stability_table(rules, 0.1, [20], draws=2, seed=0)["prompts"]) == {12}


def test_the_bench_zeroes_neurons_of_a_real_model(lm):
    prompts = PromptSet([Prompt(text=f"say {i}", kind="harmful", helpful="x") for i in range(6)], "p")
    suite = Suite((SuiteSet("direct", prompts, ("asr", "refusal"), "known", correct="known"),), max_new_tokens=4)
    bench = Bench(lm, suite, [ASR])
    space = lm.view.space
    many = NeuronSet(space, {s: torch.ones(space.width(s)).bool() for s in space.sites(("ffn",))})
    plain, zeroed = bench.on("direct"), bench.on("direct", many)
    assert plain.rows["response"].tolist() != zeroed.rows["response"].tolist()
    assert bench.on("direct") is plain, "every set is evaluated once"
    assert bench(None).rows.equals(plain.rows)
    assert {r["n"] for r in bench.rates(many, condition="x")} == {6}
    pair = {"en": NeuronSet.from_flat(space, [0, 1], POOL), "de": NeuronSet.from_flat(space, [1, 2], POOL)}
    languages = detection.language_table(bench, pair, {"en": ASR}, selection.matched_random(pair["en"], 2))
    assert languages["jaccard"].iloc[0] == pytest.approx(1 / 3)
    assert len(languages) == 4


def test_places_vary_with_the_prompts_not_with_the_neurons(tmp_path):
    noisy = scores(tmp_path, "noisy", 3.0)

    def choose(some):
        return selection.mean_importance(some).top_share(0.2)

    found = detection.place_interval([noisy], choose, "in_attention", draws=20, seed=0)
    assert found.low <= found.value <= found.high
    assert found.low < found.high
    assert found.n == 24
    assert found.value == detection.size_table({"x": choose(noisy)}).loc[0, "in_attention"]
    empty = detection.place_interval([noisy], lambda some: NeuronSet(SPACE, {}), "in_attention", draws=3, seed=0)
    assert empty.n == 0
