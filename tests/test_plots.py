"""Every figure is drawn from its table alone, and redrawn only when it must be."""

import os

import pandas as pd
import pytest

from nt_utils import plots
from nt_utils.errors import InputError

RATE = {"value": [0.1, 0.8, 0.5, 0.2], "low": [0.05, 0.7, 0.4, 0.1], "high": [0.2, 0.9, 0.6, 0.3], "n": [100] * 4}
TABLES = {
    "behaviour": pd.DataFrame({"model": ["a", "a", "b", "b"], "set": ["s", "t"] * 2, "metric": "ASR", **RATE}),
    "verdicts": pd.DataFrame(
        {"model": ["a", "a", "b", "b"], "set": "s", "verdict": ["refusal", "other"] * 2, "share": [0.3, 0.7, 1, 0], "n": 9}
    ),
    "where": pd.DataFrame(
        {"rule": "r", "layer": [0, 0, 1, 1], "kind": ["q", "ffn"] * 2, "share": [0.1, 0.0, 0.2, 0.05], "count": 3}
    ),
    "deactivation": pd.DataFrame(
        {"condition": ["none", "x", "none", "x"], "group": ["none", "chosen"] * 2, "metric": ["ASR"] * 2 + ["utility"] * 2, **RATE}
    ),
    "dose": pd.DataFrame({"rule": ["a", "a", "random", "random"], "share": [0.01, 0.1] * 2, "metric": "ASR", **RATE}),
    "languages": pd.DataFrame(
        {"zeroed": ["nothing", "en"] * 2, "evaluated": ["en", "en", "de", "de"], "jaccard": 0.1, "chance": 0.05, **RATE}
    ),
    "sn_steps": pd.DataFrame(
        {"arm": ["SN", "SN", "random", "random"], "step": [0, 5] * 2, "metric": "perplexity", "chosen": [False, True] * 2, **RATE}
    ),
    "sn_tradeoff": pd.DataFrame(
        {"arm": "SN", "step": [0, 5] * 2, "metric": ["ASR"] * 2 + ["utility"] * 2, "chosen": [False, True] * 2, "target": 0.1, **RATE}
    ),
    "sn_equal": pd.DataFrame(
        {"arm": ["SN", "random"] * 2, "step": [3.5, 8] * 2, "target": 0.1, "metric": ["a", "a", "b", "b"], **RATE}
    ),
    "sn_sides": pd.DataFrame(
        {"arm": "SN", "sides": ["input", "input", "both", "both"], "step": [0, 5] * 2, "metric": "ASR", **RATE}
    ),
    "sn_wrappers": pd.DataFrame({"attack": ["all", "all", "x", "x"], "state": ["before", "SN"] * 2, **RATE}),
    "rsn_finetuning": pd.DataFrame(
        {"arm": ["SN", "SN", "full", "full"], "step": [0, 5] * 2, "metric": "ASR", **RATE}
    ),
    "growth": pd.DataFrame(
        {
            "sweep": ["tokens", "tokens", "layers", "layers", "width", "width"], "tokens": [16, 32, 64, 64, 64, 64],
            "layers": [2, 2, 1, 2, 2, 2], "width": [512, 512, 512, 512, 256, 512],
            "forward_ms": [1, 2, 1, 2, 1, 2], "exact_ms": [3.5, 8, 3, 6, 4, 9], "expected_ms": [3, 8, 3, 6, 4, 9],
        }
    ),
    "stability": pd.DataFrame({"rule": ["a", "a", "b", "b"], "prompts": [8, 16] * 2, "chance": 0.02, **RATE}),
    "units_where": pd.DataFrame(
        {"layer": 0, "unit": "ffn channel", "category": ["SCU", "UCU", "CU", "RU"], "count": 1, "units": 4, "share": 0.25}
    ),
    "units_pruning": pd.DataFrame(
        {
            "condition": ["dense", "SCU", "random, as SCU, max of 2", "RU"], "group": ["none", "chosen", "control", "chosen"],
            "share": [0, 0.03, 0.03, 0.2], "metric": "direct ASR", **RATE,
        }
    ),
    "units_growth": pd.DataFrame(
        {"category": ["SCU", "SCU", "RU", "RU"], "share": [0.01, 0.1] * 2, "chosen": [False, True] * 2, "cost": "c", **RATE}
    ),
    "units_sensitivity": pd.DataFrame(
        {"variant": "a", "prompts": [8, 16] * 2, "category": ["SCU", "SCU", "RU", "RU"], "chance": 0.02, **RATE}
    ),
    "units_agreement": pd.DataFrame({"changed": ["a", "b"] * 2, "category": ["SCU", "SCU", "RU", "RU"], "chance": 0.02, **RATE}),
    "agreement": pd.DataFrame(
        {
            "a": ["one", "one", "two"], "b": ["one", "two", "two"], "share": 0.01, "jaccard": [0.9, 0.1, 0.8], "chance": 0.01,
            "spearman": [0.9, -0.2, 1], "n": 4, "prompts": 40,
        }
    ),
    "agreement_sizes": pd.DataFrame({"share": [0.01, 0.1] * 2, "which": ["a", "a", "b", "b"], "value": [0.1, 0.2, 0.3, 0.4]}),
    "agreement_sites": pd.DataFrame(
        {"definition": ["a", "a", "b", "b"], "layer": 0, "kind": ["ffn", "o"] * 2, "share": [0.1, 0.2, 0, 0.3], "spearman": 0.1}
    ),
    "effects": pd.DataFrame(
        {
            "intervention": "zeroed", "definition": ["untouched", "a", "a", "b"], "set": ["chosen", "chosen", "random", "chosen"],
            "metric": "ASR", **RATE,
        }
    ),
    "dose_definitions": pd.DataFrame(
        {"rule": ["a", "a", "random", "random"], "neurons": [2, 20] * 2, "metric": "ASR", **RATE}
    ),
    "per_neuron": pd.DataFrame({"measure": ["x", "x", "y", "y"], "definition": ["a", "b"] * 2, "chance": 0.01, **RATE}),
}  # fmt: skip
TABLES["effects_training"] = TABLES["effects"]


