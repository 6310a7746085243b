"""Importance of query and key rows: what zeroing one channel before the rotary embedding does to the attention's output.

Zeroing channel i of a head's queries or keys changes the logits S by a term of rank 2, the channel and its rotary partner p:

    q row:  D(t, s) = scale * q_i(t) * (cos_t,i K_i(s) +- sin_t,i K_p(s))
    k row:  D(t, s) = scale * k_i(s) * (Q_i(t) cos_s,i +- Q_p(t) sin_s,i)      for every query head of the key/value group

With A = softmax(S), E = softmax(S - D) - A and the heads' output columns W_O:

    Imp^2 = sum_t  E_t P E_t^T,        P = V W_O^T W_O V^T                     (token space: keys by keys)
          = sum_t  Z_t G Z_t^T,        Z = E V,  G = W_O^T W_O                 (head space: cheaper for long prompts)

Under query/key norms the head's other channels are rescaled too: S' = (rms / rms without the channel) * (S - D), at the
query's position for q rows and at the key's for k rows. Soft-capping acts on S - D before the softmax.

A row t of queries contributes its own summand, so long prompts can be estimated from a sample of their rows (:class:`Rows`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: Query rows taken together: short blocks see fewer keys (causality), long ones cost fewer calls.
ROWS = {"cpu": 8, "cuda": 64}
#: Of a sampled prompt, rows at its beginning that are all taken (few keys, large changes), and pairs of rows drawn behind.
FIRST_ROWS, PAIRS = 32, 48


# ---------------------------------------------------------------------------------------------------- query rows


@dataclass(frozen=True)
class Rows:
    """The query rows that are measured: all of a range, or a stratified sample of a long one.

    Attributes:
        places: positions in the prompt, in order but for pairs; count: rows that they stand for, the last so many.
        edges: boundaries of the stretches that two rows each were drawn from; the rows before them are all taken. None: all are.
        blocks: (places among the measured rows, range of keys that any of these may attend to).
    """

    places: list[int]
    tokens: int
    edges: list[int] | None
    blocks: list[tuple[slice, slice]]

    @classmethod
    def of(cls, allowed: Bool[Tensor, "tokens tokens"], first: int, exact_tokens: int | None, size: int) -> Rows:
        """The rows from ``first`` on: all where they are at most ``exact_tokens`` (None: always), else a sample of them.

        The sample has the first ``FIRST_ROWS`` and two rows from each of ``PAIRS`` equal stretches of the rest; it depends on
        the prompt's length alone. ``size``: rows in a block.
        """
        tokens, edges = len(allowed), None
        places = list(range(first, tokens))
        if exact_tokens is not None and len(places) > max(exact_tokens, FIRST_ROWS + 2 * PAIRS):
            places = places[:FIRST_ROWS]
            edges = torch.linspace(first + FIRST_ROWS, tokens, PAIRS + 1).round().long().tolist()
            generator = torch.Generator().manual_seed(tokens)
            for low, high in pairwise(edges):
                places += (low + torch.randperm(high - low, generator=generator)[:2]).tolist()
        size = max(size, -(-len(places) // 16))
        blocks = []
        for start in range(0, len(places), size):
            seen = allowed[places[start : start + size]].any(0).nonzero().flatten()
            blocks.append((slice(start, min(start + size, len(places))), slice(int(seen[0]), int(seen[-1]) + 1)))
        return cls(places, tokens, edges, blocks)

    @property
    def index(self) -> slice | list[int]:
        """What picks the measured rows out of a tensor over tokens (without a copy where all are taken)."""
        return slice(self.places[0], self.tokens) if self.edges is None else self.places

    def total(
        self, values: Float[Tensor, "*channels rows"], extent: Callable[[], Float[Tensor, "*channels tokens"]]
    ) -> tuple[Float[Tensor, "*channels"], Float[Tensor, "*channels"]]:
        """Sum over all rows of what was measured at some, and its standard error: exact with error 0, or an unbiased estimate.

        A row's value goes with ``extent``, which is known for every row. With A and B the two rows drawn from a stretch of n,
        and each half of the sample giving the slope b = sum(n value) / sum(n extent) that the other half uses,

            total = sum over stretches of  value_B + (n - 1) (value_A - b_B extent_A) + b_B (extent - extent_B),

        averaged with A and B exchanged: given B, A is drawn evenly from the other n - 1 rows, so this is unbiased. The variance
        is that of the residuals, n^2 (1 - 2/n) (e_A - e_B)^2 / 4 a stretch.
        """
        if self.edges is None:
            total = values.sum(-1)
            return total, torch.zeros_like(total)
        surely, known = self.edges[0] - self.places[0], extent()
        n = torch.tensor([high - low for low, high in pairwise(self.edges)], device=values.device)
        whole = torch.stack([known[..., low:high].sum(-1) for low, high in pairwise(self.edges)], -1)
        (x, x_known), (y, y_known) = (
            (values[..., start::2], known[..., self.places[start::2]]) for start in (surely, surely + 1)
        )
        tiny = torch.finfo(values.dtype).tiny
        by_x, by_y = (
            (n * v).sum(-1, True) / (n * k).sum(-1, True).clamp_min(tiny) for v, k in ((x, x_known), (y, y_known))
        )
        one = y + (n - 1) * (x - by_y * x_known) + by_y * (whole - y_known)
        other = x + (n - 1) * (y - by_x * y_known) + by_x * (whole - x_known)
        slope = (by_x + by_y) / 2
        spread = (x - slope * x_known) - (y - slope * y_known)
        variance = (n * (n - 2) * spread.square()).sum(-1) / 4
        return values[..., :surely].sum(-1) + (one + other).sum(-1) / 2, variance.sqrt()


# -------------------------------------------------------------------------------------------------- one attention


@dataclass
class Attention:
    """The attention of some equally long prompts in one layer: real tokens only, float32.

    Under soft-capping ``logits`` are those before it and
    without the mask; else they are -inf where masked. ``cos`` and ``sin`` are None without a rotary embedding.
    """

    query: Float[Tensor, "prompts heads tokens d"]
    key: Float[Tensor, "prompts kv_heads tokens d"]
    value: Float[Tensor, "prompts kv_heads tokens d"]
    cos: Float[Tensor, "prompts 1 tokens rotated"] | None
    sin: Float[Tensor, "prompts 1 tokens rotated"] | None
    allowed: Bool[Tensor, "tokens tokens"]
    logits: Float[Tensor, "prompts heads tokens tokens"]
    weights: Float[Tensor, "prompts heads tokens tokens"]
    scaling: float
    softcap: float | None
    rows: Rows


def channel_parts(
    x: Float[Tensor, "*batch tokens d"],
    cos: Float[Tensor, "*#batch tokens rotated"] | None,
    sin: Float[Tensor, "*#batch tokens rotated"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """How each channel before the rotary embedding enters the vector ``x`` after it (its rotated part first).

    Returns:
        at_place, at_partner, like x: channel i puts them into places i and partner[i]; partner [d].
    """
    d = x.shape[-1]
    partner = torch.arange(d, device=x.device)
    if cos is None or sin is None:
        return x, torch.zeros_like(x), partner
    r = cos.shape[-1]
    half = r // 2
    partner[:r] = partner[:r].roll(half)
    sign = torch.ones(r, device=x.device)
    sign[half:] = -1
    turned, signed = x[..., :r], sign * sin
    # Undo the rotation: the channel itself, divided by what the embedding scales it by (YaRN, half-precision cos).
    before = (turned * cos + turned.roll(half, -1) * signed) / (cos**2 + sin**2)
    at_place, at_partner = before * cos, before * signed
    if r < d:
        rest = x[..., r:]
        at_place, at_partner = torch.cat([at_place, rest], -1), torch.cat([at_partner, torch.zeros_like(rest)], -1)
    return at_place, at_partner, partner


def rms_ratio(raw: Float[Tensor, "prompts tokens width"], norm, scope: str, head_dim: int) -> Tensor:
    """rms / rms without the channel, like ``raw``: what zeroing one channel does to the others under an RMS norm."""
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0)
    square = raw.double() ** 2
    width = square.shape[-1] if scope == "full" else head_dim
    square = square.unflatten(-1, (-1, width))
    mean = square.mean(-1, keepdim=True)
    without = (mean - square / width).clamp(min=0) + eps
    return ((mean + eps) / without).sqrt().flatten(-2).float()


class Buffers:
    """Two flat working buffers, kept from call to call as long as they are large enough and on the right device."""

    def __init__(self):
        self._pair: list[Tensor] = []

    def like(self, tensor: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Two buffers of this shape with the tensor's device and precision."""
        size = math.prod(shape)
        kept = self._pair
        if not kept or kept[0].numel() < size or kept[0].device != tensor.device or kept[0].dtype != tensor.dtype:
            self._pair = kept = [tensor.new_empty(size), tensor.new_empty(size)]
        return kept[0][:size].view(shape), kept[1][:size].view(shape)


