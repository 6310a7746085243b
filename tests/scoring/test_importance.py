"""Exact importance against brute force: zero the neuron, run its block again, compare. Then everything around it."""

import copy
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3Config

from nt_utils import hooks
from nt_utils.errors import ModelError
from nt_utils.models import DecoderView, pad
from nt_utils.neurons import NeuronScores
from nt_utils.scoring import importance as scoring
from nt_utils.scoring.importance import importance, score_batch, standard_errors
from nt_utils.scoring.query_key import Buffers, QueryKey, Rows
from nt_utils.scoring.reference import importance_by_hand
from tests.common import refused
from tests.tiny import CONFIGS, FAMILIES, SHAPE, hooks_left, tiny_lm, tiny_model, training_lm

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
    original = QueryKey._norm

    def spy(self, keys):
        function = original(self, keys)
        used.add(function.__name__)
        return function

    monkeypatch.setattr(QueryKey, "_norm", spy)
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
    scorer = scoring._Scorer(scoring.Weights(lm.view), batch, scoring.KINDS, None, None, None)
    with torch.no_grad(), scorer.attached():
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
    monkeypatch.setattr(scoring.Weights, "SHARE", 0.0)
    fresh = scoring.Weights(view)
    without = score_batch(view, batch, weights=fresh)
    assert not fresh._grams
    monkeypatch.setattr(scoring.Weights, "SHARE", 100.0)
    keeping = scoring.Weights(view)
    for _ in range(2):
        found = score_batch(view, batch, weights=keeping)
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
    monkeypatch.setattr(scoring, "value_scores", lambda *_: (_ for _ in ()).throw(RuntimeError("inside")))
    before = lm.model.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"):
        importance(lm, TEXTS, progress=False)
    assert lm.model.config._attn_implementation == before
    assert hooks_left(lm.model) == 0


def test_a_model_in_training_mode_is_refused():
    refused("training mode", lambda: importance(training_lm(), TEXTS))


