"""The tables of notebook 01: counted by hand on a toy space, and run for real on a tiny model."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch

from nt_utils import selection
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.evaluation import metrics
from nt_utils.evaluation.suite import Suite, SuiteSet
from nt_utils.experiments import detection
from nt_utils.experiments.bench import Bench, Measure
from nt_utils.neurons import POOL, NeuronSet, NeuronSpace, ScoreWriter

SPACE = NeuronSpace(
    {"q": (4, 4), "k": (2, 2), "v": (2, 2), "o": (10, 10), "ffn": (30, 30)},
    {"q": 9, "k": 9, "v": 9, "o": 8, "ffn": 24},
    total_parameters=4000,
    architecture="toy",
)
ASR = Measure("direct", "asr", "direct ASR")
CHOSEN = NeuronSet.from_flat(SPACE, [0, 1, 32, 41], POOL)


@dataclass
class FakeEvaluation:
    outcomes: np.ndarray

    def rate(self, name, metric):
        return metrics.wilson(int(self.outcomes.sum()), len(self.outcomes))

    def values(self, name, metric):
        return pd.Series(self.outcomes.astype(float))

    @property
    def rows(self):
        return pd.DataFrame({"set": "direct", "topic": "", "number": range(len(self.outcomes))})


class FakeBench(Bench):
    """Zeroing complies on as many of 40 prompts as the chosen neurons it hits, times ten."""

    def __init__(self):
        self.measures = [ASR]

    def __call__(self, neurons=None):
        hits = len(neurons & CHOSEN) if neurons is not None else 0
        extra = len(neurons) % 3 if neurons is not None else 0
        return FakeEvaluation(np.arange(40) < 10 * hits + extra)


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
    assert size.loc["rule", "in_first_half"] == pytest.approx(2 / 5)
    assert size.loc["nothing", "neurons"] == 0


def test_deactivation_compares_chosen_sets_with_controls():
    bench = FakeBench()
    draws = selection.matched_random(CHOSEN, 5, seed=0)
    table = detection.deactivation_table(bench, {"rule": CHOSEN}, {"random": draws, "other": draws[0]})
    rows = table.set_index("condition")
    assert rows.loc[detection.NONE, "value"] == 0
    assert rows.loc["rule", "value"] == 1
    assert rows.loc["random, max of 5", "value"] == rows.loc["other", "value"] == 1 / 40
    assert set(table["group"]) == {"none", "chosen", "control"}
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert bench.excess(CHOSEN, draws, ASR).value == pytest.approx(39 / 40)
    assert bench.change(CHOSEN, ASR).value == 1


def test_dose_grows_with_the_share_and_random_sets_overlap_where_they_must():
    values = torch.zeros(SPACE.size(POOL))
    values[CHOSEN.flat(POOL)] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    ranking = selection.Ranking(SPACE, POOL, values)
    table = detection.dose_table(FakeBench(), {"rule": ranking}, [0.0125, 0.05, 0.9], "rule", 3, seed=0)
    rule = table[table["rule"] == "rule"]
    assert rule["share"].tolist() == [0.0125, 0.05, 0.9]
    assert rule["value"].is_monotonic_increasing
    assert rule["value"].iloc[1] == 1
    random = table[table["rule"] != "rule"]
    assert random["share"].tolist() == [0.0125, 0.05, 0.9]
    assert (random["value"].iloc[:2] < 0.1).all() and random["value"].iloc[2] > 0.5


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
    plain, zeroed = bench(None), bench(many)
    assert plain.rows["response"].tolist() != zeroed.rows["response"].tolist()
    assert bench(None) is plain, "every set is evaluated once"
    assert {r["n"] for r in bench.rates(many, condition="x")} == {6}
    languages = detection.language_table(
        bench,
        {"en": NeuronSet.from_flat(space, [0, 1], POOL), "de": NeuronSet.from_flat(space, [1, 2], POOL)},
        {"en": ASR},
        draws=2,
        seed=0,
    )
    assert languages["jaccard"].iloc[0] == pytest.approx(1 / 3)
    assert len(languages) == 4


def test_places_vary_with_the_prompts_not_with_the_neurons(tmp_path):
    noisy = scores(tmp_path, "noisy", 3.0)

    def choose(some):
        return selection.mean_importance(some).top_share(0.2)

    found = detection.place_interval(noisy, choose, "in_first_half", draws=20, seed=0)
    assert found.low <= found.value <= found.high
    assert found.low < found.high
    assert found.n == 24
    assert found.value == detection.size_table({"x": choose(noisy)}).loc[0, "in_first_half"]
    empty = detection.place_interval(noisy, lambda some: NeuronSet(SPACE, {}), "in_first_half", draws=3, seed=0)
    assert empty.n == 0
