"""Verdicts, the rows of the ledger and what is published from them."""

import json
import math

import pandas as pd
import pytest

from nt_utils.errors import InputError
from nt_utils.files import project_root
from nt_utils.study import ledger

ROW = dict(
    claim="c",
    paper="SN",
    section="4.1",
    model="testbed",
    statement="ASR rises by more than 50 points",
    value=0.6,
    low=0.55,
    high=0.7,
    n=100,
    seeds="0",
    notebook="01_safety_neurons",
    above=0.5,
)


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [
        (0.55, 0.7, {"above": 0.5}, "holds"),
        (0.4, 0.7, {"above": 0.5}, "undecided"),
        (0.1, 0.5, {"above": 0.5}, "does not hold"),
        (0.01, 0.09, {"below": 0.1}, "holds"),
        (0.05, 0.2, {"below": 0.1}, "undecided"),
        (0.1, 0.2, {"below": 0.1}, "does not hold"),
        (math.nan, 0.2, {"below": 0.1}, "not testable here"),
    ],
)
def test_the_verdict_follows_from_interval_and_margin(low, high, margin, expected):
    assert ledger.verdict(low, high, **margin) == expected


def test_a_margin_is_needed():
    for margins in ({}, {"above": 1, "below": 2}):
        with pytest.raises(InputError, match="above and below"):
            ledger.verdict(0, 1, **margins)


def test_rows_carry_the_verdict():
    assert ledger.finding(**ROW)["verdict"] == "holds"
    assert ledger.finding(**ROW, by_construction=True)["verdict"] == "by construction"
    silent = ledger.finding(**ROW, not_testable=True)
    assert silent["verdict"] == "not testable here"
    assert math.isnan(silent["value"])


@pytest.mark.parametrize("change", [{"low": None}, {"high": math.nan}, {"n": 0}, {"value": math.nan}])
def test_a_row_without_interval_or_n_is_refused(change):
    with pytest.raises(InputError, match="finding c"):
        ledger.finding(**(ROW | change))


def write_run(folder, seed, finished=True, **change):
    row = ledger.finding(**(ROW | {"seeds": str(seed)} | change))
    (folder / "findings").mkdir(parents=True)
    pd.DataFrame([row]).to_csv(folder / "findings" / "01_safety_neurons.csv", index=False)
    (folder / "provenance").mkdir()
    (folder / "provenance" / "01_safety_neurons.json").write_text(json.dumps({"finished": finished}))
    (folder / "figures").mkdir()
    for suffix in (".csv", ".png", ".pdf"):
        (folder / "figures" / f"01_dose{suffix}").write_text(f"{seed}")
    return folder


def test_publish_collects_rows_figures_and_the_readme_table(tmp_path):
    runs = [write_run(tmp_path / f"seed-{i}", i, value=0.6 + 0.01 * i) for i in range(3)]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{ledger.BEGIN}\nstale table\n{ledger.END}\nafter\n")
    ledger.publish(runs, tmp_path)
    table = pd.read_csv(tmp_path / "figures" / "findings.csv", dtype={"seeds": str})
    assert list(table.columns) == ledger.COLUMNS
    assert table["seeds"].tolist() == ["0", "1", "2"]
    assert (tmp_path / "figures" / "01_dose.png").read_text() == "0"
    text = readme.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "stale table" not in text
    assert "<b>01_safety_neurons</b>: 1 claims: holds 3" in text
    assert "| 0.61 [0.585, 0.635] | holds 3 |" in text
    each = (tmp_path / "figures" / "findings.md").read_text()
    assert "0: 0.6 [0.55, 0.7] **holds**<br>1: 0.61 [0.55, 0.7] **holds**" in each


def test_publish_refuses_unfinished_and_missing_runs(tmp_path):
    with pytest.raises(InputError, match="no findings"):
        ledger.collect([tmp_path / "nothing"])
    with pytest.raises(InputError, match="did not finish"):
        ledger.collect([write_run(tmp_path / "a", 0, finished=False)])


def test_publish_refuses_runs_of_different_code(tmp_path):
    runs = [write_run(tmp_path / f"seed-{i}", i) for i in range(2)]
    for run, code in zip(runs, "ab", strict=True):
        note = {"finished": True, "code": code}
        (run / "provenance" / "01_safety_neurons.json").write_text(json.dumps(note))
    with pytest.raises(InputError, match="different versions of the code"):
        ledger.collect(runs)


def test_the_readme_agrees_with_the_published_ledger():
    root = project_root()
    table = root / "figures" / "findings.csv"
    findings = pd.read_csv(table, dtype={"seeds": str, "section": str})
    text = (root / "README.md").read_text(encoding="utf-8")
    assert ledger.readme_table(findings) in text
    assert ledger.seeds_table(findings) == (root / "figures" / "findings.md").read_text(encoding="utf-8")
    assert set(findings["verdict"]) <= set(ledger.VERDICTS)
    told = findings[findings["verdict"] != "not testable here"]
    assert told[["value", "low", "high", "n"]].notna().all().all()
