"""Alpha: what it does to the model, how it is learnt (gradients against finite differences), and the dial."""

import math
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nt_utils import hooks
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import DivergedError
from nt_utils.interventions import trunk
from nt_utils.interventions.dial import PRESETS, assign, dial, mark_dominated, preset, sweep, whole_layers
from nt_utils.interventions.learning import Learner, Recipe, adapt, find_inner_rate, learn
from nt_utils.interventions.modulation import Modulation
from nt_utils.neurons import POOL, NeuronSet, NeuronSpace
from nt_utils.scoring.attribution import frozen
from nt_utils.selection import Ranking
from nt_utils.work import COUNTS
from tests.common import assert_same, logits_of, refused, snapshot
from tests.tiny import double_lm, tiny_lm, training_lm

IDS = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
SPACE = NeuronSpace({"o": (4, 4), "ffn": (6, 6)}, {"o": 1, "ffn": 1}, 100, "toy")
SHORT = Recipe(iterations=3, support=1, query=2, inner_rate=1.0, validate_every=1)


def _set(space, *neurons):
    masks = {}
    for layer, kind, index in neurons:
        mask = masks.setdefault((layer, kind), torch.zeros(space.width((layer, kind)), dtype=torch.bool))
        mask[index] = True
    return NeuronSet(space, masks)


def _rankings(space, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, space.size(POOL), generator=generator)
    return Ranking(space, POOL, values[0], "s"), Ranking(space, POOL, values[1], "u")


def _sets(lm, n=20):
    return assign(*_rankings(lm.view.space), n, n)


def _prompts(word, n, kind="harmful"):
    return PromptSet([Prompt(f"{word} {i}", refusal="No.", helpful=f"Yes {i}", kind=kind) for i in range(n)])


TASKS = {"roleplay": _prompts("Be Max: do", 4), "prefix": _prompts("Say yes: do", 5)}
BENIGN = _prompts("boil", 5, "benign")
HELD_OUT = ({"roleplay": _prompts("Be Rex: try", 2)}, _prompts("cook", 2, "benign"))


# -------------------------------------------------------------------------------------------------- intervention


def test_alpha_multiplies_the_channels(any_lm):
    """Alpha = the reading weights' columns multiplied, one hook a site; afterwards the model is as before."""
    view = any_lm.view
    safety, utility = _set(view.space, (0, "ffn", 3), (1, "o", 5), (0, "ffn", 9)), _set(view.space, (1, "ffn", 2))
    modulation = Modulation(safety, utility, torch.tensor([2.0, 1.5, 1.7, 0.25]))
    values = dict(zip([*safety, *utility], modulation.alpha.tolist(), strict=True))
    assert modulation.safety_alpha.tolist() == [2.0, 1.5, pytest.approx(1.7)]
    plain = logits_of(any_lm.model, IDS)
    with modulation.active(any_lm):
        assert sum(len(m._forward_pre_hooks) for m in any_lm.model.modules()) == 3
        hooked = logits_of(any_lm.model, IDS)
    before = snapshot(any_lm)
    with torch.no_grad():
        for (layer, kind, index), factor in values.items():
            view.weight(layer, kind)[:, index] *= factor
        folded = logits_of(any_lm.model, IDS)
        any_lm.model.load_state_dict(before)
    assert torch.allclose(hooked, folded, atol=1e-4)
    assert not torch.allclose(plain, hooked, atol=1e-2)
    assert torch.equal(plain, logits_of(any_lm.model, IDS))


def test_key_says_what_acts(lm):
    a, b = _set(lm.view.space, (0, "ffn", 3)), _set(lm.view.space, (1, "ffn", 3))
    one = Modulation(a, b, torch.tensor([1.2, 0.9]))
    assert one.key == Modulation(b, a, torch.tensor([0.9, 1.2]), name="another").key
    assert one.key != Modulation(a, b, torch.tensor([1.2, 0.8])).key
    still = Modulation(a, b, torch.ones(2))
    assert still.key == Modulation(b, a, torch.ones(2)).key != one.key
    with still.active(lm):
        assert not any(m._forward_pre_hooks for m in lm.model.modules())


