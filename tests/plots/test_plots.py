"""Every figure is drawn from its table alone, and redrawn only when it must be."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nt_utils import plots
from nt_utils.errors import InputError
from nt_utils.files import project_root
from nt_utils.plots import style, text

PUBLISHED = {plots.figure_name(t): t for t in sorted((project_root() / "figures").rglob("*.csv"))}
RATE = {"value": [0.1, 0.8, 0.5, 0.2], "low": [0.05, 0.7, 0.4, 0.1], "high": [0.2, 0.9, 0.6, 0.3], "n": [100] * 4}
TABLES = {name: pd.read_csv(table) for name, table in PUBLISHED.items() if name in plots.FIGURES}
DOSE = pd.DataFrame(
    {
        "rule": ["a", "a", "random", "direction"],
        "share": [0.01, 0.1, 0.1, np.nan],
        "broken": [False, True] * 2,
        "metric": "ASR",
        **RATE,
    }
)
STABILITY = pd.DataFrame({"rule": ["a", "a", "b", "b"], "prompts": [8, 16] * 2, "chance": 0.02, **RATE})
EFFECTS = pd.DataFrame(
    {
        "intervention": "zeroed",
        "definition": ["untouched", "a", "a", "b"],
        "set": ["chosen", "chosen", "random", "no neurons"],
        "metric": "ASR",
        **RATE,
    }
)
DEFENCES = pd.DataFrame({"defence": ["none", "a"] * 2, "metric": ["ASR", "ASR", "utility", "utility"], **RATE})
STEPS = pd.DataFrame({"arm": ["SN", "SN", "random", "random"], "step": [0, 5] * 2, "chosen": [False, True] * 2, **RATE})


def test_every_figure_is_published():
    assert set(TABLES) == set(plots.FIGURES)


@pytest.mark.parametrize("name", TABLES)
def test_a_figure_comes_from_its_table(tmp_path, name):
    table = tmp_path / f"01_{name}.csv"
    TABLES[name].to_csv(table, index=False)
    drawn = plots.draw(table)
    axes = [axis for ax in drawn.axes for axis in (ax.xaxis, ax.yaxis)]
    ticks = [label.get_text() for axis in axes for label in axis.get_ticklabels(which="both")]
    assert any(ticks) and not [tick for tick in ticks if "$" in tick], (
        "no tick is a formula, which would stand there raw"
    )
    first = {suffix: table.with_suffix(suffix).read_bytes() for suffix in plots.SUFFIXES}
    assert len(first[".png"]) > 5000
    with Image.open(io.BytesIO(first[".png"])) as picture:
        assert picture.mode == "P" and round(picture.info["dpi"][0]) == plots.DPI and picture.width > 500
    assert b"/FontFile2" in first[".pdf"], "the fonts are embedded"
    assert b"<text" not in first[".svg"], "letters are outlines"
    assert str(TABLES[name].columns[0]).encode() in first[".md"]
    assert b"\\toprule" in first[".tex"]
    changed = TABLES[name].copy()
    column = next(c for c in ("value", "share", "exact_ms", *changed.columns[3:4]) if c in changed)
    changed[column] = changed[column].to_numpy()[::-1]
    changed.to_csv(table, index=False)
    plots.draw(table, pictures=(".svg",))
    assert table.with_suffix(".svg").read_bytes() != first[".svg"]


def small_picture(name, table):
    file = io.BytesIO()
    with plots.style.look():
        drawn = plots.FIGURES[name](table)
        drawn.savefig(file, dpi=40)
    plt.close(drawn)
    return file.getvalue()


def test_a_users_matplotlibrc_changes_no_figure():
    """TeX crashes where there is none; a dark theme gave invisible titles."""
    plain = small_picture("dose", DOSE)
    with plt.rc_context({"text.usetex": True, "figure.facecolor": "black", "text.color": "white", "font.size": 30}):
        assert small_picture("dose", DOSE) == plain


def test_strangers_text_is_drawn_as_it_is(tmp_path):
    """A dollar sign is no formula, and a name that starts with an underscore stands in the legend."""
    names = ["$x_1", "_b<i>"]
    table = tmp_path / "01_dose.csv"
    DOSE.assign(rule=[names[0], names[0], names[1], names[1]]).to_csv(table, index=False)
    legend = plots.draw(table).legends[0]
    assert [text.get_text().strip() for text in legend.get_texts()] == names
    assert not any(text.get_usetex() or text.get_parse_math() for text in legend.get_texts())


def test_tokens_that_look_like_missing_values_are_shown_as_they_are(tmp_path):
    table, tokens = tmp_path / "01_tokens.csv", ["null", "NA", "", " x", "nan"]
    rows = {"prompt": "p", "position": range(5), "token": tokens, "neuron": "n", "value": 0.5}
    pd.DataFrame(rows).to_csv(table, index=False)
    labels = plots.draw(table).axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["null", "NA", "space", "x", "nan"]


def test_a_picture_follows_from_the_files_in_its_fingerprint():
    """Figures of one module formerly had colours from another, whose changes did not redraw them."""
    shared = {"style", "text"}
    for name in {function.__module__ for function in plots.FIGURES.values()}:
        tree = ast.parse(Path(sys.modules[name].__file__).read_text())
        found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        found = {module.rpartition(".")[2] for module in found if module.startswith("nt_utils.plots.")}
        assert found <= shared, name


def test_labels_cover_neither_points_nor_each_other():
    points = np.array([[0.5, 0.5], [0.56, 0.5], [0.5, 0.56], [0.44, 0.5], [0.9, 0.1]])
    drawn, axes = plots.style.panels()
    ax = axes[0, 0]
    ax.scatter(*points.T)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    plots.style.place_labels(ax, points, points[[0, 1, 4]], ["first", "second", "third"])
    drawn.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    dots = ax.transData.transform(points)
    plt.close(drawn)
    assert [text.get_text() for text in ax.texts] == ["first", "second", "third"]
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(ax.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


@pytest.mark.parametrize("width", plots.WIDTHS)
def test_a_figure_says_what_its_bars_are(width):
    """At the foot, or over the legend there; a table over seeds has other intervals."""
    cases = (("effects", EFFECTS, "95% intervals over topics"), ("defences", DEFENCES, "difference from no defence"))
    for name, plain, words in cases:
        for table, expected in ((plain, words), (plain.assign(interval="t over seeds"), "t over seeds")):
            with plots.style.look(width):
                drawn = plots.FIGURES[name](table)
                plots.style.fit(drawn)
            found = drawn.legends[0].get_title().get_text() if drawn.legends else drawn.get_supxlabel()
            plt.close(drawn)
            assert expected in found.replace("\n", " ")


def test_rows_of_panels_are_as_high_as_they_have_lines():
    one = EFFECTS
    more = pd.concat([one.assign(definition=f"d{i}", intervention="amplified") for i in range(6)])
    for width in ("text", "column"):
        with plots.style.look(width):
            drawn = plots.FIGURES["effects"](pd.concat([one, more], ignore_index=True))
        drawn.canvas.draw()
        heights = [ax.bbox.height for ax in drawn.axes if ax.get_visible()]
        plt.close(drawn)
        assert len(heights) == 2
        assert heights[1] > 1.2 * heights[0]


def test_figures_of_a_quick_run_are_marked(tmp_path):
    """Whoever draws them; the folder's name decides."""
    pictures = []
    for study in ("testbed", "testbed-quick"):
        table = tmp_path / study / "seed-0" / "figures" / "01_dose.csv"
        table.parent.mkdir(parents=True)
        DOSE.to_csv(table, index=False)
        words = [text.get_text() for text in plots.draw(table, pictures=(".png",)).texts]
        assert any("quick" in word for word in words) == study.endswith("-quick")
        pictures.append(table.with_suffix(".png").read_bytes())
        assert not table.with_suffix(".pdf").exists()
    assert pictures[0] != pictures[1]


