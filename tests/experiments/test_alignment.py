"""The pieces of notebook 04 on a tiny model: frozen units keep their bits, chosen points are what they say."""

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
from nt_utils.experiments import alignment
from nt_utils.experiments.bench import Bench, Finding, Measure
from nt_utils.experiments.units import Calibration
from nt_utils.interventions.tuning import Everything, LoRA
from nt_utils.plots import alignment as figures
from tests.tiny import tiny_lm

SHARES = {"SCU": 0.1, "UCU": 0.2, "RU": 0.3}
ASR = Measure("direct", "asr", "direct ASR")
REFUSED = Measure("direct", "refusal", "refused")


def prompts(word, n=16, **fields):
    return PromptSet([Prompt(text=f"{word} number {i}", topic=f"{word}{i // 2}", **fields) for i in range(n)], word)


HARM = prompts("burn", kind="harmful", refusal="No.", helpful="x")
GOOD = prompts("bake", kind="benign", refusal="No.", helpful="Take flour.")


@pytest.fixture(scope="module")
def tuned_lm():
    """A model of this file's own: tuning puts the weights back, but nobody else should see them move."""
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def calibration(tuned_lm):
    return Calibration.of(tuned_lm, HARM, GOOD, size=2)


@pytest.fixture(scope="module")
def scores(calibration):
    return calibration.scores()


@pytest.fixture(scope="module")
def suite():
    asked = prompts("steal", 6, kind="harmful", helpful="x")
    return Suite((SuiteSet("direct", asked, ("asr", "refusal"), "known", correct="known"),), max_new_tokens=2)


@pytest.fixture(scope="module")
def runs(tuned_lm, scores, suite):
    sets = alignment.frozen_sets(scores.map(SHARES), scores, 0.2, 1, seed=0)
    scopes = {"full": Everything(), "LoRA": LoRA(rank=1)}
    scopes |= {name: alignment.freezing(neurons, 8) for name, neurons in sets.items()}
    return alignment.attack(
        tuned_lm, GOOD, suite, scopes, [0.01], keep=[*sets], steps=[1, 2], batch_size=4, held_out=GOOD[:4]
    ), sets


def test_frozen_units_are_bit_identical_after_fine_tuning(tuned_lm, runs):
    swept, sets = runs
    view, stored = tuned_lm.view, {k: v.clone() for k, v in tuned_lm.model.state_dict().items()}
    for name, neurons in sets.items():
        with swept[name, 0.01].delta.active(tuned_lm):
            for (layer, kind), mask in neurons.masks.items():
                path = f"model.layers.{layer}.{'mlp.down_proj' if kind == 'ffn' else 'self_attn.o_proj'}.weight"
                now, before = view.weight(layer, kind), stored[path]
                assert torch.equal(now[:, mask], before[:, mask]), name
                if not mask.all():
                    assert not torch.equal(now[:, ~mask], before[:, ~mask]), name
                if kind == "ffn":
                    gate = stored[f"model.layers.{layer}.mlp.gate_proj.weight"]
                    assert torch.equal(view.weight(layer, "gate")[mask], gate[mask])
    assert all(torch.equal(v, stored[k]) for k, v in tuned_lm.model.state_dict().items())


def test_units_are_followed_where_the_task_was_learnt(tuned_lm, suite, calibration):
    """A rate that breaks the model, however large, is not what a fine-tuner takes."""
    options = {"keep": ["full"], "steps": [2], "batch_size": 4, "held_out": GOOD[:4]}
    swept = alignment.attack(tuned_lm, GOOD, suite, {"full": Everything()}, [0.003, 1.0], **options)
    best, broken = swept["full", 0.003], swept["full", 1.0]
    assert broken.losses[2] > broken.losses[0] > best.losses[2] and broken.tuned.final is None
    assert alignment.best_run(swept, "full") is best
    with best.delta.active(tuned_lm):
        after = Calibration.of(tuned_lm, HARM, GOOD, size=2)
    moved = alignment.moved_share(calibration, after, SHARES, "SCU", "CU", 4, 0)
    assert alignment.flow_finding(best, calibration, after, SHARES, 4, 0) == Finding("A7", "", "share", moved)
    for run, state in ((broken, after), (best, None)):  # None: it diverged
        assert "did not learn the task" in alignment.flow_finding(run, calibration, state, SHARES, 4, 0).found
    broken.tuned.diverged = 1
    assert alignment.best_run(swept, "full") is best
    with pytest.raises(InputError, match="held_out: is empty"):
        alignment.attack(tuned_lm, GOOD, suite, {"full": Everything()}, [0.003], keep=["full"], steps=[2])


