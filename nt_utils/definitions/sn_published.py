"""SN-Tune's detection as its published code computes it [SN: Zhao et al., ICLR 2025; code at commit 06e2e70].

With x = the feed-forward block's input, o = the input of o_proj, Q and K after the rotary embedding, mask the model's own:

    FFN k:               sum_t |(W_up x_t)_k|                                  (neither gate nor W_down)
    V, list entry (h,i): sum_t |o_t,(h,i)|
    Q and K, one list:   sum (softmax(S - q_i k_i^T) - softmax(S))^2,   S = s Q K^T + mask   (q_i k_i^T is not scaled, no root)

1. Run every prompt as raw text, without a chat template, and take the three lists of scores in every layer.
2. Take the top k of each list on each prompt; k is a share of the list's length (``PRESETS``).
3. Intersect over all prompts; an entry (h, i) of the V and K list stands for row i of query head h's key/value head.
4. Options that the code adds: key/value rows by dividing the entry's index by the group size; only the first 100 indices.

**Ours**: s is the model's own scaling, soft-capping is left out, and a rank is divided by the list's length, so that the
ranking of the pool (FFN channels and the V list's o_proj channels) serves every number of neurons.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nt_utils import hooks, selection
from nt_utils.definitions import Material, definition
from nt_utils.errors import check_choice
from nt_utils.models import DecoderView, LanguageModel, decoder
from nt_utils.neurons import POOL, NeuronScores, NeuronSet, ScoreWriter
from nt_utils.scoring.attention import attention_through
from nt_utils.selection import Ranking

#: Shares of a list that count as its top: Llama-3-8B's 12000 of 14336 and 2000 of 4096, Mistral-7B's 2000 and 1000.
PRESETS = {
    "Llama": {"ffn": 12000 / 14336, "attention": 2000 / 4096},
    "Mistral": {"ffn": 2000 / 14336, "attention": 1000 / 4096},
}


@definition("as published", paper="SN")
def published(lm: LanguageModel, material: Material) -> Ranking:
    """Minus the worst relative rank of each FFN and attention channel in its list over the harmful prompts."""
    scores = material.scores("as published", lambda: published_scores(lm, material.harmful.texts))
    return selection.consistency(scores, rho=1.0, kinds=POOL, per="projection", relative=True)


def published_scores(lm: LanguageModel, texts: Sequence[str]) -> NeuronScores:
    """The three lists on each raw text: kinds ``ffn``, ``o`` (the V list) and ``q`` (the list that q and k share)."""
    space, shared = lm.view.space, {}

    def attention(layer, query, key, value, mask, scaling, softcap):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        logits = scaling * (query @ key.mT).float()
        shared[layer, "q"] = _shared_scores(query[0].float(), key[0].float(), logits[0], mask[0])
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return (capped.masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype) @ value).transpose(1, 2)

    meta = {"score": "as published", "model": lm.name}
    sites = [(layer, kind) for layer in range(space.num_layers) for kind in ("o", "up")]
    with ScoreWriter(None, space, ("q", "o", "ffn"), len(texts), meta) as writer, torch.no_grad():
        for row, ids in enumerate(lm.tokenizer(list(texts))["input_ids"]):
            with attention_through(lm.view, attention), hooks.capture(lm, sites) as seen:
                decoder(lm.model)(torch.tensor([ids], device=lm.device), use_cache=False)
            sums = {(i, {"up": "ffn"}.get(kind, kind)): x[0].float().abs().sum(0) for (i, kind), x in seen.items()}
            writer.write(row, {site: values[None] for site, values in {**shared, **sums}.items()})
        return writer.close()


def _shared_scores(query: Tensor, key: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """sum (softmax(S - q_i k_i^T) - softmax(S))^2 for every dimension i of every head: [H d]; query, key [H, T, d]."""
    plain = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    moved = [logits - query[..., i, None] * key[..., None, :, i] for i in range(query.shape[-1])]
    moved = [s.masked_fill(~mask, -torch.inf).softmax(-1) - plain for s in moved]
    return torch.stack([change.square().sum((-1, -2)) for change in moved], dim=-1).flatten()


def published_set(
    view: DecoderView, scores: NeuronScores, preset: str = "Llama", *, division: bool = False, cap: int | None = None
) -> NeuronSet:
    """The published set of q, k, v and FFN neurons: top k of every list on every prompt.

    No study takes it: they rank by :func:`published`. It is for comparisons with what the published code names.

    Args:
        division: find key/value rows by dividing an index by the group size; cap: only so many lowest indices of a list.
    """
    check_choice("preset", preset, PRESETS)
    d, group, masks = view.head_dim, view.num_heads // view.num_kv_heads, {}
    for layer, kind in view.space.sites(("q", "o", "ffn")):
        values = scores.get(layer, kind)
        k = math.ceil(PRESETS[preset]["ffn" if kind == "ffn" else "attention"] * values.shape[1])
        top = torch.zeros_like(values, dtype=torch.bool).scatter_(1, values.topk(k).indices, True).all(0)
        entries = top.nonzero().flatten()[:cap]
        rows = entries // group if division else entries // d // group * d + entries % d
        for target in {"q": ("q", "k"), "o": ("v",), "ffn": ("ffn",)}[kind]:
            chosen = rows if target in ("k", "v") else entries
            masks[layer, target] = torch.zeros(view.space.width((layer, target)), dtype=torch.bool)
            masks[layer, target][chosen] = True
    return NeuronSet(view.space, masks, meta={"rule": "as published", "preset": preset})
