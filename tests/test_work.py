"""Progress of long loops, and counts of work."""

import io
import sys
import weakref

import pytest

from nt_utils import work
from nt_utils.interventions.tuning import tune


def test_counts_add_up():
    before = work.COUNTS.copy()
    work.count(scored_rows=3, scored_tokens=40)
    work.count(scored_rows=2)
    found = {name: work.COUNTS[name] - before[name] for name in ("scored_rows", "scored_tokens")}
    assert found == {"scored_rows": 5, "scored_tokens": 40}


def test_a_batch_gets_lines_with_part_and_time_left_and_the_notebook_nothing(monkeypatch, capsys):
    log = io.StringIO()
    monkeypatch.setenv(work.IN_BATCH, "1")
    monkeypatch.setattr(work, "SECONDS", 0.0)
    monkeypatch.setattr(sys, "__stderr__", log)
    with work.part("SN-Tune"), work.part(""), work.part("rate 0.001"):  # a part without a name is none
        assert list(work.track(range(5), "training", unit="step")) == [0, 1, 2, 3, 4]
    lines = [line.strip("\r ") for line in log.getvalue().splitlines() if work.MARK in line]
    assert lines and all(line.startswith("progress: SN-Tune, rate 0.001, training: ") for line in lines)
    assert any("4 of 5 step" in line and "so far" in line and "to go" in line for line in lines)
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_each_item_of_a_mapping_is_a_part(monkeypatch):
    seen = []
    for name, value in work.parts({"SN": 1, 0.5: 2}):
        seen.append((name, value, list(work._parts)))
        if value == 2:
            break
    assert seen == [("SN", 1, ["SN"]), (0.5, 2, ["0.5"])] and not work._parts


def test_without_a_batch_it_is_a_bar_and_can_be_switched_off(monkeypatch, capsys):
    monkeypatch.delenv(work.IN_BATCH, raising=False)
    with work.track(total=3, desc="short") as bar:
        bar.update(2)
    assert capsys.readouterr().err == "", "a short loop shows nothing"
    monkeypatch.setattr(work, "DELAY", 0.0)
    with work.track(total=3, desc="scoring", disable=True) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
    with work.track(total=3, desc="scoring") as bar:
        bar.update(2)
    assert "scoring" in capsys.readouterr().err


class Memory:
    """Stands in for the C library: what it was asked for, and whether what was held is gone by then."""

    def __init__(self, held=lambda: None):
        self.asked, self.held = [], held

    def mallopt(self, parameter, value):
        self.asked.append((parameter, value))

    def malloc_trim(self, pad):
        self.asked.append(("trim", self.held() is None))


def test_memory_is_given_back_once_nothing_of_the_call_is_left(monkeypatch):
    """Trained weights, gradients and optimiser are still there while the function's own names are."""
    memory = Memory()
    monkeypatch.setattr(work.ctypes, "CDLL", lambda name: memory)

    class Held:
        pass

    @work.memory_released
    def train(fail):
        held = Held()
        memory.held = weakref.ref(held)
        assert memory.asked[-1] == (-3, 2**21), "meanwhile large blocks come from the system"
        if fail:
            raise ValueError("diverged")
        return "done"

    once = [(-3, 2**21), (-3, 2**25)]
    assert train(False) == "done" and memory.asked == [*once, ("trim", True)]
    with pytest.raises(ValueError, match="diverged"):
        train(True)
    assert memory.asked[3:] == [*once, ("trim", False)], "the error still holds what it met"
    assert tune.__wrapped__.__name__ == "tune", "a training is such a call"


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_other_c_libraries_keep_their_memory_without_a_word(monkeypatch, error):
    def missing(name):
        raise error

    monkeypatch.setattr(work.ctypes, "CDLL", missing)
    assert work.memory_released(lambda: "done")() == "done"
