"""One step of the workflow: a notebook executed with papermill, into its final name only when every cell succeeded."""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import functools
import io
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import psutil

from nt_utils.errors import InputError
from nt_utils.files import atomic, read_json
from nt_utils.work import IN_BATCH, MARK, STARTED, clock

#: Set by ``make study`` for its steps beside STARTED: its process, whose death ends them.
OWNER = "NT_STUDY_PROCESS"
#: Environment variables whose values are kept out of everything that is written.
SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
HIDDEN = "[hidden]"
WIDGET = "application/vnd.jupyter.widget-view+json"
#: Lines of the error stream that an executed notebook does not keep: bars, and notices about the kernel's sockets.
NOISE = re.compile(r"^\s*$|\r|\d+%\||it/s|Loading weights|socket|traitlets|zmq", re.IGNORECASE)


def run_notebook(notebook: str, parameters: Mapping[str, Any], output: Path, root: Path) -> None:
    """Execute a notebook of ``root`` into ``output``; what it prints goes to ``logs/<notebook>.log`` beside it.

    Raises InputError in one line when a cell fails, the kernel dies, the disk is full or another process runs the same
    step; what was executed by then is kept as ``<output>.failed.ipynb``, and an older ``output`` stays as it was.
    """
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    os.environ[IN_BATCH] = notebook
    output = Path(output).absolute()
    failed, log = output.with_suffix(".failed.ipynb"), output.parent / "logs" / f"{notebook}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with claimed(log.with_suffix(".lock"), f"{output}: this step"):
            failed.unlink(missing_ok=True)
            _remove_leftovers(output)
            with atomic(output) as tmp:
                try:
                    with _log(log) as file, _progress(log, notebook):
                        _execute(root / "notebooks" / f"{notebook}.ipynb", tmp, parameters, root, file)
                except BaseException:  # whatever it was, a half-executed notebook may not pass for a finished one
                    if tmp.exists():
                        tmp.replace(failed)
                    raise
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{notebook}: {error.strerror or error} ({error.filename or output.parent})") from error
    except Exception as error:
        raise InputError(f"{notebook}: {hide(_last_line(error))} (see {failed})") from error


def _execute(source: Path, target: Path, parameters: Mapping, root: Path, log: _Hiding) -> None:
    papermill = _papermill()
    with tempfile.TemporaryDirectory(prefix="nt-") as folder:
        streams = {"progress_bar": False, "stdout_file": log, "stderr_file": log}
        kernel = {"kernel_name": "python3", "cwd": str(root), "config": _sockets(Path(folder))}
        papermill.execute_notebook(str(source), str(target), dict(parameters), **streams, **kernel)
    _drop_bars(target)


def _sockets(folder: Path) -> Any:
    """Let the kernel be reached through sockets in this folder.

    Free TCP ports, Jupyter's way, may be taken between their choice and their use when steps start side by side, and
    anybody on the machine can read what passes through them. Where the folder's path is too long for sockets
    (about 100 bytes) they are used all the same.
    """
    from traitlets.config import Config

    file = folder / "kernel.json"
    if len(os.fsencode(file)) > 90:
        return Config()
    return Config({"KernelManager": {"transport": "ipc", "connection_file": str(file)}})


def _drop_bars(path: Path) -> None:
    """Take progress out of an executed notebook: without the kernel's widgets, bars are broken stubs; text bars, and the
    notices of the library that talks to the kernel, are no results."""
    book = read_json(path)
    for cell in book["cells"]:
        kept = []
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                lines = "".join(output["text"]).splitlines(keepends=True)
                output["text"] = [line for line in lines if not NOISE.search(line)]
            if WIDGET not in output.get("data", {}) and output.get("text") != []:
                kept.append(output)
        if "outputs" in cell:
            cell["outputs"] = kept
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _progress(log: Path, notebook: str) -> Iterator[None]:
    """Show the progress lines of a step's log as they come, once each: tqdm writes many of them twice."""
    ended = threading.Event()

    def follow() -> None:
        with log.open(encoding="utf-8", errors="replace") as file:
            over, shown = False, ""
            while not over:
                over = ended.wait(1.0)  # asked first: what was written until the end is still read
                for line in file:
                    found = line.rpartition(MARK)[2].strip()
                    if MARK in line and found != shown:
                        shown = found
                        print(f"       {notebook}: {shown}", flush=True)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@functools.cache