def test_redraw_is_a_no_op_when_nothing_changed(tmp_path, monkeypatch):
    table = tmp_path / "01_stability.csv"
    STABILITY.to_csv(table, index=False)
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "findings.csv")
    assert plots.redraw(tmp_path) == [table]
    assert plots.redraw(tmp_path) == []
    os.utime(table, (table.stat().st_mtime + 60,) * 2)
    assert plots.redraw(tmp_path) == [], "a checkout changes times, not contents"
    table.with_suffix(".svg").unlink()
    assert plots.redraw(tmp_path) == [table]
    table.write_text(table.read_text().replace("16", "17"))
    assert plots.redraw(tmp_path) == [table]
    look = tmp_path / "style.py"  # a changed style changes every figure
    look.write_text(Path(plots.style.__file__).read_text() + "# other")
    monkeypatch.setattr(plots.style, "__file__", str(look))
    assert plots.redraw(tmp_path) == [table]
    assert plots.redraw(tmp_path) == []


def test_width_presets(tmp_path):
    table = tmp_path / "01_dose.csv"
    DOSE.assign(metric=["ASR", "utility"] * 2).to_csv(table, index=False)
    sizes = {width: plots.draw(table, width, tmp_path / width).get_size_inches() for width in plots.WIDTHS}
    assert {width: size[0] for width, size in sizes.items()} == {w: inches for w, (inches, _) in plots.WIDTHS.items()}
    assert sizes["column"][1] > sizes["text"][1], "panels stand below each other"
    assert plots.redraw(tmp_path, "column") == []
    assert plots.redraw(tmp_path) == [table]
    with pytest.raises(InputError, match="width: got 'wide'; allowed: text, column, slide"):
        plots.draw(table, "wide")


