"""Hidden states below the lowest trained layer do not change in training: each row's are computed once and reused.

SN-Tune, NeuronTune and their kin train neurons of a few layers. What enters the lowest of them is the same at every
step, so the layers below it run once a row, without gradients, and never again. States lie in main memory up to a
budget, on disk beyond.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nt_utils import hooks
from nt_utils.models import LanguageModel, decoder, is_sharded, pad

Row = tuple[int, ...]
#: Bytes of hidden states kept in main memory.
BUDGET = 2**30


class _Reached(Exception):
    """The layer was reached: what stands above it need not run."""


class FrozenTrunk:
    """What enters ``layer``, row by row.

    Args:
        layer: the lowest layer with anything trained, 1 or more.
        budget: bytes of states kept in main memory (None: ``BUDGET``); further rows lie in a temporary folder.
    """

    def __init__(self, lm: LanguageModel, layer: int, budget: int | None = None):
        self.lm, self.layer, self.budget = lm, layer, BUDGET if budget is None else budget
        self._states: dict[Row, Tensor] = {}
        self._held = 0
        self._folder: tempfile.TemporaryDirectory | None = None

    @classmethod
    def of(cls, lm: LanguageModel, layer: int, budget: int | None = None) -> FrozenTrunk | None:
        """None where nothing can be reused: layer 0, a sharded model, or dropout that is on."""
        if layer < 1 or is_sharded(lm.model) or (lm.model.training and _drops(lm.model)):
            return None
        return cls(lm, layer, budget)

    @contextmanager
    def reused(self, rows: Sequence[Row], width: int) -> Iterator[None]:
        """Inside, the model's forward of these rows, padded on the right to ``width``, starts at the layer."""
        self._compute([row for row in dict.fromkeys(rows) if row not in self._states])
        kept = [self._states[row] for row in rows]
        hidden = torch.zeros(len(rows), width, kept[0].shape[-1], dtype=kept[0].dtype)
        for padded, states in zip(hidden, kept, strict=True):
            padded[: len(states)] = states
        with hooks.start_at(self.lm, self.layer, hidden.to(self.lm.device)):
            yield

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
        self._held += states.numel() * states.element_size()
        if self._held <= self.budget:
            return states.clone()
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="nt_trunk_")
        path = f"{self._folder.name}/{len(self._states)}"
        states.contiguous().view(torch.uint8).numpy().tofile(path)
        return torch.from_file(path, shared=False, size=states.numel(), dtype=states.dtype).view(states.shape)


def _drops(model: nn.Module) -> bool:
    """Whether any dropout has a probability above 0."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", 0.0)
        for module in model.modules()
        if not isinstance(getattr(module, "attention_dropout", 0.0), nn.Module)
    )
