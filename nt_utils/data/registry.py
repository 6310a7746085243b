"""The public prompt sets this project knows by name: where they are on the hub, and how their columns map to prompts.

The entries stand in `registry.yaml`. Each lists every place it can be read from: the hub (first choice first; some copies
are gated and need an accepted licence) and the file that the original project publishes. Nothing is shipped with this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from nt_utils.errors import InputError

Columns = Mapping[str, str | Sequence[str]]
"""Prompt field -> column of the data; several columns are joined by a blank line, empty ones left out."""

_GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Place:
    """One place to read a set from.

    id        hub data set id, or the address of a file
    config    hub configuration, "" for the only one
    split     hub split, "" for a file
    columns   how its columns map to prompt fields
    where     column -> value that a row must have (the safe half of XSTest)
    """

    id: str
    columns: Columns
    config: str = ""
    split: str = "train"
    where: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_file(self) -> bool:
        """Whether the place is a file at an address, not a hub data set."""
        return self.id.startswith("http")


@dataclass(frozen=True)
class Entry:
    """One public set: its kind of prompts, its places, its source.

    languages   columns that hold the same prompts in other languages, chosen as `name:column`
    shortest    rows with fewer characters are left out (headings and blank lines of running text)
    words       longer texts are cut to so many words (whole articles of an encyclopaedia)
    own         names of the project's files that no place says; `files` are all names in the folder NT_DATA
    stream      too large to download for a few hundred prompts: read from the front
    """

    name: str
    kind: str
    places: tuple[Place, ...]
    source: str
    licence: str
    languages: Sequence[str] = ()
    shortest: int = 0
    words: int = 0
    stream: bool = False
    own: Sequence[str] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Names that a file of this set may have in the folder NT_DATA, in lower case; * stands for any characters."""
        published = [place.id.rpartition("/")[2].lower() for place in self.places if place.is_file]
        return (*dict.fromkeys([*published, *self.own, f"{self.name}.*", f"{self.name}_*"]),)


def _read() -> dict[str, Entry]:
    """The entries of `registry.yaml`."""
    found = {}
    for name, row in yaml.safe_load(Path(__file__).with_name("registry.yaml").read_text(encoding="utf-8")).items():
        places = []
        for place in row.pop("places"):
            if "file" in place:
                place |= {"id": f"{_GITHUB}/{place.pop('file')}", "split": ""}
            places.append(Place(**place))
        found[name] = Entry(name, places=tuple(places), **row)
    return found


REGISTRY: dict[str, Entry] = _read()


def entry(name: str) -> Entry:
    """The entry of this name. Raises InputError that lists the known names."""
    if name not in REGISTRY:
        raise InputError(
            f"unknown prompt set {name!r}: use one of {', '.join(REGISTRY)}, a file or hub:org/name:split:column"
        )
    return REGISTRY[name]
