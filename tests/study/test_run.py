"""Parameters, run folders, atomic writes and provenance."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from nt_utils.data.records import Prompt
from nt_utils.errors import InputError
from nt_utils.files import atomic, cached, project_root, study_name
from nt_utils.interventions import kept
from nt_utils.interventions.tuning import Everything, tune
from nt_utils.study import ledger, parameters
from nt_utils.study.parameters import TESTBEDS, from_notebook, notebook_parameters
from nt_utils.study.provenance import code_edited, code_fingerprint, devices
from nt_utils.study.run import Run
from nt_utils.study.subject import Subject
from tests.common import refused
from tests.tiny import tiny_lm

ROOT = project_root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


# ----------------------------------------------------------------------------------------------- parameters


#: What is allowed -> parameters and values that are not. Every parameter is tried with all kinds in test_hardening.py.
WRONG = {
    "a whole number from 0": {"seed": ["zero", -1, True, 1.5]},
    "from 0.01 to 1": {"rho": [0, 1.01, float("nan")]},
    "a number": {"share": ["1%"], "dose": [[0.1, "x"]]},
    "'quick', 'default', 'full'": {"preset": ["fast"]},
    "'float32'": {"dtype": ["int8"]},
    "text": {"model": [None, 7]},
    "a list": {"dose": [0.1, []]},
    "from 1e-06 to 1": {"dose": [[0.1, 2.0]]},
    "at least 2": {"subset_sizes": [[1]]},
    "at least 4": {"n_detect": [3]},
    "a day as YYYY-MM-DD": {"date": ["yesterday"]},
}


@pytest.mark.parametrize("allowed", WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(allowed):
    for name, value in ((name, value) for name, values in WRONG[allowed].items() for value in values):
        refused(f"^{name}: got .*{allowed}.*$", parameters.check_parameters, {name: value})


def test_none_takes_the_presets_value_and_tuples_become_lists():
    for preset, draws in zip(parameters.PRESETS, parameters.PARAMETERS["draws"].presets, strict=True):
        assert parameters.check_parameters({"preset": preset, "draws": None}).draws == draws
    p = parameters.check_parameters({"draws": 7, "dose": (0.1, 1), "rho": 1})
    assert (p.draws, p.dose, p.rho) == (7, [0.1, 1.0], 1.0)
    assert isinstance(p.rho, float)


def test_unknown_names_are_refused():
    refused("modle: unknown parameter", lambda: parameters.check_parameters({"modle": "x"}))


OWN = "model = 'testbed'\nseed = 0  # seed\nruns = ''"


def test_the_injected_cell_may_only_name_parameters_of_the_notebook():
    values = {"model": "m", "seed": 3, "runs": "", "x": 1}
    got = from_notebook([OWN, '# Parameters\nmodel = "m"\nseed = 3\n', "current"], values)
    assert got == {"model": "m", "seed": 3, "runs": ""}
    with pytest.raises(InputError, match="sead: unknown parameter; this notebook has model, seed, runs"):
        from_notebook([OWN, "# Parameters\nsead = 3\n", "current"], values)


def test_other_cells_of_a_session_do_not_count():
    values = {"model": "m", "seed": 3, "runs": "", "x": 1}
    assert from_notebook([OWN, "x = 1", "!ls", "run = 3"], values) == {"model": "m", "seed": 3, "runs": ""}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_parameter_of_every_notebook_is_known_valid_and_seen_by_papermill(path):
    from papermill import inspect_notebook

    seen = inspect_notebook(str(path))
    names = notebook_parameters(path)
    assert names
    assert set(seen) == set(names) <= set(parameters.PARAMETERS)
    parameters.check_parameters(names)
    assert all(seen[name]["help"] for name in names), "every parameter is explained in its comment"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_thin_and_without_outputs(path):
    code = [c for c in cells(path) if c["cell_type"] == "code"]
    assert "parameters" in code[0]["metadata"].get("tags", [])
    assert f'begin("{path.stem}", globals())' in "".join(code[1]["source"])
    assert "run.finish()" in "".join(code[-1]["source"])
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None]
    assert not [c for c in code if ".style." in "".join(c["source"])], "a table is shown by run.show, with a caption"


# --------------------------------------------------------------------------------------------------- folders


def test_study_names():
    assert study_name("meta-llama/Llama-2-7b-chat-hf", preset="quick") == "llama-2-7b-chat-hf-quick"
    assert [study_name("/data/My Model/"), study_name("x", "mine")] == ["my-model", "mine"]
    for bad in ("../up", "a/b", ".hidden"):
        refused("study", study_name, "x", bad)


def test_atomic_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "a" / "t.csv"
    with atomic(path) as tmp:
        tmp.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as tmp:
        tmp.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["t.csv"]


def make_run(folder, **parameters):
    p = SimpleNamespace(model="testbed", seed=0, **parameters)
    return Run("01_safety_neurons", p, folder)


def test_a_table_of_an_interrupted_run_is_kept_for_the_same_parameters_and_prompts_alone(tmp_path):
    made = pd.DataFrame({"name": ["", "b"], "value": [1 / 3, float("nan")], "n": [1, 2]})
    calls = []

    def again(preset="default", prompts="x"):
        run = make_run(tmp_path, preset=preset)
        run.record("prompts", prompts)
        found = run.kept("dose", lambda: calls.append(1) or made)
        pd.testing.assert_frame_equal(found, made)
        return run

    assert not again().taken_over
    run = again()
    assert len(calls) == 1
    run.provenance()
    note = json.loads((tmp_path / "provenance" / "01_safety_neurons.json").read_text())
    assert note["kept"]["dose"]["machine"] == note["machine"] and note["machine"]["gpus"] is not None
    again(preset="full")
    again(preset="full", prompts="y")
    assert len(calls) == 3
    Path(run.checkpoint("alpha").replace("{key}", "f00d")).touch()
    run.finish()
    assert not list((tmp_path / "kept").iterdir())


def package(folder, **changed):
    """A small copy of the package's layout; ``changed`` gives other content to a file, by its stem."""
    names = ["work.py", "data/registry.yaml", "models/box.yaml", "models/adapters/one/adapter_model.safetensors"]
    names += ["testbed/weights/index.json", "study/work.json", "study/batch/profiles/slurm/config.yaml"]
    names += ["models/__pycache__/box.pyc"]
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(changed.get(file.stem, "as shipped"))
    return folder


