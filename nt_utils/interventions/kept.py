"""Finished trainings on disk: a notebook that was interrupted does not repeat them.

A study names the files (:func:`keep`). A call of :func:`~nt_utils.interventions.tuning.tune` that has no callback then
leaves its deltas under a name of its own, and takes over what the same call left: the same scope, examples, options and
weights, on the same kind of device. Trainings of more than ``MOST_BYTES`` are not kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nt_utils.files import atomic, read_json
from nt_utils.interventions.delta import Delta
from nt_utils.work import COUNTS, count, is_older

MOST_BYTES = 2**30
FINAL = "final"
_names: str | None = None


def keep(names: str | None) -> None:
    """Keep trainings in files of this name, in which "{key}" stands for which training; None: nowhere."""
    global _names
    _names = names


def key_of(scope: Any, **facts: Any) -> str:
    """Identifies a training: its scope (a dataclass; neuron sets by their fingerprint) and all else that decides it."""
    values = {field.name: getattr(scope, field.name) for field in fields(scope)}
    named = {name: getattr(value, "fingerprint", value) for name, value in values.items()}
    return hashlib.sha256(json.dumps([type(scope).__name__, named, facts]).encode()).hexdigest()[:16]


def _file(key: str, part: str) -> Path:
    return Path(str(_names).replace("{key}", f"{key}-{part}"))


def load(key: str) -> tuple[dict[str, Delta], dict[str, Any]] | None:
    """The deltas and the facts that were kept, None where there are none; what an earlier process did is counted as work.

    Raises InputError for a damaged file.
    """
    note = _file(key, "facts").with_suffix(".json")
    if _names is None or not note.is_file():
        return None
    kept = read_json(note)
    if is_older(note):
        count(**kept["work"])
    return {part: Delta.load(_file(key, part)) for part in kept["parts"]}, kept["facts"]


def save(key: str, deltas: Mapping[str, Delta], facts: Mapping[str, Any], before: Counter[str]) -> None:
    """Keep the deltas, and then the facts (JSON-able), which say that they are complete; ``before``: the counts until then."""
    if _names is None or sum(delta.bytes for delta in deltas.values()) > MOST_BYTES:
        return
    for part, delta in deltas.items():
        delta.save(_file(key, part))
    with atomic(_file(key, "facts").with_suffix(".json")) as tmp:
        tmp.write_text(json.dumps({"parts": list(deltas), "facts": facts, "work": COUNTS - before}), encoding="utf-8")