def test_bad_modulations(lm):
    space = lm.view.space
    a, b = _set(space, (0, "ffn", 3)), _set(space, (1, "ffn", 3))
    for message, arguments in {
        "both sets are empty": (a - a, b - b, torch.ones(0)),
        "safety: holds q rows; alpha acts on ffn, o": (_set(space, (0, "q", 1)), b, torch.ones(2)),
        "utility: holds k, v rows": (a, _set(space, (0, "k", 1), (1, "v", 2)), torch.ones(3)),
        "alpha: got 3.5; allowed: 0 to 3": (a, b, torch.tensor([1.0, 3.5])),
        "bounds: got": (a, b, torch.ones(2), (1.5, 2.0)),
        "another architecture": (a, _set(SPACE, (0, "ffn", 1)), torch.ones(2)),
    }.items():
        refused(message, Modulation, *arguments)
    refused("the model at hand is qwen3", lambda: Modulation(a, b, torch.ones(2)).active(tiny_lm("qwen3")))


# ------------------------------------------------------------------------------------------------------ choosing


def test_a_contested_neuron_goes_where_it_ranks_higher():
    """1 is second for safety and first for utility; 3 is fourth and second: both go to utility, safety moves on."""
    safety = Ranking(SPACE, POOL, torch.tensor([9.0, 8, 7, 6, 5, *[0.0] * 15]))
    utility = Ranking(SPACE, POOL, torch.tensor([0.0, 9, 0, 8, 7, *[-1.0] * 15]))
    s, u = assign(safety, utility, 3, 2)
    assert s.flat(POOL).nonzero().flatten().tolist() == [0, 2, 4]
    assert u.flat(POOL).nonzero().flatten().tolist() == [1, 3]
    tied = assign(safety, safety, 1, 1)
    assert [t.flat(POOL).nonzero().flatten().tolist() for t in tied] == [[0], [1]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 10_000))
def test_assigned_sets_are_disjoint_and_complete(n_safety, n_utility, seed):
    """Exact sizes, no overlap, and no list has passed over a free neuron that it ranks above one it took."""
    safety, utility = _rankings(SPACE, seed)
    if not 1 <= n_safety + n_utility <= 20:
        refused("allowed: from 1 to 20", lambda: assign(safety, utility, n_safety, n_utility))
        return
    chosen = assign(safety, utility, n_safety, n_utility)
    assert [len(c) for c in chosen] == [n_safety, n_utility]
    assert not len(chosen[0] & chosen[1])
    places = [torch.argsort(torch.argsort(r.values, descending=True)) for r in (safety, utility)]
    flat = [c.flat(POOL) for c in chosen]
    free = ~(flat[0] | flat[1])
    for mine, other, place, other_place in zip(flat, flat[::-1], places, places[::-1], strict=True):
        if mine.any() and free.any():
            assert place[mine].max() < place[free].min()
        lost = [i for i in other.nonzero().flatten().tolist() if mine.any() and place[i] < place[mine].max()]
        assert all(other_place[i] <= place[i] for i in lost)


def test_rankings_of_other_neurons_are_refused():
    safety, utility = _rankings(SPACE)
    refused("n_safety: got 1.5", lambda: assign(safety, utility, 1.5, 1))
    rows = Ranking(NeuronSpace({"q": (3,)}, {"q": 1}, 9, "toy"), ("q",), torch.ones(3))
    refused("safety: ranks q rows", lambda: assign(rows, utility, 1, 1))
    refused("utility: ranks other neurons", lambda: assign(safety, Ranking(SPACE, ("ffn",), torch.ones(12)), 1, 1))


def test_whole_layers():
    values = torch.cat([torch.zeros(10), torch.ones(10)])
    assert whole_layers(Ranking(SPACE, POOL, values), 1).per_layer() == [0, 10]
    assert len(whole_layers(Ranking(SPACE, POOL, values), 2)) == 20
    refused("layers: got 3", lambda: whole_layers(Ranking(SPACE, POOL, values), 3))


# ------------------------------------------------------------------------------------------------------ the dial


