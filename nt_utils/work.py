"""What was done and how far: counts of a notebook's work, and the one way in which long loops say where they are.

Generation, scoring and training add to ``COUNTS``; a run writes them into its provenance, and ``make plan`` predicts from
those of published runs. ``track`` is tqdm's bar in a live notebook and, in a batch, a line every half minute in the step's
log, so that an executed notebook keeps nothing of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil
import tqdm as bars
from tqdm.auto import tqdm

#: Kind of work -> how much (see :func:`count`).
COUNTS: Counter[str] = Counter()
#: Set in the steps of a batch: progress goes, as lines, to the kernel's error stream, which is the step's log.
IN_BATCH = "NT_BATCH_STEP"
#: When ``make study`` began (seconds since 1970), for its steps; and when this process did.
STARTED, _begun = "NT_STUDY_STARTED", time.time()
MARK, SECONDS = "progress: ", 30.0
#: Seconds before a loop shows a bar in a live notebook: thousands are shorter.
DELAY = 2.0
_parts: list[str] = []
T = TypeVar("T")
P = ParamSpec("P")


def count(**amounts: float) -> None:
    """Add to the counts. The kinds that ``make plan`` reads:

    read_tokens                      through a plain forward pass, without gradients: prompts, likelihoods, statistics
    written_tokens, decode_steps     of answers: tokens, and forward passes of one token a row
    cached_answers                   answers that an earlier study or process left (see :func:`is_older`) and that cost nothing
    scored_rows, scored_tokens       scored exactly
    gradient_tokens                  forward and backward with frozen weights: attribution, learning alpha
    trained_steps, trained_rows, trained_tokens    a backward pass into some weights
    tuned_steps, tuned_rows, tuned_tokens          into more than half of all weights
    """
    COUNTS.update({name: int(amount) for name, amount in amounts.items()})


def is_older(path: Path) -> bool:
    """Whether a file was there before this study, or this process where it is none's, began: what it holds was no work of it.

    An answer that the same study gave before is one that it does not have to give twice, on any machine.
    """
    try:
        return path.stat().st_mtime < float(os.environ.get(STARTED, _begun))
    except OSError:  # deleted meanwhile
        return True


def clock(seconds: float) -> str:
    """ "45 s", "3 min 20 s", "2 h 05 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def measured() -> dict[str, int]:
    """The counts so far, with the largest memory of this process and of its GPUs, in bytes, and its processor's seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = dict(COUNTS) | {"peak_bytes": peak, "cpu_seconds": round(used.ru_utime + used.ru_stime)}
    torch = sys.modules.get("torch")  # not loaded for this alone
    if torch is not None and torch.cuda.is_available():
        found["gpu_peak_bytes"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return found


def memory_released(function: Callable[P, T]) -> Callable[P, T]:
    """A function in which large blocks go back to the system when they are freed, and all of them however it ends.

    Else the C library (glibc; nothing happens elsewhere) keeps most of what is freed. Training all weights of a model with
    half a billion took 16 GiB in place of 13.5, and 6 of the 9 GiB that were held afterwards were free.
    """

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        _from_the_system(2**21)
        try:
            return function(*args, **kwargs)
        finally:
            _from_the_system(2**25)
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)

    return inner


def _from_the_system(size: int) -> None:
    """Blocks of this many bytes and more are mapped one by one; glibc by itself takes up to 2^25 from what it keeps."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD


@contextmanager
def part(name: str) -> Iterator[None]:
    """What the loops inside belong to: an arm, a rate, a draw. Shown before their own labels."""
    _parts.append(name)
    try:
        yield
    finally:
        _parts.pop()


def parts(named: Mapping[Any, T]) -> Iterator[tuple[Any, T]]:
    """The items of a mapping, each while :func:`part` says its name."""
    for name, value in named.items():
        with part(str(name)):
            yield name, value


def track(items=None, desc: str = "", **options):
    """tqdm(items, desc, total=..., unit=..., disable=...), as said above; takes its place away at the end."""
    options = {"leave": False} | options
    desc = ", ".join(name for name in [*_parts, desc] if name)
    if IN_BATCH not in os.environ:
        return tqdm(items, desc=desc, **({"delay": DELAY} | options))
    options |= {"file": sys.__stderr__, "mininterval": SECONDS, "maxinterval": 2 * SECONDS, "delay": SECONDS}
    form = MARK + "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} to go\n"
    return bars.tqdm(items, desc=desc, bar_format=form, **options)


def memory() -> tuple[int, int]:
    """Bytes of memory that this process may have, and that are free of them (a container's limit counts)."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = next(int(line.split()[1]) for line in (group / "memory.stat").open() if line.startswith("file "))
        total, free = min(total, limit), min(free, limit - used + cached)
    except (OSError, ValueError, StopIteration):  # no such limit here
        pass
    return total, free
