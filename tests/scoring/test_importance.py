"""Exact importance against brute force: zero the neuron, run its block again, compare. Then everything around it."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from nt_utils import hooks
from nt_utils.errors import InputError, ModelError
from nt_utils.models import DecoderView, pad
from nt_utils.neurons import NeuronScores
from nt_utils.scoring import importance as scoring
from nt_utils.scoring.importance import importance, score_batch
from nt_utils.scoring.reference import importance_by_hand
from tests.tiny import CONFIGS, FAMILIES, hooks_left, tiny_lm, tiny_model

LENGTHS = (9, 14)


def prompts_of(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]


def batch_of(rows, side="right"):
    return pad(rows, pad_id=0, side=side, prompt_lengths=[len(row) for row in rows])


def relative_errors(name: str, *, last: int | None = None, side: str = "right", lengths=LENGTHS) -> dict[str, float]:
    """Largest relative error per kind over all layers, neurons and prompts of a padded batch; asserts non-vacuity."""
    view, rows = DecoderView(tiny_model(name)), prompts_of(lengths)
    found = score_batch(view, batch_of(rows, side), last=last)
    worst = {}
    for b, row in enumerate(rows):
        for site in view.space.sites():
            values = importance_by_hand(view, torch.tensor([row]), *site, last=last)
            assert values.min() > 1e-4, f"{site}: a vacuous neuron"
            error = ((found[site][b] - values).abs() / values).max().item()
            worst[site[1]] = max(worst.get(site[1], 0.0), error)
    return worst


@pytest.mark.parametrize("name", CONFIGS)
def test_every_neuron_equals_brute_force(name):
    errors = relative_errors(name)
    assert set(errors) == {"q", "k", "v", "o", "ffn"}
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "olmo2", "gpt2"])
def test_last_positions_and_left_padding_equal_brute_force(name):
    errors = relative_errors(name, last=3, side="left")
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_long_prompts_go_through_head_space(name, monkeypatch):
    """Both forms of the norm are used and both are right (the short prompts above use token space)."""
    used = set()
    original = scoring._Channels._norm

    def spy(self, keys):
        function = original(self, keys)
        used.add(function.__name__)
        return function

    monkeypatch.setattr(scoring._Channels, "_norm", spy)
    errors = relative_errors(name, lengths=(60,))
    assert max(errors.values()) < 1e-4, errors
    assert used == {"in_token_space", "in_head_space"}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_prompts(name, side):
    view, rows = DecoderView(tiny_model(name)), prompts_of((3, 17, 8))
    together = score_batch(view, batch_of(rows, side))
    for b, row in enumerate(rows):
        alone = score_batch(view, batch_of([row]))
        for site, values in alone.items():
            assert torch.allclose(together[site][b], values[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_scores_do_not_depend_on_the_attention_implementation(name):
    rows = batch_of(prompts_of((5, 9)))
    found = []
    for implementation in ("eager", "sdpa", "flash_attention_2"):
        model = tiny_model(name)
        model.config._attn_implementation_internal = implementation  # flash is not installed: it must not be called
        found.append(score_batch(DecoderView(model), rows))
        assert model.config._attn_implementation == implementation
    for site in found[0]:
        assert torch.equal(found[0][site], found[1][site])
        assert torch.equal(found[0][site], found[2][site])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "gpt2"])
def test_the_forward_pass_is_the_models_own(name):
    """While scoring, the model computes what it always computes."""
    lm = tiny_lm(name)
    batch = batch_of(prompts_of((6, 11)))
    with torch.no_grad():
        plain = lm.model(**batch.inputs, use_cache=False).logits
    engine = scoring._Engine(scoring._Readers(lm.view), batch, scoring.KINDS, None, None)
    with torch.no_grad(), engine.attached():
        scored = lm.model(**batch.inputs, use_cache=False).logits
    real = batch.attention_mask.bool()
    assert torch.allclose(plain[real], scored[real], atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 500, 10_000_000])
@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_the_chunk_budget_changes_nothing(name, chunk):
    view, batch = DecoderView(tiny_model(name)), batch_of(prompts_of((5, 12)))
    for site, values in score_batch(view, batch).items():
        again = score_batch(view, batch, kinds=[site[1]], chunk=chunk)[site]
        assert torch.allclose(values, again, rtol=2e-5, atol=1e-7)


def test_kept_gram_matrices_change_nothing(monkeypatch):
    view, batch = DecoderView(tiny_model("llama")), batch_of(prompts_of((5, 12)))
    monkeypatch.setattr(scoring._Readers, "SHARE", 0.0)
    fresh = scoring._Readers(view)
    without = score_batch(view, batch, readers=fresh)
    assert not fresh._grams
    monkeypatch.setattr(scoring._Readers, "SHARE", 100.0)
    keeping = scoring._Readers(view)
    for _ in range(2):
        found = score_batch(view, batch, readers=keeping)
        assert all(torch.equal(found[site], without[site]) for site in found)
    assert set(keeping._grams) == {0, 1}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt_neox"])
def test_half_precision_weights(name, dtype, tolerance):
    """Scores of a half-precision model follow those of the same weights in float32, to the format's precision."""
    model = tiny_model(name).to(dtype)
    batch = batch_of(prompts_of((9, 14)))
    half = score_batch(DecoderView(model), batch)
    full = score_batch(DecoderView(copy.deepcopy(model).float()), batch)
    for site in full:
        assert half[site].dtype == torch.float32
        error = (half[site] - full[site]).norm() / full[site].norm()
        assert error < tolerance, (site, error)


