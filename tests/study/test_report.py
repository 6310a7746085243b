"""The report holds everything in one file, and its check finds what is broken."""

import json
import re

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nt_utils.files import project_root
from nt_utils.study import ledger, report
from nt_utils.study.display import styled
from tests.common import refused
from tests.study.test_display import Text
from tests.study.test_ledger import make_run
from tests.study.test_publish import picture

ROOT = project_root()
TABLE = "<style>td {}</style><table id='t'><tr><td>1 &lt; 2</td></tr></table>"
WIDGET = "application/vnd.jupyter.widget-view+json"
PARAMETERS = {"model": "testbed", "seed": 0, "preset": "full", "n_test": 8}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "testbed" / "seed-0"
    for part in ("claims", "provenance"):
        (folder / part).mkdir(parents=True)
    for name, other in (("00_first", "01_second"), ("01_second", "05_never_run")):
        shown = [
            new_output("display_data", data={"image/png": picture(4), "text/plain": "<Image>"}),
            new_output("display_data", data={"text/html": TABLE}),
            new_output("display_data", data={WIDGET: {}, "text/plain": "VBox(children=())"}),
            new_output("stream", name="stdout", text="a < b"),
            new_output("stream", name="stderr", text="progress"),
        ]
        prose = f"# {name} & more\n\n## Findings\n\n$x_1 < 2$, before: [other]({other}.ipynb), [here](#Findings)"
        code = new_code_cell("if 1 < 2: pass", outputs=shown[:1] + shown[2:])
        nbformat.write(new_notebook(cells=[new_markdown_cell(prose), code]), folder / f"{name}.ipynb")
        run = make_run(folder)
        run.not_testable("S9", "ASR < 5%")
        pd.DataFrame(ledger.run_rows(run)).to_csv(folder / "claims" / f"{name}.csv", index=False)
        note = {"git": "abc", "finished": True, "parameters": PARAMETERS}
        (folder / "provenance" / f"{name}.json").write_text(json.dumps(note))
    return folder


def test_one_file_with_contents_figures_ledger_and_provenance(folder):
    page = report.write(folder).read_text(encoding="utf-8")
    assert report.problems(page) == []
    links = {'href="#00_first"', 'id="01_second"', 'href="#01_second"'}
    assert {w for w in links | {"ASR &lt; 5%", "abc", "a &lt; b", "if 1 &lt; 2"} if w not in page} == set()
    assert page.count("data:image/png;base64,") == 2
    assert not [w for w in ("05_never_run", "progress", "VBox") if w in page]


def test_what_strangers_wrote_is_shown_as_text_and_a_study_of_it_has_a_report(folder):
    """Formerly <REDACTED WEBSITE> vanished, an onerror ran in the reader's browser, and the report refused the study."""
    texts = [
        "Launder money on <REDACTED WEBSITE>?",
        '<img src=x onerror="steal()">',
        "a<script>steal()</script>b",
        "<svg/onload=steal()>",
    ]
    raw = "".join(f"<tr><td>{text}</td></tr>" for text in texts)
    outputs = [
        new_output("display_data", data={"text/html": styled(pd.DataFrame({"prompt": texts}), "Prompts").to_html()}),
        new_output("display_data", data={"text/html": f"<style>body {{ display: none }}</style><table>{raw}</table>"}),
        new_output("stream", name="stdout", text=texts[1]),
        new_output("execute_result", data={"text/plain": texts[2]}),
    ]
    node = new_notebook(cells=[new_markdown_cell("# T"), new_code_cell(texts[0], outputs=outputs)])
    nbformat.write(node, folder / "02_hostile.ipynb")
    page = report.write(folder).read_text(encoding="utf-8")
    read = Text(page)
    assert not {"redacted", "script", "svg"} & set(read.tags)
    assert read.words.count("<REDACTED WEBSITE>") == 3
    assert read.words.count('onerror="steal()"') == 3
    assert "display: none" not in page.split("</style>", 1)[1]


def test_a_long_table_is_folded_and_keeps_its_style(folder):
    long = styled(pd.DataFrame({"word": ["x"] * 16, "number": range(16)}), "Sixteen rows.")
    node = new_notebook(
        cells=[new_code_cell("", outputs=[new_output("display_data", data={"text/html": long.to_html()})])]
    )
    nbformat.write(node, folder / "02_long.ipynb")
    page = report.build(folder)
    assert "<details><summary>Sixteen rows.</summary><style>" in page
    assert re.search(r"#02_long-T_[^{]* \{\s*text-align: left", page)


def test_it_opens_with_what_was_run_the_claims_and_every_picture_has_a_number_and_caption(folder):
    page = report.build(folder)
    assert page.index('id="claims"') < page.index('id="in-short"') < page.index('id="00_first"')
    assert "<b>model</b> testbed" in page and "<b>seed</b> 0" in page
    assert page.count('<span class="verdict not-testable">') >= 2
    assert "56 of" not in page and "55 of 56 rows" in page
    figures = re.findall(r'<img alt="(Figure (\d+)[^"]*)"', page)
    assert [int(number) for _, number in figures] == [1, 2]
    assert page.count("<figcaption>") == 2


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
    refused("run the study first", lambda: report.write(tmp_path))


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ('<a href="#x">', "leads nowhere"),
        ('<a href="other.html">', "leaves the page"),
        ('<p id="x"></p><p id="x"></p>', "doubled"),
        ('<img src="figure.png">', "elsewhere"),
        ('<img src="figure.png">', "no alternative text"),
        ('<script src="https://cdn.example/mathjax.js"></script>', "elsewhere"),
        ('<img src="data:image/png;base64,AAAA">', "damaged"),
        ('<img src="data:image/png;base64,?">', "damaged"),
    ],
)
def test_the_check_finds_what_is_broken(page, found):
    assert any(found in problem for problem in report.problems(page))
    assert report.problems(f'<p id="x"><a href="#x">{picture(4)[:4]}</a></p>') == []
