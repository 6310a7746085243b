"""Parameter files, steps of the workflow, and what a bad parameter looks like to somebody who runs papermill."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from nt_utils.errors import InputError
from nt_utils.files import project_root
from nt_utils.study import batch, parameters
from nt_utils.study.batch import step
from tests.common import refused

ROOT = project_root()
TOY = """
rho = 1.0  # a number
seed = 0  # seed
study = "toy"  # study
preset = "quick"  # preset
"""


def notebook(*sources):
    cells = [new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.writes(new_notebook(cells=cells, metadata={"kernelspec": kernel}))


@pytest.fixture
def project(tmp_path):
    """A project with one toy notebook, below a path with blanks and quotes."""
    tmp_path = tmp_path / 'it\'s a "project"'
    (tmp_path / "notebooks" / "params").mkdir(parents=True)
    (tmp_path / "nt_utils").mkdir()
    (tmp_path / "notebooks" / "00_toy.ipynb").write_text(notebook(TOY, "print(rho, seed, study)"))
    (tmp_path / "notebooks" / "params" / "toy.yaml").write_text("rho: 0.5\n")
    return tmp_path


def write_params(project, **content):
    (project / "notebooks" / "params" / "toy.yaml").write_text(yaml.safe_dump(content))


# ------------------------------------------------------------------------------------------- parameter files


def test_a_notebook_gets_the_parameters_it_takes(project):
    (project / "notebooks" / "01_other.ipynb").write_text(notebook(TOY + "model = 1  # m\nn_test = 4  # n\n"))
    write_params(project, model="testbed", rho=0.5, notebooks={"00_toy": {"rho": 0.25}})
    assert batch.study_parameters("toy", "00_toy", project) == {"rho": 0.25}
    assert batch.study_parameters("toy", "01_other", project) == {"model": "testbed", "rho": 0.5}


def test_a_quick_run_is_quick_whatever_sizes_a_file_gives(project):
    """Sizes that a study's results need came through to PRESET=quick, which then took hours."""
    cell = (
        TOY
        + "n_test = None  # n\ndose = None  # d\nsides = 'both'  # s\ntune_steps = None  # t\nmax_new_tokens = 0  # m\n"
        + "dtype = 'auto'  # p\nother_sides = None  # o\n"
    )
    (project / "notebooks" / "00_toy.ipynb").write_text(notebook(cell))
    own = {"n_test": 40, "dose": [0.01, 0.02, 0.03], "sides": "input", "tune_steps": [8, 16], "max_new_tokens": 24}
    own |= {"dtype": "bfloat16", "other_sides": "both"}
    write_params(project, rho=0.5, notebooks={"00_toy": own})
    (variant,) = batch.variants("toy", [0], "quick", project)
    quick, default = (batch.settings(variant, "00_toy", 0, preset, project) for preset in ("quick", "default"))
    assert own.items() <= default.items()
    most = parameters.PARAMETERS["n_test"].presets[0]
    first = own["dose"][: len(parameters.PARAMETERS["dose"].presets[0])]
    assert (quick["n_test"], quick["dose"], quick["sides"], quick["rho"]) == (most, first, "input", 0.5)
    presets = {name: parameters.PARAMETERS[name].presets[0] for name in ("tune_steps", "max_new_tokens")}
    assert (
        presets.items() <= quick.items()
        and presets["max_new_tokens"] < 24
        and presets["tune_steps"] < [8]
        and first < own["dose"]
    )
    assert (quick["dtype"], quick["other_sides"]) == ("auto", "")
    write_params(project, n_test=4, notebooks={"00_toy": {"dose": [0.03]}})
    small = batch.settings(variant, "00_toy", 0, "quick", project)
    assert (small["n_test"], small["dose"]) == (4, [0.03])


def test_other_prompts_are_taken_where_a_files_sources_are_not_at_hand(project, capsys):
    (project / "notebooks" / "00_toy.ipynb").write_text(notebook(TOY + 'harmful = "testbed"  # h\n'))
    (project / "mine.txt").write_text("one\n")
    for file, harmful in ((project / "mine.txt", f"{project}/mine.txt"), (project / "no.txt", "testbed")):
        write_params(project, harmful=str(file), otherwise={"harmful": "testbed"})
        for _ in range(2):
            assert batch.study_parameters("toy", "00_toy", project) == {"harmful": harmful}
    (said,) = capsys.readouterr().err.splitlines()
    assert f"toy: {project}/no.txt is not at hand" in said and "harmful: testbed instead" in said


