"""From what a user calls a model to the checkpoint that is loaded."""

from __future__ import annotations

from pathlib import Path

from nt_utils.models import box, gguf


def located(source: str | Path, revision: str | None = None) -> str:
    """The checkpoint folder or hub id of a model, as transformers reads it.

    Args:
        source: a folder, a hub id, an id of :mod:`nt_utils.models.box`, a local .gguf file, or a .gguf file of a hub
            repository ("org/name:file.gguf"). GGUF files are dequantised into a folder of the cache, once.
        revision: of a hub repository.

    Raises:
        ModelError: the file cannot be had, is damaged, or is no model of a supported family.
    """
    text = str(source)
    if text in box.table():
        return str(box.folder(text))
    if not text.endswith(".gguf"):
        return str(Path(text).expanduser()) if text.startswith("~") else text
    return str(gguf.folder(gguf.file(text, revision)))