class QueryKey:
    """The q or k channels of an attention, as independent problems over I channels and g heads each.

    For q: a problem is one head of one prompt; for k: one group of g heads; under a full-width norm, where every channel
    moves every head: one prompt. The logits of a problem move by ``-D``,
    ``D[i, t, h, s] = left0[i,t,h] right0[i,s] + left1[i,t,h] right1[i,s]``, and then by the norm's factor.

    Args:
        grams: W_O^T W_O over each group's heads [Hkv, g d, g d]; over all heads [1, H d, H d] under a full-width norm.
        ratio: :func:`rms_ratio` of the projection's output, None without a norm; full: whether the norm is full-width.
    """

    def __init__(self, kind: str, attention: Attention, grams: Tensor, ratio: Tensor | None, full: bool):
        self.kind, self.attention, rows = kind, attention, attention.rows.index
        (self.prompts, h, tokens, d), n = attention.query.shape, attention.key.shape[1]
        self.d, g = d, h // n
        inner, outer = (attention.query, attention.key) if kind == "q" else (attention.key, attention.query)
        at_place, at_partner, partner = channel_parts(inner, attention.cos, attention.sin)
        opposite = outer[..., partner]
        if kind == "q":  # left [problems, I, T, 1], right [problems, I, T]
            left = [x.flatten(0, 1).transpose(1, 2).unsqueeze(-1) for x in (at_place, at_partner)]
            right = [x.repeat_interleave(g, 1).flatten(0, 1).transpose(1, 2).contiguous() for x in (outer, opposite)]
        else:  # left [problems, I, T, g]
            left = [x.unflatten(1, (n, g)).flatten(0, 1).permute(0, 3, 2, 1) for x in (outer, opposite)]
            right = [x.flatten(0, 1).transpose(1, 2).contiguous() for x in (at_place, at_partner)]
        # The rows of E sum to 0: a shift of V changes nothing, and a centred V loses fewer digits.
        value = attention.value - attention.value.mean(2, keepdim=True)
        self.gram = grams  # of the first prompt's problems; the other prompts' are the same
        if full:
            left = [self._spread(x, self.prompts) for x in left]
            right = [x.view(self.prompts, -1, tokens) for x in right]
            self.value = value.repeat_interleave(g, 1)
        elif kind == "q":
            self.value = value.repeat_interleave(g, 1).flatten(0, 1)[:, None]
            self.gram = grams.view(n, g, d, g, d).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(h, d, d)
        else:
            self.value = value.flatten(0, 1)[:, None].expand(-1, g, -1, -1)
        self._whole, self.left, self.right = left, [x[:, :, rows] * -attention.scaling for x in left], right
        problems, heads = self.value.shape[:2]
        self.logits, self.weights = (
            x[:, :, rows].reshape(problems, heads, -1, tokens).transpose(1, 2)
            for x in (attention.logits, attention.weights)
        )
        self.allowed = attention.allowed[rows]
        self.ratio = None
        if ratio is not None:
            ratio = ratio[:, rows] if kind == "q" else ratio
            self.ratio = ratio.transpose(1, 2).reshape(problems, -1, ratio.shape[1])
        self._metric: Tensor | None = None

    @staticmethod
    def _spread(left: Tensor, prompts: int) -> Tensor:
        """[S U, d, T, g] to [S, U d, T, U g]: 0 for the heads a channel does not feed."""
        _, d, tokens, g = left.shape
        left = left.unflatten(0, (prompts, -1))
        u = left.shape[1]
        wide = left.new_zeros(u, prompts, d, tokens, u, g)
        wide[torch.arange(u), :, :, :, torch.arange(u)] = left.transpose(0, 1)
        return wide.transpose(0, 1).reshape(prompts, u * d, tokens, u * g)

    def scores(self, chunk: int, buffers: Buffers) -> tuple[Float[Tensor, "prompts width"], Tensor]:
        """Importance of every channel and its standard error; ``chunk``: floats in one working buffer."""
        problems, channels, count, heads = self.left[0].shape
        squares = self.left[0].new_empty(problems, channels, count)
        for rows, keys in self.attention.rows.blocks:
            step = max(1, chunk // (heads * (rows.stop - rows.start) * (keys.stop - keys.start)))
            whole = max(1, step // channels)  # problems that fit one chunk with all their channels
            squared_norms = self._norm(keys)
            for first in range(0, problems, whole):
                which = slice(first, min(first + whole, problems))
                for i in range(0, channels, step):
                    some = slice(i, min(i + step, channels))
                    change, spare = self._change(which, some, rows, keys, buffers)
                    squares[which, some, rows] = squared_norms(change, spare, which)
        total, error = self.attention.rows.total(squares, self._extent)
        scores = total.clamp_(min=0).sqrt_()
        # Of the root: a total that moves by its error moves it by at most this, also where the estimate is 0 or below.
        error = torch.minimum(error / (2 * scores).clamp_min(torch.finfo(scores.dtype).tiny), error.sqrt())
        return scores.view(self.prompts, -1), error.view(self.prompts, -1)

    def _change(self, which: slice, some: slice, rows: slice, keys: slice, buffers: Buffers) -> tuple[Tensor, Tensor]:
        """E as [problems, channels, rows, heads, keys], and a spare tensor of that shape."""
        left0, left1 = (x[which, some, rows, :, None] for x in self.left)
        right0, right1 = (x[which, some, None, None, keys] for x in self.right)
        logits, weights = (x[which, None, rows, :, keys] for x in (self.logits, self.weights))
        new, change = buffers.like(left0, (*left0.shape[:-1], keys.stop - keys.start))
        torch.addcmul(logits, left0, right0, out=new)
        new.addcmul_(left1, right1)
        if self.ratio is not None:
            ratio = self.ratio[which, some]
            new.mul_(ratio[:, :, rows, None, None] if self.kind == "q" else ratio[:, :, None, None, keys])
        softcap = self.attention.softcap
        if softcap is not None:
            new.div_(softcap).tanh_().mul_(softcap)
            new.masked_fill_(~self.allowed[rows, None, keys], -torch.inf)
        torch.softmax(new, -1, out=change)
        return change.sub_(weights), new

    def _extent(self) -> Float[Tensor, "problems channels tokens"]:
        """What each row's contribution goes with: its channel squared times how much the values differ that it attends to."""
        problems, g, tokens, d = self.value.shape
        grams = self.gram.view(-1, g, d, g, d).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        grams = grams[torch.arange(problems, device=grams.device) % len(grams)]
        weights = self.attention.weights.reshape(problems, g, tokens, tokens)
        output = weights @ self.value

        def squares(x: Tensor) -> Tensor:
            return ((x @ grams) * x).sum(-1)

        variance = (weights @ squares(self.value)[..., None])[..., 0] - squares(output)  # [problems, g, T]
        moved = self._whole[0].square() + self._whole[1].square()
        return torch.einsum("pith,pht->pit", moved, variance.clamp_(min=0))

    def _norm(self, keys: slice) -> Callable[[Tensor, Tensor, slice], Tensor]:
        """(E, spare, problems) -> E_t P E_t^T [problems, channels, rows], in the space that is cheaper for the shape."""
        heads, n = self.value.shape[1], keys.stop - keys.start
        if heads * n * heads * n <= heads * n * self.d + (heads * self.d) ** 2:
            return self._in_token_space(keys)
        return self._in_head_space(keys)

    def _in_token_space(self, keys: slice) -> Callable[[Tensor, Tensor, slice], Tensor]:
        heads, n = self.value.shape[1], keys.stop - keys.start
        metric = self._token_metric()[:, :, keys, :, keys].clone(memory_format=torch.contiguous_format)
        metric = metric.view(-1, heads * n, heads * n)
        # P is symmetric: with several heads, its upper right quarter is counted with the lower left one.
        cut = heads // 2 * n
        metric[:, cut:, :cut] *= 2
        columns = [slice(cut, heads * n), slice(0, cut)][: 2 if cut else 1]

        def in_token_space(change: Tensor, spare: Tensor, which: slice) -> Tensor:
            flat = change.view(change.shape[0], -1, heads * n)
            sums = []
            for part in columns:
                shape = (*flat.shape[:2], part.stop - part.start)
                moved = spare.view(-1)[: math.prod(shape)].view(shape)
                torch.bmm(flat[..., part.start :], metric[which, part.start :, part], out=moved)
                sums.append(moved.mul_(flat[..., part]).sum(-1))
            return sum(sums[1:], sums[0]).view(change.shape[:3])

        return in_token_space

    def _in_head_space(self, keys: slice) -> Callable[[Tensor, Tensor, slice], Tensor]:
        value = self.value[:, :, keys]
        gram_of = torch.arange(len(value), device=value.device) % len(self.gram)

        def in_head_space(change: Tensor, spare: Tensor, which: slice) -> Tensor:
            problems, channels, rows, heads = change.shape[:4]
            moved = torch.einsum("uithk,uhkd->uithd", change, value[which])
            flat = moved.reshape(problems, channels * rows, heads * self.d)
            return (flat @ self.gram[gram_of[which]]).mul_(flat).sum(-1).view(problems, channels, rows)

        return in_head_space

    def _token_metric(self) -> Tensor:
        """P = V G V^T between the heads' keys, [problems, g, T, g, T]."""
        if self._metric is None:
            p, g, n, d = self.value.shape
            gram = self.gram.view(-1, g, d, g * d)
            half = (self.value.unflatten(0, (-1, len(gram))) @ gram).view(p, g * n, g, d).transpose(1, 2)
            full = half @ self.value.transpose(-1, -2)  # [problems, g (of the right), g T, T]
            self._metric = full.view(p, g, g, n, n).permute(0, 2, 3, 1, 4)
        return self._metric
