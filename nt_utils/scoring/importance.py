"""Exact importance of every neuron: how far the block's output moves when the neuron is zeroed [SN, section 3].

``Imp(N|c) = || h_without_N(c) - h(c) ||_2``, h = the output of the attention or feed-forward block that holds N, over
the measured token positions. :mod:`nt_utils.scoring.reference` says it word for word; here nothing is re-run, the values
of all neurons follow in closed form from one forward pass:

* ffn, o: the change is an outer product (:func:`writing_scores`).
* v: zeroing a value channel zeroes that channel of every head of its group (:func:`value_scores`).
* q, k: zeroing a channel changes the attention's logits by a term of rank 2 (:mod:`nt_utils.scoring.query_key`).

A block's output is what its last projection writes: before a norm behind the block (Gemma 2 and 3, OLMo 2) and before
a constant residual multiplier (Granite), which scales all scores of a model alike.

While scoring, the model's attention runs through :mod:`nt_utils.scoring.attention`, sample by sample on real tokens only, so
padding never enters a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from nt_utils import hooks
from nt_utils.errors import InputError, check_choice, check_count
from nt_utils.models import DecoderView, Encoded, LanguageModel, check_evaluating, context_of, decoder
from nt_utils.neurons import KINDS, NeuronScores, ScoreWriter, Site, check_kinds
from nt_utils.scoring.attention import attention_through
from nt_utils.scoring.fluctuation import Fluctuation
from nt_utils.scoring.query_key import ROWS, Attention, Buffers, QueryKey, Rows, rms_ratio
from nt_utils.work import count, track

POSITIONS = ("all", "last")
#: Floats in one working buffer: on a CPU a handful of them fit the caches, on a GPU they keep the device busy.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 27}
#: Measured tokens of a prompt beyond which q and k are estimated from a sample of its query rows.
EXACT_TOKENS = 256


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
    exact_tokens: int | None = EXACT_TOKENS,
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
        exact_tokens: a prompt with more measured tokens has its q and k scores estimated from a stratified sample of its query
            rows; :func:`standard_errors` gives their standard errors. None: every score is exact.

    Returns:
        Float32 scores [n_prompts, width] per (layer, kind), on file.

    Raises:
        InputError: bad arguments, a model in training mode, or NaN or Inf (names layer and projection).
    """
    check_kinds(kinds)
    if isinstance(prompts, str) or not len(prompts):
        raise InputError("prompts: need a list with at least one text")
    check_choice("positions", positions, POSITIONS)
    check_count("batch_size", batch_size)
    check_evaluating(lm.model)
    last = lm.suffix_length if positions == "last" else None
    counts = lm.token_counts(prompts)
    meta = {"score": "importance", "positions": positions, "model": lm.name}
    estimated = [k for k in ("q", "k") if k in kinds and last is None and max(counts) > (exact_tokens or max(counts))]
    weights = Weights(lm.view)
    with ExitStack() as stack:
        writer = stack.enter_context(ScoreWriter(path, lm.view.space, kinds, len(prompts), meta))
        error_writer = None
        if estimated:
            meta = {**meta, "score": "standard error of importance"}
            error_writer = stack.enter_context(
                ScoreWriter(_errors_path(writer.path), lm.view.space, estimated, len(prompts), meta)
            )
        # Prompts of like length together, the longest first: less padding, and memory runs out at once or never.
        order = sorted(range(len(prompts)), key=lambda i: -counts[i])
        steps = range(0, len(prompts), batch_size)
        for start in track(steps, desc="scoring", unit="batch", disable=not progress):
            rows = order[start : start + batch_size]
            batch = lm.encode([prompts[i] for i in rows], side="right")
            errors: dict[Site, Tensor] = {}
            scores = score_batch(
                lm.view,
                batch,
                kinds=kinds,
                last=last,
                statistics=statistics,
                chunk=chunk,
                weights=weights,
                exact_tokens=exact_tokens,
                errors=errors,
            )
            for b, row in enumerate(rows):
                writer.write(row, {site: values[b : b + 1] for site, values in scores.items()})
                if error_writer is not None:
                    error_writer.write(row, {site: errors[site][b : b + 1] for site in lm.view.space.sites(estimated)})
        if error_writer is not None:
            error_writer.close()
        else:  # what earlier scores of this name left would pass for theirs
            _errors_path(writer.path).unlink(missing_ok=True)
        return writer.close()


