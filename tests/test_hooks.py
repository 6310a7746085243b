"""Capture, ablate, scale and replace: right channels, nothing left behind, nothing edited in place."""

import gc
import weakref

import pytest
import torch

from nt_utils import hooks
from nt_utils.errors import InputError, ModelError
from nt_utils.neurons import NeuronSet
from tests.common import logits_of, refused, some_neurons
from tests.tiny import hooks_left, neuron_entries, tiny_lm

IDS = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))


def test_capture_sees_the_projections(any_lm):
    view = any_lm.view
    sites = view.space.sites()
    with hooks.capture(any_lm, sites) as seen:
        assert not seen
        logits_of(any_lm.model, IDS)
    assert set(seen) == set(sites)
    for site in sites:
        assert seen[site].shape == (2, 7, view.space.width(site))
    assert hooks_left(any_lm.model) == 0
    with hooks.capture(view, [(0, "v")]) as again:
        logits_of(any_lm.model, IDS)
    assert torch.equal(again[0, "v"], seen[0, "v"])


def test_ablation_equals_zeroed_weights(any_lm):
    """Channels set to 0 by hooks = a model whose weights and biases of those neurons are 0."""
    chosen = some_neurons(any_lm.view)
    plain = logits_of(any_lm.model, IDS)
    with hooks.ablate(any_lm, chosen):
        hooked = logits_of(any_lm.model, IDS)
    saved = []
    with torch.no_grad():
        for layer, kind, index in chosen:
            for parameter, at in neuron_entries(any_lm.view, layer, kind, index):
                saved.append((parameter, at, parameter[at].clone()))
                parameter[at] = 0
        edited = logits_of(any_lm.model, IDS)
        for parameter, at, values in reversed(saved):
            parameter[at] = values
    assert torch.allclose(hooked, edited, atol=1e-4)
    assert not torch.allclose(plain, hooked, atol=1e-2)
    assert torch.equal(plain, logits_of(any_lm.model, IDS))


def test_scaling_by_one_and_zero(lm):
    chosen = some_neurons(lm.view)
    ones = {site: torch.ones(lm.view.space.width(site)) for site in lm.view.space.sites()}
    with hooks.scale(lm, ones):
        same = logits_of(lm.model, IDS)
    assert torch.equal(same, logits_of(lm.model, IDS))
    with hooks.scale(lm, {site: (~mask).float() for site, mask in chosen.masks.items()}):
        scaled = logits_of(lm.model, IDS)
    with hooks.ablate(lm, chosen):
        assert torch.allclose(scaled, logits_of(lm.model, IDS), atol=1e-6)


def test_gradients_flow_into_the_factors(lm):
    factors = torch.ones(lm.view.space.width((1, "ffn")), requires_grad=True)
    with hooks.scale(lm, {(1, "ffn"): factors}):
        lm.model(IDS, use_cache=False).logits.square().mean().backward()
    assert factors.grad.abs().min() > 0
    lm.model.zero_grad()


def test_replace_by_own_values_changes_nothing_and_by_others_does(any_lm):
    view, plain = any_lm.view, logits_of(any_lm.model, IDS)
    chosen = some_neurons(view)
    with hooks.capture(any_lm, view.space.sites()) as seen:
        logits_of(any_lm.model, IDS)
    with hooks.replace(any_lm, {site: (mask, seen[site]) for site, mask in chosen.masks.items()}):
        assert torch.allclose(logits_of(any_lm.model, IDS), plain, atol=1e-5)
    constant = {site: (mask, torch.full((view.space.width(site),), 0.7)) for site, mask in chosen.masks.items()}
    with hooks.replace(any_lm, constant), hooks.capture(any_lm, [(1, "ffn")]) as after:
        assert not torch.allclose(logits_of(any_lm.model, IDS), plain, atol=1e-2)
    assert torch.all(after[1, "ffn"][..., chosen.masks[1, "ffn"]] == 0.7)
    assert not torch.any(after[1, "ffn"][..., ~chosen.masks[1, "ffn"]] == 0.7)


def test_the_outer_hook_acts_first(lm):
    width = lm.view.space.width((0, "ffn"))
    everything = torch.ones(width, dtype=torch.bool)
    with (
        hooks.replace(lm, {(0, "ffn"): (everything, torch.full((width,), 2.0))}),
        hooks.scale(lm, {(0, "ffn"): torch.full((width,), 3.0)}),
        hooks.capture(lm, [(0, "ffn")]) as seen,
    ):
        logits_of(lm.model, IDS)
    assert torch.all(seen[0, "ffn"] == 6.0)


