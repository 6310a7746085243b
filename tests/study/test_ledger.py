"""The ledger: what runs handed in, verdicts over seeds, the tables that show them, and prose that keeps to them."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from nt_utils.errors import InputError
from nt_utils.evaluation import metrics
from nt_utils.files import escaped
from nt_utils.study import claims, ledger
from nt_utils.study.run import Run
from tests.common import refused

HARM = "harmful score"


def make_run(folder, seed=0, model="testbed", notebook="02_sn_tune", **facts):
    run = Run(notebook, SimpleNamespace(model=model, seed=seed, preset="default"), folder)
    run.facts = facts
    return run


def lines_of(values, model="testbed", gate=None, claim="S8"):
    """The lines of runs that measured one claim: seed -> value, or the reason why it could not."""
    lines = []
    for seed, value in values.items():
        passed = (gate or {}).get(seed, True)
        run = make_run(None, seed, model, testbed={"passed": passed, "fingerprint": f"f{seed}"})
        if isinstance(value, str):
            run.not_testable(claim, value)
        else:
            run.measured(claim, (value, value - 0.03, value + 0.03, 80))
        lines += ledger.run_rows(run)
    return lines


def row(lines, claim="S8", **where):
    found = [v for v in ledger.verdicts(lines) if v["claim"] == claim and all(v[k] == w for k, w in where.items())]
    assert len(found) == 1
    return found[0]


def test_the_ledger_has_every_row_of_every_claim_and_no_other():
    found = ledger.verdicts(lines_of({0: -0.3}))
    assert [(v["claim"], v["row"]) for v in found] == [(c.id, r) for c, r in claims.rows()]
    assert {v["verdict"] for v in found if v["claim"] != "S8"} == {claims.NOT_RUN}
    assert len(found) <= ledger.MOST_ROWS


def test_one_seed_is_judged_by_its_own_interval_and_more_by_students_t():
    assert row(lines_of({0: -0.3}))["verdict"] == claims.HOLDS
    values = [-0.1, -0.2, -0.6]
    found = row(lines_of(dict(enumerate(values))))
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found["value"], found["low"], found["high"]) == pytest.approx((np.mean(values), low, high))
    assert (found["verdict"], found["n"], found["seeds"]) == (claims.UNDECIDED, 3, 3)
    assert found["each"] == "0: holds -10 [-13, -7]; 1: holds -20 [-23, -17]; 2: holds -60 [-63, -57]"


def test_seeds_that_miss_the_gate_are_left_out_and_counted_and_untestable_ones_are_counted():
    found = row(lines_of({0: -0.3, 1: -0.31, 2: 0.9, 3: "no time"}, gate={2: False}))
    assert (found["verdict"], found["seeds"], found["missed_gate"], found["untestable"]) == (claims.HOLDS, 3, 1, 1)
    assert found["value"] == pytest.approx(-0.305)
    assert "2: does not hold 90 [87, 93] (missed its gate)" in found["each"]
    none = row(lines_of({0: -0.3}, gate={0: False}))
    assert (none["verdict"], none["reason"]) == (claims.NOT_TESTABLE, "every seed of the testbed misses its gate")


def test_seeds_whose_training_diverged_are_not_left_out_of_the_verdict():
    found = row(lines_of({0: -0.3, 1: "training diverged", 2: "training diverged"}))
    assert found["verdict"] == claims.NOT_TESTABLE and "at 2 of 3 seeds" in found["reason"]
    left = row(lines_of({0: -0.3, 1: -0.3, 2: "no prompts"}))
    assert left["verdict"] == claims.HOLDS and ledger.cell(left).endswith("2 of 3 seeds")


def test_a_run_that_was_handed_in_twice_is_refused(tmp_path):
    folders = [write(tmp_path / name / "seed-0", 0) for name in ("a", "b")]
    refused("seed 0, 02_sn_tune was run in two of these folders", lambda: ledger.collect(folders))


def test_positive_controls_are_marked_and_not_counted():
    table = ledger.frame(lines_of({0: -0.3}) + lines_of({0: -0.3}, model="Qwen2.5-Coder-0.5B-Instruct"))
    assert table.groupby("model")["positive_control"].first().tolist() == [False, True]
    assert ledger.counts(table).startswith("Qwen2.5-Coder-0.5B-Instruct, 56 rows (a claim has one for each rule")
    assert "after Holm's correction: holds 1, not testable 3, not run 52." in ledger.counts(table)
    assert "testbed" not in ledger.counts(table)
    page = ledger.front_page(table)
    assert page.count("\n") == 1 + len(claims.CLAIMS)
    few = ledger.front_page(table, ledger.FRONT_CLAIMS).splitlines()
    assert [line.split(" | ")[0] for line in few[2:]] == [f"| {name}" for name in ledger.FRONT_CLAIMS]
    assert few[4].endswith("[02](notebooks/02_sn_tune.ipynb) |")
    assert few[0] == "| | claim | paper's figure | notebook |", "they ran none of these, and have no column of blanks"
    assert "Qwen2.5-Coder-0.5B-Instruct" in ledger.front_page(table, ("S8", "S9")).splitlines()[0]
    assert page.splitlines()[0].endswith("Qwen2.5-Coder-0.5B-Instruct | testbed (positive control) |")
    s8 = next(line for line in page.splitlines() if line.startswith("| S8 |"))
    assert s8.endswith("| implied | **holds** -30 [-33, -27] | **holds** -30 [-33, -27] |")
    assert "not testable" in next(line for line in page.splitlines() if line.startswith("| S9 |"))
    details = ledger.details(table)
    assert all(f"## {c.id}. " in details for c in claims.CLAIMS)


def test_a_run_hands_in_its_own_notebooks_claims_alone(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(InputError, match="claim S1: belongs to 01_safety_neurons"):
        run.measured("S1", (0.5, 0.4, 0.6, 9), row="contrast", part="jailbroken")
    refused("row: got 'x'", lambda: run.not_testable("S8", "why", row="x"))
    run.not_testable("S9", "no <base> model")
    page = run.claims_table().to_html()
    assert "no &lt;base&gt; model" in page
    assert "not run" in page


def write(folder, seed, value=-0.3, finished=True, code="c"):
    run = make_run(folder, seed, testbed={"passed": True, "fingerprint": "f"}, **{"model weights": f"w{seed}"})
    run.measured("S8", (value, value - 0.03, value + 0.03, 80))
    run.finish()
    note = folder / "provenance" / "02_sn_tune.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"finished": finished, "code": code}))
    return folder


def test_a_run_writes_its_claims_and_the_ledger_reads_them_back(tmp_path):
    folders = [write(tmp_path / "s" / f"seed-{i}", i) for i in range(2)]
    table = ledger.collect(folders)
    assert list(table.columns) == list(ledger.COLUMNS)
    found = row(table.to_dict("records"))
    assert (found["verdict"], found["seeds"], found["weights"]) == (claims.HOLDS, 2, "w0 w1")


def test_how_sure_a_row_is_follows_from_its_degrees_of_freedom(tmp_path):
    """The same limits from 3 trainings and from many prompts: the t distribution's further ones are not the same."""
    words = []
    for freedom in (2, math.inf):
        run = make_run(tmp_path / f"{freedom}")
        run.measured("S8", metrics.Interval(-0.3, -0.42, -0.18, 80, freedom))
        run.finish()
        line = row(ledger.read(tmp_path / f"{freedom}" / "claims" / "02_sn_tune.csv").to_dict("records"))
        assert line["verdict"] == claims.HOLDS
        others = [claims.Verdict(claims.UNDECIDED, p=0.9)] * 9
        own = metrics.Interval(line["value"], line["low"], line["high"], line["n"], freedom)
        words.append(claims.corrected([claims.decide("S8", {HARM: own}), *others])[0])
    assert words == [claims.UNDECIDED, claims.HOLDS]
    old = tmp_path / "old.csv"
    old.write_text("claim,row,part,model,seed,value,low,high,n,reason,notebook,weights,gate\n")
    refused("older version", lambda: ledger.read(old))


