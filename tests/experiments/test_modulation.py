"""Notebook 05's tables on a tiny model: the material, the sets, the baselines, the dial, adaptation and export."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from nt_utils.data.attacks import ATTACKS
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation import metrics
from nt_utils.evaluation.suite import Suite, SuiteSet
from nt_utils.experiments import dial_panel
from nt_utils.experiments import modulation as study
from nt_utils.experiments.bench import Bench, ratio, with_prose
from nt_utils.experiments.bench import measures as quantities
from nt_utils.interventions import learning, steering
from nt_utils.interventions.dial import whole_layers
from nt_utils.interventions.learning import Learner, Recipe
from nt_utils.interventions.modulation import Modulation
from nt_utils.neurons import POOL
from nt_utils.selection import Ranking
from tests.tiny import tiny_lm

QUICK = Recipe(iterations=1, support=1, query=1, inner_rate=1.0, validate_every=1)


def _prompts(word, n, kind, **more):
    rows = [
        Prompt(f"{word} {i}", refusal="No.", helpful=f"Yes {i}", kind=kind, topic=f"t{i}", **more) for i in range(n)
    ]
    return PromptSet(rows, word)


@pytest.fixture(scope="module")
def lm():
    found = tiny_lm()
    found.model.config.max_position_embeddings = 1024
    return found


@pytest.fixture(scope="module")
def ranked(lm):
    generator = torch.Generator().manual_seed(0)
    space = lm.view.space
    values = torch.randn(2, space.size(POOL), generator=generator)
    return study.Rankings(Ranking(space, POOL, values[0], "s"), Ranking(space, POOL, values[1], "u"), None, None)


@pytest.fixture(scope="module")
def found():
    """Material whose prompts are short."""
    tasks = {"roleplay": _prompts("be max", 3, "harmful"), "direct": _prompts("rob", 3, "harmful")}
    benign = _prompts("boil", 4, "benign", task="how-to")
    unseen = {"persona": _prompts("be ilse", 2, "harmful")}
    return study.Material(tasks["direct"], benign, (ATTACKS["roleplay.1"],), benign, tasks, (tasks, benign), unseen)


@pytest.fixture
def suite(monkeypatch, tmp_path):
    monkeypatch.setenv("NT_CACHE", str(tmp_path))
    wrapped = [
        dataclasses.replace(p, attack=name, text=f"{name} {p.text}")
        for name in ("roleplay.5", "persona")
        for p in _prompts("rob", 3, "harmful")
    ]
    sets = (
        SuiteSet("direct", _prompts("rob", 4, "harmful"), ("asr",)),
        SuiteSet("wrapped", PromptSet(wrapped, "wrapped"), ("asr",)),
        SuiteSet("borderline", _prompts("kill time", 4, "borderline"), ("over_refusal",)),
        SuiteSet("benign", _prompts("boil", 4, "benign"), ("refusal", "compliance")),
    )
    return study.modulation_suite(Suite(sets, "tiny", 3))


def test_the_material_keeps_splits_and_unseen_classes_apart():
    material = study.material(20, seed=1)
    learnt = [p for prompts in material.tasks.values() for p in prompts] + list(material.benign)
    held = [p for prompts in material.dev[0].values() for p in prompts] + list(material.dev[1])
    assert {p.split for p in learnt} == {"train"} and {p.split for p in held} == {"dev"}
    assert not {p.text for p in learnt} & {p.text for p in held}
    used = {ATTACKS[p.attack].attack_class for p in learnt + held if p.attack}
    assert used == {"roleplay", "fiction", "prefix", "suppression"} == set(material.tasks) - {"direct"}
    assert len(material.unseen) == 8 and not set(material.unseen) & used
    assert all(p.refusal and p.helpful for p in learnt + held)
    assert not {p.text for p in learnt} & {p.text for p in [*material.plain, *material.plain_benign]}
    share = np.mean([p.kind == "borderline" for p in material.benign])
    assert 0.5 < share < 0.7 and {len(t) for t in material.tasks.values()} == {20}


def test_a_quick_run_learns_from_one_attack_class_and_direct_requests(lm):
    run = SimpleNamespace(checkpoint=lambda name: "", is_quick=True)
    subject = SimpleNamespace(parameters=SimpleNamespace(seed=0), is_embedded=True, run=run)
    quick, whole = study.study_material(lm, subject, 4), study.material(4, 0)
    assert len(quick.wrappers) < len(whole.wrappers) and quick.unseen.keys() == whole.unseen.keys()
    (kind,) = {one.attack_class for one in quick.wrappers}
    assert set(quick.tasks) == set(quick.dev[0]) == {kind, "direct"}
    assert all(quick.tasks[name].fingerprint == whole.tasks[name].fingerprint for name in quick.tasks)


def test_given_prompts_get_stock_refusals_and_the_models_own_answers(lm, monkeypatch, tmp_path):
    monkeypatch.setenv("NT_CACHE", str(tmp_path))
    bad = PromptSet([Prompt(f"rob {i}", kind="harmful") for i in range(10)])
    benign = PromptSet([Prompt(f"boil {i}", kind="benign") for i in range(10)])
    parts = ((bad[:4], benign[:4]), (bad[4:8], benign[4:8]), (bad[8:], benign[8:]))
    material = study.given_material(lm, *parts, max_new_tokens=4)
    assert [len(s) for s in (material.plain, material.tasks["direct"], material.dev[0]["direct"])] == [4, 4, 2]
    assert set(material.plain.column("refusal")) == {study.REFUSAL}
    assert all(p.helpful.strip() for p in material.benign)
    assert set(material.tasks) == {"roleplay", "fiction", "suppression", "prefix", "direct"}
    assert not set(material.tasks) & set(material.unseen) and "persona" in material.unseen
    assert {s.name for s in study.development_suite(material, 4).sets} == {"direct", "seen", "benign"}


def test_what_a_notebook_learns_goes_on_where_it_was_interrupted(lm, found, ranked, tmp_path):
    run = SimpleNamespace(checkpoint=lambda name: str(tmp_path / f"{name}_{{key}}.safetensors"), is_quick=False)
    subject = SimpleNamespace(parameters=SimpleNamespace(seed=0), is_embedded=True, run=run)
    kept = dataclasses.replace(found, checkpoint=study.study_material(lm, subject, 3).checkpoint)
    sets, recipe = study.preset_sets(ranked, "safety-first"), dataclasses.replace(QUICK, iterations=1)
    study.learn_sets(lm, kept, *sets, recipe)
    longer = dataclasses.replace(recipe, iterations=2)
    again, anew = (study.learn_sets(lm, material, *sets, longer) for material in (kept, found))
    assert torch.equal(again.modulation.alpha, anew.modulation.alpha)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("alpha_")


def test_the_suite_tells_seen_from_unseen_attacks(suite):
    assert set(suite["seen"].prompts.column("attack")) == {"roleplay.5"}
    assert set(suite["unseen"].prompts.column("attack")) == {"persona"}
    novel = study.modulation_suite(suite, ("prefill", "persona"), 3)["novel"].prompts
    assert [p.attack for p in novel] == ["prefill", "persona", "prefill"] and novel[0].prefill
    roles = study.roles(suite)
    assert list(roles) == ["direct", "seen", "unseen", "over", "refusal", "useful"]
    assert study.key_roles(roles) == ("unseen", "over", "useful")
    few = study.roles(suite.only("direct", "benign"))
    assert study.key_roles(few) == ("direct", "refusal", "useful")
    assert [s.name for s in study.class_suite(suite, ["persona"]).sets] == ["borderline", "benign", "persona"]


def test_random_sets_match_every_site(ranked):
    safety, utility = study.preset_sets(ranked, "safety-first")
    assert len(safety) > len(utility) > 0 and not len(safety & utility)
    draws = study.random_sets(safety, utility, 3, 0)
    assert all(d.counts() == (safety | utility).counts() for d in draws)
    assert len({d.fingerprint for d in draws}) == 3
    assert draws[0] == study.random_sets(safety, utility, 1, 0)[0]


def test_attribution_with_and_without_attacks_differs(lm, found):
    options = {"n": 2, "steps": 0}
    aware, plain = study.rankings(lm, found, **options), study.rankings(lm, found, **options, attack_aware=False)
    assert aware.safety_scores.meta["method"] == "patching"
    assert study.rankings(lm, found, 2, steps=1).safety_scores.meta["method"] == "integrated"
    assert torch.equal(aware.utility.values, plain.utility.values)
    assert not torch.allclose(aware.safety.values, plain.safety.values)
    safety, utility = study.preset_sets(aware, "safety-first")
    spread = study.spread_table(aware, safety, utility)
    assert spread.groupby("role")["count"].sum().to_dict() == {"safety": len(safety), "utility": len(utility)}
    table = study.rankings_table(aware)
    assert len(table) == lm.view.space.size(POOL)
    assert table["safety"].to_numpy() == pytest.approx(aware.safety.values.numpy())
    spread = {(f.row, f.part): f.found for f in study.spread_findings(aware, {"safety": 10, "utility": 4}, 4, 0)}
    layers = aware.safety.top(10).per_layer()
    assert spread["safety", "largest layer"].value == pytest.approx(max(layers) * len(layers) / 10)
    assert len(spread) == 4 and all(found.low <= found.value <= found.high for found in spread.values())


def test_learning_adapting_and_their_tables(lm, found, ranked, suite):
    learnt = {
        name: study.learn_preset(lm, found, ranked, "safety-first", dataclasses.replace(QUICK, method=name))
        for name in ("first", "joint")
    }
    history = study.learning_table(learnt)
    assert set(history["method"]) == {"first", "joint"} and history["value"].notna().all()
    assert "support" in set(history.loc[history["method"] == "first", "loss"])
    alphas = {name: done.modulation for name, done in learnt.items()}
    assert study.unseen_classes(found, suite) == ["persona"]
    adapted = study.adaptations(lm, found, alphas, 5.0, ["persona"], QUICK)
    before, after = adapted["first"]["persona"]
    assert before is alphas["first"] and not torch.equal(before.alpha, after.alpha)
    over = study.roles(suite)["over"]
    bench = Bench(lm, study.class_suite(suite, ["persona"]), [*study.class_measures(["persona"]), over])
    table = study.adaptation_table(bench, adapted, over)
    assert len(table) == 2 * 2 * 2 and set(table["stage"]) == {"before", "after"}
    value, low, high, n = study.adapted_difference(bench, adapted, "first", "joint", over)
    assert low <= value <= high and n == 3
    rate, moved = study.inner_rate(lm, found, study.preset_sets(ranked, "safety-first"), 0.01, QUICK)
    assert rate > 0 and np.isfinite(moved)


def test_a_layers_factor_has_the_sum_of_its_neurons_gradients(lm, found, ranked):
    whole = whole_layers(ranked.safety, ranked.safety.space.num_layers)
    assert len(whole) == lm.view.space.size(POOL), "every neuron of the pool"
    sets = whole, study.nothing(whole), found.tasks, found.benign
    free, tied = (Learner(lm, *sets, dataclasses.replace(QUICK, tied=tied)) for tied in ("", "layer"))
    layers = torch.tensor([layer for layer, _, _ in whole])
    values = torch.linspace(0.8, 1.3, lm.view.space.num_layers)
    support, query = tied.draw("direct", 0)
    assert torch.equal(tied.spread(values), values[layers])
    single = free.leaf(values[layers])
    (wanted,) = torch.autograd.grad(free.loss(single, support), single)
    factors = tied.leaf(values)
    (slope,) = torch.autograd.grad(tied.loss(factors, support), factors)
    by_layer = torch.zeros_like(slope).index_add(0, layers, wanted)
    assert torch.allclose(slope, by_layer, rtol=1e-6, atol=1e-9) and slope.abs().min() > 1e-4
    outer, _ = tied.gradient(tied.start(), support, query)
    assert outer.shape == (lm.view.space.num_layers,) and outer.abs().max() > 0


def test_one_factor_a_layer_is_learnt_and_adapted(lm, found, ranked):
    learnt = study.learn_layers(lm, found, ranked.safety, 0.01, dataclasses.replace(QUICK, outer_rate=0.05)).modulation
    assert len(learnt.alpha) == lm.view.space.size(POOL)
    by_layer: dict[int, set] = {}
    for (layer, _, _), factor in zip(learnt.safety, learnt.alpha.tolist(), strict=True):
        by_layer.setdefault(layer, set()).add(factor)
    assert all(len(factors) == 1 for factors in by_layer.values()), "tied"
    assert all(abs(factor - 1) > 1e-3 for (factor,) in by_layer.values()), "every layer's factor moved from 1"
    recipe = dataclasses.replace(QUICK, tied="layer", inner_rate=0.01)
    after = learning.adapt(lm, learnt, found.unseen["persona"], found.benign, recipe)
    moved = {(layer, float(a - b)) for (layer, _, _), a, b in zip(after.safety, after.alpha, learnt.alpha, strict=True)}
    assert len(moved) == lm.view.space.num_layers and any(step for _, step in moved)
    with pytest.raises(InputError, match="tied: got 'head'"):
        dataclasses.replace(QUICK, tied="head")


def test_trainings_differ_in_their_draws_alone():
    first, second = study.trainings(QUICK, 2)
    assert first is not second and first == QUICK
    assert dataclasses.replace(second, seed=QUICK.seed) == QUICK and second.seed != QUICK.seed


def test_no_direction_within_the_bounds_asks_as_many_layers(found, monkeypatch):
    """Where the paper's bounds leave none, no more layers are tried than the study names: each costs an evaluation."""
    monkeypatch.setattr(study.steering, "MAX_KL", -1.0)
    deep, asked = tiny_lm(layers=10), []
    study.added_directions(deep, found, (0.5,), lambda s: asked.append(s.place) or 0.0, layers=2, positions=1)
    assert asked == [2, 6]


