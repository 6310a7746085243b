"""The ground floor: where things lie, files that are whole or not there, and the one sealed file format.

Scores, neuron sets, unit maps, deltas and modulations are safetensors files with JSON in the header, a checksum over
the header's entries and a digest of the values: any safetensors reader opens them, nothing is unpickled, and a damaged
one is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nt_utils.errors import InputError, first_line

if TYPE_CHECKING:
    from torch import Tensor


# ------------------------------------------------------------------------------------------------------- paths


def project_root() -> Path:
    """The checkout this runs from (nearest folder upwards with notebooks/ and nt_utils/), else the current folder."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parent.parent):
        if (folder / "notebooks").is_dir() and (folder / "nt_utils").is_dir():
            return folder
    return Path.cwd()


def study_name(model: str, study: str = "", preset: str = "default") -> str:
    """Folder name of a study: its given name or the model's last path component, with the preset if not default."""
    name = study or re.sub(r"[^a-z0-9._-]+", "-", Path(model.rstrip("/")).name.lower()).strip("-.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"study: got {name!r}; allowed: letters, digits, dot, dash and underscore")
    return name if preset == "default" else f"{name}-{preset}"


def run_folder(runs: str, study: str, seed: int) -> Path:
    """``runs``/study/seed-N; '' = runs/ of the project."""
    return (Path(runs).expanduser() if runs else project_root() / "runs") / study / f"seed-{seed}"


def cache_folder() -> Path:
    """What runs share: NT_CACHE, or nt_utils in the user's cache folder. InputError where there is no home."""
    given, shared = os.environ.get("NT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given).expanduser() if given else Path(shared or Path.home() / ".cache").expanduser() / "nt_utils"
    except RuntimeError as error:
        raise InputError(f"cache: no home folder is known ({error}); set NT_CACHE to a folder") from error


def writable(folder: Path) -> Path:
    """The folder, made; InputError in one line where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"cache: {folder} cannot be written ({why}); set NT_CACHE to another folder") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------- whole or not there


@contextlib.contextmanager
def atomic(path: Path):
    """Yield a temporary path in the same folder; it takes ``path``'s name only when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield tmp
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def cached(path: Path, load: Callable[[Path], Any], make: Callable[[Path], Any], key: Mapping[str, Any]):
    """``load(path)`` when the artifact exists and was made with ``key``; else ``make(path)``.

    A notebook that needs an upstream artifact calls this, so that it runs alone: what is missing is computed.
    """
    note = path.with_name(path.name + ".key.json")
    text = json.dumps(dict(key), sort_keys=True, default=str)
    if path.is_file() and note.is_file() and note.read_text(encoding="utf-8") == text:
        try:
            return load(path)
        except InputError as error:
            print(f"{error}; computing it again", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)  # a run that is killed below must not leave the old key beside a new artifact
    made = make(path)
    with atomic(note) as tmp:
        tmp.write_text(text, encoding="utf-8")
    return made


# ------------------------------------------------------------------------------------------------- sealed files


def read_header(path: Path, wanted: str) -> dict:
    """The metadata of a sealed file whose format starts with ``wanted``; InputError where it is damaged or another kind."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file ({first_line(error)})") from error
    if not meta.get("format", "").startswith(wanted):
        raise InputError(f"{path}: not a {wanted.rstrip('.')} file (its format is {meta.get('format', 'unnamed')!r})")
    if sealed(meta) != meta:
        raise InputError(f"{path}: damaged file: its header does not match its checksum")
    return meta


def write_sealed(path: Path | str, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Write tensors and a header (its "format" names the kind of file) with checksums over both; whole or not at all.

    Raises OSError where the disk takes no more.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic(Path(path)) as tmp:
        try:
            save_file(tensors, tmp, metadata=sealed({**header, "digest": digest_of(tensors.items())}))
        except SafetensorError as error:  # is no OSError
            raise OSError(f"{path}: {first_line(error)}") from error
    return Path(path)


def read_sealed(path: Path | str, wanted: str) -> tuple[dict, dict[str, Tensor]]:
    """Header and tensors of what :func:`write_sealed` wrote; InputError where it is damaged or another kind."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    header = read_header(path, wanted)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise InputError(f"{path}: damaged file ({first_line(error)})") from error
    # Sets and maps of earlier versions have no digest; their fingerprint is over the same values.
    if digest_of(tensors.items()) != header.get("digest") and ("digest" in header or "fingerprint" not in header):
        raise InputError(f"{path}: damaged file: its values do not match its digest")
    return header, tensors


@contextlib.contextmanager
def damage_reported(path: Path | str) -> Iterator[None]:
    """An entry of a file's header that is missing or makes no sense, inside, is said of the file in one line."""
    try:
        yield
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError) and str(error).startswith(str(path)):
            raise
        raise InputError(f"{path}: damaged file ({first_line(error)})") from error


def sealed(header: Mapping[str, str]) -> dict[str, str]:
    """The header with a checksum over its entries: a flipped byte must not pass for another set's description."""
    entries = {k: v for k, v in header.items() if k != "checksum"}
    return entries | {"checksum": hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()}


def digest_of_file(file: BinaryIO) -> str:
    """SHA-256 of an open safetensors file without its metadata, read in pieces: memory stays flat."""
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    while piece := file.read(1 << 16):
        digest.update(piece)
    return digest.hexdigest()


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, precisions, shapes and values, whatever the order."""
    import torch

    parts = []
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(flat.data).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------- Markdown


def escaped(text: object) -> str:
    """Text for a cell of a Markdown table: nothing in it is read as markup, and no control character ends a line."""
    words = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    words = re.sub(r"[\x00-\x1f\x7f]+", " ", words)
    return re.sub(r"([\\`*{}\[\]|$~]|(?<!\w)_|_(?!\w))", r"\\\1", words)
