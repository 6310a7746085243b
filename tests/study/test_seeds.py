"""Averages over seeds, and runs that must not be mixed."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nt_utils.errors import InputError
from nt_utils.study import claims, ledger, seeds
from tests.common import refused
from tests.study.test_ledger import make_run


def write_run(study, seed, *, finished=True, code="c", model="m", value=0.6, share=0.01):
    folder = study / f"seed-{seed}"
    (folder / "claims").mkdir(parents=True)
    run = make_run(folder, seed, model, "06_comparison")
    run.measured("X1", (value, value - 0.1, value + 0.1, 21))
    pd.DataFrame(ledger.run_rows(run)).to_csv(folder / "claims" / "06_comparison.csv", index=False)
    (folder / "provenance").mkdir()
    note = {"finished": finished, "code": code, "parameters": {"model": model, "share": share, "seed": seed}}
    (folder / "provenance" / "06_comparison.json").write_text(json.dumps(note))
    (folder / "figures").mkdir()
    rate = {"value": [value, value / 2], "low": 0.0, "high": 1.0, "n": 40, "rate": 0.1, "step": 2}
    table = pd.DataFrame({"defence": ["none", "SN-Tune"], "metric": "ASR", **rate})
    table.to_csv(folder / "figures" / "06_defences.csv", index=False)
    return folder


def test_every_seed_is_shown_with_a_t_interval(tmp_path):
    values = [0.5, 0.6, 0.8]
    folders = [write_run(tmp_path / "s", i, value=v) for i, v in enumerate(values)]
    target = seeds.aggregate(folders)
    assert target == tmp_path / "s" / "comparison"
    row = pd.read_csv(target / "claims.csv").set_index("claim").loc["X1"]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (row["value"], row["low"], row["high"]) == pytest.approx((np.mean(values), low, high), rel=1e-5)
    assert row["seeds"] == 3
    assert row["each"] == "0: holds 0.5 [0.4, 0.6]; 1: holds 0.6 [0.5, 0.7]; 2: holds 0.8 [0.7, 0.9]"
    assert row["verdict"] == claims.HOLDS
    table = pd.read_csv(target / "06_defences.csv")
    assert table["defence"].tolist() == ["none", "SN-Tune"]
    assert table.loc[0, "value"] == pytest.approx(np.mean(values))
    assert table["n"].tolist() == [3, 3]
    assert table["interval"].str.contains("t intervals over seeds").all()
    assert (target / "06_defences.png").is_file()
    before = (target / "claims.csv").read_bytes()
    seeds.aggregate(folders)
    assert (target / "claims.csv").read_bytes() == before


def test_one_seed_alone_has_no_interval_and_says_so(tmp_path, capsys):
    folder = write_run(tmp_path / "s-quick", 0)
    row = pd.read_csv(seeds.aggregate([folder]) / "claims.csv").set_index("claim").loc["X1"]
    assert (row["low"], row["high"]) == (0.5, 0.7)
    run = make_run(folder, 0, "m", "06_comparison")
    run.measured("X1", (0.7, 0.6, 0.8, 21))
    shown = seeds.shown(run).set_index("claim")
    assert shown.loc["X1", "each"] == "0: holds 0.7 [0.6, 0.8]", "what this run found, not what one before it wrote"
    assert "one seed alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model": "other"}, "model = 'other'"), ({"share": 0.5}, "share = 0.5"), ({"code": "d"}, "other code")],
)
def test_runs_that_differ_are_not_mixed(tmp_path, change, message, capsys):
    folders = [write_run(tmp_path / "s", 0), write_run(tmp_path / "s", 1, **change)]
    refused(message, lambda: seeds.aggregate(folders))
    run = make_run(folders[0], 0, "m", "06_comparison")
    run.measured("X1", (0.6, 0.5, 0.7, 21))
    assert seeds.shown(run).set_index("claim").loc["X1", "each"].count("holds") == 1
    assert message in capsys.readouterr().out


def test_a_notebook_that_did_not_finish_shows_no_claims(tmp_path):
    folders = [write_run(tmp_path / "s", i, finished=not i) for i in range(2)]
    run = make_run(folders[0], 0, "m", "06_comparison")
    run.measured("X1", (0.6, 0.5, 0.7, 21))
    assert seeds.shown(run).set_index("claim").loc["X1", "each"].count("holds") == 1


def test_missing_runs_are_listed_with_their_command(tmp_path):
    folders = [write_run(tmp_path / "testbed-full", 0), write_run(tmp_path / "testbed-full", 1, finished=False)]
    with pytest.raises(InputError, match="not complete") as error:
        seeds.aggregate([*folders, tmp_path / "testbed-full" / "seed-2"])
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 2
    assert 'make study STUDY=testbed SEEDS="1" PRESET=full' in lines[0]
    assert 'SEEDS="2"' in lines[1]