def test_every_figure_has_a_table_here():
    assert set(TABLES) == set(plots.FIGURES)


@pytest.mark.parametrize("name", TABLES)
def test_a_figure_comes_from_its_table(tmp_path, name):
    table = tmp_path / f"01_{name}.csv"
    TABLES[name].to_csv(table, index=False)
    plots.draw(table)
    first = table.with_suffix(".png").read_bytes(), table.with_suffix(".pdf").read_bytes()
    assert len(first[0]) > 5000
    plots.draw(table)
    assert (table.with_suffix(".png").read_bytes(), table.with_suffix(".pdf").read_bytes()) == first
    changed = TABLES[name].copy()
    column = next(c for c in ("value", "share", "exact_ms") if c in changed)
    changed.loc[0, column] = 0.15
    changed.to_csv(table, index=False)
    plots.draw(table)
    assert table.with_suffix(".png").read_bytes() != first[0]


def test_redraw_is_a_no_op_when_nothing_changed(tmp_path):
    table = tmp_path / "01_dose.csv"
    TABLES["dose"].to_csv(table, index=False)
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "findings.csv")
    assert plots.redraw(tmp_path) == [table]
    assert plots.redraw(tmp_path) == []
    os.utime(table, (table.stat().st_mtime + 60,) * 2)
    assert plots.redraw(tmp_path) == [table]


def test_an_unknown_figure_is_refused(tmp_path):
    (tmp_path / "01_cake.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match="no figure is called 'cake'"):
        plots.draw(tmp_path / "01_cake.csv")
    assert plots.main([str(tmp_path / "missing")]) == 1