def _papermill():
    """papermill, writing notebooks (it saves after every cell, at absolute paths) through a handler that hides secrets.

    On the way it would import a checker of address formats that builds its grammar for 1.5 s, in every step and for
    nothing; jsonschema does without it.
    """
    checker = "rfc3987_syntax"
    if checker not in sys.modules:
        sys.modules[checker] = None  # type: ignore[assignment]  # Python's way to let an import fail
    try:
        import papermill
        from papermill.iorw import LocalHandler, papermill_io
    finally:
        if sys.modules[checker] is None:
            del sys.modules[checker]

    class Hiding(LocalHandler):
        def write(self, buf, path):
            super().write(hide(buf), path)

    papermill_io.register("/", Hiding())
    return papermill


@contextlib.contextmanager
def _log(path: Path) -> Iterator[_Hiding]:
    """A step's log: what its cells print, and what the kernel itself writes to this process's error stream."""
    with path.open("w", encoding="utf-8", buffering=1) as file:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield _Hiding(file)
        finally:
            os.dup2(kept, 2)
            os.close(kept)


class _Hiding(io.TextIOBase):
    """Writes to a file without secrets."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> int:
        self._file.write(hide(text))
        return len(text)

    def flush(self) -> None:
        self._file.flush()


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def secrets() -> list[str]:
    """Values of the environment's tokens, keys and passwords, and of the hub's token files; also as JSON writes them."""
    values = [value for name, value in os.environ.items() if SECRET.search(name.upper())]
    with contextlib.suppress(OSError, UnicodeError):
        values.append(_token_file().read_text(encoding="utf-8"))
    stored = configparser.ConfigParser(interpolation=None)  # of all accounts that this user ever logged in with
    with contextlib.suppress(OSError, UnicodeError, configparser.Error):
        stored.read(_token_file().with_name("stored_tokens"), encoding="utf-8")
    values += [value for account in stored.sections() for name, value in stored.items(account) if "token" in name]
    found = {v.strip() for v in values if len(v.strip()) >= 8}
    found |= {json.dumps(v, ensure_ascii=False)[1:-1] for v in found}
    return sorted(found, key=len, reverse=True)


def _token_file() -> Path:
    """Where the hub's token lies, by the rules of ``huggingface_hub.constants``, which reads the environment only once."""
    cache = os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    home = os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))
    path = os.environ.get("HF_TOKEN_PATH", os.path.join(home, "token"))
    return Path(os.path.expandvars(os.path.expanduser(path)))


def hide(text: str) -> str:
    """The text without the values of :func:`secrets`."""
    for value in secrets():
        text = text.replace(value, HIDDEN)
    return text


# ------------------------------------------------------------------------------------------------- one at a time


@contextlib.contextmanager
def claimed(path: Path, what: str, patience: float = 15.0) -> Iterator[int]:
    """Hold the lock file ``path``; yields its descriptor. The system frees it when its last holder ends, however.

    Raises InputError when a live process holds it, or when what a dead one left behind does not end in ``patience``
    seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    with path.open("a+", encoding="utf-8") as file:
        while not _locked(file):
            file.seek(0)
            holder = file.read().strip()
            if (holder.isdigit() and _alive(int(holder))) or time.monotonic() >= end:
                raise InputError(f"{what} is at work in another process (number {holder or 'unknown'})")
            time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nothing can be held, nothing is refused
        return True
    return True


def _remove_leftovers(output: Path) -> None:
    """Temporary files of this step whose process was killed; nobody else writes them while the step is claimed."""
    for left in output.parent.rglob(f".{output.stem.split('_')[0]}_*.tmp*"):
        left.unlink()


def die_with_the_study() -> None:
    """End this process when ``make study`` is gone: nothing goes on writing into a folder that a new run may claim.

    The kernel watches this process and ends with it.
    """
    owner = int(os.environ.get(OWNER, "0"))

    def watch() -> None:
        while _alive(owner):
            time.sleep(0.5)
        os._exit(1)

    if owner:
        threading.Thread(target=watch, daemon=True).start()


def _alive(process: int) -> bool:
    """Whether a process runs; one that ended and that its parent has not asked about yet (a zombie) does not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


# ------------------------------------------------------------------------------------------------------ progress


def expected_seconds(notebook: str, output: Path) -> float | None:
    """Median of what this notebook took in the run folders of the same study and preset; None when it never ran."""
    found = []
    for note in output.absolute().parent.parent.glob(f"seed-*/provenance/{notebook}.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(read_json(note).get("seconds"))
    found = [seconds for seconds in found if seconds]
    return statistics.median(found) if found else None


def since_the_start() -> str:
    """ ", 3 min 20 s since the start" inside ``make study``, else nothing."""
    started = float(os.environ.get(STARTED, "0"))
    return f", {clock(time.time() - started)} since the start" if started else ""