def test_a_misspelt_source_is_refused_and_not_replaced(project):
    """It was not at hand, so that the whole study ran on other prompts."""
    (project / "notebooks" / "00_toy.ipynb").write_text(notebook(TOY + 'harmful = "testbed"\n'))
    write_params(project, harmful="xstest-unsave", otherwise={"harmful": "testbed"})
    message = "toy.yaml: harmful: unknown prompt set 'xstest-unsave': use one of"
    refused(message, batch.study_parameters, "toy", "00_toy", project)


def test_other_prompts_are_taken_for_a_source_of_one_notebook_too(project):
    (project / "notebooks" / "00_toy.ipynb").write_text(
        notebook(TOY + 'harmful = "testbed"\nother_harmful = ""\nnew_task = ""\n')
    )
    own = {"00_toy": {"other_harmful": str(project / "no.txt"), "new_task": "", "rho": 0.5}}
    instead = {"harmful": "testbed", "other_harmful": "", "new_task": "testbed"}
    write_params(project, harmful="testbed", notebooks=own, otherwise=instead)
    found = batch.study_parameters("toy", "00_toy", project)
    left_out = {"other_harmful": "", "new_task": ""}
    assert found == {"harmful": "testbed", "rho": 0.5} | left_out, "what a notebook leaves out stays out"
    (project / "mine.txt").write_text("one\n")
    write_params(project, harmful=str(project / "mine.txt"), new_task="", notebooks=own, otherwise=instead)
    found = batch.study_parameters("toy", "00_toy", project)
    assert found["harmful"] == str(project / "mine.txt"), "a set that is only left out leaves the others alone"
    write_params(project, harmful=str(project / "no.txt"), new_task="", otherwise=instead)
    assert batch.study_parameters("toy", "00_toy", project) == {"harmful": "testbed"} | left_out


def test_every_study_that_names_other_prompts_has_some_for_each_source(monkeypatch):
    """A study of the package that falls back where its prompts are not at hand falls back for all of them."""
    monkeypatch.setattr("nt_utils.study.batch.parameter_files.is_at_hand", lambda source: False)
    for study in ("qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct", "smollm2-135m-instruct"):
        for name in batch.notebooks(ROOT):
            given = batch.study_parameters(study, name, ROOT)
            assert {given[r] for r in parameters.SOURCES if r in given} <= {"", "testbed", "python-prose"}, (
                study,
                name,
            )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rhoo: 1", "toy.yaml: rhoo: unknown parameter; did you mean rho\\? allowed: rho, notebooks, sweep, otherwise"),
        ("model: testbed", "model: unknown parameter"),
        ("seed: 1", "seed: set by SEEDS"),
        ("facts: {gate: true}", "facts: gate: unknown; allowed: gated"),
        ("notebooks: [1]", "notebooks: got"),
        ("sweep: {rho: 0.5}", "sweep: rho: got 0.5; allowed: a list"),
        ("sweep: {rho: [0.5, 2]}", "rho: got 2"),
        ("sweep: {rhoo: [0.5]}", "rhoo: unknown"),
        ("rho: 2", "rho: got 2"),
        ("notebooks: {09_none: {}}", "'09_none' is no notebook; known: 00_toy"),
        ("notebooks: {00_toy: {rho2: 0.5}}", "rho2: unknown parameter; did you mean rho"),
        ("rho: 0.5\nrho: 0.6", "'rho' stands twice"),
        ("notebooks:\n  00_toy: {rho: 0.5, rho: 0.6}", "'rho' stands twice"),
        ("rho: 0.5  # f\xfcr", "toy.yaml: not UTF-8"),
    ],
)
def test_a_wrong_parameter_file_is_named(project, content, message):
    (project / "notebooks" / "params" / "toy.yaml").write_bytes(content.encode("latin-1"))
    refused(message, lambda: batch.study_parameters("toy", "00_toy", project))


def test_unknown_studies_and_seeds_are_refused(project):
    refused("'none' has no parameter file; known: toy", lambda: batch.study_parameters("none", "00_toy", project))
    assert batch.parse_seeds("0 1,2 1") == [0, 1, 2]
    for bad in ("", "one", "-1", "1.5", "²", "9" * 40):
        refused("seeds", batch.parse_seeds, bad)


