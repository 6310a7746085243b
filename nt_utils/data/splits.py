"""Which prompt serves what: every split of a study is decided here, by content.

A prompt serves one use in all notebooks of a study: to *detect* neurons and score units, to *tune* on, to *develop* on
(choose rates, doses and thresholds), or to *test*.

1. Embedded prompts of the corpus's dev and test splits are developed and tested on; its train split is detected and tuned on.
2. Else the words decide: a hash of the seed and the text gives a number in [0, 1), and SHARES says which use that is. So a text
   serves the same use whatever source, role or notebook it comes in, and a smaller sample is part of a larger one.
3. A source that is given to test on (``harmful_test``, ``benign_test``) is tested on as a whole, and its texts serve nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nt_utils.data import corpus, sources, tasks
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.data.registry import REGISTRY
from nt_utils.errors import InputError, check_choice

#: use -> share of the texts of a source that serve it.
SHARES = {"test": 0.4, "develop": 0.15, "tune": 0.15, "detect": 0.3}
USES = tuple(SHARES)
#: Shares of the embedded corpus's train split.
TRAIN_SHARES = {"tune": 1 / 3, "detect": 2 / 3}
#: Split of the embedded corpus that serves a use.
EMBEDDED_SPLITS = {"test": "test", "develop": "dev", "tune": "train", "detect": "train"}
#: role -> kind of its prompts.
ROLES = {
    "harmful": "harmful",
    "benign": "benign",
    "borderline": "borderline",
    "general": "general",
    "second_language": "harmful",
    "other_harmful": "harmful",
    "new_task": "benign",
}


def content(prompt: Prompt) -> str:
    """What makes two prompts the same: the request's words, whatever their case and blanks.

    An embedded request is known by its topic and template, also inside an attack.
    """
    if prompt.source == corpus.SOURCE and prompt.topic and prompt.template:
        return f"{prompt.template} {prompt.topic}"
    return " ".join(prompt.text.casefold().split())


def number(prompt: Prompt, seed: int = 0) -> float:
    """A number in [0, 1) that only the seed and the prompt's content decide."""
    digest = hashlib.sha256(f"{seed} {content(prompt)}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def use_of(prompt: Prompt, seed: int = 0) -> str:
    """detect, tune, develop or test: what a prompt serves in every notebook of a study with this seed."""
    embedded = {split: use for use, split in EMBEDDED_SPLITS.items() if split != "train"}
    shares = SHARES
    if prompt.source == corpus.SOURCE:
        if prompt.split in embedded:
            return embedded[prompt.split]
        shares = TRAIN_SHARES
    left = number(prompt, seed)
    for use, share in shares.items():
        left -= share
        if left < 0:
            return use
    return use


def rows(prompts: PromptSet, use: str, n: int | None = None, seed: int = 0) -> PromptSet:
    """The prompts that serve a use, in their order: all, or the n whose numbers are smallest."""
    check_choice("use", use, USES)
    return smallest(PromptSet([p for p in prompts if use_of(p, seed) == use], f"{prompts.name} ({use})"), n, seed)


def smallest(prompts: PromptSet, n: int | None, seed: int = 0) -> PromptSet:
    """The n prompts whose numbers are smallest, in their order: a sample that is part of every larger one."""
    if n is None or n >= len(prompts):
        return prompts
    order = sorted(range(len(prompts)), key=lambda i: number(prompts[i], seed))
    return prompts[sorted(order[:n])]


def pairs(n: int, use: str = "detect", language: str = "en", seed: int = 0) -> tuple[PromptSet, PromptSet]:
    """n harmful and n benign requests of the embedded train split that share their templates pair by pair.

    Raises InputError when the split has fewer than n.
    """
    bad, good = (rows(corpus.corpus(kind, "train", language), use, seed=seed) for kind in ("harmful", "benign"))
    if not 1 <= n <= len(bad):
        raise InputError(f"n: got {n}; allowed: 1 to {len(bad)} embedded prompts in {language} to {use} with")
    partners: dict[str, list[Prompt]] = {}
    for prompt in good:
        partners.setdefault(prompt.template, []).append(prompt)
    harmful, benign = [], []
    for prompt in smallest(bad, n, seed):
        pair = f"{seed} {content(prompt)}"
        harmful.append(prompt.replace(pair=pair))
        benign.append(random.Random(pair).choice(partners[prompt.template]).replace(pair=pair))
    name = f"testbed-pairs-{use}-{language}"
    return PromptSet(harmful, f"{name}-harmful"), PromptSet(benign, f"{name}-benign")


class Splits:
    """The prompts of a study by role and use.

    Args:
        given: role (see ROLES) or "harmful_test", "benign_test" -> its source as a notebook's parameter names it; "" for none,
            ``corpus.SOURCE`` for the embedded prompts.
        seed: of the study.
    """

    def __init__(self, given: Mapping[str, str], seed: int = 0) -> None:
        self.given = {role: source for role, source in given.items() if source}
        self.seed = seed

    def __contains__(self, role: str) -> bool:
        return role in self.given

    @functools.cached_property
    def reserved(self) -> frozenset[str]:
        """Contents of the sources that are given to test on."""
        tests = [name for name in self.given if name.endswith("_test")]
        return frozenset(content(p) for name in tests for p in self._source(name))

    def rows(self, role: str, use: str, n: int | None = None) -> PromptSet:
        """Prompts of a role that serve a use: n of them, or all; fewer where the source has fewer.

        Raises InputError naming the role when the study has no such role or its source cannot be read.
        """
        if role not in self.given:
            raise InputError(f"{role}: this study has no such prompts; it has {', '.join(self.given)}")
        if self.given[role] == corpus.SOURCE:
            return self._embedded(role, use, n)
        if use == "test" and f"{role}_test" in self.given:
            return smallest(self._source(f"{role}_test"), n, self.seed)
        found = self._source(role).filter(helpful=bool) if role == "new_task" else self._source(role)
        kept = PromptSet([p for p in found if content(p) not in self.reserved], found.name)
        return rows(kept, use, n, self.seed)

    def _source(self, name: str) -> PromptSet:
        role = name.removesuffix("_test")
        try:
            return _loaded(self.given[name], ROLES[role], _stamp(self.given[name]))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    def _embedded(self, role: str, use: str, n: int | None) -> PromptSet:
        split = EMBEDDED_SPLITS[use]
        if role == "general" and use == "tune":
            raise InputError("general: embedded running text is not tuned on")
        if role == "general":
            return corpus.general(n or 200, split, self.seed)
        if role == "new_task":
            return tasks.differences(n, split, self.seed)
        if role == "second_language":
            return rows(corpus.corpus("harmful", split, "de"), use, n, self.seed)
        return rows(corpus.corpus(ROLES[role], split), use, n, self.seed)

    def require(self, role: str, use: str, least: int) -> int:
        """How many prompts of a role serve a use; raises InputError when these are fewer than ``least``."""
        found = len(self.rows(role, use))
        if found < least:
            name = f"{role}_test" if use == "test" and f"{role}_test" in self.given else role
            whole = "the embedded corpus" if self.given[name] == corpus.SOURCE else self.given[name]
            raise InputError(f"{name}: {whole} has {found} prompts to {use} with; at least {least} are needed")
        return found


def _stamp(source: str) -> tuple[Any, ...]:
    """Changes when a file does that the source may be read from: one that it names, or one of the folder NT_DATA.

    It is taken at every look at the prompts, so no file is read for it, as `sources.local_file` does to tell which of
    NT_DATA holds a set.
    """
    paths = [path.absolute() for path in sources.named_paths(source)]
    folder = os.environ.get("NT_DATA")
    if folder and source.partition(":")[0] in REGISTRY:
        with contextlib.suppress(OSError):  # reading the source says what is wrong with the folder
            paths = sorted(Path(folder).expanduser().absolute().iterdir())
    stats = [(str(path), path.stat()) for path in paths if os.path.isfile(path)]
    return folder, *((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)


@functools.lru_cache(maxsize=16)
def _loaded(source: str, kind: str, stamp: tuple[Any, ...]) -> PromptSet:
    """A source as a whole; kept, since a run checks it when it begins and reads it again in its cells."""
    return sources.load_prompts(source, kind=kind)
