"""Fluctuation statistics of the channels that write to the residual stream [SSAH, section 3: unit scores].

A unit's score on a data set is the variance of its activation over tokens times the squared norm of the weights that
read it, ``Var_D(x_j) * ||W[:, j]||^2``, for FFN channels (reader: down projection) and attention channels (reader:
output projection). A head's score is the sum of its channels'. Ours, where the paper leaves it open: the population
variance, over all real tokens of prompt and response, each token counted once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nt_utils import hooks
from nt_utils.errors import InputError, check_count
from nt_utils.files import damage_reported, read_sealed, write_sealed
from nt_utils.models import DecoderView, Encoded, LanguageModel, check_evaluating, decoder
from nt_utils.neurons import POOL, NeuronSpace, Site
from nt_utils.work import count, track

FORMAT = "nt_utils.fluctuation.2"


class Fluctuation:
    """Running mean and variance over tokens of every o and ffn channel, in float64.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), which stays exact where a running sum
    of squares cancels; the result does not depend on batch size or padding.

    Args:
        space: the model's neurons; ``readers``: site -> squared column norms of the reading weights [width];
        head_dim: channels in one attention head.
    """

    def __init__(self, space: NeuronSpace, readers: dict[Site, Tensor], head_dim: int):
        self.space, self.readers, self.head_dim = space, readers, head_dim
        self._count = dict.fromkeys(readers, 0)
        self._mean = {site: torch.zeros_like(norms) for site, norms in readers.items()}
        self._squares = {site: torch.zeros_like(norms) for site, norms in readers.items()}

    @classmethod
    def of(cls, source: LanguageModel | DecoderView) -> Fluctuation:
        """Empty statistics for a model."""
        view = source if isinstance(source, DecoderView) else source.view
        readers = {
            site: torch.linalg.vector_norm(view.weight(*site).detach(), dim=0, dtype=torch.float64).cpu() ** 2
            for site in view.space.sites(POOL)
        }
        return cls(view.space, readers, view.head_dim)

    # -- feeding

    def update(self, site: Site, values: Tensor) -> None:
        """Take in activations [tokens, width] of one site (real tokens only). Raises InputError at NaN or Inf."""
        values = values.detach().double()
        mean = values.mean(0)
        squares = (values - mean).square_().sum(0)
        if not torch.isfinite(squares).all():
            raise InputError(f"model: NaN or Inf in the activations of layer {site[0]}, projection {site[1]}")
        self._merge(site, len(values), mean.cpu(), squares.cpu())

    def _merge(self, site: Site, count: int, mean: Tensor, squares: Tensor) -> None:
        before = self._count[site]
        total = before + count
        if not total:
            return
        shift = mean - self._mean[site]
        # New tensors each time: nobody who holds an earlier mean sees it change.
        self._mean[site] = self._mean[site] + shift * (count / total)
        self._squares[site] = self._squares[site] + squares + shift**2 * (before * count / total)
        self._count[site] = total

    def merge(self, other: Fluctuation) -> Fluctuation:
        """The statistics over both token sets; neither operand changes."""
        if other.space.architecture != self.space.architecture:
            raise InputError(
                f"fluctuation: statistics of two architectures cannot be merged: {self.space.architecture} and "
                f"{other.space.architecture}"
            )
        out = Fluctuation(self.space, self.readers, self.head_dim)
        for part in (self, other):
            for site in self.readers:
                out._merge(site, part._count[site], part._mean[site], part._squares[site])
        return out

    @contextmanager
    def reading(self, view: DecoderView, batch: Encoded) -> Iterator[None]:
        """Feed from every forward of ``batch`` inside."""
        spans = [slice(s, s + n) for s, n in zip(batch.starts, batch.lengths, strict=True)]

        def read(activation: Tensor, site: Site) -> None:
            for b, span in enumerate(spans):
                self.update(site, activation[b, span])

        with hooks.edit(view, {site: partial(read, site=site) for site in self.readers}):
            yield

    # -- reading off

    @property
    def tokens(self) -> int:
        """Tokens taken in."""
        return min(self._count.values())

    def mean(self, layer: int, kind: str) -> Tensor:
        """Mean activation of each channel, float64 [width]."""
        return self._of(self._mean, layer, kind)

    def variance(self, layer: int, kind: str) -> Tensor:
        """Population variance of each channel over tokens, float64 [width]."""
        return self._of(self._squares, layer, kind) / self._count[layer, kind]

    def score(self, layer: int, kind: str) -> Tensor:
        """Var_D(x_j) ||W[:, j]||^2 of each channel, float64 [width]."""
        return self.variance(layer, kind) * self.readers[layer, kind]

    def _of(self, table: dict[Site, Tensor], layer: int, kind: str) -> Tensor:
        if (layer, kind) not in table:
            raise InputError(f"site: no statistics for layer {layer}, projection {kind!r}; allowed kinds: o, ffn")
        if not self._count[layer, kind]:
            raise InputError("fluctuation: no tokens were taken in yet")
        return table[layer, kind]

    # -- files

    def save(self, path) -> Path:
        """Write safetensors with the neuron space in the header; atomic."""
        tables = {"mean": self._mean, "squares": self._squares, "reader": self.readers}
        tensors = {f"{i}.{kind}.{name}": v for name, table in tables.items() for (i, kind), v in table.items()}
        counts = json.dumps({f"{layer}.{kind}": n for (layer, kind), n in self._count.items()})
        header = {"format": FORMAT, "space": self.space.to_json(), "head_dim": str(self.head_dim), "counts": counts}
        return write_sealed(path, tensors, header)

    @classmethod
    def load(cls, path, space: NeuronSpace | None = None) -> Fluctuation:
        """Read statistics. Raises InputError when the file is damaged or, given ``space``, of another architecture."""
        header, tensors = read_sealed(path, FORMAT)
        with damage_reported(path):
            found, counts = NeuronSpace.from_json(header["space"]), json.loads(header["counts"])
            found.check(f"{path}: made for", space)
            names = {site: f"{site[0]}.{site[1]}" for site in found.sites(POOL)}
            out = cls(found, {s: tensors[f"{name}.reader"] for s, name in names.items()}, int(header["head_dim"]))
            for s, name in names.items():
                out._mean[s], out._squares[s] = tensors[f"{name}.mean"], tensors[f"{name}.squares"]
                out._count[s] = counts[name]
        return out


def fluctuation(
    lm: LanguageModel,
    prompts: Sequence[str],
    responses: Sequence[str] | None = None,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Fluctuation:
    """Statistics over all tokens of the rendered prompts and, if given, of the teacher-forced responses.

    The prompts' statistics alone come with the importance scores, in the same pass: ``importance(statistics=...)``.

    Raises:
        InputError: no prompts, a model in training mode, or NaN or Inf (names layer and projection).
    """
    if isinstance(prompts, str) or not len(prompts):
        raise InputError("prompts: need a list with at least one text")
    check_count("batch_size", batch_size)
    if responses is not None and len(responses) != len(prompts):
        raise InputError(f"responses: got {len(responses)} for {len(prompts)} prompts")
    check_evaluating(lm.model)
    statistics = Fluctuation.of(lm)
    steps = range(0, len(prompts), batch_size)
    for start in track(steps, desc="fluctuation", unit="batch", disable=not progress):
        part = slice(start, start + batch_size)
        batch = lm.encode(prompts[part], None if responses is None else responses[part], side="right").to(lm.device)
        count(read_tokens=batch.input_ids.numel())
        with torch.no_grad(), statistics.reading(lm.view, batch):
            decoder(lm.model)(**batch.inputs, use_cache=False)
    return statistics
