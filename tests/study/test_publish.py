"""What is published: figures, gallery and executed notebooks without traces of the machine; and whether it reproduces."""

import base64
import io
import json
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from nt_utils import plots
from nt_utils.errors import InputError
from nt_utils.files import project_root
from nt_utils.study import ledger, publish, reproduce
from tests.common import refused
from tests.study.test_ledger import make_run

NAME = "02_sn_tune"


def picture(width=1600):
    buffer = io.BytesIO()
    Image.effect_noise((width, width // 2), 60).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def root(tmp_path):
    """A checkout with one notebook, a README with markers, and a finished run of the testbed."""
    (tmp_path / "notebooks").mkdir()
    cells = [
        new_markdown_cell("# SN-Tune"),
        new_markdown_cell("## Does tuning cost utility?\n\nFirst sentence. Second one. Third one.\n\nMore."),
        new_code_cell('run.figure("sn_steps", table)\nrun.measured("S8", interval)'),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / f"{NAME}.ipynb")
    marks = (*publish.markers(publish.FIRST_CLAIMS), *publish.markers(publish.ALL_CLAIMS))
    (tmp_path / "README.md").write_text("before\n{}\nstale\n{}\n{}\nstale\n{}\nafter\n".format(*marks))
    finished(tmp_path, tmp_path / "runs" / "testbed-full" / "seed-0")
    return tmp_path


def finished(root, folder, value=-0.3):
    run = make_run(folder, testbed={"passed": True, "fingerprint": "abcd"}, **{"model weights": "0123"})
    run.parameters.preset = "full"
    run.measured("S8", (value, value - 0.03, value + 0.03, 80))
    (folder / "figures").mkdir(parents=True)
    table = pd.DataFrame({"arm": ["a", "b"], "value": [0.25, 1 + value]})
    table = table.assign(step=0, metric="direct ASR", low=0.1, high=0.9, n=80, chosen=True)
    table.to_csv(folder / "figures" / "02_sn_steps.csv", index=False)
    (folder / "figures" / "02_sn_steps.png").write_bytes(base64.b64decode(picture(40)))
    outputs = [
        new_output("display_data", data={"image/png": picture(), "text/plain": "<Image>"}),
        new_output("stream", name="stdout", text=f"saved in {root}/runs on {platform.node()}, {Path.home()}"),
        new_output("stream", name="stderr", text="Loading weights: 0%"),
        new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "HBox()"}),
    ]
    links = new_markdown_cell(f"[Index](index.ipynb), [here]({NAME}.ipynb), [away](https://a.b/c.ipynb)")
    cell = new_code_cell("1 + 1", outputs=outputs, metadata={"papermill": {"duration": 1}})
    made = {"papermill": {"input_path": "/x", "output_path": f"{folder}/.{NAME}.1.tmp.ipynb"}}
    nbformat.write(new_notebook(cells=[cell, links], metadata=made), folder / f"{NAME}.ipynb")
    run.finish()
    return folder


@pytest.fixture
def published(root):
    publish.publish({"testbed": [root / "runs" / "testbed-full" / "seed-0"]}, root)
    return root


def test_the_front_page_ledger_and_claims_page_are_written(published):
    text = (published / "README.md").read_text()
    assert text.startswith("before") and text.endswith("after\n") and "stale" not in text
    assert "| S8 | SN-Tune works because" in text and "**holds** -30 [-33, -27]" in text
    assert len(pd.read_csv(published / "figures" / "findings.csv")) == 56
    assert "## S8." in (published / "docs" / "claims.md").read_text()
    (published / "README.md").write_text("no markers")
    refused("markers", lambda: publish.publish({"testbed": [published / "nothing"]}, published))


def test_the_gallery_has_every_figure_with_question_caption_claims_and_links_that_lead_somewhere(published):
    page = (published / "figures" / "README.md").read_text()
    assert "**Does tuning cost utility?**" in page and "\n### Rates against training steps" in page
    assert "First sentence. Second one." in page and "Third" not in page
    assert "testbed, seed 0, preset full" in page
    assert "Claims: [S8](../docs/claims.md)." in page
    for target in publish.links(page):
        assert (published / "figures" / target).exists(), target


def test_a_figure_that_older_code_drew_is_drawn_anew(published):
    """Pictures of a run were copied as they were: publishing again brought back captions that had been mended."""
    made = published / "figures" / "testbed" / NAME / "02_sn_steps.png"
    stale = published / "runs" / "testbed-full" / "seed-0" / "figures" / made.name
    drawn = made.read_bytes()
    stale.write_bytes(base64.b64decode(picture(40)))
    publish.publish({"testbed": [stale.parent.parent]}, published)
    assert made.read_bytes() == drawn != base64.b64decode(picture(40))
    assert plots.is_current(stale.with_suffix(".csv"))