def test_baselines_are_chosen_by_the_cost(lm, found, ranked, suite):
    scaled = study.layer_scaling(ranked.safety, (0.5, 2.0), lambda m: abs(float(m.alpha[0]) - 2))
    assert set(scaled.alpha.tolist()) == {2.0} and len({layer for layer, _, _ in scaled.safety}) == 1
    steered = study.added_directions(lm, found, (0.5, 1.0), lambda s: -s.strength)[1]
    assert steered.mode == "add" and steered.strength == 1.0
    measures = study.roles(suite)
    bench = Bench(lm, suite, list(measures.values()))
    rate = {r: bench(scaled).rate(m.set, m.metric).value for r, m in measures.items()}
    expected = rate["direct"] + rate["seen"] + rate["over"] - rate["useful"]
    assert study.cost(bench, measures)(scaled) == pytest.approx(expected)
    table = study.arms_table(bench, {"plain": None, "NeuronTune": scaled, "random": [scaled, steered]})
    assert set(table["group"]) == {"none", "chosen", "control"} and "random, mean of 2" in set(table["arm"])
    assert len(table) == 3 * len(measures)
    mean = table[(table["arm"] == "random, mean of 2") & (table["metric"] == "over-refusal")].iloc[0]
    assert mean["low"] <= mean["value"] <= mean["high"]