def test_a_file_that_extends_another_has_its_lines_and_its_own_on_top(project):
    folder = project / "notebooks" / "params"
    (folder / "_base.yaml").write_text("rho: 0.25\nfacts: {gated: true}\n")
    (folder / "toy.yaml").write_text("extends: _base\nfacts: {tokenizer: x}\n")
    found = batch.read("toy", project)
    assert (found.shared["rho"], found.facts) == (0.25, {"gated": True, "tokenizer": "x"})
    (folder / "toy.yaml").write_text("extends: _base\nrho: 0.75\n")
    assert batch.read("toy", project).shared["rho"] == 0.75
    (folder / "_base.yaml").write_text("extends: toy\n")
    for wrong, message in (("_base", "extends: got 'toy'"), ("none", "extends: got 'none'")):
        (folder / "toy.yaml").write_text(f"extends: {wrong}\n")
        refused(message, batch.read, "toy", project)
    refused("known: toy", lambda: batch.read("_base", project))


def test_every_study_of_the_project_is_valid():
    for file in (ROOT / "notebooks" / "params").glob("[!_]*.yaml"):
        for name in batch.notebooks(ROOT):
            batch.study_parameters(file.stem, name, ROOT)


def test_the_command_line_refuses_before_it_starts(capsys):
    wrong = {"--studies": ["nope"], "--seeds": ["x", "²"], "--preset": ["fast"], "--cores": ["0", "-1", "many", ""]}
    for arguments in (["study", f"{option}={value}"] for option, values in wrong.items() for value in values):
        assert batch.main(arguments) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert "\n" not in error


# -------------------------------------------------------------------------------------------------- one step


def outputs(path):
    return "".join(
        "".join(o.get("text", "")) for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])
    )


def test_a_step_leaves_the_executed_notebook(project):
    output = project / "runs" / "toy" / "00_toy.ipynb"
    batch.run_notebook("00_toy", {"seed": 7, "rho": 0.5}, output, project)
    assert "0.5 7 toy" in outputs(output)
    assert sorted(p.name for p in output.parent.iterdir()) == ["00_toy.ipynb", "logs"]
    assert "0.5 7 toy" in (output.parent / "logs" / "00_toy.log").read_text()


def test_an_executed_notebook_keeps_no_stubs_of_progress_bars(project, capsys):
    bar = """
import sys, time
import tqdm.notebook
from nt_utils import work
for _ in tqdm.notebook.tqdm(range(3)):
    pass
for _ in tqdm.tqdm(range(3), desc="Loading weights"):
    pass
work.SECONDS = 0.0
for _ in work.track(range(3), "training"):
    time.sleep(0.5)
for _ in range(2):
    print(work.MARK + "answers: 1 of 2, 3 it/s", file=sys.stderr)
print("after the bar")
print("a real warning", file=sys.stderr)
"""
    (project / "notebooks" / "00_toy.ipynb").write_text(notebook(TOY, bar))
    output = project / "runs" / "toy" / "00_toy.ipynb"
    batch.run_notebook("00_toy", {}, output, project)
    assert outputs(output).split("\n") == ["after the bar", "a real warning", ""]
    assert "widget-view" not in output.read_text()
    shown = capsys.readouterr().out.splitlines()  # the batch's own output says how far a cell is, each line once
    assert any("00_toy: training: 2 of 3" in line for line in shown)
    assert all(one != other for one, other in itertools.pairwise(shown))


REFUSED = "from nt_utils.errors import InputError\nraise InputError('seed: got 1; allowed: 2')"
KILLED = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(("cell", "message"), [(REFUSED, "seed: got 1; allowed: 2"), (KILLED, "00_toy")])
def test_a_failed_cell_or_a_dead_kernel_is_no_finished_notebook(project, cell, message):
    (project / "notebooks" / "00_toy.ipynb").write_text(notebook(TOY, cell, "print('never')"))
    output = project / "runs" / "00_toy.ipynb"
    output.parent.mkdir()
    output.write_text("an older result")
    with pytest.raises(InputError, match=message) as error:
        batch.run_notebook("00_toy", {"seed": 0}, output, project)
    assert "\n" not in str(error.value)
    assert output.read_text() == "an older result"
    assert sorted(p.name for p in output.parent.iterdir()) in (
        ["00_toy.failed.ipynb", "00_toy.ipynb", "logs"],
        ["00_toy.ipynb", "logs"],
    )


