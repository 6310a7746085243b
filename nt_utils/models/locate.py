"""Where a model is: what a user names as ``model`` becomes a folder or a hub id that transformers can load."""

from __future__ import annotations

from pathlib import Path


def located(source) -> str:
    """A folder's path or a hub id. A leading ``~`` is the home folder."""
    return str(Path(source).expanduser()) if str(source).startswith("~") else str(source)