class Fixed(Bench):
    """Actions are numbers x: every prompt of ASR is answered with that chance, in order."""

    def __init__(self):
        self.measures = [study.Measure("s", "asr", m) for m in ("asr", "over", "useful")]

    def part(self, *measures):
        return self

    def on(self, name, action=None):
        values = pd.Series(np.arange(20) < round(20 * (0.8 if action is None else action))).astype(float)
        rows = pd.DataFrame({"set": "s", "topic": "", "number": range(20)})
        return type("Found", (), {"rows": rows, "values": lambda self, *_: values})()


def test_the_dials_slope_is_least_squares_over_its_levels():
    settings = {(n, m, 1.0): 0.8 - 0.05 * n for n in (0, 4, 8) for m in (0, 5)}
    bench = Fixed()
    found = study.dial_slope(bench, settings, 0, bench.measures[0])
    assert found.value == pytest.approx(np.polyfit([0, 0.5, 1], [0.8, 0.6, 0.4], 1)[0])
    assert study.dial_slope(bench, settings, 1, bench.measures[0]).value == pytest.approx(0)


def test_ratios_have_the_interval_of_their_parts():
    after, before = metrics.Interval(0.2, 0.1, 0.3, 50), metrics.Interval(0.8, 0.7, 0.9, 50)
    found = ratio(after, before)
    assert found.value == pytest.approx(0.25) and 0.1 / 0.9 < found.low < 0.25 < found.high < 0.3 / 0.7
    assert ratio(after, metrics.Interval(0.1, 0.0, 0.2, 50)) is None
    sure = metrics.Interval(0.8, 0.8, 0.8, 50)
    assert ratio(after, sure)[:3] == pytest.approx((0.25, 0.125, 0.375))


