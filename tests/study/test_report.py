"""The report holds everything in one file, and its check finds what is broken."""

import base64
import io
import json
import re

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from nt_utils.errors import InputError
from nt_utils.files import project_root
from nt_utils.study import ledger, report
from tests.study.test_ledger import make_run

ROOT = project_root()


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "testbed" / "seed-0"
    for part in ("claims", "provenance"):
        (folder / part).mkdir(parents=True)
    for name, other in (("00_first", "01_second"), ("01_second", "05_never_run")):
        shown = [
            new_output("display_data", data={"image/png": picture(), "text/plain": "<Image>"}),
            new_output(
                "display_data",
                data={"text/html": "<style>td {}</style><table id='t'><tr><td>1 &lt; 2</td></tr></table>"},
            ),
            new_output(
                "display_data",
                data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox(children=())"},
            ),
            new_output("stream", name="stdout", text="a < b"),
            new_output("stream", name="stderr", text="progress"),
        ]
        cells = [
            new_markdown_cell(
                f"# {name} & more\n\n## Findings\n\n$x_1 < 2$, before: [other]({other}.ipynb), [here](#Findings)"
            ),
            new_code_cell("if 1 < 2: pass", outputs=shown[:1] + shown[2:]),
        ]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
        run = make_run(folder)
        run.not_testable("S9", "ASR < 5%")
        pd.DataFrame(ledger.run_rows(run)).to_csv(folder / "claims" / f"{name}.csv", index=False)
        (folder / "provenance" / f"{name}.json").write_text(json.dumps({"git": "abc", "finished": True}))
    return folder


def test_one_file_with_contents_figures_ledger_and_provenance(folder):
    page = report.write(folder).read_text(encoding="utf-8")
    assert report.problems(page) == []
    for wanted in (
        'href="#00_first"',
        'id="01_second"',
        'href="#01_second"',
        "ASR &lt; 5%",
        "abc",
        "a &lt; b",
        "if 1 &lt; 2",
    ):
        assert wanted in page, wanted
    assert page.count("data:image/png;base64,") == 2
    assert "05_never_run" not in page
    assert "progress" not in page
    assert "VBox" not in page
    assert "05_never_run.ipynb" not in page


def test_formulas_are_mathml(folder):
    page = report.build(folder)
    assert page.count("<math") == 2
    assert "<msub><mi>x</mi><mn>1</mn></msub>" in page
    assert "$" not in page


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_every_formula_of_the_notebooks_is_understood(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
    text = "".join(report.markdown(cell.source) for cell in cells)
    assert "$" not in text
    assert "029F5" not in text
    assert not re.search(r"\\[a-zA-Z]", re.sub(r"<code>.*?</code>", "", text))  # a command that was not known


def test_a_folder_without_notebooks(tmp_path):
    with pytest.raises(InputError, match="run the study first"):
        report.write(tmp_path)


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ('<a href="#x">', "leads nowhere"),
        ('<a href="other.html">', "leaves the page"),
        ('<p id="x"></p><p id="x"></p>', "doubled"),
        ('<img src="figure.png">', "elsewhere"),
        ('<script src="https://cdn.example/mathjax.js"></script>', "elsewhere"),
        ('<img src="data:image/png;base64,AAAA">', "damaged"),
        ('<img src="data:image/png;base64,?">', "damaged"),
    ],
)
def test_the_check_finds_what_is_broken(page, found):
    assert any(found in problem for problem in report.problems(page))
    assert report.problems(f'<p id="x"><a href="#x">{picture()[:4]}</a></p>') == []