def test_tables_for_reports():
    table = pd.DataFrame({"rule_a": ["50% | x", "R&D\nnext"], "value": [0.123456, float("nan")], "n": [3, 4]})
    assert text.markdown(table).splitlines() == [
        "| rule_a | value | n |",
        "| --- | ---: | ---: |",
        "| 50% \\| x | 0.1235 | 3 |",
        "| R&amp;D next |  | 4 |",
    ]
    assert text.latex(table).splitlines()[1:] == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"rule\_a & value & n \\",
        r"\midrule",
        r"50\% \textbar{} x & 0.1235 & 3 \\",
        r"R\&D next &  & 4 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_drawing_loads_no_model_library(tmp_path):
    DOSE.to_csv(tmp_path / "01_dose.csv", index=False)
    code = "import sys; from nt_utils import plots; assert plots.main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "drawn: 01_dose" in done.stdout


def test_an_unknown_figure_is_refused(tmp_path):
    (tmp_path / "01_cake.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match="no figure is called 'cake'"):
        plots.draw(tmp_path / "01_cake.csv")
    assert plots.main([str(tmp_path / "missing")]) == 1


@pytest.mark.parametrize("metric", ["perplexity", "KL to the untouched model", "log-likelihood of reference answers"])
def test_what_is_no_share_is_not_drawn_in_percent(metric):
    """Nats and ratios had an axis from 0 to 100%."""
    table = STEPS.assign(metric=metric, value=-2.5, low=-3.0, high=-2.0)
    drawn = plots.FIGURES["sn_steps"](table)
    drawn.canvas.draw()
    low, high = drawn.axes[0].get_ylim()
    assert low < -2.5 < high
    assert not any("%" in label.get_text() for label in drawn.axes[0].get_yticklabels())
    plt.close(drawn)


@pytest.mark.parametrize("top", [0.08, 0.12, 0.2, 0.35])
def test_a_tick_of_a_share_says_where_it_stands(top):
    """Ticks at 2.5, 5 and 7.5% were written as 2, 5 and 8%."""
    drawn, ax = plt.subplots()
    ax.set_ylim(0, top)
    style.percent(ax.yaxis)
    drawn.canvas.draw()
    shown = [(place, label.get_text()) for place, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)]
    assert len(shown) > 2 and all(float(text.rstrip("%")) == pytest.approx(100 * place) for place, text in shown)
    plt.close(drawn)


def test_several_processes_draw_the_same_files_as_one(tmp_path):
    """Also that the same table gives the same files. Every figure was drawn after the other, for minutes."""
    tables = {"dose": DOSE, "stability": STABILITY, "where": TABLES["where"], "languages": TABLES["languages"]}
    for folder in ("one", "several"):
        (tmp_path / folder).mkdir()
        for i, (name, table) in enumerate(2 * list(tables.items())):
            table.to_csv(tmp_path / folder / f"0{i}_{name}.csv", index=False)
        assert len(plots.redraw(tmp_path / folder, workers=1 + (folder == "several"))) == 8
    files = [{p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("one", "several")]
    assert files[0] == files[1] and len(files[0]) == 8 * (1 + len(plots.SUFFIXES))


def painted(drawn) -> dict[str, set]:
    """Label of a row or a line -> the colours it is drawn in, on the first axes."""
    ax = drawn.axes[0]
    found: dict[str, set] = {}
    for container in ax.containers:
        line = container.lines[0]
        name = ax.get_yticklabels()[int(line.get_ydata()[0])].get_text()
        found.setdefault(name, set()).add(line.get_color())
    return found


def test_random_units_have_the_colour_of_the_category_that_they_stand_beside():
    conditions = ["dense", "SCU", "random, matched to SCU, mean of 8", "UCU"]
    groups = ["none", "chosen", "control", "chosen"]
    table = pd.DataFrame({"condition": conditions, "group": groups, "share": 0.03, "metric": "direct ASR", **RATE})
    found = painted(plots.FIGURES["units_pruning"](table))
    assert found["SCU (3%)"] == found["random, matched to SCU, mean of 8"] != found["UCU (3%)"]


def test_every_definition_has_a_colour_of_its_own_the_same_as_elsewhere():
    from nt_utils.study.parameters import DEFINITIONS

    rules = [*DEFINITIONS, "random, matched to contrast"]
    rows = [{"rule": r, "share": s, "neurons": n} for r in rules for s, n in ((0.01, 10), (0.1, 100))]
    rate = {"metric": "direct ASR", "value": 0.5, "low": 0.4, "high": 0.6, "n": 32}
    drawn = plots.FIGURES["dose_definitions"](pd.DataFrame(rows).assign(**rate))
    found = {line.get_label(): line.get_color() for line in drawn.axes[0].lines if line.get_label() in rules}
    assert set(found) == set(rules) and len(set(found.values())) == len(rules)
    assert found["contrast"] == plots.style.NAMED["contrast"]
