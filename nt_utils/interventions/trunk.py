"""What a training need not compute again: the layers below the lowest trained one, and tokens that all rows begin with.

SN-Tune, NeuronTune and their kin train neurons of a few layers. What enters the lowest of them is the same at every
step, so the layers below it run once a row, without gradients, and never again. States lie in main memory up to a
budget, on disk beyond. In the layers above, the tokens that every row of a batch begins with (template, system prompt)
run once a batch: their keys and values, with gradients, serve all its rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nt_utils import hooks
from nt_utils.models import LanguageModel, decoder, is_sharded, pad
from nt_utils.scoring.attribution import Prefix

Row = tuple[int, ...]
#: Common tokens from which on they are run apart.
SHORTEST_PREFIX = 8
#: Bytes of hidden states kept in main memory.
BUDGET = 2**30


class _Reached(Exception):
    """The layer was reached: what stands above it need not run."""


class FrozenTrunk:
    """What enters ``layer``, row by row, and the forward of a batch from there on.

    Args:
        layer: the lowest layer with anything trained.

    ``BUDGET`` bytes of states are kept in main memory; further rows lie in a temporary folder.
    """

    def __init__(self, lm: LanguageModel, layer: int):
        self.lm, self.layer = lm, layer
        self._states: dict[Row, Tensor] = {}
        self._held = 0
        self._folder: tempfile.TemporaryDirectory | None = None

    @classmethod
    def of(cls, lm: LanguageModel, layer: int) -> FrozenTrunk | None:
        """None where nothing can be reused: a sharded model, or dropout that is on. A layer below 0 counts as 0."""
        if is_sharded(lm.model) or (lm.model.training and _drops(lm.model)):
            return None
        return cls(lm, max(layer, 0))

    @contextmanager
    def reused(self, rows: Sequence[Row], starts: Sequence[int]) -> Iterator[Prefix]:
        """Inside, the model's forward of these rows, padded on the right, starts at the layer, behind the prefix.

        Enter it after every hook that acts on the layers from there on.

        Args:
            starts: tokens of each row's prompt; the last of them predicts the response and is never in the prefix.
        """
        hidden = self._entering(rows)
        length = _common(rows, min(starts) - 1)
        recomputed = any(getattr(module, "gradient_checkpointing", False) for module in self.lm.model.modules())
        if length < SHORTEST_PREFIX or (recomputed and self.lm.model.training):
            length, cache = 0, None
        else:
            cache = self._cache(rows[0][:length], None if hidden is None else hidden[:1, :length], len(rows))
        with self._start(None if hidden is None else hidden[:, length:]):
            yield Prefix(length, cache)

    def _start(self, hidden: Tensor | None) -> AbstractContextManager:
        return nullcontext() if hidden is None else hooks.start_at(self.lm, self.layer, hidden)

    def _cache(self, prefix: Row, hidden: Tensor | None, count: int) -> DynamicCache:
        """Keys and values of the prefix for ``count`` rows. Layers that are skipped hold zeros: only their length counts."""
        cache, view = DynamicCache(config=self.lm.model.config), self.lm.view
        ids = torch.tensor([prefix], device=self.lm.device)
        with self._start(hidden):
            decoder(self.lm.model)(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
        skipped = torch.zeros((), dtype=self.lm.model.dtype).expand(1, view.num_kv_heads, len(prefix), view.head_dim)
        layers: list[Any] = cache.layers
        for layer, part in enumerate(layers):
            if layer < self.layer:
                part.update(skipped, skipped)
            part.keys, part.values = (kept.expand(count, -1, -1, -1) for kept in (part.keys, part.values))
        return cache

    def _entering(self, rows: Sequence[Row]) -> Tensor | None:
        """What enters the layer [rows, tokens, hidden size], zeros behind a row's end; None for the first layer."""
        if not self.layer:
            return None
        self._compute([row for row in dict.fromkeys(rows) if row not in self._states])
        kept = [self._states[row] for row in rows]
        hidden = torch.zeros(len(rows), max(map(len, rows)), kept[0].shape[-1], dtype=kept[0].dtype)
        for padded, states in zip(hidden, kept, strict=True):
            padded[: len(states)] = states
        return hidden.to(self.lm.device)

    def _compute(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        batch = pad(rows, pad_id=self.lm.pad_id, side="right", prompt_lengths=[len(row) for row in rows])

        def keep(stream: Tensor) -> None:
            for row, states in zip(rows, stream, strict=True):
                self._states[row] = self._stored(states[: len(row)].cpu())
            raise _Reached

        try:
            with torch.no_grad(), hooks.residual(self.lm, {self.layer: keep}):
                decoder(self.lm.model)(**batch.to(self.lm.device).inputs, use_cache=False)
        except _Reached:
            pass

    def _stored(self, states: Tensor) -> Tensor:
        """The states in memory, or mapped from a file where the budget is spent."""
        self._held += states.nbytes
        if self._held <= BUDGET:
            return states.clone()
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="nt_trunk_")
        path = f"{self._folder.name}/{len(self._states)}"
        states.contiguous().view(torch.uint8).numpy().tofile(path)
        return torch.from_file(path, shared=False, size=states.numel(), dtype=states.dtype).view(states.shape)


def _common(rows: Sequence[Row], limit: int) -> int:
    """How many tokens all rows begin with, at most the limit."""
    first = rows[0][:limit]
    return next((i for i, token in enumerate(first) if any(row[i] != token for row in rows)), len(first))


def _drops(model: nn.Module) -> bool:
    """Whether any dropout has a probability above 0."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", 0.0)
        for module in model.modules()
        if not isinstance(getattr(module, "attention_dropout", 0.0), nn.Module)
    )
