"""Rows of token ids through a model: batches by a fixed rule, a shared prefix read once, log-probabilities in pieces.

What is in a batch depends on the rows and on constants alone, never on free memory, so that a run has the same batches
on every machine.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nt_utils.errors import ModelError
from nt_utils.work import count, track

if TYPE_CHECKING:
    from nt_utils.models import LanguageModel

Rows = Sequence[Sequence[int]]

BATCH_SIZE = 64
"""Rows of a batch where nothing else is said."""
BATCH_TOKENS = 2**14
"""Rows times longest row of a batch are at most this: it bounds the key-value cache."""
LOGIT_BYTES = 2**28
"""Memory for the logits of one batch, and for the float32 copy of a piece of them."""
PADDING = 64
"""Tokens of padding that are cheaper than another batch."""
SAVED = 64
"""A prefix is shared where it spares at least so many tokens."""


def batches(lengths: Sequence[int], room: int, size: int, *, logits: int = 0) -> Iterator[list[int]]:
    """Numbers of the rows of every batch, longest first.

    Args:
        lengths: tokens of every row; room: tokens that it may grow by; size: at most so many rows a batch.
        logits: bytes of logits that a row takes.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        longest = lengths[order[0]]
        alike = sum(2 * lengths[i] + PADDING >= longest for i in order)
        most = min(size, alike, BATCH_TOKENS // (longest + room), LOGIT_BYTES // logits if logits else size)
        yield order[: max(1, most)]
        order = order[max(1, most) :]


class Prefix:
    """The tokens with which all rows begin, with their keys and values, which are computed once.

    Rows are cut after them (:meth:`cut`), and a batch starts from copies of the cache (:meth:`cache`). Empty where rows
    share too little, or where the model does not allow it: sliding windows drop keys by their place in the cache,
    and kernels other than eager and sdpa may not take padding in the middle.
    """

    def __init__(self, lm: LanguageModel, rows: Rows, keep: Sequence[int]) -> None:
        """``keep[i]``: so many tokens at the end of row i must be read with the batch."""
        self.length, self._cache = 0, None
        attention = getattr(lm.model.config.get_text_config(), "_attn_implementation", None)
        length = min(len(row) - k for row, k in zip(rows, keep, strict=True))
        first, last = min(map(tuple, rows)), max(map(tuple, rows))  # the rows that differ first
        length = next((i for i in range(length) if first[i] != last[i]), max(length, 0))
        if length * (len(rows) - 1) < SAVED or attention not in ("eager", "sdpa"):
            return
        ids = torch.tensor([list(rows[0][:length])], device=lm.device)
        found = lm.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        if getattr(found, "layers", None) and all(type(layer).__name__ == "DynamicLayer" for layer in found.layers):
            self.length, self._cache = length, found

    def cut(self, row: Sequence[int]) -> list[int]:
        """The row without the prefix."""
        return list(row[self.length :])

    def cache(self, n: int) -> Any:
        """A cache of n rows, to be handed to the model; None for an empty prefix."""
        found = copy.deepcopy(self._cache)
        if found is not None:
            found.batch_repeat_interleave(n)
        return found


def left_padded(lm: LanguageModel, rows: Rows, prefix: Prefix) -> tuple[Tensor, Tensor]:
    """Token ids [rows, tokens] without the prefix, padded on the left, and the mask [rows, prefix + tokens]."""
    cut = [prefix.cut(row) for row in rows]
    width = max(map(len, cut))
    ids = torch.tensor([[lm.pad_id] * (width - len(row)) + row for row in cut], device=lm.device)
    mask = torch.tensor([[1] * prefix.length + [0] * (width - len(r)) + [1] * len(r) for r in cut], device=lm.device)
    return ids, mask


def forward(lm: LanguageModel, ids: Tensor, mask: Tensor, last: int, past: Any, use_cache: bool) -> Any:
    """The model's output; logits [rows, last, vocabulary] of the last positions."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    if ids.shape[1] == 1 and past is not None:
        count(written_tokens=len(ids), decode_steps=1)
    else:
        count(read_tokens=ids.numel())
    return lm.model(**inputs, past_key_values=past, use_cache=use_cache or past is not None, logits_to_keep=last)


def keep_rows(cache: Any, kept: Tensor) -> None:
    """Drop the other rows of a cache; every layer is indexed on its own device."""
    for layer in cache.layers:
        at = kept.to(layer.keys.device)
        layer.keys, layer.values = layer.keys[at], layer.values[at]


def tail_logits(
    lm: LanguageModel, heads: Rows, tails: Rows, *, batch_size: int = BATCH_SIZE, name: str = "", progress: bool = False
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number, logits [tail, vocabulary], ids [tail]) of every row: the logits from which each token of its tail is predicted.

    Args:
        heads: what comes before, at least one token a row; tails: what is predicted. Rows without a tail are left out.

    Raises:
        ModelError: a logit is not a number.
    """
    numbers = [i for i, tail in enumerate(tails) if len(tail)]
    if not numbers:
        return
    rows = [[*heads[i], *tails[i]] for i in numbers]
    with torch.no_grad(), track(total=len(rows), desc=name, unit="row", disable=not progress) as bar:
        prefix = Prefix(lm, rows, [len(tails[i]) + 1 for i in numbers])
        word = lm.model.config.get_text_config().vocab_size * next(lm.model.parameters()).element_size()
        longest = max(len(tails[i]) for i in numbers)
        plan = batches([len(r) for r in rows], 0, batch_size, logits=word * (longest + 1))
        for batch in plan:
            last = 1 + max(len(tails[numbers[j]]) for j in batch)
            ids, mask = left_padded(lm, [rows[j] for j in batch], prefix)
            logits = forward(lm, ids, mask, last, prefix.cache(len(batch)), False).logits
            for row, j in enumerate(batch):
                n = len(tails[numbers[j]])
                found = logits[row, last - 1 - n : last - 1]
                if found.isnan().any():
                    raise ModelError(f"model: its logits are not numbers (NaN) at row {numbers[j]}")
                yield numbers[j], found, ids[row, -n:]
            bar.update(len(batch))


def log_probability(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of the ids [n] under logits [n, vocabulary], float64 [n]; float32 within, in pieces of LOGIT_BYTES."""
    step = max(1, LOGIT_BYTES // (4 * logits.shape[-1]))
    pieces = zip(logits.split(step), ids.split(step), strict=True)
    loss = torch.nn.functional.cross_entropy
    return -torch.cat([loss(part.float(), chosen, reduction="none") for part, chosen in pieces]).double()