def test_the_dial_turns_and_shows_rates(lm, ranked, suite, capsys):
    measures = study.roles(suite)
    bench = Bench(lm, suite, [measures[r] for r in ("unseen", "over", "useful")])
    learnt = Modulation(*study.preset_sets(ranked, "safety-first"), torch.full((14,), 1.5))
    table = study.dial_table(ranked, learnt, bench, [0.0, 0.05], [0.5, 1.0])
    assert len(table) == 1 + 3 * 2 and "dominated" in table
    dial = dial_panel.Dial(lm, ranked, learnt, table, tokens=3)
    assert dial.values("n_safety") == [0, 7] and dial.values("strength") == [0.0, 0.5, 1.0]
    text = dial.rates(7, 0, 1.0)
    row = table[(table.n_safety == 7) & (table.n_utility == 0) & (table.strength == 1.0)].iloc[0]
    assert f"over-refusal {row['over-refusal']:.0%}" in text and "n = 4" in text
    assert dial.rates(7, 7, 0.0) == dial.rates(0, 0, 1.0) and "no rates" in dial.rates(3, 0, 1.0)
    plain, modulated = dial.answers("rob", 7, 7, 1.0)
    assert plain == dial.answers("rob", 0, 0, 1.0)[1] and isinstance(modulated, str)
    assert dial_panel.panel(lm, ranked, learnt, table, ["rob"]) is None
    assert "no front end" in capsys.readouterr().out