def test_hooks_are_gone_after_nested_exceptions(lm):
    with (
        pytest.raises(RuntimeError, match="inside"),
        hooks.ablate(lm, some_neurons(lm.view)),
        hooks.capture(lm, lm.view.space.sites()),
    ):
        assert hooks_left(lm.model) > 0
        raise RuntimeError("inside")
    assert hooks_left(lm.model) == 0


def test_a_failing_registration_leaves_nothing(lm):
    with pytest.raises(InputError), hooks.capture(lm, [(0, "q"), (9, "q")]):
        pass
    assert hooks_left(lm.model) == 0

    def fails(_function):
        raise RuntimeError("no")

    module = lm.view.projection(0, "o").module
    good = hooks.after(module, lambda *_: None)
    with pytest.raises(RuntimeError, match="no"), hooks.attached([good, hooks.Hook(module, print, fails)]):
        pass
    assert hooks_left(lm.model) == 0


def test_captured_tensors_are_freed():
    lm = tiny_lm("llama")
    with hooks.capture(lm, [(0, "ffn"), (1, "q")]) as seen:
        logits_of(lm.model, IDS)
    references = [weakref.ref(tensor) for tensor in seen.values()]
    assert all(reference() is not None for reference in references)
    seen.clear()
    gc.collect()
    assert all(reference() is None for reference in references)


def test_activations_are_not_edited_in_place(lm):
    with hooks.capture(lm, [(0, "o"), (0, "ffn"), (0, "v")]) as seen, hooks.ablate(lm, some_neurons(lm.view)):
        logits_of(lm.model, IDS)
    with hooks.capture(lm, [(0, "o"), (0, "ffn"), (0, "v")]) as clean:
        logits_of(lm.model, IDS)
    assert torch.equal(seen[0, "v"], clean[0, "v"])  # captured before the ablation acted, and untouched by it
    mask = some_neurons(lm.view).masks[0, "v"]
    assert seen[0, "v"][..., mask].abs().min() > 0


def test_empty_and_foreign_selections_are_errors(lm):
    refused("empty", lambda: hooks.ablate(lm, NeuronSet(lm.view.space, {})))
    refused("empty", lambda: hooks.capture(lm, []))
    refused("empty", lambda: hooks.scale(lm, {}))
    other = tiny_lm("qwen2")
    refused("architecture", lambda: hooks.ablate(lm, some_neurons(other.view)))
    refused("channels", lambda: hooks.scale(lm, {(0, "q"): torch.ones(5)}))
    nothing = torch.zeros(32, dtype=torch.bool)
    refused("no channel", lambda: hooks.replace(lm, {(0, "q"): (nothing, torch.ones(32))}))


def _contexts(lm):
    """Every way to put hooks on, none of which runs."""
    some, width = some_neurons(lm.view), lm.view.space.width((0, "o"))
    mask, values = torch.ones(width, dtype=torch.bool), torch.zeros(width)
    return {
        "edit": hooks.edit(lm, {(0, "o"): lambda x: x}),
        "capture": hooks.capture(lm, [(0, "o")]),
        "scale": hooks.scale(lm, {(0, "o"): values}),
        "ablate": hooks.ablate(lm, some),
        "my name": hooks.ablate(lm, some, name="my name"),
        "replace": hooks.replace(lm, {(0, "o"): (mask, values)}),
        "residual": hooks.residual(lm, {1: lambda x: x}),
        "written": hooks.written(lm, lambda x: x),
        "observe": hooks.observe([(lm.view.layers[0], lambda args, kwargs: None)]),
    }


def test_a_context_none_of_whose_hooks_ran_is_an_error(lm):
    for name, context in _contexts(lm).items():
        with pytest.raises(ModelError, match=f"{name}: none of its .* hooks ran"), context:
            pass
    for context in _contexts(lm).values():  # what went wrong inside is what is reported
        with pytest.raises(KeyError, match="inside"), context:
            raise KeyError("inside")
    assert hooks_left(lm.model) == 0
    with hooks.ablate(lm, some_neurons(lm.view)):
        logits_of(lm.model, IDS)


@pytest.mark.parametrize("part", ["model", "layer", "forward"])
def test_compiled_models_are_refused(part):
    lm = tiny_lm()
    chosen = some_neurons(lm.view)
    if part == "model":
        lm.model = torch.compile(lm.model, backend="eager")
    elif part == "forward":
        lm.model.forward = torch.compile(lm.model.forward, backend="eager")
    else:
        lm.view.layers[1].compile(backend="eager")
    refused("compiled by torch.compile", lambda: hooks.ablate(lm, chosen), kind=ModelError)


def test_scripted_modules_are_refused(lm):
    scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    refused("torch.jit", lambda: hooks.attached([hooks.after(scripted, print)]), kind=ModelError)
