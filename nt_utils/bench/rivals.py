"""What the exact scores are compared with: the published way for q and k, one forward a neuron, a linearised softmax.

The published way is restated from its description (mask one channel of the projected queries or keys at a time, in
chunks of 128, recompute every head's softmax without mask or rotary embedding, one prompt at a time, Python lists);
it is here to be timed, not to be used: it leaves out what methods of this package take from the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from nt_utils import hooks
from nt_utils.models import DecoderView, Encoded, decoder
from nt_utils.neurons import NeuronSet
from nt_utils.scoring import importance

CHUNK = 128


def peer_scores(view: DecoderView, batch: Encoded) -> dict[tuple[int, str], list[list[float]]]:
    """Change of the attention weights when one query or key channel is masked, prompt by prompt."""
    sites = [(layer, kind) for layer in range(view.num_layers) for kind in "qk"]
    scores: dict[tuple[int, str], list[list[float]]] = {site: [] for site in sites}
    for row in batch.input_ids:
        with torch.no_grad(), hooks.capture(view, sites) as seen:
            decoder(view.model)(row[None], use_cache=False)
            for layer in range(view.num_layers):
                query, key = seen[layer, "q"][0], seen[layer, "k"][0]
                scores[layer, "q"].append(_masked(query, key, view, "q"))
                scores[layer, "k"].append(_masked(query, key, view, "k"))
    return scores


def _attention(query: Tensor, key: Tensor, view: DecoderView) -> Tensor:
    """Softmax of every head, query and key [..., T, width] -> [..., H, T, T]."""
    q = query.unflatten(-1, (view.num_heads, -1)).transpose(-2, -3)
    k = key.unflatten(-1, (view.num_kv_heads, -1)).transpose(-2, -3)
    k = k.repeat_interleave(view.num_heads // view.num_kv_heads, -3)
    return (q @ k.transpose(-1, -2) / view.head_dim**0.5).softmax(-1)


def _masked(query: Tensor, key: Tensor, view: DecoderView, kind: str) -> list[float]:
    plain = _attention(query, key, view)
    target = query if kind == "q" else key
    values: list[float] = []
    for start in range(0, target.shape[-1], CHUNK):
        count = min(CHUNK, target.shape[-1] - start)
        masked = target.repeat(count, 1, 1)
        masked[torch.arange(count), :, start + torch.arange(count)] = 0
        changed = _attention(masked, key, view) if kind == "q" else _attention(query, masked, view)
        values += [(one - plain).norm().item() for one in changed]
    return values


def zeroed_forwards(view: DecoderView, batch: Encoded, count: int = 6) -> list:
    """Forward passes with one neuron zeroed each: what brute force does for every neuron."""
    sites = view.space.sites()
    runs = []
    for i in range(count):
        site = sites[i * len(sites) // count]
        mask = torch.zeros(view.space.width(site), dtype=torch.bool)
        mask[i] = True
        chosen = NeuronSet(view.space, {site: mask})

        def run(chosen=chosen) -> None:
            with torch.no_grad(), hooks.ablate(view, chosen):
                decoder(view.model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

        runs.append(run)
    return runs


class _Linearised(importance.QueryKey):
    """E = -A * (D - sum(A D)): the softmax's first-order change in place of the exact one."""

    def _change(self, which, some, rows, keys, buffers):
        left0, left1 = (x[which, some, rows, :, None] for x in self.left)
        right0, right1 = (x[which, some, None, None, keys] for x in self.right)
        weights = self.weights[which, None, rows, :, keys]
        new, change = buffers.like(left0, (*left0.shape[:-1], keys.stop - keys.start))
        torch.mul(left0, right0, out=new)
        new.addcmul_(left1, right1).mul_(weights)
        return torch.addcmul(new, new.sum(-1, keepdim=True), weights, value=-1, out=change), new


@contextmanager
def linearised() -> Iterator[None]:
    """Inside, q and k scores come from the linearised softmax (plain attention only: no query/key norm, no capping)."""
    with mock.patch.object(importance, "QueryKey", _Linearised):
        yield
