"""What a piece of work costs in memory, measured from inside the process. For timings, never for results tables."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_PROBE = 16 * 2**20


def resident(which: str = "VmRSS") -> int:
    """Bytes of memory this process has resident now (VmRSS) or had at most since :func:`forget_peak` (VmHWM)."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(which + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {which}")


def forget_peak() -> None:
    """Let the kernel's own mark of the highest resident memory start anew (a sampling thread misses short peaks,
    and fewer of them the longer the run).

    Raises:
        OSError: the kernel keeps no such mark, or one that short peaks leave as it was.
    """
    if not _kernel_marks_peaks():
        raise OSError("this system's kernel does not mark the peak of a process's resident memory")
    _CLEAR.write_text("5")


@cache
def _kernel_marks_peaks() -> bool:
    """Whether the mark rises with memory that is touched and given back, tried once: containers and virtual kernels
    exist that take the command and show a mark, but never move it."""
    try:
        _CLEAR.write_text("5")
        before = resident("VmHWM")
        if before - resident() > _PROBE // 2:
            return False
        with mmap.mmap(-1, _PROBE) as block:
            for page in range(0, _PROBE, mmap.PAGESIZE):
                block[page] = 1
        return resident("VmHWM") - before > _PROBE // 2
    except OSError:
        return False


def peak_of(work: Callable[[], object]) -> float:
    """Bytes that the work needs above what is held before it: of the GPU where there is one, else of this process.

    On a CPU freed memory that the allocator kept is used again without being seen, so that small amounts read too low.
    NaN where neither can be told (no Linux, or a kernel that keeps no mark of the peak, see :func:`forget_peak`).
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return float(torch.cuda.max_memory_allocated() - before)
    try:
        forget_peak()
        before = resident()
    except OSError:
        return math.nan
    work()
    return float(max(resident("VmHWM") - before, 0))