# ------------------------------------------------------------------------------------- the real notebooks


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("01_safety_neurons", {"rhoo": "1"}, "rhoo: unknown parameter"),
        ("00_model_under_study", {"model": "./no-such-folder"}, "no-such-folder"),
    ],
)
def test_papermill_shows_one_line_for_a_bad_parameter(tmp_path, name, parameters, message):
    source, target = str(ROOT / "notebooks" / f"{name}.ipynb"), str(tmp_path / "out.ipynb")
    command = [sys.executable, "-m", "papermill", source, target]
    for key, value in ({"runs": str(tmp_path / "runs")} | parameters).items():
        command += ["-p", key, value]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert message in last
    assert last.startswith(("InputError", "ModelError"))
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


# ------------------------------------------------------------------------------------ secrets, sweeps, the same twice

LEAKING = """
import os, pathlib, sys
from nt_utils.study import ledger
print(os.environ["HF_TOKEN"])
print(os.environ["HF_TOKEN"], file=sys.stderr)
folder = pathlib.Path("runs") / study / f"seed-{seed}" / "claims"
folder.mkdir(parents=True, exist_ok=True)
line = {"claim": "c", "value": rho, "low": 0, "high": 1, "n": 9, "seed": seed}
rows = [ledger.COLUMNS, [str(line.get(name, "")) for name in ledger.COLUMNS]]
(folder / "00_toy.csv").write_text("\\n".join(map(",".join, rows)) + "\\n")
if rho == 0.25:
    raise RuntimeError(os.environ["HF_TOKEN"])
"""


@pytest.mark.parametrize(
    ("environment", "file"),
    [
        ({"XDG_CACHE_HOME": "{home}/cache"}, "cache/huggingface/token"),
        ({"XDG_CACHE_HOME": "{home}/cache", "HF_HOME": "~/hub"}, "hub/token"),
        ({"HF_HOME": "$PLACE/hub"}, "there/hub/token"),
        ({"HF_TOKEN_PATH": "~/my token"}, "my token"),
        ({}, ".cache/huggingface/token"),
    ],
)
def test_the_hubs_token_is_hidden_wherever_the_hub_looks_for_it(tmp_path, monkeypatch, environment, file):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    environment = {"HOME": str(tmp_path), "PLACE": str(tmp_path / "there")} | environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("{home}", str(tmp_path)))
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("hf_planted_token\n")
    assert step.hide("a hf_planted_token here") == "a [hidden] here"
    stored = "[work]\nhf_token = hf_stored%token\nrefresh_token = renewed_token\nexpires_at = 1234567890\n"
    path.with_name("stored_tokens").write_text(stored)
    assert step.hide("hf_stored%token, renewed_token, 1234567890") == "[hidden], [hidden], 1234567890"
    path.with_name("stored_tokens").write_text("not such a file")
    assert step.hide("a hf_planted_token here") == "a [hidden] here"


def test_a_secret_is_hidden_in_json_too(monkeypatch):
    """Notebooks are JSON, where a quote or a backslash of a secret is written in another way."""
    secret = 'pass"word\\with é'
    monkeypatch.setenv("MY_PASSWORD", secret)
    text = json.dumps({"text": f"it is {secret}!"}, ensure_ascii=False)
    assert json.loads(step.hide(text)) == {"text": "it is [hidden]!"}
    assert step.hide(f"it is {secret}!") == "it is [hidden]!"


