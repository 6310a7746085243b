"""The published detection against its formulas written out in loops."""

import math

import pytest
import torch

from nt_utils import hooks
from nt_utils.data.records import PromptSet
from nt_utils.definitions import REGISTRY, Material
from nt_utils.definitions.sn_published import PRESETS, published_scores, published_set
from nt_utils.neurons import POOL
from tests.common import refused
from tests.tiny import tiny_lm

TEXTS = ["break it", "open the door", "a b"]


def by_loops(lm, text):
    """The three lists of layer 0: a plain Llama's, by its own submodules, a token, head and dimension at a time."""
    model, view = lm.model.model, lm.view
    layer, ids = model.layers[0], torch.tensor([lm.tokenizer(text)["input_ids"]])
    tokens, h, n, d = ids.shape[1], view.num_heads, view.num_kv_heads, view.head_dim
    x = layer.input_layernorm(model.embed_tokens(ids))
    cos, sin = model.rotary_emb(x, torch.arange(tokens)[None])

    def rotated(y):
        half = torch.cat([-y[..., d // 2 :], y[..., : d // 2]], -1)
        return y * cos[:, None] + half * sin[:, None]

    attention = layer.self_attn
    q = rotated(attention.q_proj(x).view(1, tokens, h, d).transpose(1, 2))[0]
    k = rotated(attention.k_proj(x).view(1, tokens, n, d).transpose(1, 2))[0]
    v = attention.v_proj(x).view(tokens, n, d)
    shared, values, written = torch.zeros(h, d), torch.zeros(h, d), torch.zeros(tokens, h, d)
    for head in range(h):
        keys = k[head // (h // n)]
        for t in range(tokens):
            logits = torch.stack([q[head, t] @ keys[s] / math.sqrt(d) for s in range(t + 1)])
            written[t, head] = logits.softmax(0) @ v[: t + 1, head // (h // n)]
            values[head] += written[t, head].abs()
            for i in range(d):
                without = logits - torch.stack([q[head, t, i] * keys[s, i] for s in range(t + 1)])
                shared[head, i] += (without.softmax(0) - logits.softmax(0)).square().sum()
    hidden = model.embed_tokens(ids) + attention.o_proj(written.reshape(1, tokens, h * d))
    up = layer.mlp.up_proj(layer.post_attention_layernorm(hidden))[0].abs().sum(0)
    return {"q": shared.flatten(), "o": values.flatten(), "ffn": up}


@torch.no_grad()
def test_scores_equal_the_formulas_in_loops():
    lm = tiny_lm()
    scores = published_scores(lm, TEXTS)
    for row, text in enumerate(TEXTS):
        for kind, wanted in by_loops(lm, text).items():
            assert wanted.min() >= 0 < wanted.max()
            torch.testing.assert_close(scores.get(0, kind)[row], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "phi3", "qwen3"])
def test_the_pass_is_the_models_own(name):
    lm = tiny_lm(name)
    scores = published_scores(lm, TEXTS[:1])
    with torch.no_grad(), hooks.capture(lm, [(1, "o"), (1, "up")]) as seen:
        lm.model(torch.tensor([lm.tokenizer(TEXTS[0])["input_ids"]]))
    for kind, role in (("o", "o"), ("ffn", "up")):
        torch.testing.assert_close(scores.get(1, kind)[0], seen[1, role][0].abs().sum(0), rtol=1e-4, atol=1e-5)


def test_the_set_is_the_intersection_of_the_tops_and_maps_to_rows():
    lm = tiny_lm()
    scores, d, group = published_scores(lm, TEXTS), lm.view.head_dim, 2
    found = published_set(lm.view, scores, "Llama")
    divided = published_set(lm.view, scores, "Llama", division=True, cap=2)
    for source, target, share in (
        ("ffn", "ffn", "ffn"),
        ("q", "q", "attention"),
        ("q", "k", "attention"),
        ("o", "v", "attention"),
    ):
        values = scores.get(1, source)
        k = math.ceil(PRESETS["Llama"][share] * values.shape[1])
        tops = [set(row.argsort(descending=True)[:k].tolist()) for row in values]
        entries = sorted(set.intersection(*tops))
        assert entries
        wanted, capped = set(entries), set(entries[:2])
        if target in ("k", "v"):
            wanted = {(j // d) // group * d + j % d for j in entries}
            capped = {j // group for j in entries[:2]}
        assert set(found.mask((1, target)).nonzero().flatten().tolist()) == wanted
        assert set(divided.mask((1, target)).nonzero().flatten().tolist()) == capped
    refused("preset: got 'Gemma'; allowed: Llama, Mistral", lambda: published_set(lm.view, scores, "Gemma"))


def test_ranking_holds_the_set_of_every_share():
    """The neurons in the top share of their list on every prompt are those whose value reaches minus the share."""
    lm = tiny_lm()
    ranking = REGISTRY["as published"](lm, Material(PromptSet.of(TEXTS, "raw", kind="harmful")))
    scores = published_scores(lm, TEXTS)
    chosen = ranking.at_least(-0.5)
    for site in lm.view.space.sites(POOL):
        values = scores.get(*site)
        k = int(0.5 * values.shape[1])
        tops = [set(row.argsort(descending=True)[:k].tolist()) for row in values]
        assert set(chosen.mask(site).nonzero().flatten().tolist()) == set.intersection(*tops)
