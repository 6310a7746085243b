import json
import sys

import pytest

from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation.benchmarks import COLUMNS, run_benchmarks, write_choice_task
from tests.common import ScaledLogits, refused
from tests.tiny import tiny_lm

COLOURS = PromptSet(
    [
        Prompt(f"What colour is thing {i}?", helpful=f"It is {c}.", task="colours")
        for i, c in enumerate(["red", "blue"] * 10)
    ]
)


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_choice_task(COLOURS, tmp_path / "tasks", "colours", choices=2)


def test_written_task_holds_the_answer_among_others_of_its_task(tmp_path):
    more = COLOURS + PromptSet([Prompt("1 + 1", helpful="2", task="sums"), Prompt("1 + 2", helpful="3", task="sums")])
    folder = write_choice_task(more, tmp_path, "mixed", choices=2)
    rows = [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()]
    for row, prompt in zip(rows, more, strict=True):
        assert row["choices"][row["answer"]] == prompt.helpful and len(set(row["choices"])) == 2
        assert prompt.task != "sums" or set(row["choices"]) == {"2", "3"}
    assert {row["answer"] for row in rows} == {0, 1}
    with pytest.raises(InputError, match="task 'colours' has no 3 different known answers"):
        write_choice_task(COLOURS, tmp_path, "colours", choices=3)


def test_a_local_task_with_and_without_an_intervention(task_folder):
    pytest.importorskip("lm_eval")
    lm = tiny_lm()
    plain = run_benchmarks(lm, ["colours"], task_folder=task_folder)
    assert list(plain.columns) == list(COLUMNS)
    (line,) = plain.to_dict("records")
    assert (line["task"], line["metric"], line["n"], line["intervention"]) == ("colours", "acc", 20, "none")
    assert 0 <= line["low"] <= line["value"] <= line["high"] <= 1
    turned = run_benchmarks(lm, ["colours"], task_folder=task_folder, intervention=ScaledLogits())
    assert turned["value"][0] == pytest.approx(1 - line["value"]) and turned["intervention"][0] == "scaled"
    assert not lm.model.lm_head._forward_hooks
    assert run_benchmarks(lm, ["colours"], task_folder=task_folder, limit=5)["n"][0] == 5


def test_unknown_task_names_its_neighbours(task_folder):
    pytest.importorskip("lm_eval")
    with pytest.raises(
        InputError, match=r"unknown task 'colors': the harness has \d+ tasks, the nearest are .*colours"
    ):
        run_benchmarks(tiny_lm(), ["colors"], task_folder=task_folder)


def test_errors_in_one_line(tmp_path, monkeypatch):
    refused("tasks must be a list", lambda: run_benchmarks(tiny_lm(), "colours"))
    refused("there is no folder", lambda: run_benchmarks(tiny_lm(), ["colours"], task_folder=tmp_path / "no"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        InputError, match=r'benchmarks need lm-evaluation-harness: pip install "nt-utils\[benchmarks\]"'
    ):
        run_benchmarks(tiny_lm(), ["colours"])
