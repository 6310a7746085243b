"""What made a result: the code, the commit and the versions of the libraries that decide it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from nt_utils.files import read_json


def code_fingerprint() -> str:
    """Hash of this package's source: what was computed by other code is computed again."""
    digest = hashlib.sha256()
    folder = Path(__file__).resolve().parent.parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def notes(folder: Path) -> dict[str, dict[str, Any]]:
    """What made the results of a run folder: notebook -> its note, as :meth:`nt_utils.study.run.Run.provenance` writes it."""
    return {path.stem: read_json(path) for path in sorted((folder / "provenance").glob("*.json"))}


def git_revision() -> str:
    """Commit of the project, with "+changes" when the tree differs; "" outside a checkout."""
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