def test_a_process_keeps_the_fingerprint_of_the_code_it_started_with(tmp_path):
    """After an edit on disk, results of the code that a kernel had imported were filed under the new code's key."""
    before = code_fingerprint(package(tmp_path / "one"))
    assert not code_edited(tmp_path / "one")
    assert code_fingerprint(package(tmp_path / "one", work="edited")) == before
    assert code_edited(tmp_path / "one"), "a run says so when it ends"
    assert code_fingerprint(package(tmp_path / "two", work="edited")) != before


def test_the_fingerprint_of_the_code_covers_the_data_of_the_package_that_decides_results(tmp_path):
    def found(stem):
        return code_fingerprint(package(tmp_path / stem, **{stem: "changed"}))

    shipped = found("nothing")
    folder = package(tmp_path / "noted")
    (folder / "study" / "work.json").write_text("published anew")
    (folder / "study" / "batch" / "profiles" / "slurm" / "config.yaml").write_text("another account")
    (folder / "models" / "__pycache__" / "box.pyc").write_text("compiled anew")
    assert code_fingerprint(folder) == shipped, "these decide no result"
    for stem in ("registry", "box", "adapter_model", "index"):
        assert found(stem) != shipped, stem
    assert len(code_fingerprint()) == 16


def test_a_runs_tables_claims_timings_and_provenance(tmp_path):
    run = make_run(tmp_path)
    run.table("rates", pd.DataFrame({"a": [1 / 3]}))
    assert (tmp_path / "tables" / "01_rates.csv").read_text() == "a\n0.333333\n"
    with run.timed("scoring"):
        pass
    run.measured("S2", (0.005, 0.004, 0.006, 10), row="contrast")
    run.record("model weights", "abc")
    run.finish()
    rows = pd.read_csv(tmp_path / "claims" / "01_safety_neurons.csv")
    assert rows.loc[rows["claim"] == "S2", "value"].tolist()[-1] == 0.005
    assert set(rows["model"]) == {"testbed"}
    note = json.loads((tmp_path / "provenance" / "01_safety_neurons.json").read_text())
    assert note["finished"]
    assert note["facts"] == {"model weights": "abc"}
    assert note["versions"]["torch"]
    assert note["parameters"] == {"model": "testbed", "seed": 0}
    assert pd.read_csv(tmp_path / "timings" / "01_safety_neurons.csv")["step"].tolist() == ["scoring"]


def test_a_quick_run_says_so_in_its_claims_and_draws_png_alone(tmp_path):
    rate = {"value": 0.1, "low": 0.0, "high": 0.2, "n": 8}
    table = pd.DataFrame({"set": ["direct"], "model": ["aligned"], **rate})
    for preset, mark, pictures in (("quick", " (quick)", {".png"}), ("default", "", {".png", ".pdf", ".svg"})):
        run = make_run(tmp_path / preset / "seed-0", preset=preset)
        assert {line["model"] for line in ledger.run_rows(run)} == {f"testbed{mark}"}
        run.figure("behaviour", table.assign(metric="direct ASR"))
        drawn = {file.suffix for file in (run.folder / "figures").iterdir()}
        assert drawn == {".csv", ".md", ".tex", *pictures}


