"""Prompts as small typed records: the one form in which every prompt, embedded, local or from the hub, moves on.

A `Prompt` is immutable; a `PromptSet` is an immutable sequence of them with a name. Empty strings mean "not known",
so a set read from a bare list of questions and the testbed's fully annotated corpus go through the same code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nt_utils.errors import InputError, check_choice

if TYPE_CHECKING:
    import pandas

PROMPT_KINDS = ("harmful", "benign", "borderline", "general")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request and what is known about it.

    text      what the user says (an attack's wrapper included)
    refusal   a reference refusal, used as a training target and for refusal margins
    helpful   the known answer that gives what was asked: the helpful answer of a benign request, the (harmless stub)
              compliance of a harmful one
    kind      harmful, benign, borderline (benign but sounding harmful) or general (running text, no request)
    language  language code, "en" by default
    template, topic   the request's wording and subject; splits keep both apart
    pair      id shared by a harmful and a benign prompt of the same template
    attack    name of the attack that wraps the prompt, "" for a direct request
    source    the set it comes from
    split     train, dev or test
    task      the utility task it belongs to (arithmetic, facts, ...)
    answer    the short known answer, matched in place of `helpful` where it is given
    prefill   words put into the assistant's mouth before it answers (attacks that prefill the answer)
    """

    text: str
    refusal: str = ""
    helpful: str = ""
    kind: str = "general"
    language: str = "en"
    template: str = ""
    topic: str = ""
    pair: str = ""
    attack: str = ""
    source: str = ""
    split: str = ""
    task: str = ""
    answer: str = ""
    prefill: str = ""

    def __post_init__(self) -> None:
        values = _values(self)
        if set(map(type, values)) != {str}:  # corpora make prompts by the ten thousand: one look at all of them
            for field, value in zip(PROMPT_FIELDS, values, strict=True):
                if not isinstance(value, str):
                    raise InputError(f"prompt field {field} must be text, got {type(value).__name__}")
        check_choice("kind", self.kind, PROMPT_KINDS)

    def replace(self, **changes: str) -> Prompt:
        """A copy with some fields changed."""
        return Prompt(**dict(zip(PROMPT_FIELDS, _values(self), strict=True)) | changes)


PROMPT_FIELDS = tuple(field.name for field in dataclasses.fields(Prompt))
_values = operator.attrgetter(*PROMPT_FIELDS)


class PromptSet(Sequence):
    """An immutable, named sequence of prompts.

    `dropped` counts the rows that the loader left out, by reason (empty, duplicate).
    """

    def __init__(self, prompts: Iterable[Prompt], name: str = "", dropped: dict[str, int] | None = None) -> None:
        self._prompts = tuple(prompts)
        for prompt in self._prompts:
            if not isinstance(prompt, Prompt):
                raise InputError(f"a PromptSet holds Prompt records, got {type(prompt).__name__}")
        self.name = name
        self.dropped = dict(dropped or {})
        self._fingerprint: str | None = None

    @classmethod
    def of(cls, texts: Iterable[str], name: str = "", **fields: str) -> PromptSet:
        """A set of plain texts; `fields` (kind, language, ...) are given to every prompt."""
        return cls((Prompt(text=text, **fields) for text in texts), name)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        """One prompt for an int; a PromptSet of the same name for a slice or a list of ints."""
        if isinstance(index, slice):
            return self._derive(self._prompts[index])
        if isinstance(index, (list, tuple)) or (hasattr(index, "tolist") and getattr(index, "ndim", 0) == 1):
            return self._derive(self._prompts[int(i)] for i in index)
        return self._prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptSet) and self._prompts == other._prompts

    def __hash__(self) -> int:
        return hash(self._prompts)

    def __add__(self, other: PromptSet) -> PromptSet:
        name = self.name if self.name == other.name else "+".join(n for n in (self.name, other.name) if n)
        return PromptSet(self._prompts + other._prompts, name)

    def __repr__(self) -> str:
        return f"PromptSet({self.name!r}, {len(self)} prompts)"

    def _derive(self, prompts: Iterable[Prompt], name: str | None = None) -> PromptSet:
        return PromptSet(prompts, self.name if name is None else name, self.dropped)

    @property
    def texts(self) -> list[str]:
        """The prompts' texts, in order."""
        return [prompt.text for prompt in self._prompts]

    def column(self, field: str) -> list[str]:
        """One field of every prompt, in order."""
        _check_fields([field])
        return [getattr(prompt, field) for prompt in self._prompts]

    def filter(self, **fields: Any) -> PromptSet:
        """The prompts whose fields equal the given value, lie in the given collection or satisfy the given function."""
        _check_fields(fields)
        tests = {field: _test(wanted) for field, wanted in fields.items()}
        return self._derive(p for p in self._prompts if all(test(getattr(p, f)) for f, test in tests.items()))

    def take(self, n: int | None, seed: int | None = None) -> PromptSet:
        """n prompts in their original order: a random choice for a seed, the first n without one.

        All of them when n is None or exceeds the length.
        """
        if n is not None and n < 0:
            raise InputError(f"n must be 0 or more, got {n}")
        if n is None or n >= len(self):
            return self
        if seed is None:
            return self[:n]
        return self[sorted(random.Random(seed).sample(range(len(self)), n))]

    def map(self, function: Callable[[Prompt], Prompt], name: str | None = None) -> PromptSet:
        """The set with `function` applied to every prompt."""
        return self._derive((function(prompt) for prompt in self._prompts), name)

    def rename(self, name: str) -> PromptSet:
        """The same prompts under another name."""
        return self._derive(self._prompts, name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every field of every prompt, in order; the name does not enter."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for prompt in self._prompts:
                row = {f: value for f in PROMPT_FIELDS if (value := getattr(prompt, f))}
                digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
                digest.update(b"\n")
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def to_frame(self) -> pandas.DataFrame:
        """One row a prompt, one column a field."""
        import pandas

        columns = {field: self.column(field) for field in PROMPT_FIELDS}
        return pandas.DataFrame(columns, columns=list(PROMPT_FIELDS))


def _check_fields(fields: Iterable[str]) -> None:
    unknown = [str(field) for field in fields if field not in PROMPT_FIELDS]
    if unknown:
        raise InputError(f"unknown prompt field {', '.join(unknown)}: the fields are {', '.join(PROMPT_FIELDS)}")


def _test(wanted: Any) -> Callable[[str], bool]:
    if callable(wanted):
        return wanted
    if isinstance(wanted, (list, tuple, set, frozenset)):
        return lambda value: value in wanted
    return lambda value: value == wanted