def everything(folder):
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_a_sweep_gives_one_table_and_a_planted_token_appears_nowhere(project):
    shutil.copy(ROOT / "Snakefile", project / "Snakefile")
    (project / "notebooks" / "00_toy.ipynb").write_text(notebook(TOY.replace("quick", "default"), LEAKING))
    (project / "notebooks" / "01_other.ipynb").write_text(notebook("seed = 0  # seed\n", "1 / 0"))
    token = "hf_" + "planted" * 4
    command = [sys.executable, "-m", "nt_utils.study.batch", "study", "--studies=toy", "--seeds=0", "--cores=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_TOKEN": token, "OMP_NUM_THREADS": "1"}
    environment |= {"HOME": "/proc/nohome", "NT_CACHE": str(project / "cache")}  # a home that cannot be written
    environment = {k: v for k, v in environment.items() if k not in ("XDG_CACHE_HOME", "LOGNAME", "USER")}

    def study(values):
        write_params(project, sweep={"rho": values, "seed": [3]})
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=600)
        assert token not in done.stdout + done.stderr
        assert token.encode() not in everything(project)
        return done

    (project / "Snakefile").write_text("raise ValueError('the reason of Snakemake')\n")
    assert "the reason of Snakemake" in study([0.5]).stderr
    shutil.copy(ROOT / "Snakefile", project / "Snakefile")
    failed = study([0.5, 0.25])
    assert failed.returncode != 0
    assert "00_toy: RuntimeError: [hidden]" in failed.stderr
    assert b"[hidden]" in everything(project)
    assert (project / "runs" / "toy.rho-0.25" / "seed-3" / "00_toy.failed.ipynb").is_file()
    done = study([0.5, 0.75])
    assert done.returncode == 0, done.stderr
    assert "toy.rho-0.75, seed 3" in done.stdout
    assert "toy.rho-0.5," not in done.stdout, "a finished point is not repeated"
    table = (project / "runs" / "toy" / "sweep.csv").read_text().splitlines()
    names, *lines = (line.split(",") for line in table)
    rows = [dict(zip(names, line, strict=True)) for line in lines]
    assert [(r["rho"], r["seed"], r["claim"], r["value"], r["n"]) for r in rows] == [
        ("0.5", "3", "c", "0.5", "9"),
        ("0.75", "3", "c", "0.75", "9"),
    ]


def test_runs_of_a_sweep(project):
    write_params(project, sweep={"rho": [0.5, 1]})
    found = batch.variants("toy", [0, 1], "quick", project)
    assert [v.folder for v in found] == ["toy.rho-0.5-quick", "toy.rho-1-quick"]
    assert found[0].outputs()[1] == "runs/toy.rho-0.5-quick/seed-1/00_toy.ipynb"
    settings = {"rho": 1, "study": "toy.rho-1", "seed": 1, "preset": "quick"}
    assert batch.settings(found[1], "00_toy", 1, "quick", project) == settings
    write_params(project, rho=0.5)
    [plain] = batch.variants("toy", [0], "default", project)
    assert (plain.folder, plain.notebooks) == ("toy", ("00_toy",))


def test_settings_are_written_when_they_change(project, monkeypatch):
    """A result older than its settings is out of date, so an unchanged file keeps its time."""
    file = project / "runs" / "toy" / "seed-0" / ".settings" / "00_toy.json"

    def noted():
        [run] = batch.variants("toy", [0], "default", project)
        batch.note_settings(run, "default", project)
        before = file.stat().st_mtime_ns
        os.utime(file, ns=(1, 1))
        return before

    assert noted() != 1
    assert noted() == 1
    write_params(project, rho=0.25)
    assert noted() != 1
    assert json.loads(file.read_text())["parameters"]["rho"] == 0.25
    monkeypatch.setattr(batch.parameter_files, "code_fingerprint", lambda: "other code")
    assert noted() != 1
    assert noted() == 1


def test_a_changed_prompt_file_changes_the_settings_of_the_steps_that_read_it(project):
    """Also a local model's folder, in every form in which a parameter can name a file."""
    prompts, model = project / "prompts.csv", project / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    prompts.write_text("goal\nHow?\n")
    given = {"a": "prompts.csv:goal", "b": f"advbench@{prompts}", "c": str(model), "d": "testbed", "e": "hub:x/y:z"}
    given |= {"f": 3, "g": f"phrases+{model}"}
    before = batch.parameter_files.contents(given, project)
    assert sorted(before) == ["a", "b", "c", "g"]
    prompts.write_text("goal\nWhy?\n")
    after = batch.parameter_files.contents(given, project)
    assert after["a"] != before["a"] and after["b"] != before["b"] and after["c"] == before["c"]
    (model / "config.json").write_text("{ }")
    changed = batch.parameter_files.contents(given, project)
    assert changed["c"] != before["c"] and changed["g"] != before["g"]


