"""What is done to a model: an intervention has a ``name`` for tables, a ``key`` for caches and ``active(lm)``.

``active`` is a context manager; outside it the model is untouched. Evaluation takes any object of this shape.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nt_utils.errors import InputError
from nt_utils.neurons import NeuronSet

if TYPE_CHECKING:
    from nt_utils.models import LanguageModel


class Intervention(Protocol):
    """Anything that changes a model while it is active."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def key(self) -> str:
        """Identifies the intervention: two with the same key act alike."""

    def active(self, lm: LanguageModel) -> AbstractContextManager: ...


@dataclass(frozen=True)
class Deactivate:
    """Zero the neurons of a set, bias included (methods.md section 0; [SN] section 3)."""

    neurons: NeuronSet
    name: str = "deactivate"

    def __post_init__(self):
        if not len(self.neurons):
            raise InputError("neurons: the set is empty; deactivating nothing is no intervention")

    @property
    def key(self) -> str:
        return f"deactivate-{self.neurons.fingerprint}"

    def active(self, lm: LanguageModel) -> AbstractContextManager:
        from nt_utils import hooks

        return hooks.ablate(lm.view, self.neurons, self.name)