def test_the_panels_prompt_is_the_first_that_the_dial_turns(lm, ranked, suite, monkeypatch):
    frame = pd.DataFrame({"n_safety": [0, 0, 7], "n_utility": [0, 7, 0], "strength": [0.0, 1.0, 1.0]})
    dial = dial_panel.Dial(lm, ranked, None, frame)
    assert dial.safest == {"n_safety": 7, "n_utility": 0, "strength": 1.0}
    sure, no = "Sure, here is how to do it: buy a crowbar.", "I'm sorry, I cannot help with that."
    said = {
        "refused": (no, no),
        "same": (sure, sure),
        "other": (sure, "Take a spoon first."),
        "turned": (sure, no),
        "two\nlines": (sure, no),
    }
    monkeypatch.setattr(dial, "all_answers", lambda prompts, **_: [said[p] for p in prompts])
    assert dial.telling(["two\nlines", "refused", "same", "other", "turned"]) == "turned"
    assert dial.telling(["refused", "same", "other"]) == "other"
    assert dial.telling(["refused", "same"]) == "refused"
    assert dial.telling(["two\nlines"]) == "two\nlines"


def test_the_panel_follows_its_sliders(lm, ranked, suite, monkeypatch):
    widgets = pytest.importorskip("ipywidgets")
    measures = study.roles(suite)
    bench = Bench(lm, suite, [measures[r] for r in ("unseen", "over", "useful")])
    learnt = Modulation(*study.preset_sets(ranked, "safety-first"), torch.full((14,), 1.5))
    table = study.dial_table(ranked, learnt, bench, [0.0, 0.05], [1.0])
    monkeypatch.setattr(dial_panel, "has_front_end", lambda: True)
    rival = steering.Steering(torch.ones(lm.view.hidden_size), 1, "add", 0.5, name="<b>rival")
    box = dial_panel.panel(lm, ranked, learnt, table, ["rob"], rival)
    text, safety, utility, _, buttons, rates, plain, answers, status = box.children
    assert isinstance(box, widgets.VBox) and "unseen-attack ASR" in rates.value and rates.value != plain.value
    assert "&lt;b&gt;rival" in answers.children[2].children[0].value, "names are escaped"
    assert not safety.continuous_update, "a slider acts when it is let go"
    at_full = rates.value, answers.children[1].children[1].value
    safety.value, utility.value = 0, 0
    assert rates.value != at_full[0] or answers.children[1].children[1].value != at_full[1]
    assert answers.children[0].children[1].value == answers.children[1].children[1].value
    reset = buttons.children[-1]
    reset.click()
    assert (rates.value, answers.children[1].children[1].value) == at_full
    monkeypatch.setattr(dial_panel.Dial, "rival_answer", lambda *_: 1 / 0)
    text.value = "other"
    assert status.value.startswith("ZeroDivisionError"), "an error stands on the panel"
    text.value = " "
    assert answers.children[0].children[1].value == ""


