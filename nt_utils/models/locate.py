"""From what a user calls a model to the checkpoint that is loaded."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from nt_utils.models import box, gguf

#: Adapters that come with the package, a folder each; `adapter_config.json` names the model in the box that they change.
ADAPTERS = Path(__file__).with_name("adapters")


def located(source: str | Path, revision: str | None = None) -> str:
    """The checkpoint folder or hub id of a model, as transformers reads it.

    Args:
        source: a folder, a hub id, an id of :mod:`nt_utils.models.box`, a name in ADAPTERS, a local .gguf file, or a .gguf
            file of a hub repository ("org/name:file.gguf"). GGUF files are dequantised into a folder of the cache, once.
        revision: of a hub repository.

    Raises:
        ModelError: the file cannot be had, is damaged, or is no model of a supported family.
    """
    text = str(source)
    if text in box.table():
        return str(box.folder(text))
    if Path(text).name == text and (ADAPTERS / text / ADAPTER_CONFIG_NAME).is_file():
        return str(ADAPTERS / text)
    if not text.endswith(".gguf"):
        return str(Path(text).expanduser()) if text.startswith("~") else text
    return str(gguf.folder(gguf.file(text, revision)))