def standard_errors(scores: NeuronScores) -> NeuronScores | None:
    """Standard errors of the q and k scores that were estimated (0 for exact ones); None where all are exact."""
    path = _errors_path(scores.path)
    if not path.is_file():
        return None
    return NeuronScores.load(path, scores.space).subset(scores.rows)


def _errors_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.errors{path.suffix}")


def score_batch(
    view: DecoderView,
    batch: Encoded,
    *,
    kinds: Sequence[str] = KINDS,
    last: int | None = None,
    statistics: Fluctuation | None = None,
    chunk: int | None = None,
    weights: Weights | None = None,
    exact_tokens: int | None = EXACT_TOKENS,
    errors: dict[Site, Tensor] | None = None,
) -> dict[Site, Float[Tensor, "batch width"]]:
    """Scores of one padded batch, float32 on the CPU for every (layer, kind).

    Args:
        last: measure only the last so many tokens of each prompt; None = all of them.
        weights: what was read of the weights in an earlier batch.
        errors: takes the standard errors of the q and k scores, like the scores.
    """
    check_evaluating(view.model)
    limit, why = context_of(view.config)
    if limit is not None and max(batch.lengths) > limit:
        raise InputError(f"prompts: the longest has {max(batch.lengths)} tokens; {why} {limit}")
    count(scored_rows=len(batch.input_ids), scored_tokens=batch.input_ids.numel())
    scorer = _Scorer(weights or Weights(view), batch.to(view.device), tuple(kinds), last, chunk, exact_tokens)
    with torch.no_grad(), scorer.attached(), ExitStack() as stack:
        if statistics is not None:
            stack.enter_context(statistics.reading(view, scorer.batch))
        decoder(view.model)(**scorer.batch.inputs, use_cache=False)
    if errors is not None:
        errors |= scorer.errors
    return scorer.scores


# ------------------------------------------------------------------------------------------------ ffn, o and v