def test_the_three_exported_forms_agree(lm, ranked):
    safety, utility = study.preset_sets(ranked, "safety-first")
    alpha = torch.linspace(0, 2, len(safety) + len(utility))
    table = study.parity_table(lm, Modulation(safety, utility, alpha), ["rob", "boil an egg"]).set_index("form")
    assert table.loc["folded", "difference"] < 1e-5
    assert table.loc["adapter", "difference"] < 1e-4  # alpha 0 stands as 1e-6 there
    assert table.loc["untouched model", "difference"] > 1e-3


def test_claims_of_the_dial_and_of_the_modulated_model(lm, found, ranked, suite):
    suite = with_prose(suite, 0, n=2)
    measures = study.roles(suite)
    quality = quantities(suite, "over", "useful", "perplexity", "kl", "likelihood")
    bench = Bench(lm, suite, [*measures.values(), *quality.values()])
    tuned = Modulation(*study.preset_sets(ranked, "safety-first"), torch.full((14,), 1.5))
    other = Modulation(*study.preset_sets(ranked, "safety-first"), torch.full((14,), 2.5))
    rivals = {"x": ("N1", "random", [tuned]), "y": ("N6", "cost", [None])}
    both = {(f.claim, f.part): f.found for f in study.findings(bench, [tuned, other], measures, quality, rivals)}
    useful = measures["refusal"]
    mean = np.mean([bench.rate(useful, a).value for a in (tuned, other)]) - bench.rate(useful).value
    assert both["N3", "benign"].value == pytest.approx(mean), "two trainings are averaged"
    rows = {(f.claim, f.part): f.found for f in study.findings(bench, [tuned], measures, quality, rivals)}
    assert {claim for claim, _ in rows} == {"N1", "N2", "N3", "N4", "N6"}
    assert rows["N1", "random"].value == 0, "against itself"
    kl = bench.on(quality["kl"].set, tuned).values(quality["kl"].set, "kl").mean()
    assert rows["N4", "kl"].value == pytest.approx(kl) and kl > 0
    three = Bench(lm, suite, [measures[r] for r in ("unseen", "over", "useful")])
    settings = study.dial_settings(ranked, tuned, [0.0, 0.05], [1.0])
    assert len(settings) == 4 and settings[0, 0, 1.0] is None
    directions = study.added_directions(lm, found, (0.5, 1.0), lambda s: -s.strength)
    assert [d.strength for d in directions] == [0.5, 1.0]
    said = {f.part: f.found for f in study.dial_findings(three, settings, [None, *directions], lambda a: len(a.alpha))}
    assert set(said) == {"safety slope", "utility slope", "undominated"}
    assert all(i.low <= i.value <= i.high for i in said.values())
