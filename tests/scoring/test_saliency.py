"""Weight importance per neuron and activation change, against autograd and numpy one prompt at a time."""

import copy

import numpy as np
import torch

from nt_utils import hooks, selection
from nt_utils.data.records import PromptSet
from nt_utils.models import DecoderView
from nt_utils.neurons import KINDS, POOL
from nt_utils.scoring.activation_change import activation_change
from nt_utils.scoring.saliency import saliency
from tests.common import refused
from tests.tiny import tiny_lm

TEXTS = ["Tell me a story.", "Hi", "What is the tallest hill in this town?"]
PROMPTS = PromptSet.of(TEXTS, "test", kind="harmful")
RESPONSES = ["No.", "Once upon a time there was", "I will not"]


def loss_of_one(model, lm, text, response):
    """Mean negative log-likelihood of the response's tokens, and where the response begins."""
    batch = lm.encode([text], [response], side="right")
    start = batch.prompt_lengths[0]
    labels = batch.input_ids.clone()
    labels[:, :start] = -100
    return model(batch.input_ids, labels=labels, use_cache=False).loss, start


def owned_mean(view, site):
    """Mean over each neuron's weights of what the model's weights hold."""
    layer, kind = site
    if kind in "qkv":
        return view.weight(layer, kind).mean(1)
    if kind == "o":
        return view.weight(layer, "o").mean(0)
    rows = [view.weight(layer, role) for role in (("gate", "up") if view.gated else ("up",))]
    total = view.weight(layer, "ffn").sum(0) + sum(r.sum(1) for r in rows)
    return total / (view.weight(layer, "ffn").shape[0] + sum(r.shape[1] for r in rows))


def test_snip_equals_autograd_one_prompt_at_a_time(any_lm):
    before = any_lm.weights_fingerprint
    found = saliency(any_lm, PROMPTS, RESPONSES, kinds=KINDS, batch_size=2, progress=False)
    for i, (text, response) in enumerate(zip(TEXTS, RESPONSES, strict=True)):
        model = copy.deepcopy(any_lm.model)
        model.requires_grad_(True)
        loss_of_one(model, any_lm, text, response)[0].backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.copy_((parameter * parameter.grad).abs())
            view = DecoderView(model)
            for site in view.space.sites(KINDS):
                wanted = owned_mean(view, site)
                assert wanted.max() > 1e-5
                torch.testing.assert_close(found.get(*site)[i], wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()))
    assert any_lm.weights_fingerprint == before
    assert any(p.requires_grad for p in any_lm.model.parameters())


def test_wanda_equals_numpy_one_prompt_at_a_time(any_lm):
    found = saliency(any_lm, PROMPTS, RESPONSES, metric="wanda", kinds=KINDS, batch_size=3, progress=False)
    view = any_lm.view
    for i, (text, response) in enumerate(zip(TEXTS, RESPONSES, strict=True)):
        inputs = {}
        roles = ["q", "k", "v", "o", "up", "ffn"] + (["gate"] if view.gated else [])
        places = {(layer, role): view.projection(layer, role).module for layer in (0, 1) for role in roles}
        watch = [
            (m, lambda args, kwargs, key=key, inputs=inputs: inputs.__setitem__(key, args[0][0].numpy()))
            for key, m in places.items()
        ]
        with torch.no_grad(), hooks.observe(watch):
            _, start = loss_of_one(any_lm.model, any_lm, text, response)
        for layer, kind in view.space.sites(KINDS):
            parts = []
            for role in {"ffn": [r for r in ("gate", "up", "ffn") if r in roles]}.get(kind, [kind]):
                norms = np.sqrt((inputs[layer, role][start:].astype(float) ** 2).sum(0))
                weights = view.weight(layer, role).detach().abs().double().numpy() * norms[None]
                parts.append(weights.T if role in ("o", "ffn") else weights)
            wanted = np.concatenate(parts, axis=1).mean(1)
            np.testing.assert_allclose(found.get(layer, kind)[i], wanted, rtol=1e-3, atol=1e-5 * wanted.max())


def test_set_difference_is_a_set_difference(lm):
    safety = saliency(lm, PROMPTS, RESPONSES, progress=False)
    utility = saliency(lm, PROMPTS, RESPONSES[::-1], metric="wanda", progress=False)
    ranking = selection.set_difference(safety, utility, 0.25)
    top_safety, top_utility = (selection.mean_importance(s) for s in (safety, utility))
    useful = top_utility.top_share(0.25)
    for q in (0.05, 0.2, 0.5):
        wanted = top_safety.top_share(q) - useful
        assert 0 < len(wanted) < len(top_safety.top_share(q))
        assert ranking.top(len(wanted)) == wanted
    assert selection.set_difference(safety, utility, 0.0).top(7) == top_safety.top(7)
    refused("below 1", lambda: selection.set_difference(safety, utility, 1.0))


def test_activation_change_equals_numpy_one_prompt_at_a_time(any_lm):
    other = tiny_lm(any_lm.name.removeprefix("tiny-"), seed=1)
    found = activation_change(any_lm, other, PROMPTS, RESPONSES, batch_size=2, progress=False)
    squares, tokens = {}, 0
    for text, response in zip(TEXTS, RESPONSES, strict=True):
        batch = any_lm.encode([text], [response])
        start, end = batch.prompt_lengths[0] - 1, batch.lengths[0] - 1
        tokens += end - start
        seen = []
        for model in (any_lm, other):
            with torch.no_grad(), hooks.capture(model, model.view.space.sites(POOL)) as activations:
                model.model(**batch.inputs, use_cache=False)
            seen.append({s: v[0, start:end].double().numpy() for s, v in activations.items()})
        for site, values in seen[0].items():
            squares[site] = squares.get(site, 0) + ((values - seen[1][site]) ** 2).sum(0)
    ranking = selection.root_mean_square(found)
    for site, values in any_lm.view.space.split(ranking.values, POOL).items():
        wanted = np.sqrt(squares[site] / tokens)
        assert wanted.max() > 0.01
        np.testing.assert_allclose(values, wanted, rtol=1e-3, atol=1e-5)


def test_activation_change_of_a_subset_weighs_its_own_tokens(lm):
    found = activation_change(lm, tiny_lm("llama", seed=1), PROMPTS, RESPONSES, progress=False)
    alone = activation_change(lm, tiny_lm("llama", seed=1), PROMPTS[1:], RESPONSES[1:], progress=False)
    part = selection.root_mean_square(found.subset([1, 2])).values
    torch.testing.assert_close(part, selection.root_mean_square(alone).values, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(part, selection.root_mean_square(found).values, rtol=1e-2)


def test_bad_input(lm):
    refused("snip, wanda", lambda: saliency(lm, PROMPTS, RESPONSES, metric="magnitude", progress=False))
    refused("got 1 for 3 prompts", lambda: saliency(lm, PROMPTS, RESPONSES[:1], progress=False))
    refused("architecture", lambda: activation_change(lm, tiny_lm("qwen3"), PROMPTS, RESPONSES, progress=False))
    refused("activation_change", lambda: selection.root_mean_square(saliency(lm, PROMPTS, RESPONSES, progress=False)))