def test_one_copy_of_the_model_judges_all_arms(tuned_lm, suite, monkeypatch):
    seen = []
    monkeypatch.setattr(
        alignment,
        "finetune",
        lambda *a, reference, **k: (
            seen.append(reference) or SimpleNamespace(evaluations={0: None}, tuned=SimpleNamespace(final=None))
        ),
    )
    alignment.attack(tuned_lm, GOOD, suite, {"full": Everything(), "LoRA": LoRA(rank=1)}, [0.1, 0.2], steps=[1])
    assert len(seen) == 4 and len(set(map(id, seen))) == 1 and seen[0].model is not tuned_lm.model
    assert seen[0].weights_fingerprint == tuned_lm.weights_fingerprint


def test_sets_that_are_frozen(scores):
    units = scores.map(SHARES)
    sets = alignment.frozen_sets(units, scores, 0.25, 2, seed=0)
    scu, guarded, everything = (sets[n] for n in ("freeze SCU", "freeze SCU + top 25% CU", "freeze SCU + all CU"))
    assert len(scu - guarded) == len(guarded - everything) == 0
    assert everything == units.set("SCU", "CU")
    top = alignment.top_complex(units, scores, 0.25)
    assert len(top - units.set("CU")) == 0
    flat = units.flat()
    wanted = scores.safety[flat == 2].sort(descending=True).values[: round(0.25 * int((flat == 2).sum()))].sum()
    chosen = sum(float(scores.safety[i]) for i in range(len(flat)) if len(scores.neurons(torch.tensor([i])) - top) == 0)
    assert chosen == pytest.approx(float(wanted))
    for i in (1, 2):
        assert sets[f"freeze random {i}"].counts() == guarded.counts()
    with pytest.raises(InputError, match="share"):
        alignment.top_complex(units, scores, 0.0)


def test_tables_of_a_sweep(runs):
    swept, _ = runs
    assert set(rate for arm, rate in swept if arm == "LoRA") == {0.1}, "adapters take ten times the rate"
    table = alignment.attack_table(swept, [ASR, REFUSED], rows="benign")
    assert len(table) == 6 * 3 * 2
    assert table["loss"].gt(0).all(), "of held-out rows, at step 0 too"
    assert table[table["step"] == 0].groupby("metric")["value"].nunique().eq(1).all()
    assert table[table["step"] == 0]["loss"].nunique() == 1
    _, equal = alignment.equal_loss_points(swept)
    assert set(equal) == {arm for arm, _ in swept}
    both = alignment.by_arm([equal, equal], [swept, swept])
    chosen = alignment.points_table(both, [ASR], compared="equal held-out loss", rows="benign")
    assert len(chosen) == 6
    assert figures.attack_curves(table).axes
    assert figures.attack_sweep(table).axes
    assert figures.attack_points(chosen).axes


@dataclass
class FakeEvaluation:
    asr: float
    helpful: float

    def rate(self, name, metric):
        return metrics.wilson(round(100 * getattr(self, metric)), 100)

    def values(self, name, metric):
        return pd.Series(np.arange(100) < round(100 * getattr(self, metric))).astype(float)

    @property
    def rows(self):
        return pd.DataFrame({"set": "direct", "topic": "", "number": range(100)})


def fake_runs(table):
    """arm -> [(held-out loss, asr, utility) a step] as fine-tunings."""
    return {
        (arm, 0.1): SimpleNamespace(
            evaluations={i: FakeEvaluation(asr, utility) for i, (_, asr, utility) in enumerate(steps)},
            losses={i: loss for i, (loss, _, _) in enumerate(steps)},
        )
        for arm, steps in table.items()
    }


def test_the_bounded_attacker_keeps_utility_and_equal_losses_are_interpolated():
    swept = fake_runs(
        {
            "full": [(3.0, 0.0, 1.0), (2.0, 0.1, 0.95), (1.0, 0.5, 0.9), (0.2, 0.8, 0.5)],
            "slow": [(3.0, 0.0, 1.0), (2.5, 0.1, 0.5), (1.5, 0.2, 0.5)],
        }
    )
    useful = Measure("direct", "helpful", "utility")
    worst = alignment.worst_points(swept, ASR, useful, 0.9)
    assert {arm: p.step for arm, p in worst.items()} == {"full": 2}, "step 0 is no attack; slow never keeps its utility"
    target, equal = alignment.equal_loss_points(swept)
    assert target == 1.5, "the slowest arm's lowest held-out loss"
    assert {arm: p.step for arm, p in equal.items()} == {"full": 1.5, "slow": 2}
    assert equal["full"].rate(ASR) == pytest.approx(0.3), "half way between 10 and 50%"
    assert equal["full"].values(ASR).mean() == pytest.approx(0.3)
    found = alignment.point_difference(alignment.by_arm([equal, equal], [swept, swept]), "full", "slow", ASR)
    assert found.value == pytest.approx(0.1)
    assert alignment.point_difference({arm: [p] for arm, p in worst.items()}, "full", "slow", ASR) is None
    findings = list(alignment.freezing_findings({"benign rows": alignment.by_arm([equal], [swept])}, "slow", ASR))
    assert [f.row for f in findings] == ["benign rows", "10% harmful rows", ""]
    assert findings[0].found.value == pytest.approx(-0.1)
    assert isinstance(findings[1].found, str)