def writing_scores(x: Float[Tensor, "tokens width"], columns: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
    """ffn and o: what channel k writes is x_k W[:, k], so ``Imp = ||x_k|| ||W[:, k]||`` (``columns``: the latter)."""
    return x.float().square().sum(0).sqrt() * columns


def value_scores(
    heads: Float[Tensor, "prompts kv_heads group tokens d"], grams: Tensor
) -> Float[Tensor, "prompts kv_heads*d"]:
    """v: ``Imp^2 = sum_{h,h'} <O_h,i, O_h',i> <W_h,i, W_h',i>`` over a group's heads h, h' with outputs O."""
    n, g, _, d = heads.shape[1:]
    columns = grams.view(-1, n // len(grams), g, d, n // len(grams), g, d)
    columns = columns.diagonal(dim1=1, dim2=4).diagonal(dim1=2, dim2=4)  # [1 or Hkv, g, g, groups in it, d]
    columns = columns.permute(0, 3, 1, 2, 4).reshape(n, g, g, d)
    tokens = torch.einsum("sugti,suhti->sughi", heads, heads)
    return (tokens * columns).sum((2, 3)).clamp(min=0).sqrt().flatten(1)


# --------------------------------------------------------------------------------------------------- one forward


class Weights:
    """What the scores need of the weights: column norms and Gram matrices, kept for the next batch where small."""

    #: Gram matrices are kept when all of them together take no more than this share of the weights.
    SHARE = 0.03

    def __init__(self, view: DecoderView):
        self.view = view
        group = view.num_heads // view.num_kv_heads * view.head_dim
        heads = 1 if view.family.qk_norm == "full" else view.num_kv_heads
        self._size = view.num_heads * view.head_dim if heads == 1 else group
        kept = 4 * heads * self._size**2 * view.num_layers
        self._keep = kept <= self.SHARE * sum(p.nbytes for p in view.model.parameters())
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


class _Scorer:
    """Takes the scores of one batch while the model's forward runs."""

    def __init__(self, weights: Weights, batch: Encoded, kinds: tuple[str, ...], last, chunk, exact_tokens):
        self.view, self.weights, self.batch, self.kinds = weights.view, weights, batch, kinds
        self.chunk = chunk or CHUNK.get(self.view.device.type, CHUNK["cuda"])
        self.exact_tokens = exact_tokens
        self.spans = [(s, s + n) for s, n in zip(batch.starts, batch.lengths, strict=True)]
        self.firsts = [0 if last is None else max(n - last, 0) for n in batch.lengths]
        self.scores: dict[Site, Tensor] = {}
        self.errors: dict[Site, Tensor] = {}
        self._rope: dict[int, tuple[Tensor, Tensor] | None] = {}
        self._raw: dict[Site, Tensor] = {}
        self._masks: dict[tuple[int, int], tuple[Tensor, Tensor, Rows]] = {}
        self._grouped: dict[int, list[list[int]]] = {}
        self._buffers = Buffers()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks and attention in place; removed whatever happens."""
        layers = range(self.view.num_layers)
        readers: dict[str, Callable] = {"o": self._read, "ffn": self._read}
        if self.view.family.qk_norm:
            readers |= {"q": self._keep_raw, "k": self._keep_raw}
        sites = [(i, kind) for i in layers for kind in self.kinds if kind in readers]
        edits = {site: partial(readers[site[1]], site=site) for site in sites}
        with ExitStack() as stack:
            if set("qkv") & set(self.kinds):
                stack.enter_context(attention_through(self.view, self.attention))
                stack.enter_context(
                    hooks.observe([(self.view.attention(i), partial(self._keep_rope, layer=i)) for i in layers])
                )
            if edits:
                stack.enter_context(hooks.edit(self.view, edits, "importance"))
            yield

    def _keep_rope(self, args: tuple, kwargs: dict, layer: int) -> None:
        self._rope[layer] = kwargs.get("position_embeddings")

    def _keep_raw(self, activation: Tensor, site: Site) -> None:
        self._raw[site] = activation

    def _read(self, activation: Tensor, site: Site) -> None:
        columns = self.weights.columns(*site).to(activation.device)
        spans = [(start + first, end) for (start, end), first in zip(self.spans, self.firsts, strict=True)]
        rows = [writing_scores(activation[b, start:end], columns) for b, (start, end) in enumerate(spans)]
        self._store(*site, torch.stack(rows))

    def _store(self, layer: int, kind: str, values: Tensor) -> None:
        values = values.float().cpu()
        if not torch.isfinite(values).all():
            raise InputError(f"model: NaN or Inf in {_culprit(self.view, layer, kind)}")
        self.scores[layer, kind] = values

    def attention(self, layer: int, query, key, value, mask, scaling: float, softcap: float | None) -> Tensor:
        """The attention's output [batch, tokens, heads, d]; takes the q, k and v scores on the way."""
        output = torch.zeros_like(query.transpose(1, 2))
        grams = self.weights.grams(layer, query.device)
        found: dict[str, dict[int, Tensor]] = {kind: {} for kind in "qkv" if kind in self.kinds}
        errors: dict[str, dict[int, Tensor]] = {kind: {} for kind in found}
        for members in self._groups(mask, query.shape[1], query.shape[-1], key.shape[1]):
            block = self._attention(layer, members, query, key, value, mask, scaling, softcap)
            heads = block.weights.unflatten(1, (key.shape[1], -1)) @ block.value.unsqueeze(2)  # [S, Hkv, g, T, d]
            for b, rows in zip(members, heads.flatten(1, 2).transpose(1, 2), strict=True):
                output[b, slice(*self.spans[b])] = rows.to(output.dtype)
            for kind in found:
                if kind == "v":
                    scores = value_scores(heads[:, :, :, self.firsts[members[0]] :], grams)
                    error = torch.zeros_like(scores)
                else:
                    ratio = self._rms_ratio(layer, kind, members)
                    problems = QueryKey(kind, block, grams, ratio, self.view.family.qk_norm == "full")
                    scores, error = problems.scores(self.chunk, self._buffers)
                found[kind] |= dict(zip(members, scores, strict=True))
                errors[kind] |= dict(zip(members, error, strict=True))
        for kind, rows in found.items():
            self._store(layer, kind, torch.stack([rows[b] for b in range(len(self.spans))]))
            self.errors[layer, kind] = torch.stack([errors[kind][b] for b in range(len(self.spans))]).cpu()
        self._raw.clear()
        return output

    def _attention(self, layer, members: list[int], query, key, value, mask, scaling, softcap) -> Attention:
        """The attention of some equally long prompts on their real tokens."""

        def cut(x: Tensor) -> Tensor:
            return torch.stack([x[b, :, slice(*self.spans[b])] for b in members]).float()

        q, k, v = cut(query), cut(key), cut(value)
        allowed, rows = self._measured(members[0], mask)
        logits = (q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2).mul_(scaling)
        if softcap is None:
            weights = logits.masked_fill_(~allowed, -torch.inf).softmax(-1)
        else:
            weights = (softcap * torch.tanh(logits / softcap)).masked_fill_(~allowed, -torch.inf).softmax(-1)
        cos = sin = None
        rope = self._rope.get(layer)
        if rope is not None:
            cos, sin = (cut(x[:, None].expand(len(self.spans), -1, -1, -1)) for x in rope)
        return Attention(q, k, v, cos, sin, allowed, logits, weights, scaling, softcap, rows)

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
        return lengths[a] == lengths[b] and torch.equal(self._measured(a, mask)[0], self._measured(b, mask)[0])

    def _measured(self, b: int, mask: Tensor) -> tuple[Tensor, Rows]:
        """One prompt's mask and its measured rows, worked out once for all layers that share the mask."""
        key = (id(mask), b)
        if key not in self._masks:
            span = slice(*self.spans[b])
            allowed = mask[b, 0, span, span]
            rows = Rows.of(allowed, self.firsts[b], self.exact_tokens, ROWS.get(allowed.device.type, ROWS["cuda"]))
            self._masks[key] = (mask, allowed, rows)  # holds the mask, so that its id stays its own
        return self._masks[key][1:]

    def _rms_ratio(self, layer: int, kind: str, members: list[int]) -> Tensor | None:
        norms = self.view.qk_norm(layer)
        if norms is None:
            return None
        raw = torch.stack([self._raw[layer, kind][b, slice(*self.spans[b])] for b in members])
        return rms_ratio(raw, norms["qk".index(kind)], self.view.family.qk_norm, self.view.head_dim)


def _culprit(view: DecoderView, layer: int, kind: str) -> str:
    """Which projection of the block holds NaN or Inf weights; else the activations of the one whose score failed."""
    for role in ("gate", "up", "ffn") if kind == "ffn" else ("q", "k", "v", "o"):
        if role == "gate" and not view.gated:
            continue
        values = [x for x in (view.weight(layer, role), view.bias(layer, role)) if x is not None]
        if not all(torch.isfinite(x).all() for x in values):
            return f"the weights of layer {layer}, projection {role}"
    return f"the activations of layer {layer}, projection {kind}"
