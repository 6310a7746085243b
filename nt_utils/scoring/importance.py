"""Exact importance of every neuron: how far the block's output moves when the neuron is zeroed [SN, section 3].

``Imp(N|c) = || h_without_N(c) - h(c) ||_2``, h = the output of the attention or feed-forward block that holds N, over
the measured token positions. Nothing is re-run: the values follow in closed form from one forward pass.

* ffn, o: the change is an outer product, so the norm is ``||x_k|| * ||W[:, k]||`` (x = the channel over tokens).
* v: zeroing a value channel zeroes that channel of every head of its group: a Gram matrix of output columns.
* q, k: zeroing a channel changes the logits by a rank-2 term (the channel and its rotary partner). With
  ``A' = softmax(S - D)`` and ``E = A' - A``, ``Imp^2 = tr(E P E^T)``, ``P = V W_O^T W_O V^T`` in token space, or
  ``tr(Z G Z^T)``, ``Z = E V``, ``G = W_O^T W_O`` in head space, whichever is cheaper for the shape.
  ``E = A * (exp(-D) / sum(A * exp(-D)) - 1)`` is computed with expm1, so small changes keep their digits.

A block's output is what its last projection writes: before a norm behind the block (Gemma 2 and 3, OLMo 2) and before
a constant residual multiplier (Granite), which scales all scores of a model alike.

Queries, keys, values, mask, scaling and soft-capping come from the model itself: while scoring, its attention runs
through a function of our own registered with transformers' AttentionInterface. Scores therefore do not depend on
whether the model otherwise uses eager, sdpa or flash attention. The function works sample by sample on real tokens
only, so padding never enters a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_utils import hooks
from nt_utils.errors import InputError
from nt_utils.models import DecoderView, Encoded, LanguageModel, decoder
from nt_utils.neurons import KINDS, NeuronScores, ScoreWriter, Site, check_kinds
from nt_utils.scoring.attention import attention_through
from nt_utils.scoring.fluctuation import Fluctuation
from nt_utils.work import track

POSITIONS = ("all", "last")
#: Floats in one working buffer: on a CPU a handful of them fit the caches, on a GPU they keep the device busy.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 27}
#: Query rows taken together: short blocks see fewer keys (causality), long ones cost fewer calls.
ROWS = {"cpu": 8, "cuda": 64}

# ------------------------------------------------------------------------------------------------------ public


def importance(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    kinds: Sequence[str] = KINDS,
    positions: str = "all",
    batch_size: int = 8,
    path=None,
    progress: bool = True,
    statistics: Fluctuation | None = None,
    chunk: int | None = None,
) -> NeuronScores:
    """Score every neuron of these kinds on every prompt.

    Args:
        lm: the model, in evaluation mode.
        prompts: plain user texts; the model's chat template is put around them.
        kinds: which projections.
        positions: where the change of the block's output is measured (sum of squares over them): "all" = every token
            of the rendered prompt, "last" = the template's tokens after the user's text.
        batch_size: prompts in one forward pass; scores do not depend on it.
        path: the score file; default a temporary file.
        progress: show a progress bar.
        statistics: fluctuation statistics to feed in the same pass (every prompt token, whatever ``positions``).
        chunk: floats in one working buffer (memory against speed); default by device.

    Returns:
        Float32 scores [n_prompts, width] per (layer, kind), on file.

    Raises:
        InputError: bad arguments, a model in training mode, or NaN or Inf (names layer and projection).
    """
    _check_arguments(lm, prompts, kinds, positions, batch_size)
    space = lm.view.space
    meta = {"score": "importance", "positions": positions, "model": lm.name}
    readers = _Readers(lm.view)
    with ScoreWriter(path, space, kinds, len(prompts), meta) as writer:
        # Prompts of like length together, the longest first: less padding, and memory runs out at once or never.
        counts = lm.token_counts(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -counts[i])
        last = lm.suffix_length if positions == "last" else None
        for start in _bar(range(0, len(prompts), batch_size), progress):
            rows = order[start : start + batch_size]
            batch = lm.encode([prompts[i] for i in rows], side="right")
            scores = score_batch(
                lm.view, batch, kinds=kinds, last=last, statistics=statistics, chunk=chunk, readers=readers
            )
            for b, row in enumerate(rows):
                writer.write(row, {site: values[b : b + 1] for site, values in scores.items()})
        return writer.close()


def score_batch(
    view: DecoderView,
    batch: Encoded,
    *,
    kinds: Sequence[str] = KINDS,
    last: int | None = None,
    statistics: Fluctuation | None = None,
    chunk: int | None = None,
    readers: _Readers | None = None,
) -> dict[Site, Tensor]:
    """Scores of one padded batch, float32 [batch, width] on the CPU for every (layer, kind).

    Args:
        last: measure only the last so many tokens of each prompt; None = all of them.
    """
    if view.model.training:
        raise InputError("model: it is in training mode (dropout would change the scores); call model.eval() first")
    engine = _Engine(readers or _Readers(view), batch.to(view.device), tuple(kinds), last, chunk)
    with torch.no_grad(), engine.attached(), ExitStack() as stack:
        if statistics is not None:
            stack.enter_context(statistics.reading(view, engine.batch))
        decoder(view.model)(**engine.batch.inputs, use_cache=False)
    return engine.scores


def _check_arguments(lm, prompts, kinds, positions, batch_size) -> None:
    check_kinds(kinds)
    if isinstance(prompts, str) or not len(prompts):
        raise InputError("prompts: need a list with at least one text")
    if positions not in POSITIONS:
        raise InputError(f"positions: got {positions!r}; allowed: {', '.join(POSITIONS)}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: got {batch_size!r}; allowed: a whole number from 1")
    if lm.model.training:
        raise InputError("model: it is in training mode (dropout would change the scores); call model.eval() first")


def _bar(steps: range, progress: bool):
    return track(steps, desc="scoring", unit="batch", disable=not progress)


# ------------------------------------------------------------------------------------------------------ engine


class _Readers:
    """What the scores need of the weights: column norms and Gram matrices, kept for the next batch where small."""

    #: Gram matrices are kept when all of them together take no more than this share of the weights.
    SHARE = 0.03

    def __init__(self, view: DecoderView):
        self.view = view
        group = view.num_heads // view.num_kv_heads * view.head_dim
        heads = 1 if view.family.qk_norm == "full" else view.num_kv_heads
        self._size = view.num_heads * view.head_dim if heads == 1 else group
        kept = 4 * heads * self._size**2 * view.num_layers
        self._keep = kept <= self.SHARE * sum(p.numel() * p.element_size() for p in view.model.parameters())
        self._columns: dict[Site, Tensor] = {}
        self._grams: dict[int, Tensor] = {}

    def columns(self, layer: int, kind: str) -> Tensor:
        """Norm of each input channel's column, float32 [width]."""
        if (layer, kind) not in self._columns:
            weight = self.view.weight(layer, kind)
            self._columns[layer, kind] = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
        return self._columns[layer, kind]

    def grams(self, layer: int, device) -> Tensor:
        """W_O^T W_O over each key/value group's heads [Hkv, g d, g d]; over all heads [1, H d, H d] for a full norm."""
        if layer in self._grams:
            return self._grams[layer].to(device)
        weight = self.view.weight(layer, "o")
        columns = weight.unflatten(1, (-1, self._size))
        grams = torch.stack([w.T @ w for w in (columns[:, u].to(device).float() for u in range(columns.shape[1]))])
        if self._keep:
            self._grams[layer] = grams
        return grams