def test_an_arm_that_never_learns_the_task_moves_no_other_arm():
    arms = {"full": [(3.0, 0.0, 1.0), (1.0, 0.8, 0.9)], "slow": [(3.0, 0.0, 1.0), (1.5, 0.1, 0.9)]}
    target, points = alignment.equal_loss_points(fake_runs(arms))
    bad = fake_runs(arms | {"bad": [(3.0, 0.0, 1.0), (9.0, 0.0, 0.0)]})
    assert alignment.equal_loss_points(bad)[0] == target == 1.5 and set(alignment.equal_loss_points(bad)[1]) == set(
        points
    )


def test_between_two_steps_an_interval_is_as_wide_as_at_a_step():
    arms = {"full": [(3.0, 0.0, 1.0), (1.0, 1.0, 0.9)], "slow": [(3.0, 0.0, 1.0), (1.1, 0.6, 0.9)]}
    swept = fake_runs(arms)
    _, points = alignment.equal_loss_points(swept)
    chosen = alignment.by_arm([points], [swept])
    found = alignment.point_difference(chosen, "slow", "full", ASR)
    at_steps = metrics.clustered_difference(np.ones((1, 100)), (np.arange(100) < 60).astype(float))
    assert points["full"].step == pytest.approx(0.95) and found.value == pytest.approx(0.6 - 0.95)
    assert found.high - found.low >= at_steps.high - at_steps.low > 0.15
    rare = fake_runs({"full": [(3.0, 0.0, 1.0), (1.0, 0.01, 0.9)]})
    rate = alignment.point_difference(
        alignment.by_arm([alignment.equal_loss_points(rare)[1]], [rare]), "full", None, ASR
    )
    assert rate.value == pytest.approx(0.01)
    assert rate.low == 0 < rate.high, "a rate does not fall below 0"


def test_arms_of_a_further_training_come_down_to_the_first_ones_loss():
    first = fake_runs({"full": [(3.0, 0.0, 1.0), (1.0, 0.5, 0.9)], "slow": [(3.0, 0.0, 1.0), (2.0, 0.2, 0.5)]})
    second = fake_runs({"full": [(3.0, 0.0, 1.0), (1.5, 0.6, 0.9)]})
    target, points = alignment.equal_loss_points(first)
    again = alignment.equal_loss_points(second, target)[1]
    assert again["full"].loss == target == 2.0 and again["full"].step == pytest.approx(2 / 3)
    found = alignment.by_arm([points, again], [first, second])
    assert {arm: len(some) for arm, some in found.items()} == {"full": 2, "slow": 1}
    assert alignment.equal_loss_points(second, 1.2) == (1.2, {}), "an arm that does not come down has no point"
    assert list(alignment.by_arm([points, {}], [first, second])) == ["slow"]


def test_flows_and_their_noise(calibration):
    first, second = calibration.scores(range(4)).map(SHARES), calibration.scores(range(4, 8)).map(SHARES)
    table = alignment.flow_table({"same": (first, first), "other": (first, second)})
    assert table.groupby("change")["share"].sum().tolist() == pytest.approx([1, 1])
    margins = table[table["change"] == "other"].groupby("before")["count"].sum()
    assert margins.to_dict() == first.counts()
    assert figures.unit_flow(table).axes
    found = alignment.moved_share(calibration, calibration, SHARES, "SCU", "CU", draws=4, seed=0)
    assert found.low <= found.value <= found.high <= 0, "the same model on the same prompts moves nothing"
    assert found.n == 4


def test_alignment_trains_only_what_it_may(tuned_lm, scores, suite):
    units = scores.map(SHARES)
    ways = alignment.budget_scopes(units, 8, 1, seed=0)
    assert list(ways) == ["full", "RU", "random", "UCU"]
    dev, test = Bench(tuned_lm, suite, [ASR, REFUSED]), Bench(tuned_lm, suite, [ASR, REFUSED])
    found = alignment.align(dev, test, ways, HARM, GOOD, [1e-3, 1e-2], ASR, REFUSED, steps=2, batch_size=4)
    table = alignment.budget_table(test(None), found, [ASR, REFUSED])
    assert table["arm"].unique().tolist() == ["unaligned", *ways]
    trained = table.groupby("arm")["trained"].first()
    assert trained["full"] == 1
    assert 0 < trained["RU"] < 0.5
    assert trained["RU"] == pytest.approx(trained["random"], rel=0.2)
    kept = ~units.set("RU").mask((1, "ffn"))
    before = tuned_lm.view.weight(1, "ffn").clone()
    with found["RU"].tuned.delta.active(tuned_lm):
        after = tuned_lm.view.weight(1, "ffn")
        assert torch.equal(after[:, kept], before[:, kept])
        assert not torch.equal(after[:, ~kept], before[:, ~kept])
    assert figures.align_budget(table).axes