@pytest.mark.parametrize("kind", ["q", "k", "v", "o", "gate", "ffn"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_weights_are_named(kind, bad, tmp_path):
    lm = tiny_lm("llama")
    with torch.no_grad():
        lm.view.weight(1, kind)[3, 2] = bad
    message = f"NaN or Inf in the weights of layer 1, projection {kind}"
    refused(message, importance, lm, TEXTS, progress=False, path=tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def test_bad_activations_are_named():
    lm = tiny_lm("llama")
    with torch.no_grad():
        lm.model.model.layers[1].post_attention_layernorm.weight[0] = torch.nan
    refused("NaN or Inf in the activations of layer 1, projection ffn", lambda: importance(lm, TEXTS, progress=False))


def test_an_attention_that_bypasses_the_interface_is_refused(monkeypatch):
    lm = tiny_lm("llama")
    attention = lm.model.model.layers[1].self_attn

    def own_forward(hidden_states, **_more):
        return torch.zeros_like(hidden_states), None

    monkeypatch.setattr(attention, "forward", own_forward)
    refused("AttentionInterface", lambda: score_batch(lm.view, batch_of(prompts_of((4,)))), kind=ModelError)


# ---------------------------------------------------------------------------------------------- sampled query rows


def _sampled(tokens, edges, generator):
    places = list(range(edges[0]))
    for low, high in pairwise(edges):
        places += (low + torch.randperm(high - low, generator=generator)[:2]).tolist()
    return Rows(places, tokens, edges, [])


def test_the_estimate_from_sampled_rows_is_unbiased_and_knows_its_error():
    """Over 4000 samples: the mean is the sum over all rows, and the squared errors are the variance it states."""
    generator = torch.Generator().manual_seed(0)
    tokens, edges = 60, list(range(4, 61, 7))
    extent = torch.rand(3, tokens, generator=generator, dtype=torch.float64) + 0.1
    values = extent * (0.5 + torch.rand(3, tokens, generator=generator)) + 0.3 * torch.rand(
        3, tokens, generator=generator
    )
    rows = [_sampled(tokens, edges, generator) for _ in range(4000)]
    totals, errors = zip(*(r.total(values[:, r.places], lambda: extent) for r in rows), strict=True)
    totals, errors = torch.stack(totals), torch.stack(errors)
    spread = totals.std(0)
    assert torch.all((totals.mean(0) - values.sum(1)).abs() < 4 * spread / 4000**0.5)
    assert torch.allclose(errors.square().mean(0).sqrt(), spread, rtol=0.15)
    every = Rows.of(torch.ones(tokens, tokens).tril().bool(), 0, None, 8)
    total, error = every.total(values, lambda: extent)
    assert torch.equal(total, values.sum(-1)) and not error.any()


def test_long_prompts_are_estimated_within_their_standard_errors():
    model = tiny_model("qwen2")
    view, batch = DecoderView(model), batch_of(prompts_of((320, 20)))
    model.config.max_position_embeddings = 512
    errors: dict = {}
    exact = score_batch(view, batch, exact_tokens=None)
    found = score_batch(view, batch, errors=errors)
    for site, values in exact.items():
        if site[1] in "qk":
            assert torch.equal(found[site][1], values[1]) and not errors[site][1].any()
            off = (found[site][0] - values[0]) / errors[site][0]
            assert 0.4 < off.square().mean().sqrt() < 3 and (found[site][0] != values[0]).all()
        else:
            assert torch.equal(found[site], values)
    again = score_batch(view, batch_of(prompts_of((320, 20))[:1]))
    assert all(torch.allclose(again[s][0], found[s][0], rtol=1e-5) for s in found)  # whatever stands beside it
    last = score_batch(view, batch, last=3)
    wanted = score_batch(view, batch, last=3, exact_tokens=None)
    assert all(torch.equal(last[s], wanted[s]) for s in last)


def test_standard_errors_lie_beside_the_scores(tmp_path):
    lm = tiny_lm("llama")
    lm.model.config.max_position_embeddings = 512
    texts = ["word " * 60, "Hi"]
    scores = importance(lm, texts, path=tmp_path / "s.safetensors", progress=False)
    errors = standard_errors(NeuronScores.load(tmp_path / "s.safetensors"))
    assert errors.kinds == ("q", "k") and (errors.get(0, "q")[0] > 0).all() and not errors.get(0, "q")[1].any()
    assert standard_errors(scores.subset([1])).n_prompts == 1
    assert standard_errors(importance(lm, texts, exact_tokens=None, progress=False)) is None
    assert standard_errors(importance(lm, texts, positions="last", progress=False)) is None


def test_exact_scores_in_the_place_of_estimated_ones_have_no_standard_errors(tmp_path):
    """Formerly the file of the earlier scores' errors stayed and was read as theirs."""
    lm = tiny_lm("llama")
    lm.model.config.max_position_embeddings = 512
    path = tmp_path / "s.safetensors"
    options = {"path": path, "progress": False}
    assert standard_errors(importance(lm, ["word " * 60, "Hi"], **options)) is not None
    assert standard_errors(importance(lm, ["word " * 60, "Hi"], exact_tokens=None, **options)) is None
    assert standard_errors(NeuronScores.load(path)) is None
    assert standard_errors(importance(lm, ["word " * 60], **options)).n_prompts == 1
    assert standard_errors(importance(lm, ["Hi", "Ho"], **options)) is None
    assert list(tmp_path.iterdir()) == [path]


def test_an_estimate_below_zero_has_a_score_of_zero_and_a_bounded_standard_error(monkeypatch):
    """At 2048 tokens of SmolLM2 an unbiased estimate fell below zero, and its infinite error refused the whole scoring."""
    model = tiny_model("qwen2")
    model.config.max_position_embeddings = 512
    batch = batch_of(prompts_of((320,)))
    exact = score_batch(DecoderView(model), batch, kinds=("k",), exact_tokens=None)
    total = Rows.total

    def below(rows, values, extent):
        found, error = total(rows, values, extent)
        return found - 2 * found.amax(-1, keepdim=True) * (torch.arange(found.shape[-1]) == 0), error

    monkeypatch.setattr(Rows, "total", below)
    errors: dict = {}
    found = score_batch(DecoderView(model), batch, kinds=("k",), errors=errors)
    for site, values in found.items():
        zero = values[0] == 0
        assert zero.any() and not zero.all() and (exact[site][0] > 0).all()
        assert 0 < errors[site][0][zero].min() <= errors[site][0][zero].max() < 100 * errors[site][0][~zero].max()


def test_working_buffers_follow_the_device():
    buffers = Buffers()
    first = buffers.like(torch.ones(1), (2, 3))
    elsewhere = buffers.like(torch.ones(1, device="meta"), (2, 3))
    assert {b.device.type for b in first} == {"cpu"} and {b.device.type for b in elsewhere} == {"meta"}
    assert buffers.like(torch.ones(1), (2, 2))[0].device.type == "cpu"
    assert buffers.like(torch.ones(1).double(), (2, 2))[0].dtype == torch.float64


def test_a_batch_whose_longest_prompt_changes_the_others_rotation_is_refused():
    """longrope: the factors of every prompt in a batch follow the longest one."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0, 1.0, 1.1, 1.2], "long_factor": [1.5, 3.0, 8.0, 20.0]}
    config = Phi3Config(**SHAPE | {"max_position_embeddings": 256}, rope_parameters=rope)
    config.original_max_position_embeddings = 32
    view = DecoderView(AutoModelForCausalLM.from_config(config).eval())
    short, long = prompts_of((10, 40))
    score_batch(view, batch_of([short]))
    refused("longest has 40 tokens; with the model's longrope .* beyond 32", score_batch, view, batch_of([short, long]))