@dataclass
class _Block:
    """The attention of some equally long prompts in one layer: real tokens only, float32.

    query [S, H, T, d], key and value [S, Hkv, T, d] as the attention sees them; cos, sin [S, 1, T, r] or None;
    allowed: bool [T, T]; logits [S, H, T, T] scaled, with -inf where masked (under soft-capping: before it and without
    the mask); weights [S, H, T, T]; row_blocks: see ``_row_blocks``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor | None
    sin: Tensor | None
    allowed: Tensor
    logits: Tensor
    weights: Tensor
    scaling: float
    softcap: float | None
    row_blocks: list[tuple[slice, slice]]


class _Engine:
    """Takes the scores of one batch while the model's forward runs."""

    def __init__(self, readers: _Readers, batch: Encoded, kinds: tuple[str, ...], last: int | None, chunk: int | None):
        self.view, self.readers, self.batch, self.kinds = readers.view, readers, batch, kinds
        self.chunk = chunk or CHUNK.get(self.view.device.type, CHUNK["cuda"])
        self.spans = [(s, s + n) for s, n in zip(batch.starts, batch.lengths, strict=True)]
        self.firsts = [0 if last is None else max(n - last, 0) for n in batch.lengths]
        self.scores: dict[Site, Tensor] = {}
        self._rope: dict[int, tuple[Tensor, Tensor] | None] = {}
        self._raw: dict[Site, Tensor] = {}
        self._masks: dict[tuple[int, int], tuple] = {}
        self._grouped: dict[int, list[list[int]]] = {}
        self._spaces: list[Tensor] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks and attention in place; removed whatever happens."""
        with ExitStack() as stack:
            in_attention = set("qkv") & set(self.kinds)
            if in_attention:
                stack.enter_context(attention_through(self.view, self.attention))
                stack.enter_context(hooks.observe([(self.view.attention(i), self._keep_rope(i)) for i in self._layers]))
            readers = {"o": self._read, "ffn": self._read}
            if self.view.family.qk_norm:
                readers |= {"q": self._keep_raw, "k": self._keep_raw}
            edits = {(i, kind): readers[kind](i, kind) for i in self._layers for kind in self.kinds if kind in readers}
            if edits:
                stack.enter_context(hooks.edit(self.view, edits))
            yield

    @property
    def _layers(self) -> range:
        return range(self.view.num_layers)

    # -- readers

    def _keep_rope(self, layer: int) -> Callable:
        def read(args: tuple, kwargs: dict) -> None:
            self._rope[layer] = kwargs.get("position_embeddings")

        return read

    def _keep_raw(self, layer: int, kind: str) -> Callable:
        def read(activation: Tensor) -> None:
            self._raw[layer, kind] = activation

        return read

    def _read(self, layer: int, kind: str) -> Callable:
        """ffn and o: ||x_k|| ||W[:, k]||."""

        def read(activation: Tensor) -> None:
            rows = [
                activation[b, start + first : end].float().square().sum(0).sqrt()
                for b, ((start, end), first) in enumerate(zip(self.spans, self.firsts, strict=True))
            ]
            self._store(layer, kind, torch.stack(rows) * self.readers.columns(layer, kind).to(activation.device))

        return read

    def _store(self, layer: int, kind: str, values: Tensor) -> None:
        values = values.float().cpu()
        if not torch.isfinite(values).all():
            raise InputError(f"model: NaN or Inf in {_culprit(self.view, layer, kind)}")
        self.scores[layer, kind] = values

    # -- attention

    def attention(self, layer, query, key, value, mask, scaling, softcap) -> Tensor:
        """The attention's output [batch, tokens, heads, d]; takes the q, k and v scores on the way."""
        output = torch.zeros_like(query.transpose(1, 2))
        grams = self.readers.grams(layer, query.device)
        found: dict[str, dict[int, Tensor]] = {kind: {} for kind in "qkv" if kind in self.kinds}
        for members in self._groups(mask, query.shape[1], query.shape[-1], key.shape[1]):
            block = self._block(layer, members, query, key, value, mask, scaling, softcap)
            heads = block.weights.unflatten(1, (key.shape[1], -1)) @ block.value.unsqueeze(2)  # [S, Hkv, g, T, d]
            for b, rows in zip(members, heads.flatten(1, 2).transpose(1, 2), strict=True):
                output[b, slice(*self.spans[b])] = rows.to(output.dtype)
            for kind in found:
                if kind == "v":
                    scores = _value_scores(heads[:, :, :, self.firsts[members[0]] :], grams)
                else:
                    rescale = self._rescale(layer, kind, members)
                    channels = _Channels(kind, block, grams, rescale, self.view.family.qk_norm)
                    scores = channels.scores(self.chunk, self._spaces)
                for b, row in zip(members, scores, strict=True):
                    found[kind][b] = row
        for kind, rows in found.items():
            self._store(layer, kind, torch.stack([rows[b] for b in range(len(self.spans))]))
        self._raw.clear()
        return output

    def _cut(self, x: Tensor, members: Sequence[int]) -> Tensor:
        """Real tokens of some equally long prompts, float32: x [batch, heads, tokens, d] -> [S, heads, T, d]."""
        return torch.stack([x[b, :, slice(*self.spans[b])] for b in members]).float()

    def _block(self, layer, members, query, key, value, mask, scaling, softcap) -> _Block:
        q, k, v = (self._cut(x, members) for x in (query, key, value))
        allowed, row_blocks = self._seen(members[0], mask)
        logits = (q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2).mul_(scaling)
        if softcap is None:
            weights = logits.masked_fill_(~allowed, -torch.inf).softmax(-1)
        else:
            weights = (softcap * torch.tanh(logits / softcap)).masked_fill_(~allowed, -torch.inf).softmax(-1)
        cos = sin = None
        rope = self._rope.get(layer)
        if rope is not None:
            size = self.batch.input_ids.shape[0]
            cos, sin = (self._cut(x[:, None].expand(size, -1, -1, -1), members) for x in rope)
        return _Block(q, k, v, cos, sin, allowed, logits, weights, scaling, softcap, row_blocks)

    def _groups(self, mask: Tensor, h: int, d: int, n: int) -> list[list[int]]:
        """Prompts of equal length and mask, as many together as keep the intermediate tensors near the chunk budget."""
        if id(mask) not in self._grouped:
            groups: list[list[int]] = []
            for b in range(len(self.spans)):
                tokens = self.spans[b][1] - self.spans[b][0]
                most = max(1, self.chunk // (h * h // n * tokens * max(tokens, d)))
                for group in groups:
                    if len(group) < most and self._alike(group[0], b, mask):
                        group.append(b)
                        break
                else:
                    groups.append([b])
            self._grouped[id(mask)] = groups
        return self._grouped[id(mask)]

    def _alike(self, a: int, b: int, mask: Tensor) -> bool:
        lengths = self.batch.lengths
        return lengths[a] == lengths[b] and torch.equal(self._seen(a, mask)[0], self._seen(b, mask)[0])

    def _seen(self, b: int, mask: Tensor) -> tuple[Tensor, list]:
        """The mask of one prompt's real tokens and its row blocks, worked out once for all layers that share it."""
        key = (id(mask), b)
        if key not in self._masks:
            span = slice(*self.spans[b])
            allowed = mask[b, 0, span, span]
            size = ROWS.get(allowed.device.type, ROWS["cuda"])
            self._masks[key] = (mask, allowed, _row_blocks(allowed, self.firsts[b], size))  # holds the mask: ids stay
        return self._masks[key][1:]

    def _rescale(self, layer: int, kind: str, members: list[int]) -> Tensor | None:
        scope, norms = self.view.family.qk_norm, self.view.qk_norm(layer)
        if norms is None:
            return None
        norm = norms["qk".index(kind)]
        raw = torch.stack([self._raw[layer, kind][b, slice(*self.spans[b])] for b in members])
        return _rescale(raw, norm, scope, self.view.head_dim)


def _culprit(view: DecoderView, layer: int, kind: str) -> str:
    """Which projection of the block holds NaN or Inf weights; else the activations of the one whose score failed."""
    for role in ("gate", "up", "ffn") if kind == "ffn" else ("q", "k", "v", "o"):
        if role == "gate" and not view.gated:
            continue
        values = [x for x in (view.weight(layer, role), view.bias(layer, role)) if x is not None]
        if not all(torch.isfinite(x).all() for x in values):
            return f"the weights of layer {layer}, projection {role}"
    return f"the activations of layer {layer}, projection {kind}"


# ------------------------------------------------------------------------------------------------------ formulas


def _value_scores(heads: Tensor, grams: Tensor) -> Tensor:
    """v: Imp^2 = sum_{h,h'} <O_h,i, O_h',i> <W_h,i, W_h',i> over a group's heads; [S, Hkv, g, T, d] -> [S, Hkv d]."""
    n, g, _, d = heads.shape[1:]
    columns = grams.view(-1, n // len(grams), g, d, n // len(grams), g, d)
    columns = columns.diagonal(dim1=1, dim2=4).diagonal(dim1=2, dim2=4)  # [1 or Hkv, g, g, groups in it, d]
    columns = columns.permute(0, 3, 1, 2, 4).reshape(n, g, g, d)
    tokens = torch.einsum("sugti,suhti->sughi", heads, heads)
    return (tokens * columns).sum((2, 3)).clamp(min=0).sqrt().flatten(1)


def _channel_parts(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """How each channel before the rotary embedding enters the vector after it.

    Args:
        x: [..., T, d] after the embedding (its rotated part first); cos, sin: [..., T, r], halves equal.

    Returns:
        own, other [..., T, d]: channel i puts own_i into place i and other_i into place partner[i]; partner [d].
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
    own, other = before * cos, before * signed
    if r < d:
        rest = x[..., r:]
        own, other = torch.cat([own, rest], -1), torch.cat([other, torch.zeros_like(rest)], -1)
    return own, other, partner


def _rescale(raw: Tensor, norm, scope: str, head_dim: int) -> Tensor:
    """rms / rms without the channel, [S, T, width]: what zeroing one channel does to the others under an RMS norm.

    Args:
        raw: the projection's output [S, T, width].
    """
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0)
    square = raw.double() ** 2
    width = square.shape[-1] if scope == "full" else head_dim
    square = square.unflatten(-1, (-1, width))
    mean = square.mean(-1, keepdim=True)
    without = (mean - square / width).clamp(min=0) + eps
    return ((mean + eps) / without).sqrt().flatten(-2).float()


class _Channels:
    """The q or k channels of a block, as P independent problems over I channels and g heads each.

    For q: a problem is one head of one prompt; for k: one group of g heads; under a full-width norm, where every
    channel moves every head: one prompt. In all cases the logits move by ``-D``,
    ``D[p, i, t, h, s] = left0[p,i,t,h] right0[p,i,s] + left1[p,i,t,h] right1[p,i,s]``, and then by the norm's factor.
    """

    def __init__(self, kind: str, block: _Block, grams: Tensor, rescale: Tensor | None, scope: str):
        self.kind, self.block, self.rescale = kind, block, None
        self._metric: Tensor | None = None
        (self.prompts, h, tokens, d), n = block.query.shape, block.key.shape[1]
        self.d, g = d, h // n
        inner, outer = (block.query, block.key) if kind == "q" else (block.key, block.query)
        own, other, partner = _channel_parts(inner, block.cos, block.sin)
        across = outer[..., partner]
        if kind == "q":  # left [P, I, T, 1], right [P, I, T]
            left = [x.flatten(0, 1).transpose(1, 2).unsqueeze(-1) for x in (own, other)]
            right = [x.repeat_interleave(g, 1).flatten(0, 1).transpose(1, 2).contiguous() for x in (outer, across)]
        else:  # left [P, I, T, g]
            left = [x.unflatten(1, (n, g)).flatten(0, 1).permute(0, 3, 2, 1) for x in (outer, across)]
            right = [x.flatten(0, 1).transpose(1, 2).contiguous() for x in (own, other)]
        value = block.value - block.value.mean(2, keepdim=True)  # rows of E sum to 0: a shift of V changes nothing
        self.gram = grams  # of the first prompt's problems; the other prompts' are the same
        if scope == "full":
            left = [self._spread(x, self.prompts) for x in left]
            right = [x.view(self.prompts, -1, tokens) for x in right]
            self.value = value.repeat_interleave(g, 1)
        elif kind == "q":
            self.value = value.repeat_interleave(g, 1).flatten(0, 1)[:, None]
            self.gram = grams.view(n, g, d, g, d).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(h, d, d)
        else:
            self.value = value.flatten(0, 1)[:, None].expand(-1, g, -1, -1)
        self.left, self.right = [x * -block.scaling for x in left], right
        problems, heads = self.value.shape[:2]
        self.logits, self.weights = (
            x.view(problems, heads, tokens, tokens).transpose(1, 2) for x in (block.logits, block.weights)
        )
        if rescale is not None:
            self.rescale = rescale.transpose(1, 2).reshape(problems, -1, tokens)

    @staticmethod
    def _spread(left: Tensor, prompts: int) -> Tensor:
        """[S U, d, T, g] to [S, U d, T, U g]: 0 for the heads a channel does not feed."""
        _, d, tokens, g = left.shape
        left = left.unflatten(0, (prompts, -1))
        u = left.shape[1]
        wide = left.new_zeros(u, prompts, d, tokens, u, g)
        wide[torch.arange(u), :, :, :, torch.arange(u)] = left.transpose(0, 1)
        return wide.transpose(0, 1).reshape(prompts, u * d, tokens, u * g)

    # -- scores

    def scores(self, chunk: int, spaces: list[Tensor]) -> Tensor:
        """Imp of every channel, [S, width]; ``chunk``: floats in one working buffer; ``spaces``: the buffers, kept."""
        problems, channels, _, heads = self.left[0].shape
        total = self.left[0].new_zeros(problems, channels)
        for rows, keys in self.block.row_blocks:
            per_channel = heads * (rows.stop - rows.start) * (keys.stop - keys.start)
            step = max(1, chunk // per_channel)
            together = max(1, step // channels)  # problems that fit one chunk with all their channels
            norm = self._norm(keys)
            for u in range(0, problems, together):
                us = slice(u, min(u + together, problems))
                for i in range(0, channels, step):
                    ii = slice(i, min(i + step, channels))
                    change, spare = self._change(us, ii, rows, keys, spaces)
                    total[us, ii] += norm(change, us, spare)
        return total.clamp_(min=0).sqrt_().view(self.prompts, -1)

    def _change(self, us: slice, ii: slice, rows: slice, keys: slice, spaces: list[Tensor]) -> tuple[Tensor, Tensor]:
        """E = A' - A as [U, I, rows, g, keys], and a spare tensor of that shape."""
        left0, left1 = (x[us, ii, rows, :, None] for x in self.left)
        right0, right1 = (x[us, ii, None, None, keys] for x in self.right)
        logits, weights = (x[us, None, rows, :, keys] for x in (self.logits, self.weights))
        shape = (*left0.shape[:-1], keys.stop - keys.start)
        new, change = _workspace(spaces, shape, left0)
        torch.addcmul(logits, left0, right0, out=new)
        new.addcmul_(left1, right1)
        if self.rescale is not None:
            factor = self.rescale[us, ii]
            new.mul_(factor[:, :, rows, None, None] if self.kind == "q" else factor[:, :, None, None, keys])
        if self.block.softcap is not None:
            new.div_(self.block.softcap).tanh_().mul_(self.block.softcap)
            new.masked_fill_(~self.block.allowed[rows, None, keys], -torch.inf)
        torch.softmax(new, -1, out=change)
        return change.sub_(weights), new

    def _norm(self, keys: slice) -> Callable[[Tensor, slice, Tensor], Tensor]:
        """(E, problems, spare) -> tr(E P E^T) of each channel [U, I], in token or head space, whichever is cheaper."""
        heads = self.value.shape[1]
        n, d = keys.stop - keys.start, self.d
        if heads * n * heads * n <= heads * n * d + (heads * d) ** 2:
            return self._in_token_space(keys)
        return self._in_head_space(keys)

    def _in_token_space(self, keys: slice) -> Callable[[Tensor, slice, Tensor], Tensor]:
        heads, n = self.value.shape[1], keys.stop - keys.start
        metric = self._token_metric()[:, :, keys, :, keys].clone(memory_format=torch.contiguous_format)
        metric = metric.view(-1, heads * n, heads * n)
        # P is symmetric: with several heads, its upper right quarter is counted with the lower left one.
        cut = heads // 2 * n
        metric[:, cut:, :cut] *= 2

        def quarter(flat: Tensor, us: slice, columns: slice, spare: Tensor) -> Tensor:
            shape = (*flat.shape[:2], columns.stop - columns.start)
            moved = spare.view(-1)[: math.prod(shape)].view(shape)
            torch.bmm(flat[..., columns.start :], metric[us, columns.start :, columns], out=moved)
            return moved.mul_(flat[..., columns])

        def in_token_space(change: Tensor, us: slice, spare: Tensor) -> Tensor:
            flat = change.view(change.shape[0], -1, heads * n)
            parts = [slice(cut, heads * n), slice(0, cut)][: 2 if cut else 1]
            sums = [quarter(flat, us, part, spare).view(*change.shape[:2], -1).sum(-1) for part in parts]
            return sums[0] if len(sums) == 1 else sums[0] + sums[1]

        return in_token_space

    def _in_head_space(self, keys: slice) -> Callable[[Tensor, slice, Tensor], Tensor]:
        value = self.value[:, :, keys]
        which = torch.arange(len(value), device=value.device) % len(self.gram)

        def in_head_space(change: Tensor, us: slice, spare: Tensor) -> Tensor:
            u, i, rows, heads = change.shape[:4]
            moved = torch.einsum("uithk,uhkd->uithd", change, value[us])
            flat = moved.reshape(u, i * rows, heads * self.d)
            return (flat @ self.gram[which[us]]).mul_(flat).view(u, i, -1).sum(-1)

        return in_head_space

    def _token_metric(self) -> Tensor:
        """P = V G V^T between the heads' keys, [P, g, T, g, T]."""
        if self._metric is None:
            p, g, n, d = self.value.shape
            gram = self.gram.view(-1, g, d, g * d)
            half = (self.value.unflatten(0, (-1, len(gram))) @ gram).view(p, g * n, g, d).transpose(1, 2)
            full = half @ self.value.transpose(-1, -2)  # [P, g (of the right), g T, T]
            self._metric = full.view(p, g, g, n, n).permute(0, 2, 3, 1, 4)
        return self._metric


def _row_blocks(allowed: Tensor, first: int, size: int) -> list[tuple[slice, slice]]:
    """The measured rows in blocks, each with the range of keys that any of its rows may see (half, when causal)."""
    tokens = allowed.shape[0]
    size = max(size, -(-tokens // 16))
    starts = range(first, tokens, size)
    seen = torch.stack([allowed[i : i + size].any(0) for i in starts]).int()  # [blocks, T]
    low, high = seen.argmax(1).tolist(), (tokens - seen.flip(1).argmax(1)).tolist()
    rows = [slice(i, min(i + size, tokens)) for i in starts]
    return [(r, slice(a, b)) for r, a, b in zip(rows, low, high, strict=True)]


def _workspace(spaces: list[Tensor], shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Two buffers of this shape, carved from two flat ones that are kept for the next call."""
    size = math.prod(shape)
    if not spaces or spaces[0].numel() < size:
        spaces[:] = [like.new_empty(size), like.new_empty(size)]
    return spaces[0][:size].view(shape), spaces[1][:size].view(shape)