def test_dial_interpolates_towards_one(lm):
    rankings = _rankings(lm.view.space)
    full = dial(*rankings, 10, 5, start=(1.4, 0.8))
    assert torch.allclose(full.safety_alpha, torch.tensor(1.4))
    assert torch.allclose(full.utility_alpha, torch.tensor(0.8))
    half = dial(*rankings, 10, 5, 0.5, start=(1.4, 0.8))
    assert torch.allclose(half.alpha - 1, (full.alpha - 1) / 2)
    assert dial(*rankings, 10, 5, 100, start=(1.4, 0.8)).alpha.unique().tolist() == [0.0, 3.0]
    plain = logits_of(lm.model, IDS)
    distances = []
    for strength in (0, 0.5, 1):
        with dial(*rankings, 10, 5, strength, start=(1.4, 0.8)).active(lm):
            distances.append(float((logits_of(lm.model, IDS) - plain).norm()))
    assert distances[0] == 0 < distances[1] < distances[2]
    for bad in (math.nan, math.inf):
        refused("strength: got", dial, *rankings, 10, 5, bad)


def test_dial_reuses_what_was_learnt():
    safety, utility = _rankings(SPACE)
    sets = assign(safety, utility, 3, 2)
    learnt = Modulation(*sets, torch.tensor([1.1, 1.2, 1.6, 0.7, 0.9]), (0.5, 2.0), weights="abc")
    assert torch.equal(dial(safety, utility, 3, 2, learnt=learnt).alpha, learnt.alpha)
    wider = dial(safety, utility, 5, 2, learnt=learnt)
    table = dict(zip(wider.safety, wider.safety_alpha.tolist(), strict=True))
    for neuron, value in zip(learnt.safety, learnt.safety_alpha.tolist(), strict=True):
        assert table.pop(neuron) == value
    assert list(table.values()) == pytest.approx([1.3, 1.3])
    assert wider.bounds == (0.5, 2.0) and wider.weights == "abc"
    narrower = dial(safety, utility, 1, 0, learnt=learnt)
    assert [*narrower.safety] == [*safety.top(1)] and len(narrower.utility) == 0
    other = NeuronSpace(SPACE.widths, SPACE.parameters_per_neuron, 100, "other")
    refused("another architecture", dial, *_rankings(other), 3, 2, learnt=learnt)


def test_presets(lm):
    rankings = _rankings(lm.view.space)
    size = lm.view.space.size(POOL)
    first, second = (preset(name, *rankings) for name in ("safety-first", "utility-first"))
    assert (len(first.safety), len(first.utility)) == (round(0.07 * size), round(0.03 * size))
    assert (len(second.safety), len(second.utility)) == (len(first.utility), len(first.safety))
    assert first.name == "safety-first" and set(PRESETS) == {"safety-first", "utility-first"}


def test_sweep_and_frontier():
    """Each setting measured once; a point is dominated when another is as good everywhere and better somewhere."""
    seen = []

    def measure(setting):
        seen.append(setting)
        if setting is None:
            return {"asr": 0.5, "refused": 0.1}
        return {"asr": 0.5 - 0.02 * len(setting.safety), "refused": 0.3 - 0.02 * len(setting.utility)}

    table = sweep(*_rankings(SPACE), [0, 4], [0, 5], [0, 0.5, 1], measure, progress=False)
    assert list(zip(table.n_safety, table.n_utility, table.strength, strict=True)) == [
        (0, 0, 0.0),
        (0, 5, 0.5),
        (0, 5, 1.0),
        (4, 0, 0.5),
        (4, 0, 1.0),
        (4, 5, 0.5),
        (4, 5, 1.0),
    ]
    assert len(seen) == 7 and seen[0] is None
    marked = mark_dominated(table, lower=["asr", "refused"])
    # Untouched: fewest refused. 4 + 5: best ASR at refused .2. All others lose to one of them or tie with nothing worse.
    assert marked.dominated.tolist() == [False, True, True, True, True, False, False]
    higher = mark_dominated(table.assign(kept=-table.refused), lower=["asr"], higher=["kept"])
    assert higher.dominated.equals(marked.dominated)
    broken = pd.DataFrame({"asr": [0.1, np.nan], "refused": [0.1, 0.0]})
    assert mark_dominated(broken, lower=["asr", "refused"]).dominated.tolist() == [False, True]
    refused("no such column: cost", lambda: mark_dominated(table, lower=["cost"]))


# ------------------------------------------------------------------------------------------------------ gradients