def test_publishing_another_model_keeps_what_was_published(published):
    path = published / "figures" / "measured.csv"
    other = pd.read_csv(path).assign(model="Qwen2.5-Coder-1.5B-Instruct", value=-0.5, low=-0.6, high=-0.4)
    other.to_csv(path, index=False)
    publish.publish({"testbed": [published / "runs" / "testbed-full" / "seed-0"]}, published)
    found = pd.read_csv(path).dropna(subset="value").set_index("model")["value"]
    assert found.to_dict() == {"Qwen2.5-Coder-1.5B-Instruct": -0.5, "testbed": -0.3}
    page = (published / "README.md").read_text()
    assert "**holds** -50 [-60, -40]" in page and "**holds** -30 [-33, -27]" in page


def test_executed_notebooks_name_no_machine_and_show_no_progress(published):
    path = published / "notebooks" / "executed" / "testbed" / f"{NAME}.ipynb"
    text = path.read_text()
    for hidden in (str(published), str(Path.home()), "Loading weights", "HBox", "papermill", "input_path"):
        assert hidden not in text, hidden
    if len(platform.node()) > 3:
        assert platform.node() not in text
    node = nbformat.read(path, as_version=4)
    nbformat.validate(node)
    assert "seed 0, preset full" in node.cells[0].source and "make study STUDY=testbed" in node.cells[0].source
    image = Image.open(io.BytesIO(base64.b64decode(node.cells[1].outputs[0].data["image/png"])))
    assert image.size == (publish.WIDTH, publish.WIDTH // 2)
    assert path.stat().st_size < publish.MOST_BYTES
    links = f"[Index](../../index.ipynb), [here]({NAME}.ipynb), [away](https://a.b/c.ipynb)"
    assert node.cells[2].source == links


def test_a_run_of_another_checkout_names_no_place(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    publish.publish({"testbed": [finished(elsewhere, elsewhere / "runs" / "testbed-full" / "seed-0")]}, root)
    copy = root / "notebooks" / "executed" / "testbed" / f"{NAME}.ipynb"
    assert str(elsewhere) not in copy.read_text()
    shutil.move(elsewhere / "runs" / "testbed-full", root / "runs" / "moved")  # its cells still name where they ran
    publish.publish({"testbed": [root / "runs" / "moved" / "seed-0"]}, root)
    assert str(elsewhere) not in copy.read_text() and "saved in ./runs" in copy.read_text()


def test_a_checkout_below_the_home_folder_names_no_place(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    hidden = publish.secrets_of_machine(tmp_path / "here", tmp_path / "away" / "deep")
    assert publish._without(f"{tmp_path}/away/deep/runs, {tmp_path}/here/x, {tmp_path}/y", hidden) == "./runs, ./x, ~/y"


def test_seeds_with_other_settings_are_not_pooled(root):
    other = finished(root, root / "runs" / "testbed-full" / "seed-1")
    note = other / "provenance" / f"{NAME}.json"
    content = json.loads(note.read_text())
    content["parameters"]["sides"] = "both"
    note.write_text(json.dumps(content))
    first = root / "runs" / "testbed-full" / "seed-0" / "provenance" / f"{NAME}.json"
    first.write_text(
        json.dumps(json.loads(first.read_text()) | {"parameters": content["parameters"] | {"sides": "input"}})
    )
    with pytest.raises(InputError, match="sides"):
        publish.publish({"testbed": [root / "runs" / "testbed-full" / f"seed-{seed}" for seed in (0, 1)]}, root)


def test_too_large_a_notebook_is_refused(root, monkeypatch):
    monkeypatch.setattr(publish, "MOST_BYTES", 1000)
    refused("at most 0.001 MB", lambda: publish.publish({"testbed": [root / "runs" / "testbed-full" / "seed-0"]}, root))


@pytest.mark.parametrize("table", sorted((project_root() / "figures").glob("measured.csv")), ids=lambda p: p.name)
def test_the_projects_pages_say_what_its_ledger_says(table):
    """README's table, the page of claims and every number in README's findings follow from what the runs handed in."""
    root = project_root()
    found = ledger.frame(ledger.read(table).to_dict("records"))
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert publish.front(found) in readme and ledger.front_page(found, ledger.FRONT_CLAIMS) in readme
    assert (root / "docs" / "claims.md").read_text(encoding="utf-8").strip() == publish.claims_page(found).strip()
    assert ledger.unsupported(publish.between(root / "README.md", publish.FINDINGS)[1], found) == []
    assert found.groupby("model").size().max() <= ledger.MOST_ROWS
    gallery = root / "figures" / "README.md"
    assert [t for t in publish.links(gallery.read_text(encoding="utf-8")) if not (gallery.parent / t).exists()] == []


# ---------------------------------------------------------------------------------------------------- reproducing


def test_tables_are_compared_cell_by_cell():
    before = pd.DataFrame({"a": ["x", "y"], "b": [1.0, float("nan")]})
    assert reproduce.compare_tables(before, before.copy())["says"] == "equal"
    close = reproduce.compare_tables(before, before.assign(b=[1.00005, float("nan")]))
    assert (close["equal"], close["close"], close["different"], close["says"]) == (3, 1, 0, "within 0.0001")
    tiny = pd.DataFrame({"kl": [1e-8, -3e-8]})
    assert reproduce.compare_tables(tiny, -tiny)["close"] == 2, "a divergence of nothing is rounding"
    far = reproduce.compare_tables(before, before.assign(b=[1.1, float("nan")]))
    assert (far["different"], far["says"]) == (1, "differs") and far["largest"] == pytest.approx(0.1 / 1.1)
    assert reproduce.compare_tables(before, before[:1])["says"] == "2 x 2 cells, now 1 x 2"


@pytest.mark.parametrize(
    ("value", "status", "says"), [(-0.3, 0, "equal"), (-0.31, 0, "equal"), (0.3, 1, "S8: holds, now does not hold")]
)
def test_a_rerun_passes_exactly_when_its_verdicts_are_equal(
    published, tmp_path, monkeypatch, capsys, value, status, says
):
    folder = finished(published, tmp_path / "runs" / "reproduce" / "testbed-full" / "seed-0", value)
    monkeypatch.setattr(reproduce, "project_root", lambda: published)
    assert reproduce.main(["--study", "testbed", "--folder", str(folder)]) == status
    table = pd.read_csv(folder / "reproduced.csv").set_index(["notebook", "table"]).loc[NAME]
    assert table.loc["verdicts", "says"] == says
    assert table.loc["02_sn_steps", "cells"] == 2 * 8
    assert table.loc["02_sn_steps", "different"] == (value != -0.3)
    (folder / "figures" / "02_sn_steps.csv").unlink()
    assert reproduce.main(["--study", "testbed", "--folder", str(folder)]) == 1
    assert "was not made" in capsys.readouterr().out


def test_a_study_of_which_some_notebooks_were_published_is_rerun_and_compared_in_these_alone(published, monkeypatch):
    """Every notebook of the checkout was rerun, and each claim of an unpublished one counted as another verdict."""
    shutil.copy(published / "notebooks" / f"{NAME}.ipynb", published / "notebooks" / "01_safety_neurons.ipynb")
    ran = []
    what = reproduce.published("testbed", published)
    with monkeypatch.context() as fake:
        fake.setattr("subprocess.run", lambda call, **_: ran.append(call[4]) or SimpleNamespace(returncode=0))
        folder = reproduce.rerun(what, published, 1)
    assert ran == [NAME]
    finished(published, folder)
    other = make_run(folder, notebook="01_safety_neurons", testbed={"passed": True})
    other.measured("S2", (0.3, 0.27, 0.33, 80), row="contrast", part="share")
    other.finish()
    table = reproduce.compare(what, folder, published)
    assert set(table["notebook"]) == {NAME} and reproduce.is_reproduced(table)
    (folder / "claims" / f"{NAME}.csv").unlink()
    says = reproduce.compare(what, folder, published).set_index("table").loc["verdicts", "says"]
    assert says == "S8: holds, now not run"


def test_a_study_that_was_not_published_is_refused(published):
    refused("published: testbed", lambda: reproduce.published("other", published))
    assert json.loads((published / "figures" / "testbed" / NAME / "made_with.json").read_text())["testbed"] == "abcd"


def test_a_caption_names_the_gpus_of_a_run_and_of_tables_that_it_took_over():
    note = {"parameters": {"model": "m", "seed": 0}, "machine": {"gpus": []}}
    assert "computed" not in publish.caption(publish.made_with(note))
    note["kept"] = {"dose": {"machine": {"gpus": ["NVIDIA H200"]}}}
    assert publish.caption(publish.made_with(note)).endswith("computed on CPU and NVIDIA H200")
    note["machine"]["gpus"] = ["NVIDIA H200"]
    assert publish.caption(publish.made_with(note)).endswith("computed on NVIDIA H200")


def test_a_model_that_is_published_again_keeps_its_place(published):
    """The first model of the front page became its last one."""
    file = published / "figures" / "measured.csv"
    lines = pd.read_csv(file)
    pd.concat([lines, lines.assign(model="other")]).to_csv(file, index=False)
    publish.publish({"testbed": [published / "runs" / "testbed-full" / "seed-0"]}, published)
    assert pd.read_csv(file)["model"].unique().tolist() == ["testbed", "other"]
