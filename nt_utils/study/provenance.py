"""What made a result: the code, the commit and the versions of the libraries that decide it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from nt_utils.files import read_json

PACKAGE = Path(__file__).resolve().parent.parent
#: Files of the package that decide results. The testbed's weights are large: the index holds their digests.
DECIDING = ("**/*.py", "**/*.yaml", "models/adapters/**/*", "testbed/weights/index.json")
#: How processes are started and whose account pays a cluster: no result follows from it.
PROFILES = "study/batch/profiles"
#: Stands behind the fingerprint of code that was edited while a run computed.
EDITED = "+edited"


@functools.cache
def code_fingerprint(folder: Path = PACKAGE) -> str:
    """Hash of this package's source and data: what was computed with others is computed again.

    It is taken once a process, since a running kernel keeps the code that it imported whatever is edited afterwards.
    """
    digest = hashlib.sha256()
    files = {file for pattern in DECIDING for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(file for file in files if not file.is_relative_to(folder / PROFILES)):
        digest.update(f"{file.relative_to(folder)}".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def notes(folder: Path) -> dict[str, dict[str, Any]]:
    """What made the results of a run folder: notebook -> its note, as :meth:`nt_utils.study.run.Run.provenance` writes it."""
    return {path.stem: read_json(path) for path in sorted((folder / "provenance").glob("*.json"))}


def code_edited(folder: Path = PACKAGE) -> bool:
    """Whether the package on disk is no longer the one that this process began with."""
    return code_fingerprint.__wrapped__(folder) != code_fingerprint(folder)


@functools.cache
def git_revision() -> str:
    """Commit of the project when this process began, with "+changes" when the tree differs; "" outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+changes" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def machine() -> dict[str, Any]:
    """What computes: platform, version of Python, number of processors and names of the GPUs that PyTorch sees."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
    }


def devices(note: Mapping[str, Any]) -> str:
    """What a run computed on, for a caption: "CPU", or its GPUs, also those of an interrupted run whose tables it took over."""
    makers = [note.get("machine", {}), *(kept["machine"] for kept in note.get("kept", {}).values())]
    found = [name for made in makers for name in made.get("gpus") or ["CPU"]]
    return " and ".join(dict.fromkeys(found))


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that decide results."""
    found = {}
    for name in "nt-utils torch transformers tokenizers datasets accelerate numpy scipy pandas gguf".split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
