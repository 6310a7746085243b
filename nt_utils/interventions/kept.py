"""Finished trainings on disk: a notebook that was interrupted does not repeat them.

A study names the files (:func:`keep`). A call of :func:`~nt_utils.interventions.tuning.tune` without a callback and in one
process then leaves its deltas under a name of its own, and takes over what the same call left: the same scope, examples
and options on the same model, by all that acts on it (:func:`nt_utils.models.identity.identity`). While hooks are on the
model, and beyond ``MOST_BYTES`` of all that a notebook keeps, nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from nt_utils.errors import InputError
from nt_utils.files import atomic, read_json
from nt_utils.interventions.delta import Delta
from nt_utils.models import LanguageModel
from nt_utils.work import COUNTS, count, is_older

MOST_BYTES = 2**33
FINAL = "final"
#: What made the trainings that were taken over from an earlier process, for provenance; each once.
TAKEN: list[dict[str, Any]] = []
#: Each time that something learnt was not learnt anew, whoever had learnt it.
REUSED: list[str] = []
_names: str | None = None
_made_with: Mapping[str, Any] = {}
_counted: set[str] = set()


def keep(names: str | None, made_with: Mapping[str, Any] | None = None) -> None:
    """Keep trainings in files of this name, in which "{key}" stands for which training; None: nowhere.

    made_with: what stands in ``TAKEN`` when another process takes one over (machine, commit).
    """
    global _names, _made_with
    if names != _names:
        TAKEN.clear()
        _counted.clear()
    _names, _made_with = names, made_with or {}


@contextmanager
def paused() -> Iterator[None]:
    """Nothing is kept or taken over inside: what is timed there has to happen."""
    global _names
    names, _names = _names, None
    try:
        yield
    finally:
        _names = names


def key_of(lm: LanguageModel, scope: Any, **facts: Any) -> str:
    """Identifies a training by the model, its scope (a dataclass) and all else that decides it; "" where none is kept."""
    acting = lm.identity() if _names is not None else None
    if acting is None:
        return ""
    values = {field.name: getattr(scope, field.name) for field in fields(scope)}
    named = {name: getattr(value, "fingerprint", value) for name, value in values.items()}
    parts = [acting, type(scope).__name__, named, facts]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _file(key: str, part: str) -> Path:
    return Path(str(_names).replace("{key}", f"{key}-{part}"))


def load(key: str) -> tuple[dict[str, Delta], dict[str, Any]] | None:
    """The deltas and the facts that were kept, None where there are none or a file is damaged, which is said.

    What an earlier process did is counted as work, once.
    """
    if not key or not (note := _file(key, "facts").with_suffix(".json")).is_file():
        return None
    try:
        kept = read_json(note)
        deltas = {part: Delta.load(_file(key, part)) for part in kept["parts"]}
    except (InputError, OSError, ValueError, KeyError) as error:
        print(f"a kept training is repeated: {error}")
        return None
    REUSED.append(key)
    if is_older(note):
        if kept["made_with"] not in TAKEN:
            TAKEN.append(kept["made_with"])
        if key not in _counted:
            _counted.add(key)
            count(**kept["work"])
    return deltas, kept["facts"]


def save(key: str, deltas: Mapping[str, Delta], facts: Mapping[str, Any], before: Counter[str]) -> None:
    """Keep the deltas, and then the facts (JSON-able), which say that they are complete; ``before``: the counts until then.

    A disk that is full costs the copy, not the training.
    """
    if not key:
        return
    note = _file(key, "facts").with_suffix(".json")
    there = sum(file.stat().st_size for file in note.parent.glob(Path(str(_names)).name.replace("{key}", "*")))
    if there + sum(delta.bytes for delta in deltas.values()) > MOST_BYTES:
        return
    body = {"parts": list(deltas), "facts": facts, "work": COUNTS - before, "made_with": _made_with}
    try:
        for part, delta in deltas.items():
            delta.save(_file(key, part))
        with atomic(note) as tmp:
            tmp.write_text(json.dumps(body), encoding="utf-8")
    except OSError as error:
        for part in deltas:
            _file(key, part).unlink(missing_ok=True)
        print(f"a training is not kept: {error}")