def test_a_claim_rests_on_another_over_the_same_seeds():
    """S1 holds at one seed of three and is undecided over them, so that S2 says nothing, whatever each seed says."""

    def lines(jailbroken):
        found = []
        for seed, value in enumerate(jailbroken):
            run = make_run(None, seed, notebook="01_safety_neurons")
            run.measured("S1", (value, value - 0.05, value + 0.05, 80), row="contrast", part="jailbroken")
            run.measured("S1", (1.0, 0.99, 1.01, 80), row="contrast", part="perplexity")
            run.measured("S2", (0.002, 0.001, 0.003, 80), row="contrast")
            found += ledger.run_rows(run)
        return found

    mixed = row(lines([0.9, 0.2, 0.01]), "S2", row="contrast")
    assert mixed["verdict"] == claims.NOT_TESTABLE and mixed["reason"].endswith("(S1) is not shown: undecided")
    assert mixed["each"].startswith("0: holds") and "2: not testable" in mixed["each"]
    assert row(lines([0.9, 0.8, 0.85]), "S2", row="contrast")["verdict"] == claims.HOLDS


def test_unfinished_missing_and_mixed_runs_are_refused(tmp_path):
    refused("no claims", lambda: ledger.collect([tmp_path / "nothing"]))
    refused("did not finish", lambda: ledger.collect([write(tmp_path / "a" / "seed-0", 0, finished=False)]))
    refused("edited while", lambda: ledger.collect([write(tmp_path / "c" / "seed-0", 0, code="c+edited")]))
    with pytest.raises(InputError, match="different versions of the code"):
        ledger.collect([write(tmp_path / "b" / f"seed-{i}", i, code=c) for i, c in enumerate("cd")])


