"""What many tests share: refusals in one line, stand-ins for judges and interventions, a model's weights before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nt_utils.errors import InputError
from nt_utils.interventions.delta import same_bits
from nt_utils.models import DecoderView, LanguageModel
from nt_utils.neurons import KINDS, NeuronSet


def refused(
    message: str, call: Callable[..., Any], *given: Any, kind: type[Exception] = InputError, **more: Any
) -> str:
    """The one line of the error that ``call`` ends in, which matches ``message``; a context manager is entered."""
    with pytest.raises(kind, match=message) as error:
        found = call(*given, **more)
        if hasattr(found, "__enter__"):
            with found:
                pass
    assert "\n" not in str(error.value)
    return str(error.value)


class Says:
    """A judge that gives one verdict, or those of a list, or what a function makes of each response."""

    def __init__(self, verdict: Any, name: str = "says") -> None:
        self.verdict, self.name = verdict, name

    def __call__(self, prompts: Sequence, responses: Sequence[str]) -> list:
        if callable(self.verdict):
            return [self.verdict(response) for response in responses]
        return self.verdict if isinstance(self.verdict, list) else [self.verdict] * len(responses)


class ScaledLogits:
    """An intervention that multiplies the logits: by -1, the least likely word becomes the likeliest."""

    name = "scaled"

    def __init__(self, by: float = -1.0, key: str | None = "") -> None:
        self.by, self.entered = by, 0
        self.key = f"scaled-{by}" if key == "" else key

    @contextlib.contextmanager
    def active(self, lm: LanguageModel) -> Iterator[None]:
        self.entered += 1
        handle = lm.model.lm_head.register_forward_hook(lambda module, inputs, output: self.by * output)
        try:
            yield
        finally:
            handle.remove()


def saved(lm: LanguageModel, folder: Path, **options: Any) -> Path:
    """A folder with the model and its tokenizer."""
    lm.model.save_pretrained(folder, **options)
    lm.tokenizer.save_pretrained(folder)
    return folder


def some_neurons(view: DecoderView, per_site: int = 2, seed: int = 0, kinds: Sequence[str] = KINDS) -> NeuronSet:
    """A few neurons of every kind in every layer."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for site in view.space.sites(kinds):
        masks[site] = torch.zeros(view.space.width(site), dtype=torch.bool)
        masks[site][torch.randperm(view.space.width(site), generator=generator)[:per_site]] = True
    return NeuronSet(view.space, masks)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's logits on these token ids, without gradients."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def snapshot(lm: LanguageModel) -> dict[str, Tensor]:
    """A copy of the model's weights, by name."""
    return {name: values.detach().clone() for name, values in lm.model.state_dict().items()}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Two snapshots hold the same bits."""
    assert before.keys() == after.keys()
    assert not [name for name in before if not same_bits(before[name], after[name])]


def without_dropout(lm: LanguageModel) -> LanguageModel:
    """The model with every dropout's probability 0, so that training mode draws nothing."""
    for module in lm.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return lm