def test_an_alignment_that_diverges_at_every_rate_has_rows_that_say_so(tuned_lm, suite):
    dev, test = Bench(tuned_lm, suite, [ASR, REFUSED]), Bench(tuned_lm, suite, [ASR, REFUSED])
    rates = {"full": [1e30], "RU": [1e-3]}
    found = {
        name: alignment.align(dev, test, {name: Everything()}, HARM, GOOD, rate, ASR, REFUSED, 2, batch_size=4)[name]
        for name, rate in rates.items()
    }
    table = alignment.budget_table(test(None), found, [ASR, REFUSED]).set_index("arm")
    assert table["value"].isna().groupby("arm").all().to_dict() == {"full": True, "RU": False, "unaligned": False}
    assert (table.loc["full", "n"] == 0).all() and table.loc["full", "learning_rate"].isna().all()
    assert figures.align_budget(table.reset_index()).axes
    said = list(alignment.budget_findings([found], ASR, REFUSED))
    assert len(said) == 2 and all(f.found == "full: the training diverged at every learning rate" for f in said)


def test_states_are_those_of_single_prompts(any_lm):
    texts, ends = ["Hi", "A much longer request than that"], ["No, never", "No"]
    found = alignment.last_states(any_lm, texts, ends, tokens=3)
    for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
        ids = any_lm.tokens(any_lm.render([text]))[0] + any_lm.tokenizer(end, add_special_tokens=False)["input_ids"][:3]
        with torch.no_grad():
            states = any_lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        wanted = torch.stack([s[0, -1] for s in states])
        assert torch.allclose(found[i], wanted, atol=1e-4 * float(wanted.abs().max()))
    assert found.shape[1] == any_lm.view.num_layers + 1
    assert not torch.allclose(found[1], alignment.last_states(any_lm, texts, None)[1])


def test_leaning_is_a_difference_of_cosines(tuned_lm):
    generator = torch.Generator().manual_seed(0)
    query, refusal, compliance = (torch.randn(5, 3, 8, generator=generator) for _ in range(3))
    found = alignment.leaning(query, refusal, compliance)
    a, b, c = (x[2, 1].double().numpy() for x in (query, refusal, compliance))

    def cos(x, y):
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    assert found[2, 1] == pytest.approx(cos(a, b) - cos(a, c))
    shift = torch.randn(3, 8, generator=generator)
    moved = alignment.leaning(query + shift, refusal + shift, compliance + shift, shift.double())
    np.testing.assert_allclose(moved, found, atol=1e-6)
    assert (alignment.leaning(query, query, compliance) >= 0).all()
    values = alignment.direction_values(tuned_lm, HARM, GOOD, "No", "Yes")
    assert {v.shape for v in values.values()} == {(16, 3)}
    table = alignment.direction_table({"aligned": values}, HARM.column("topic"))
    assert len(table) == 3 * 3
    assert (table["low"] <= table["value"]).all()
    assert figures.direction(table).axes


def test_the_probe_finds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(80, generator=generator) < 0.5).tolist()
    states = torch.randn(80, 2, 16, generator=generator)
    states[:, 1, 3] += 4 * torch.tensor(labels).float()
    topics = [f"t{i // 2}" for i in range(80)]
    table = alignment.probe_table({"m": states}, labels, topics, 5, seed=0).set_index("layer")
    assert table.loc[1, "value"] > 0.9
    assert table.loc[0, "value"] < 0.7
    assert (table["n"] == 80).all()
    assert figures.probe(table.reset_index()).axes
    assert alignment.probe_table({"m": states}, [True] * 80, topics, 5, seed=0).empty
    leaky = torch.zeros(80, 1, 40)
    leaky[range(80), 0, [i // 2 for i in range(80)]] = 1  # one-hot topics: only a topic seen in training could help
    by_topic = [bool((i // 2) % 2) for i in range(80)]
    found = alignment.probe_table({"m": leaky}, by_topic, topics, 5, seed=0).iloc[0]
    assert found["value"] < 0.7
    alone = metrics.wilson(round(80 * found["value"]), 80)
    assert found["high"] - found["low"] > 1.2 * (alone.high - alone.low), "prompts of a topic are no independent ones"