def test_every_number_of_the_prose_must_stand_in_the_ledger():
    table = ledger.frame(lines_of({0: -0.312}))
    fine = "On the testbed the harmful score falls by 31.2 points more than with random neurons (S8: [-34.2, -28.2])."
    assert ledger.unsupported(fine, table) == []
    assert ledger.unsupported("It falls by 31 points (S8).", table) == []
    assert ledger.unsupported("It falls by 45 points (S8).", table) == ["45: It falls by 45 points (S8)."]
    assert ledger.unsupported("It falls by 31 points.", table) == ["31: It falls by 31 points."], "no claim is named"
    assert ledger.unsupported("Qwen 1.5B and 0.5B answer alike, says S8.", table) == []


def test_strangers_names_cannot_break_a_table():
    assert escaped("a|b <img onerror=x> `c` $d$\ne") == r"a\|b &lt;img onerror=x&gt; \`c\` \$d\$ e"
    assert escaped("a\r~~b~~\x1b[31m") == r"a \~\~b\~\~ \[31m", "no line end and no terminal sequence"
    assert math.isnan(claims.Verdict("x").interval.value)


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.2, claims.HOLDS), (1.45, claims.NOT_TESTABLE), (3.0, claims.NOT_TESTABLE)]
)
def test_a_claim_that_rests_on_another_says_nothing_where_that_one_is_not_shown(ratio, verdict):
    """A set that breaks the model was counted as a small set that jailbreaks it (S2 asks how few neurons S1 needs)."""
    run = make_run(None, 0, "qwen2.5-coder-0.5b-instruct", "01_safety_neurons")
    run.measured("S1", (0.5, 0.3, 0.7, 40), row="contrast", part="jailbroken")
    run.measured("S1", (ratio, ratio - 0.1, ratio + 0.1, 40), row="contrast", part="perplexity")
    run.measured("S2", (0.001, 0.0009, 0.0011, 40), row="contrast")
    found = row(ledger.run_rows(run), "S2", row="contrast")
    assert found["verdict"] == verdict and ("(S1)" in found["reason"]) == (verdict == claims.NOT_TESTABLE)
