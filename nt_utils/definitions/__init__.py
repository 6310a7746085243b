"""Published definitions of a safety neuron, one file each: a function from a model and its prompts to a ranking of neurons.

How to add a definition: write one file in this folder. Its docstring names the paper and gives the formula and a numbered
algorithm; its function takes (model, material) and returns a :class:`nt_utils.selection.Ranking`; the decorator registers
it. Notebook 06, its tables, parameters and plan follow from the registry::

    @definition("contrast", paper="ours, after SN", needs=("benign",))
    def contrast(lm, material): ...

This file imports neither torch nor a model, so that the names are known where nothing heavy is loaded.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nt_utils.data.records import PromptSet
from nt_utils.errors import InputError

if TYPE_CHECKING:
    from nt_utils.data.attacks import Attack
    from nt_utils.models import LanguageModel
    from nt_utils.neurons import NeuronScores
    from nt_utils.selection import Ranking

#: The three papers under study come first in every table; the others follow in the order of their files.
STUDIED = ("SN", "ours, after SN", "SSAH", "NT")


@dataclass(frozen=True)
class Definition:
    """A registered definition.

    Attributes:
        name: what tables call it; paper: where it comes from.
        needs: fields of :class:`Material`, beside ``harmful``, without which it cannot be computed.
        function: (model, material) -> ranking.
    """

    name: str
    paper: str
    needs: tuple[str, ...]
    function: Callable[[LanguageModel, Material], Ranking]

    def __call__(self, lm: LanguageModel, material: Material) -> Ranking:
        """Rank the model's neurons. Raises InputError where the material lacks what the definition needs."""
        if missing := [name for name in self.needs if not material.has(name)]:
            raise InputError(f"{self.name}: the material has no {', '.join(missing)}, which this definition needs")
        return self.function(lm, material)


_FOUND: dict[str, Definition] = {}


def definition(name: str, *, paper: str, needs: Sequence[str] = ()) -> Callable:
    """Register the function below it as the definition ``name``."""

    def register(function):
        _FOUND[name] = Definition(name, paper, tuple(needs), function)
        return function

    return register


def names() -> tuple[str, ...]:
    """The names of all definitions, read from the files' text without importing them."""
    found = []
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        found += re.findall(r'^@definition\(\s*"([^"]+)",\s*paper="([^"]+)"', path.read_text(encoding="utf-8"), re.M)
    order = {paper: place for place, paper in enumerate(STUDIED)}
    return tuple(name for name, paper in sorted(found, key=lambda pair: order.get(pair[1], len(STUDIED))))


def __getattr__(name: str) -> Any:
    """``REGISTRY``: name -> :class:`Definition`; the files are imported when it is first asked for."""
    if name != "REGISTRY":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        importlib.import_module(f"{__name__}.{path.stem}")
    registry = {key: _FOUND[key] for key in names()}
    globals()["REGISTRY"] = registry
    return registry


# --------------------------------------------------------------------------------------------------- material


@dataclass(frozen=True)
class Material:
    """What definitions are computed from: calibration prompts in blocks, and what some definitions need beside them.

    A definition scores all prompts once (:meth:`scores`, :meth:`merged` keep the result) and ranks by the chosen blocks, so
    that other halves of the prompts cost no further pass through the model.

    Attributes:
        harmful, benign: prompts with reference responses.
        base: the unaligned model; responses: what the aligned model answers to the harmful prompts.
        attacks: the study's attacks; per_class: how many of each attack class are used; attacked_prompts: on how many of
            the harmful prompts.
        utility_share: set difference -> the share of the pool that it leaves out as useful.
        options: keywords of every scoring function (batch size, progress).
        blocks: prompt i is in block i mod blocks; chosen: the blocks that count, None for all.
    """

    harmful: PromptSet
    benign: PromptSet | None = None
    base: LanguageModel | None = None
    responses: Sequence[str] = ()
    attacks: Sequence[Attack] = ()
    per_class: int | None = 1
    attacked_prompts: int = 24
    utility_share: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=lambda: {"progress": False})
    blocks: int = 1
    chosen: tuple[int, ...] | None = None
    _kept: dict = field(default_factory=dict, repr=False)

    def has(self, name: str) -> bool:
        """Whether this field was given."""
        value = getattr(self, name)
        return value is not None and (not isinstance(value, (Sequence, Mapping)) or len(value) > 0)

    def take(self, blocks: Sequence[int] | None) -> Material:
        """The same material with only these blocks of prompts counting; None for all."""
        return replace(self, chosen=None if blocks is None else tuple(blocks))

    def scores(self, key: str, compute: Callable[[], NeuronScores], period: int | None = None) -> NeuronScores:
        """The chosen prompts' rows of ``compute()``, which scores all prompts and is called once for each ``key``.

        Args:
            period: number of prompts after which the rows repeat them (a round for each attack); None: they do not.
        """
        if key not in self._kept:
            self._kept[key] = compute()
        found = self._kept[key]
        if self.chosen is None:
            return found
        rows = range(found.n_prompts)
        return found.subset([row for row in rows if row % (period or len(rows)) % self.blocks in self.chosen])

    def merged(self, key: str, compute: Callable[[int], Any]) -> Any:
        """Running statistics over the chosen blocks: ``compute(block)`` for each, kept, joined by their ``merge``."""
        if key not in self._kept:
            self._kept[key] = [compute(block) for block in range(self.blocks)]
        chosen = range(self.blocks) if self.chosen is None else self.chosen
        return reduce(lambda a, b: a.merge(b), [self._kept[key][block] for block in chosen])