def _learner(lm, method="first", **more):
    recipe = replace(SHORT, **({"method": method} | more))
    return Learner(lm, *_sets(lm), TASKS, BENIGN, recipe)


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_second_order_is_the_derivative_through_the_inner_step(attention, inner_steps):
    """The outer gradient against central differences of "adapt, then take the query loss", along the direction in which
    the two orders differ most."""
    lm = double_lm(attn_implementation=attention)
    learner = _learner(lm, "second", inner_steps=inner_steps, inner_rate=2.0)
    support, query = learner.draw("roleplay", 0)
    alpha = torch.linspace(0.8, 1.3, 40, dtype=torch.float64).requires_grad_()

    def outer(at):
        return float(learner.loss(learner.adapted(at.requires_grad_(), support, second=False), query).detach())

    with frozen(lm.model):
        second, value = learner.gradient(alpha, support, query)
        first, same = _learner(lm, "first", inner_steps=inner_steps, inner_rate=2.0).gradient(alpha, support, query)
        direction = (second - first) / (second - first).norm()
        step = 1e-4 * direction
        difference = (outer(alpha.detach() + step) - outer(alpha.detach() - step)) / 2e-4
        assert value == pytest.approx(same) == pytest.approx(outer(alpha.detach().clone()))
    found, other = float(second @ direction), float(first @ direction)
    assert found == pytest.approx(difference, rel=1e-5)
    assert abs(other - difference) > 100 * abs(found - difference)


def test_first_order_is_the_gradient_after_the_inner_step():
    learner = _learner(double_lm(), "first")
    support, query = learner.draw("prefix", 1)
    alpha = torch.linspace(0.8, 1.3, 40, dtype=torch.float64).requires_grad_()
    slope = torch.autograd.grad(learner.loss(alpha, support), alpha)[0]
    moved = (alpha - learner.recipe.inner_rate * slope).detach().requires_grad_()
    wanted = torch.autograd.grad(learner.loss(moved, query), moved)[0]
    assert torch.allclose(learner.gradient(alpha, support, query)[0], wanted)
    plain = torch.autograd.grad(learner.loss(alpha, query), alpha)[0]
    assert not torch.allclose(wanted, plain, rtol=1e-3)


