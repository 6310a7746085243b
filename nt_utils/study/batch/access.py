"""May this machine have the model? Told without loading anything, and without ever showing a token."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

import nt_utils
from nt_utils.errors import InputError, gate_message
from nt_utils.files import cache_folder, read_json
from nt_utils.study.batch.parameter_files import StudyFile

#: Models that any machine can have, read here without loading PyTorch (see nt_utils/models/box.py).
BOX = Path(nt_utils.__file__).parent / "models" / "box.yaml"
ADAPTERS = BOX.with_name("adapters")  # see nt_utils/models/locate.py


def boxed(model: str) -> dict[str, Any]:
    """What is known of a model in the box, with "here": its file lies in NT_MODELS; {} for any other model.

    Of an adapter that comes with the package, what is known of its base model.
    """
    if Path(model).name == model and (adapter := ADAPTERS / model / "adapter_config.json").is_file():
        model = read_json(adapter)["base_model_name_or_path"]
    row = yaml.safe_load(BOX.read_text(encoding="utf-8")).get(model)
    if row is None:
        return {}
    given = os.environ.get("NT_MODELS")
    here = Path(given).expanduser() / row["file"] if given else None
    return row | {"here": here is not None and here.is_file()}


def cached_file(model: str, name: str = "config.json") -> Path | None:
    """A file of a hub model in the hub's cache, of a model in the box in this project's; or None."""
    from huggingface_hub import try_to_load_from_cache

    if row := boxed(model):
        path = cache_folder() / "models" / row["sha256"] / name
        return path if path.is_file() else None

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