def test_a_file_below_a_folder_with_an_at_sign_is_found(project):
    """What stood after the @ was taken for the file, and the contents of such a model counted for nothing."""
    home = project / "me@corp.com"
    (home / "model").mkdir(parents=True)
    (home / "model" / "config.json").write_text("{}")
    (home / "prompts.csv").write_text("goal\nHow?\n")
    given = {"model": f"{home}/model", "bare": "me@corp.com/model", "phrases": f"phrases+{home}/model"}
    given |= {"set": f"advbench@{home}/prompts.csv", "bare_set": "advbench@me@corp.com/prompts.csv"}
    given |= {"column": f"{home}/prompts.csv:goal"}
    before = batch.parameter_files.contents(given, project)
    assert sorted(before) == sorted(given)
    (home / "model" / "config.json").write_text("{ }")
    (home / "prompts.csv").write_text("goal\nWhy?\n")
    after = batch.parameter_files.contents(given, project)
    assert not [name for name in given if after[name] == before[name]]


def test_a_step_takes_the_prompts_that_its_settings_file_says(project, monkeypatch, capsys):
    """With a network that comes and goes, one notebook took the file's prompts and the next one the others, unseen."""
    (project / "notebooks" / "00_toy.ipynb").write_text(notebook(TOY + 'harmful = "testbed"  # h\n', "print(harmful)"))
    write_params(project, harmful="advbench", otherwise={"harmful": "testbed"})
    monkeypatch.chdir(project)
    monkeypatch.setattr(batch.parameter_files, "is_at_hand", lambda source: True)
    [run] = batch.variants("toy", [0], "default", project)
    batch.note_settings(run, "default", project)
    monkeypatch.setattr(batch.parameter_files, "is_at_hand", lambda source: False)
    folder = project / "runs" / "toy" / "seed-0"
    output, settings = folder / "00_toy.ipynb", folder / ".settings" / "00_toy.json"
    call = ["run", "00_toy", "--study=toy", "--seed=0", f"--output={output}"]
    assert batch.main([*call, f"--settings={settings}"]) == 0
    assert outputs(output) == "advbench\n"
    assert batch.main(call) == 0
    assert outputs(output) == "testbed\n", "by hand, the step decides itself"
    capsys.readouterr()
    settings.write_text("{")
    assert batch.main([*call, f"--settings={settings}"]) == 1
    assert capsys.readouterr().err.startswith(f"error: settings: {settings} ")
    assert batch.main([*call, f"--settings={settings}.none"]) == 1
    assert capsys.readouterr().err.startswith(f"error: settings: {settings}.none ")


def test_a_kernel_is_reached_through_sockets_of_its_own(project, monkeypatch):
    cell = "from ipykernel.kernelapp import IPKernelApp\nprint(IPKernelApp.instance().transport)"
    (project / "notebooks" / "00_toy.ipynb").write_text(notebook(TOY, cell))
    output = project / "runs" / "00_toy.ipynb"
    batch.run_notebook("00_toy", {"seed": 0}, output, project)
    assert "ipc" in outputs(output)
    long = project / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    batch.run_notebook("00_toy", {"seed": 0}, output, project)
    assert "tcp" in outputs(output)


TINY = """
import pandas as pd
from nt_utils.files import project_root
from nt_utils.study.run import begin
from nt_utils.scoring.importance import importance
from tests.tiny import tiny_lm
run = begin("00_toy", globals())
scores = importance(tiny_lm(), ["one prompt", "and another"], positions="all")
rows = [(*site, float(x)) for site in scores.space.sites() for x in scores.get(*site).mean(0)]
run.table("scores", pd.DataFrame(rows, columns=["layer", "kind", "score"]))
run.finish()
"""


def test_the_same_seed_gives_the_same_tables(tmp_path, monkeypatch):
    """Byte for byte, in processes of their own; seconds and times stand elsewhere."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the cells take their model from tests/
    cells = notebook('model = "testbed"  # m\n' + TOY.split("\n", 2)[2] + 'runs = ""  # r\nn_test = 4  # n\n', TINY)
    tables = []
    for name in ("a", "b"):
        project = tmp_path / name
        (project / "notebooks").mkdir(parents=True)
        (project / "nt_utils").mkdir()
        (project / "notebooks" / "00_toy.ipynb").write_text(cells)
        output = project / "runs" / "toy" / "seed-0" / "00_toy.ipynb"
        batch.run_notebook("00_toy", {"study": "toy", "preset": "default"}, output, project)
        tables.append({p.name: p.read_bytes() for p in (output.parent / "tables").iterdir()})
    assert len(tables[0]["00_scores.csv"].splitlines()) > 100
    assert tables[0] == tables[1]