def test_joint_is_the_mean_of_both_without_an_inner_step():
    learner = _learner(double_lm(), "joint")
    support, query = learner.draw("prefix", 1)
    alpha = torch.linspace(0.8, 1.3, 40, dtype=torch.float64).requires_grad_()
    halves = [torch.autograd.grad(learner.loss(alpha, b), alpha)[0] for b in (support, query)]
    assert torch.allclose(learner.gradient(alpha, support, query)[0], (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_the_loss_is_weighted_by_lambda(lm, balance):
    """Refusals of attacked prompts against helpful answers of benign ones, each the mean over its prompts."""
    learner = _learner(lm, balance=balance)
    alpha = torch.ones(40)
    attacked, benign = TASKS["prefix"][:3], BENIGN[:1]
    parts = []
    for prompts, column in ((attacked, "refusal"), (benign, "helpful")):
        total = 0.0
        for prompt in prompts:
            batch = lm.encode([prompt.text], [getattr(prompt, column)])
            with torch.no_grad():
                logp = lm.model(**batch.inputs).logits[0, :-1].log_softmax(-1)
            picked = logp.gather(1, batch.input_ids[0, 1:, None])[batch.prompt_lengths[0] - 1 :]
            total -= float(picked.mean())
        parts.append(total / len(prompts))
    found = float(learner.loss(alpha, learner.batch(attacked, benign)).detach())
    assert found == pytest.approx(balance * parts[0] + (1 - balance) * parts[1], rel=1e-4)


def test_draws(lm):
    """Support and query share no prompt; iterations differ; the same iteration is drawn alike."""
    learner = _learner(lm, support=2, query=2)
    rows = {}
    for iteration in range(4):
        for part, (responses, weights) in zip("sq", learner.draw("prefix", iteration), strict=True):
            batch = responses.batch
            rows[iteration, part] = [
                tuple(ids[:n].tolist()) for ids, n in zip(batch.input_ids, batch.lengths, strict=True)
            ]
            assert weights.sum() == pytest.approx(1.0) and len(weights) == 4
        assert not set(rows[iteration, "s"]) & set(rows[iteration, "q"])
    assert len({tuple(r) for r in rows.values()}) > 4
    again = learner.draw("prefix", 2)[0][0].batch
    assert [tuple(i[:n].tolist()) for i, n in zip(again.input_ids, again.lengths, strict=True)] == rows[2, "s"]


# ------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("method", ["first", "second", "joint"])
def test_learning_lowers_the_loss_and_leaves_the_weights(lm, method):
    before = snapshot(lm)
    recipe = Recipe(method, iterations=8, support=2, query=2, inner_rate=0.5, outer_rate=0.1, bounds=(0.5, 1.5))
    found = learn(lm, *_sets(lm, 40), TASKS, BENIGN, recipe, progress=False)
    history = found.history
    assert history["query"].iloc[-2:].mean() < history["query"].iloc[:2].mean() - 0.05
    alpha = found.modulation.alpha
    assert alpha.min() >= 0.5 and alpha.max() <= 1.5 and (alpha[:40] - 1.2).abs().max() > 0.1
    assert_same(before, snapshot(lm))
    assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())
    assert not any(m._forward_pre_hooks for m in lm.model.modules())
    assert found.modulation.weights == lm.weights_fingerprint and not found.stopped_early
    if method != "joint":  # the inner step does something, and what it is for
        assert history["adapted"].iloc[0] < history["support"].iloc[0]
    else:
        assert history["adapted"].isna().all()


def test_start_values(lm):
    """The first step is Adam's: every alpha moves by the outer rate from its starting value, or stays."""
    found = learn(lm, *_sets(lm, 3), TASKS, BENIGN, replace(SHORT, iterations=1, outer_rate=1e-3), progress=False)
    assert torch.allclose(found.modulation.safety_alpha, torch.tensor(1.2), atol=2e-3)
    assert torch.allclose(found.modulation.utility_alpha, torch.tensor(0.9), atol=2e-3)


def test_one_role_may_be_empty(lm):
    safety, utility = _sets(lm, 3)
    none = _set(lm.view.space)
    assert len(learn(lm, safety, none, TASKS, BENIGN, SHORT, progress=False).modulation.alpha) == 3
    assert len(learn(lm, none, utility, TASKS, BENIGN, SHORT, progress=False).modulation.utility_alpha) == 3


@pytest.mark.parametrize("method", ["first", "second"])
def test_resumed_learning_ends_with_the_same_alpha(lm, tmp_path, method):
    """Interrupted in the fourth iteration and taken up again: bit for bit the run that was not."""
    sets, recipe = _sets(lm), replace(SHORT, method=method, iterations=5, validate_every=2)
    whole, again = (learn(lm, *sets, TASKS, BENIGN, recipe, validation=HELD_OUT, progress=False) for _ in range(2))
    assert torch.equal(whole.modulation.alpha, again.modulation.alpha)
    file, original, before = tmp_path / "state", Learner.step, Counter(COUNTS)

    def interrupted(self, state):
        if state.iteration == 3:
            raise KeyboardInterrupt
        return original(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn(lm, *sets, TASKS, BENIGN, recipe, validation=HELD_OUT, checkpoint=file, progress=False)
    assert file.exists()
    done = Counter(COUNTS) - before
    later = {"validation": HELD_OUT, "checkpoint": file, "progress": False}
    COUNTS.clear()  # as in a new process, which finds an older file
    os.utime(file, (0, 0))
    resumed = learn(lm, *sets, TASKS, BENIGN, recipe, **later)
    assert COUNTS["gradient_tokens"] > done["gradient_tokens"] > 0, "what was interrupted counts as well"
    once = COUNTS["gradient_tokens"]
    learn(lm, *sets, TASKS, BENIGN, recipe, **later)  # it has all its iterations
    assert COUNTS["gradient_tokens"] == once
    assert torch.equal(resumed.modulation.alpha, whole.modulation.alpha)
    pd.testing.assert_frame_equal(resumed.history, whole.history)
    for changed in (
        {"recipe": replace(recipe, inner_rate=0.7)},
        {"tasks": {"prefix": TASKS["prefix"]}},
        {"benign": BENIGN[1:]},
    ):
        arguments = {"tasks": TASKS, "benign": BENIGN, "recipe": recipe} | changed
        refused("belongs to another run", learn, lm, *sets, **arguments, validation=HELD_OUT, checkpoint=file)
    refused("allowed: 5 and more", learn, lm, *sets, TASKS, BENIGN, replace(recipe, iterations=4), **later)
    file.write_bytes(b"nothing")
    refused("damaged", learn, lm, *sets, TASKS, BENIGN, recipe, validation=HELD_OUT, checkpoint=file)


def test_one_checkpoint_name_serves_several_runs(lm, tmp_path):
    """What notebook 05 does: all that it learns goes on from files of one name, each from its own."""
    recipes = [replace(SHORT, seed=seed) for seed in (0, 1)]

    def run(**more):
        return [learn(lm, *_sets(lm), TASKS, BENIGN, r, progress=False, **more).modulation.alpha for r in recipes]

    wanted, name = run(), str(tmp_path / "alpha_{key}.safetensors")
    first = run(checkpoint=name)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Learner, "step")  # nothing is learnt again
        second = run(checkpoint=name)
    for found in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_what_was_learnt_on_prompts_rendered_otherwise_is_not_resumed(lm, tmp_path, monkeypatch):
    """Under another system prompt the same prompts are other tokens; formerly their alpha was taken over without a word."""
    sets, file = _sets(lm), tmp_path / "state"

    def learnt(checkpoint):
        return learn(lm, *sets, TASKS, BENIGN, SHORT, checkpoint=checkpoint, progress=False).modulation.alpha

    name = str(tmp_path / "alpha_{key}.safetensors")
    plain = [learnt(checkpoint) for checkpoint in (file, name)]
    monkeypatch.setattr(lm, "system_prompt", "Be kind.")
    refused("belongs to another run", learnt, file)
    assert torch.equal(learnt(name), learnt(None)) and not torch.equal(learnt(name), plain[0])
    monkeypatch.setattr(lm, "system_prompt", None)
    assert torch.equal(learnt(file), plain[0]), "the same rendering again"
    monkeypatch.setattr(lm, "template_arguments", {"mood": "kind"})
    refused("belongs to another run", learnt, file)


def test_what_was_learnt_under_hooks_is_not_kept(lm, tmp_path):
    """Learning beside another intervention gives another alpha; formerly a file could not tell the two apart."""
    sets, file = _sets(lm), tmp_path / "state"

    def learnt(checkpoint):
        return learn(lm, *sets, TASKS, BENIGN, SHORT, checkpoint=checkpoint, progress=False).modulation.alpha

    plain = learnt(file)
    with hooks.ablate(lm, NeuronSet.from_flat(lm.view.space, range(5), ("ffn",))):
        with pytest.warns(UserWarning, match="^checkpoint: nothing is kept"):
            beside = learnt(file)
        assert torch.equal(beside, learnt(None))
    assert not torch.equal(beside, plain) and torch.equal(learnt(file), plain)


def test_a_measure_goes_with_no_checkpoint(lm, tmp_path):
    """A file cannot tell one function from another: formerly its values went on where another's had ended."""
    file = tmp_path / "state"
    learn(lm, *_sets(lm), TASKS, BENIGN, SHORT, checkpoint=file, progress=False)
    options = {"measure": lambda candidate: 0.0, "progress": False}
    longer = replace(SHORT, iterations=4)
    refused("^checkpoint: .* measure", learn, lm, *_sets(lm), TASKS, BENIGN, longer, checkpoint=file, **options)
    refused(
        "^checkpoint: .* measure", learn, lm, *_sets(lm), TASKS, BENIGN, SHORT, checkpoint=tmp_path / "b", **options
    )
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_seeds_matter(lm):
    a, b = (learn(lm, *_sets(lm), TASKS, BENIGN, replace(SHORT, seed=s), progress=False) for s in (0, 1))
    assert not torch.equal(a.modulation.alpha, b.modulation.alpha)


def test_a_divergence_ends_the_learning_with_a_row_and_the_best_alpha_so_far(lm, monkeypatch):
    original, seen = Learner.step, []

    def breaks(self, state):
        if state.iteration == 2:
            self.loss(torch.full((40,), math.nan), self.draw("prefix", 0)[0])
        return original(self, state)

    monkeypatch.setattr(Learner, "step", breaks)
    recipe = replace(SHORT, iterations=5)
    options = {"measure": lambda candidate: seen.append(candidate.alpha) or 1.0, "progress": False}
    found = learn(lm, *_sets(lm), TASKS, BENIGN, recipe, **options)
    assert found.diverged == 2 and not found.stopped_early
    assert found.history["iteration"].tolist() == [0, 1, 2] and math.isnan(found.history["query"].iloc[-1])
    assert torch.equal(found.modulation.alpha, seen[0])
    with pytest.raises(DivergedError):
        learn(lm, *_sets(lm), TASKS, BENIGN, recipe, progress=False)


@pytest.mark.parametrize("method", ["first", "second", "joint"])
def test_float64_learning_does_not_depend_on_the_order_of_sums(method):
    """Two attention kernels add in different orders: float32 runs part, float64 runs agree to float32's last bits."""
    alphas = {}
    for dtype in ("model", "auto"):
        for kernel in ("eager", "sdpa"):
            lm = tiny_lm(attn_implementation=kernel)
            recipe = replace(SHORT, method=method, iterations=6, train_dtype=dtype)
            alphas[dtype, kernel] = learn(lm, *_sets(lm), TASKS, BENIGN, recipe, progress=False).modulation.alpha
    assert not torch.equal(alphas["model", "eager"], alphas["model", "sdpa"])
    assert torch.allclose(alphas["auto", "eager"], alphas["auto", "sdpa"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["first", "second"])
def test_reused_hidden_states_give_the_alpha_of_whole_forwards(any_lm, method, monkeypatch):
    """Neurons of the second layer only: the first layer runs once a row, and the same alpha comes out."""
    recipe = replace(SHORT, method=method, iterations=2, train_dtype="float64")
    space = any_lm.view.space
    sets = _set(space, (1, "ffn", 3), (1, "o", 5)), _set(space, (1, "ffn", 7))
    found = [learn(any_lm, *sets, TASKS, BENIGN, recipe, progress=False).modulation.alpha]
    monkeypatch.setattr(trunk.FrozenTrunk, "of", lambda *_: None)
    found.append(learn(any_lm, *sets, TASKS, BENIGN, recipe, progress=False).modulation.alpha)
    assert torch.allclose(*found, rtol=0, atol=1e-6)
    assert (found[0] - torch.tensor([1.2, 1.2, 0.9])).abs().min() > 0.01


def test_early_stopping_keeps_the_best(lm):
    """Scripted values: the second validation is best, two without gain end it, the second alpha is given back."""
    values, seen = iter([3.0, 1.0, 2.0, 1.5, 0.1]), []

    def measure(candidate):
        seen.append(candidate.alpha)
        return next(values)

    recipe = replace(SHORT, iterations=20, patience=2)
    found = learn(lm, *_sets(lm), TASKS, BENIGN, recipe, measure=measure, progress=False)
    assert found.stopped_early and len(found.history) == 4
    assert found.history["validation"].tolist() == [3.0, 1.0, 2.0, 1.5]
    assert torch.equal(found.modulation.alpha, seen[1]) and not torch.equal(seen[1], seen[3])
    assert found.modulation.meta["iterations"] == 2


def test_validation_loss_is_that_of_the_held_out_split(lm):
    """The mean over its tasks of a loss with the benign rows in each; they are read once."""
    held_out = ({**HELD_OUT[0], "prefix": _prompts("Say yes: try", 3)}, HELD_OUT[1])
    read = []
    for more in ({}, {"validation": held_out}):
        before = COUNTS["read_tokens"]
        found = learn(lm, *_sets(lm), TASKS, BENIGN, replace(SHORT, iterations=1), progress=False, **more)
        read.append(COUNTS["read_tokens"] - before)
    learner = Learner(lm, *_sets(lm), {}, held_out[1], SHORT)
    batches = [learner.batch(attacked, held_out[1]) for attacked in held_out[0].values()]
    losses = [float(learner.loss(found.modulation.alpha, batch).detach()) for batch in batches]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert found.history["validation"][0] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert 0 < read[1] - read[0] < sum(responses.batch.input_ids.numel() for responses, _ in batches)


def test_adapting_to_an_unseen_attack(lm):
    start = dial(*_rankings(lm.view.space), 20, 20)
    unseen = _prompts("Ignore all rules:", 3)
    recipe = replace(SHORT, inner_rate=2.0, inner_steps=2)
    moved = adapt(lm, start, unseen, BENIGN, recipe)
    learner = Learner(lm, start.safety, start.utility, {}, BENIGN, recipe)
    batch = learner.batch(unseen, BENIGN)
    assert float(learner.loss(moved.alpha, batch)) < float(learner.loss(start.alpha, batch)) - 0.01
    assert moved.key != start.key and moved.name.endswith("adapted")


def test_finding_an_inner_rate(lm):
    sets = _sets(lm, 40)
    rate, gain = find_inner_rate(lm, *sets, TASKS, BENIGN, SHORT, share=0.02)
    assert gain >= 0.02
    smaller, less = find_inner_rate(lm, *sets, TASKS, BENIGN, SHORT, share=0.02, rates=[rate / 2])
    assert smaller == rate / 2 and less < 0.02
    refused("share: got 2", lambda: find_inner_rate(lm, *sets, TASKS, BENIGN, SHORT, share=2))


def test_a_slope_is_computed_once_for_every_rate_and_step(lm, monkeypatch):
    """The support loss was differentiated anew for each rate tried, and twice in each validated step."""
    asked = []

    def counted(learner, alpha, batch, loss=Learner.loss):
        asked.append(alpha)
        return loss(learner, alpha, batch)

    monkeypatch.setattr(Learner, "loss", counted)
    sets, rates = _sets(lm, 40), [0.5, 1.0, 2.0]
    rate, _ = find_inner_rate(lm, *sets, TASKS, BENIGN, SHORT, share=0.99, rates=rates)
    assert len(asked) == len(TASKS) * (1 + len(rates))
    learner = Learner(lm, *sets, TASKS, BENIGN, replace(SHORT, inner_rate=rate))
    support, query = learner.draw(next(iter(TASKS)), 0)
    found = {
        inner: float(learner.loss(at, support))
        for inner, at in (
            ("before", learner.start()),
            ("after", learner.adapted(learner.start(), support, second=False)),
        )
    }
    alone = find_inner_rate(lm, *sets, dict([next(iter(TASKS.items()))]), BENIGN, SHORT, share=0.99, rates=[rate])
    assert alone == (rate, 1 - found["after"] / found["before"]) and found["after"] != found["before"]
    asked.clear()
    effect = learner.inner_effect(learner.start(), [support])
    again, _ = learner.gradient(learner.start(), support, query)
    assert len(asked) == 2, "after the step, and the query: the slope is known"
    fresh = Learner(lm, *sets, TASKS, BENIGN, replace(SHORT, inner_rate=rate))
    assert torch.equal(again, fresh.gradient(fresh.start(), *fresh.draw(next(iter(TASKS)), 0))[0])
    assert effect == {"support": found["before"], "adapted": found["after"]}
    alpha = learner.start()
    before = learner.slope(alpha, support)[1]
    with torch.no_grad():
        alpha.mul_(1.1)  # as the optimiser changes it
    assert learner.slope(alpha, support)[1] == float(learner.loss(alpha, support)) != before


def test_bad_learning_input(lm):
    sets = _sets(lm, 3)
    few = {"roleplay": TASKS["roleplay"], "prefix": TASKS["prefix"][:2]}
    unanswered = PromptSet([Prompt(f"x {i}", kind="benign") for i in range(5)])
    for message, arguments in {
        "tasks: 'prefix' has 2 prompts; a split into support .1. and query .2. needs 3": {"tasks": few},
        "benign: 2 prompts; a split": {"benign": BENIGN[:2]},
        "benign: has prompts without a helpful answer": {"benign": unanswered},
        "tasks: 'a' has prompts without a refusal": {"tasks": {"a": unanswered}},
        "tasks: need the attacked prompts": {"tasks": {}},
        "validation: has no attack class": {"validation": ({}, BENIGN)},
    }.items():
        refused(message, learn, lm, *sets, **({"tasks": TASKS, "benign": BENIGN, "recipe": SHORT} | arguments))
    learner = _learner(lm)
    refused("the loss is not finite", learner.loss, torch.full((40,), math.nan), learner.draw("prefix", 0)[0])
    one = _set(lm.view.space, (0, "ffn", 1))
    refused("1 neurons are in both sets", learn, lm, one, one, TASKS, BENIGN, SHORT)
    refused("training mode", learn, training_lm(), *sets, TASKS, BENIGN, SHORT)
    for message, fields in {
        "safety_start: got 4": {"safety_start": 4},
        "utility_start: got nan": {"utility_start": math.nan},
        "inner_rate: got -1": {"inner_rate": -1},
        "balance: got 2": {"balance": 2},
    }.items():
        refused(message, Recipe, **fields)