def test_prompts_of_length_one():
    """A single token attends to itself alone: its queries and keys cannot matter, everything else does."""
    found = score_batch(DecoderView(tiny_model("qwen2")), batch_of(prompts_of((1, 1, 4))))
    for (_, kind), values in found.items():
        assert (values[:2].abs().max() < 1e-6) == (kind in "qk")
        assert values[2].min() > 0


def test_offloaded_weights_are_found():
    from accelerate import cpu_offload

    model, batch = tiny_model("llama-biases"), batch_of(prompts_of((5, 9)))
    plain = score_batch(DecoderView(model), batch)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert offloaded.model.layers[0].self_attn.o_proj.weight.is_meta
    found = score_batch(DecoderView(offloaded), batch)
    for site in plain:
        assert torch.allclose(plain[site], found[site], rtol=1e-5)


# ------------------------------------------------------------------------------------------------- public function


TEXTS = ["How do I do that?", "Hi", "Name three colours and explain why they matter."]


def test_scores_go_to_a_file(lm, tmp_path):
    path = tmp_path / "scores.safetensors"
    scores = importance(lm, TEXTS, batch_size=2, path=path, progress=False)
    assert scores.n_prompts == 3
    assert scores.meta["positions"] == "all"
    again = NeuronScores.load(path, lm.view.space)
    single = importance(lm, TEXTS[2:], progress=False)
    for site in lm.view.space.sites():
        assert again.get(*site).shape == (3, lm.view.space.width(site))
        assert torch.allclose(again.get(*site)[2], single.get(*site)[0], rtol=2e-5, atol=1e-6)
    assert len(load_file(path)) == len(lm.view.space.sites())


def test_last_positions_are_the_templates_tail(lm):
    scores = importance(lm, TEXTS[:1], positions="last", progress=False)
    rows = lm.tokens(lm.render(TEXTS[:1]))
    wanted = score_batch(lm.view, batch_of(rows), last=lm.suffix_length)
    everything = importance(lm, TEXTS[:1], progress=False)
    for site in lm.view.space.sites():
        assert torch.allclose(scores.get(*site), wanted[site], rtol=1e-5)
        assert (scores.get(*site) <= everything.get(*site) * (1 + 1e-5) + 1e-6).all()


def test_only_the_asked_kinds(lm):
    scores = importance(lm, TEXTS, kinds=("ffn", "o"), progress=False)
    full = importance(lm, TEXTS, progress=False)
    assert scores.kinds == ("ffn", "o")
    assert torch.allclose(scores.get(1, "o"), full.get(1, "o"), rtol=1e-5)


def test_scores_of_an_ablated_model_see_the_ablation(lm):
    """Scoring inside an intervention scores the intervened model."""
    ones = torch.ones(lm.view.space.width((0, "ffn")))
    ones[:5] = 0
    with hooks.scale(lm, {(0, "ffn"): ones}):
        scores = importance(lm, TEXTS, progress=False)
    assert torch.all(scores.get(0, "ffn")[:, :5] == 0)
    assert torch.all(scores.get(0, "ffn")[:, 5:] > 0)


def test_everything_is_put_back_after_an_error(lm, monkeypatch):
    monkeypatch.setattr(scoring, "_value_scores", lambda *_: (_ for _ in ()).throw(RuntimeError("inside")))
    before = lm.model.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"):
        importance(lm, TEXTS, progress=False)
    assert lm.model.config._attn_implementation == before
    assert hooks_left(lm.model) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"prompts": []}, "prompts: .*at least one"),
        ({"prompts": "one text"}, "prompts: .*list"),
        ({"positions": "first"}, "positions: got 'first'; allowed: all, last"),
        ({"kinds": ("q", "x")}, "kinds"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_bad_arguments(lm, more, words):
    with pytest.raises(InputError, match=words) as caught:
        importance(lm, **{"prompts": TEXTS, "progress": False, **more})
    assert "\n" not in str(caught.value)


def test_a_model_in_training_mode_is_refused():
    lm = tiny_lm("llama")
    lm.model.train()
    with pytest.raises(InputError, match="training mode"):
        importance(lm, TEXTS, progress=False)


@pytest.mark.parametrize("kind", ["q", "k", "v", "o", "gate", "ffn"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_weights_are_named(kind, bad, tmp_path):
    lm = tiny_lm("llama")
    with torch.no_grad():
        lm.view.weight(1, kind)[3, 2] = bad
    with pytest.raises(InputError, match=f"NaN or Inf in the weights of layer 1, projection {kind}") as caught:
        importance(lm, TEXTS, progress=False, path=tmp_path / "s.safetensors")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_bad_activations_are_named():
    lm = tiny_lm("llama")
    with torch.no_grad():
        lm.model.model.layers[1].post_attention_layernorm.weight[0] = torch.nan
    with pytest.raises(InputError, match="NaN or Inf in the activations of layer 1, projection ffn"):
        importance(lm, TEXTS, progress=False)


def test_an_attention_that_bypasses_the_interface_is_refused(monkeypatch):
    lm = tiny_lm("llama")
    attention = lm.model.model.layers[1].self_attn

    def own_forward(hidden_states, **_more):
        return torch.zeros_like(hidden_states), None

    monkeypatch.setattr(attention, "forward", own_forward)
    with pytest.raises(ModelError, match="AttentionInterface"):
        score_batch(lm.view, batch_of(prompts_of((4,))))
