"""Fluctuation statistics against numpy on the concatenated activations."""

import numpy as np
import pytest
import torch

from nt_utils import hooks
from nt_utils.neurons import POOL
from nt_utils.scoring.fluctuation import Fluctuation, fluctuation
from nt_utils.scoring.importance import importance
from tests.common import refused
from tests.tiny import training_lm

PROMPTS = ["Tell me a story.", "Hi", "What is the tallest hill in this town, and why?", "Go", "Write a poem"]
RESPONSES = ["No.", "Once upon a time there was", "I will not", "yes", "roses"]


def _concatenated(lm, prompts, responses=None) -> dict:
    """Activations of all tokens [tokens, width], prompt by prompt without padding."""
    rows = {site: [] for site in lm.view.space.sites(POOL)}
    for i, prompt in enumerate(prompts):
        batch = lm.encode([prompt], None if responses is None else [responses[i]])
        with torch.no_grad(), hooks.capture(lm, rows) as seen:
            lm.model(**batch.inputs, use_cache=False)
        for site, parts in rows.items():
            parts.append(seen[site][0].double().numpy())
    return {site: np.concatenate(parts) for site, parts in rows.items()}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_statistics_equal_numpy(any_lm, batch_size):
    found = fluctuation(any_lm, PROMPTS, RESPONSES, batch_size=batch_size, progress=False)
    for (layer, kind), values in _concatenated(any_lm, PROMPTS, RESPONSES).items():
        assert found.tokens == len(values)
        spread = values.var(0).max()
        assert spread > 1e-4
        np.testing.assert_allclose(found.mean(layer, kind), values.mean(0), atol=1e-5)
        np.testing.assert_allclose(found.variance(layer, kind), values.var(0), rtol=1e-4, atol=1e-6 * spread)
        norms = any_lm.view.weight(layer, kind).detach().double().square().sum(0).numpy()
        np.testing.assert_allclose(found.score(layer, kind), values.var(0) * norms, rtol=1e-4, atol=1e-6 * spread)


def test_updates_are_exact_in_any_grouping(lm):
    """The merge itself: against numpy in float64, with a mean far from zero (a sum of squares would cancel)."""
    values = torch.randn(301, lm.view.space.width((0, "ffn")), dtype=torch.float64) + 1e6
    for sizes in ([301], [1] * 301, [100, 1, 200]):
        found = Fluctuation.of(lm)
        for part in values.split(sizes):
            found.update((0, "ffn"), part)
        np.testing.assert_allclose(found.mean(0, "ffn"), values.numpy().mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.variance(0, "ffn"), values.numpy().var(0), rtol=1e-8)
    naive = values.float().square().mean(0) - values.float().mean(0) ** 2
    assert (naive - values.var(0)).abs().max() > 0.1  # the cancellation is real


def test_merge_equals_one_pass_and_changes_neither(lm):
    first = fluctuation(lm, PROMPTS[:2], progress=False)
    second = fluctuation(lm, PROMPTS[2:], progress=False)
    before = first.mean(0, "ffn").clone()
    both, whole = first.merge(second), fluctuation(lm, PROMPTS, progress=False)
    assert both.tokens == whole.tokens == first.tokens + second.tokens
    for layer, kind in lm.view.space.sites(POOL):
        np.testing.assert_allclose(both.variance(layer, kind), whole.variance(layer, kind), rtol=1e-5)
    assert torch.equal(first.mean(0, "ffn"), before)


def test_the_same_pass_as_importance(lm):
    statistics = Fluctuation.of(lm)
    importance(lm, PROMPTS, positions="last", batch_size=2, statistics=statistics, progress=False)
    alone = fluctuation(lm, PROMPTS, progress=False)
    assert statistics.tokens == alone.tokens
    for layer, kind in lm.view.space.sites(POOL):
        np.testing.assert_allclose(statistics.score(layer, kind), alone.score(layer, kind), rtol=1e-4)


def test_bad_input(lm):
    refused("no tokens", lambda: Fluctuation.of(lm).variance(0, "o"))
    refused("allowed kinds", lambda: fluctuation(lm, PROMPTS[:1], progress=False).score(0, "q"))
    refused("layer 0, projection ffn", lambda: Fluctuation.of(lm).update((0, "ffn"), torch.full((3, 40), torch.nan)))
    refused("training mode", lambda: fluctuation(training_lm(), PROMPTS))
