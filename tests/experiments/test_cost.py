import math

import pytest
import torch

from nt_utils.experiments import cost

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own counters are used there")


def work():
    return torch.ones(40 * 2**18)  # 40 MiB


@pytest.fixture(autouse=True)
def fresh_probe():
    cost._kernel_marks_peaks.cache_clear()
    yield
    cost._kernel_marks_peaks.cache_clear()


def test_peak_memory_sees_what_was_held():
    found = max(cost.peak_of(work) for _ in range(3))  # a kernel that takes memory back meanwhile hides a part
    if cost._kernel_marks_peaks():
        assert 30 * 2**20 < found < 200 * 2**20
    else:
        assert math.isnan(found)


@pytest.mark.parametrize(
    "status",
    ["VmHWM:\t  900000 kB\nVmRSS:\t  500 kB\n", "VmHWM:\t  500 kB\nVmRSS:\t  500 kB\n", "VmRSS:\t  500 kB\n", None],
    ids=["mark stays high", "mark stays low", "no mark", "no file"],
)
def test_a_kernel_without_a_moving_mark_gives_nan_not_zero(tmp_path, monkeypatch, status):
    """Seen in a container: the mark was shown and never moved, so that everything seemed to need 0 bytes."""
    if status is not None:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(cost, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(cost, "_CLEAR", tmp_path / "clear_refs")
    assert math.isnan(cost.peak_of(work))
    with pytest.raises(OSError, match="does not mark the peak"):
        cost.forget_peak()
