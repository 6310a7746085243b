"""Averages over seeds, and runs that must not be mixed."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nt_utils.errors import InputError
from nt_utils.study import ledger, seeds
from tests.study.test_ledger import ROW


def write_run(study, seed, *, finished=True, code="c", model="m", value=0.6, share=0.01):
    folder = study / f"seed-{seed}"
    (folder / "findings").mkdir(parents=True)
    row = ledger.finding(**(ROW | {"seeds": str(seed), "value": value, "notebook": "06_comparison"}))
    pd.DataFrame([row]).to_csv(folder / "findings" / "06_comparison.csv", index=False)
    (folder / "provenance").mkdir()
    note = {"finished": finished, "code": code, "parameters": {"model": model, "share": share, "seed": seed}}
    (folder / "provenance" / "06_comparison.json").write_text(json.dumps(note))
    (folder / "figures").mkdir()
    table = pd.DataFrame(
        {
            "defence": ["none", "SN-Tune"],
            "metric": "ASR",
            "value": [value, value / 2],
            "low": 0.0,
            "high": 1.0,
            "n": 40,
            "rate": 0.1,
            "step": 2,
        }
    )
    table.to_csv(folder / "figures" / "06_defences.csv", index=False)
    return folder


def test_every_seed_is_shown_with_a_t_interval(tmp_path):
    values = [0.5, 0.6, 0.8]
    folders = [write_run(tmp_path / "s", i, value=v) for i, v in enumerate(values)]
    target = seeds.aggregate(folders)
    assert target == tmp_path / "s" / "comparison"
    row = pd.read_csv(target / "findings.csv").iloc[0]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (row["value"], row["low"], row["high"]) == pytest.approx((np.mean(values), low, high), rel=1e-5)
    assert row["seeds"] == 3
    assert row["each"] == "0: 0.5; 1: 0.6; 2: 0.8"
    assert row["verdicts"] == "holds in 3"
    table = pd.read_csv(target / "06_defences.csv")
    assert table["defence"].tolist() == ["none", "SN-Tune"]
    assert table.loc[0, "value"] == pytest.approx(np.mean(values))
    assert table["n"].tolist() == [3, 3]
    assert table["interval"].str.contains("t intervals over seeds").all()
    assert (target / "06_defences.png").is_file()
    before = (target / "findings.csv").read_bytes()
    seeds.aggregate(folders)
    assert (target / "findings.csv").read_bytes() == before


def test_one_seed_alone_has_no_interval_and_says_so(tmp_path, capsys):
    folder = write_run(tmp_path / "s-quick", 0)
    row = pd.read_csv(seeds.aggregate([folder]) / "findings.csv").iloc[0]
    assert np.isnan(row["low"])
    assert seeds.shown(folder)["each"].tolist() == ["0: 0.6"]
    assert "one seed alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model": "other"}, "model = 'other'"), ({"share": 0.5}, "share = 0.5"), ({"code": "d"}, "other code")],
)
def test_runs_that_differ_are_not_mixed(tmp_path, change, message, capsys):
    folders = [write_run(tmp_path / "s", 0), write_run(tmp_path / "s", 1, **change)]
    with pytest.raises(InputError, match=message):
        seeds.aggregate(folders)
    assert len(seeds.shown(folders[0])) == 1
    assert message in capsys.readouterr().out


def test_missing_runs_are_listed_with_their_command(tmp_path):
    folders = [write_run(tmp_path / "testbed-full", 0), write_run(tmp_path / "testbed-full", 1, finished=False)]
    with pytest.raises(InputError, match="not complete") as error:
        seeds.aggregate([*folders, tmp_path / "testbed-full" / "seed-2"])
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 2
    assert 'make study STUDY=testbed SEEDS="1" PRESET=full' in lines[0]
    assert 'SEEDS="2"' in lines[1]
