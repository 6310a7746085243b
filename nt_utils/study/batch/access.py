"""May this machine have the model? Told without loading anything, and without ever showing a token."""

from __future__ import annotations

from pathlib import Path

from nt_utils.errors import InputError, gate_message
from nt_utils.study.batch.parameter_files import StudyFile


def cached_file(model: str, name: str = "config.json") -> Path | None:
    """A file of a hub model in the hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, name)
    except ValueError:  # no hub id
        return None
    return Path(found) if isinstance(found, str) else None


def is_local(model: str) -> bool:
    """Whether the model is a folder of this machine."""
    return Path(model).expanduser().is_dir()


def has_token() -> bool:
    """Whether a hub token is there."""
    from huggingface_hub import get_token

    return bool(get_token())


def check_access(file: StudyFile) -> None:
    """Refuse a study of a gated model when it is not cached and no token is there; nothing has started by then."""
    model = file.model
    if file.facts.get("gated") and not is_local(model) and not has_token() and cached_file(model) is None:
        raise InputError(f"model: {gate_message(model)}")