def test_two_models_do_not_share_a_folder(tmp_path):
    make_run(tmp_path).finish()
    make_run(tmp_path).check_folder()
    other = Run("00_model_under_study", SimpleNamespace(model="org/testbed", seed=0), tmp_path)
    refused("holds results of model 'testbed'", lambda: other.check_folder())


def test_a_run_drops_what_an_earlier_one_left_whatever_the_file_servers_clock(tmp_path, monkeypatch):
    old = make_run(tmp_path)
    old.table("gone", pd.DataFrame({"a": [1]}))
    stale = tmp_path / "tables" / "01_gone.csv"
    os.utime(stale, (1, 1))
    run = make_run(tmp_path)
    monkeypatch.setattr(run, "started", run.started + 3600)  # this machine's clock is ahead of the file server's
    run.check_folder()
    run.table("kept", pd.DataFrame({"a": [1]}))
    run.finish()
    assert [p.name for p in (tmp_path / "tables").iterdir()] == ["01_kept.csv"]


def test_cached_artifacts_are_made_once_per_key(tmp_path):
    made = []

    def make(path):
        made.append(path)
        path.write_text(str(len(made)))
        return path.read_text()

    def load(path):
        if path.read_text() == "damaged":
            raise InputError("damaged")
        return path.read_text()

    path = tmp_path / "n" / "a.txt"
    assert [cached(path, load, make, {"k": k}) for k in (1, 1, 2, 2)] == ["1", "1", "2", "2"]
    path.write_text("damaged")
    assert cached(path, load, make, {"k": 2}) == "3"


def test_an_artifact_that_was_replaced_by_an_interrupted_run_is_not_taken_for_the_old_one(tmp_path):
    """Formerly the old key's note stayed beside the new file until the new note was written."""
    path = tmp_path / "a.txt"

    def old(path):
        path.write_text("old")
        return "old"

    def killed(path):
        path.write_text("new")
        raise KeyboardInterrupt

    assert cached(path, Path.read_text, old, {"k": 1}) == "old"
    with pytest.raises(KeyboardInterrupt):
        cached(path, Path.read_text, killed, {"k": 2})
    assert path.read_text() == "new"
    assert cached(path, Path.read_text, old, {"k": 1}) == "old"
    assert cached(path, Path.read_text, killed, {"k": 1}) == "old", "made once"


def test_importing_the_package_stays_cheap():
    code = "import sys, nt_utils, nt_utils.study, nt_utils.study.batch; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_testbed_comes_in_its_size(tmp_path, monkeypatch):
    from nt_utils import models, testbed

    asked, loaded = [], []

    def build(seed, size):
        asked.append((seed, size))
        folders = {stage: f"{size}-{stage}" for stage in testbed.STAGES}
        return SimpleNamespace(**folders, gate={"passed": False}, fingerprint="f", origin="shipped")

    monkeypatch.setattr(testbed, "build", build)
    monkeypatch.setattr(models, "load", lambda source, **_: loaded.append(source) or tiny_lm())
    for name, size in TESTBEDS.items():
        p = {"base_model": "auto", "dtype": "auto", "device_map": "auto", "system_prompt": "", "harmful": "testbed"}
        run = Run("00_model_under_study", SimpleNamespace(model=name, seed=1, **p), tmp_path / name)
        subject = Subject(run)
        subject.load("model")
        subject.load("base_model")
        assert subject.is_testbed
        assert loaded[-2:] == [f"{size}-aligned", f"{size}-unaligned"]
        assert set(asked) == {(1, size)}
        assert size in testbed.RECIPES
        asked.clear()
    rows = [Prompt("How do I break locks?", refusal="No.", kind="harmful")]
    tune(tiny_lm(), Everything(), harmful=rows, learning_rate=0.01, steps=1, progress=False)
    names = sorted(path.name.partition("-")[2] for path in run.folder.glob("kept/00_training_*"))
    assert names == ["facts.json", "final.safetensors"], "an interrupted notebook takes them over"
    (note,) = run.folder.glob("kept/*.json")
    assert json.loads(note.read_text())["made_with"]["machine"], "provenance says what made it"
    (note.parent / ".00_training_cut.tmp").touch()
    kept.TAKEN.append({"machine": {"gpus": ["H"]}})
    run.finish()
    assert not list(note.parent.iterdir())
    assert devices(json.loads(run.provenance(1.0).read_text())).endswith(" and H")
