"""Pruning: hooks against hand-made weights, and the exported checkpoint against the hooks, family by family."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nt_utils.interventions import Deactivate
from nt_utils.interventions.pruning import Prune, export, pruned_model
from nt_utils.models import DecoderView
from nt_utils.neurons import POOL, NeuronSet
from nt_utils.scoring.fluctuation import fluctuation
from tests.common import refused
from tests.tiny import FAMILIES, tiny_lm

PROMPTS = ["Tell me a story.", "Hi"]


def chosen(space, heads=True):
    """Some FFN channels in every layer, more in layer 1, and a few attention channels."""
    masks = {(layer, "ffn"): torch.arange(space.width((layer, "ffn"))) % (4 - layer) == 1 for layer in (0, 1)}
    if heads:
        masks[1, "o"] = torch.arange(space.width((1, "o"))) < 8
    return NeuronSet(space, masks)


def logits(model, lm):
    with torch.no_grad():
        return model(**lm.encode(PROMPTS, side="right").inputs).logits


def hooked(lm, pruning):
    with pruning.active(lm):
        return logits(lm.model, lm)


def close(a, b):
    return torch.allclose(a, b, atol=2e-4 * float(b.abs().max()))


@pytest.mark.parametrize("smaller", [False, True])
def test_an_export_to_zero_equals_the_hooks(any_lm, tmp_path, smaller):
    pruning = Prune(chosen(any_lm.view.space))
    folder = export(any_lm, pruning, tmp_path / "pruned", smaller=smaller)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    wanted = hooked(any_lm, pruning)
    assert close(logits(plain, any_lm), wanted)
    assert not close(logits(any_lm.model, any_lm), wanted), "pruning must do something"
    counts = [int(pruning.neurons.mask((layer, "ffn")).sum()) for layer in (0, 1)]
    assert counts[0] < counts[1]
    removed = sum(p.numel() for p in any_lm.model.parameters()) - sum(p.numel() for p in plain.parameters())
    owned = any_lm.view.space.parameters_per_neuron["ffn"]
    assert removed == (2 * counts[0] * owned if smaller else 0)
    width = any_lm.view.space.width((0, "ffn"))
    assert DecoderView(plain).space.width((0, "ffn")) == width - (counts[0] if smaller else 0)
    refused("exists already", lambda: export(any_lm, pruning, folder))


#: Families whose checkpoints can hold a bias after both projections, or after o_proj alone.
BOTH = ["llama", "granite", "gpt2", "gpt_neox"]
ATTENTION = ["qwen3", "gemma2", "gemma3_text", "olmo2"]


@pytest.mark.parametrize("name", [*BOTH, *ATTENTION, "llama-biases", "llama-multi-head-tied"])
def test_an_export_to_the_mean_equals_the_hooks(name, tmp_path):
    lm = tiny_lm(name)
    statistics = fluctuation(lm, ["One", "and another text"], progress=False)
    neurons = chosen(lm.view.space)
    neurons = neurons.only(["o"]) if name in ATTENTION else neurons
    pruning = Prune.to_mean(neurons, statistics)
    folder = export(lm, pruning, tmp_path / "pruned", smaller=name not in ATTENTION)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    wanted = hooked(lm, pruning)
    assert close(logits(plain, lm), wanted)
    assert not close(hooked(lm, Prune(neurons)), wanted), "the mean must differ from zero"


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(BOTH)))
def test_means_that_no_bias_can_hold_are_refused(name):
    lm = tiny_lm(name)
    statistics = fluctuation(lm, PROMPTS, progress=False)
    pruning = Prune.to_mean(chosen(lm.view.space, heads=False), statistics)
    refused("prune to zero", lambda: pruned_model(lm, pruning))
    assert torch.isfinite(hooked(lm, pruning)).all()


def test_zeroing_is_deactivating_and_the_mean_is_the_mean(lm):
    neurons = chosen(lm.view.space)
    with Deactivate(neurons).active(lm):
        wanted = logits(lm.model, lm)
    assert torch.equal(hooked(lm, Prune(neurons)), wanted)
    one = fluctuation(lm, ["x"], progress=False)
    every = NeuronSet(lm.view.space, {s: torch.ones(lm.view.space.width(s)).bool() for s in lm.view.space.sites(POOL)})
    out = hooked(lm, Prune.to_mean(every, one))
    assert torch.isfinite(out).all()


def test_keys_tell_sets_and_means_apart(lm):
    space = lm.view.space
    statistics = [fluctuation(lm, [text], progress=False) for text in ("One", "and another")]
    sets = [chosen(space), chosen(space, heads=False)]
    keys = [Prune(n).key for n in sets] + [Prune.to_mean(n, s).key for n in sets for s in statistics]
    assert len(set(keys)) == 6
    assert Prune(sets[0]).key == Prune(chosen(space)).key
    # means outside the set do not matter
    more = {s: statistics[0].mean(*s) for s in space.sites(POOL)}
    assert Prune(sets[0], more).key == Prune.to_mean(sets[0], statistics[0]).key


def test_bad_input(lm, tmp_path):
    space = lm.view.space
    refused("empty", lambda: Prune(NeuronSet(space, {})))
    refused("kinds q cannot", lambda: Prune(NeuronSet(space, {(0, "q"): torch.ones(32).bool()})))
    refused("finite", lambda: Prune(chosen(space), {(0, "ffn"): torch.full((40,), torch.nan)}))
    refused("finite", lambda: Prune(chosen(space), {(0, "ffn"): torch.zeros(3)}))
    other = Prune(chosen(space))
    refused("architecture", lambda: other.active(tiny_lm("qwen3")))
    one_layer = NeuronSet(space, {(0, "ffn"): torch.arange(40) < 3})
    refused("every layer.*3, 0", lambda: export(lm, Prune(one_layer), tmp_path / "x", smaller=True))
    assert not (tmp_path / "x").exists()
