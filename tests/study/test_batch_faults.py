"""Whatever is killed or full: the same command finishes the study, repeats no finished step, and the tables are the same.

A toy study of three steps: 00 and 01 are independent, 06 reads what they left.
"""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from nt_utils.files import project_root
from tests.common import refused
from tests.study.test_batch import notebook

ROOT = project_root()
PARAMETERS = 'study = "toy"  # study\nseed = 0  # seed\npreset = "default"  # preset\n'
#: A toy step: waits, fails or fills the disk when the test says so, else writes its table and one line of the trace.
WORK = """
import errno, hashlib, os, pathlib, time
from nt_utils.files import atomic
folder = pathlib.Path("runs") / study / f"seed-{seed}"
fault = pathlib.Path(f"fault-{NAME}")
order = fault.read_text() if fault.exists() else ""
if order == "wait":
    pathlib.Path(f"waiting-{NAME}").write_text(f"{os.getpid()} {os.getppid()}")
    for _ in range(600):
        time.sleep(0.2)
        if not fault.exists():
            break
if order == "raise":
    raise RuntimeError("this cell fails")
if order == "fill":
    with open(folder / "filler", "wb") as file:
        while True:
            file.write(b"0" * 4096)
            file.flush()
if order == "no space":
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
before = "".join(p.read_text() for p in sorted((folder / "tables").glob("0[01]_*.csv"))) if NAME == "06" else ""
with atomic(folder / "tables" / f"{NAME}_table.csv") as tmp:
    tmp.write_text("value\\n" + hashlib.sha256(f"{NAME} {seed} {before}".encode()).hexdigest() + "\\n")
with open("trace", "a") as file:
    file.write(f"{NAME}-seed-{seed}\\n")
"""
STEPS = {"00": "00_first", "01": "01_second", "06": "06_comparison"}


def make_project(folder: Path) -> Path:
    (folder / "notebooks" / "params").mkdir(parents=True)
    (folder / "nt_utils").mkdir()
    for number, name in STEPS.items():
        cells = notebook(PARAMETERS, f'NAME = "{number}"\n{WORK}')
        (folder / "notebooks" / f"{name}.ipynb").write_text(cells)
    (folder / "notebooks" / "params" / "toy.yaml").write_text("facts: {}\n")
    shutil.copy(ROOT / "Snakefile", folder / "Snakefile")
    (folder / "runs" / "toy").mkdir(parents=True)
    return folder


def start(project: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "nt_utils.study.batch", "study", "--studies", "toy", "--cores", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=project, env=environment, **pipes)


def until(condition, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.1)


def order(project: Path, **faults: str) -> None:
    """What the steps shall do in the next run: {"00": "wait"}; no entry: work."""
    for file in [*project.glob("fault-*"), *project.glob("waiting-*")]:
        file.unlink()
    for name, fault in faults.items():
        (project / f"fault-{name[1:]}").write_text(fault)


def waiting(project: Path, number: str) -> tuple[int, int]:
    """Process numbers of a waiting step's kernel and of the step itself."""
    file = project / f"waiting-{number}"
    until(lambda: file.exists() and len(file.read_text().split()) == 2)
    kernel, step = file.read_text().split()
    return int(kernel), int(step)


def done(project: Path) -> list[str]:
    return sorted(p.name[:2] for p in (project / "runs/toy/seed-0").glob("0*.ipynb") if ".failed" not in p.name)


def finished(project: Path) -> list[str]:
    """Every step that ran to its end, once for each time it did."""
    return sorted((project / "trace").read_text().split())


def tables(project: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((project / "runs/toy/seed-0/tables").iterdir())}


def failure(process: subprocess.Popen) -> str:
    out, error = process.communicate(timeout=300)
    assert process.returncode != 0, out
    return error


@contextlib.contextmanager
def small_disk(folder: Path):
    """A file system of 400 KiB where mounting is allowed, else nothing (a full disk is then simulated)."""
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_rerun_finishes_whatever_was_killed_and_repeats_nothing(tmp_path):
    undisturbed, project = make_project(tmp_path / "a"), make_project(tmp_path / "b")
    reference = start(undisturbed)
    runs = project / "runs/toy/seed-0"
    with small_disk(project / "runs" / "toy") as mounted:
        # a killed kernel, and a cell that fails
        order(project, _00="wait", _01="raise")
        study = start(project)
        os.kill(waiting(project, "00")[0], signal.SIGKILL)
        error = failure(study)
        assert "00_first: " in error
        assert "01_second: RuntimeError: this cell fails" in error
        assert done(project) == []
        assert (runs / "01_second.failed.ipynb").is_file()

        # a killed papermill, and a full disk
        order(project, _00="wait", _01="fill" if mounted else "no space")
        study = start(project)
        os.kill(waiting(project, "00")[1], signal.SIGKILL)
        assert os.strerror(errno.ENOSPC) in failure(study)
        assert done(project) == []
        (runs / "filler").unlink(missing_ok=True)

        # a killed Snakemake, when one step has finished
        order(project, _01="wait")
        study = start(project)
        kernel, step = waiting(project, "01")
        until(lambda: done(project) == ["00"] and len(list((project / ".snakemake/incomplete").iterdir())) == 1)
        [snakemake] = psutil.Process(study.pid).children()
        snakemake.kill()
        assert "the same command goes on" in study.communicate(timeout=300)[0]
        until(lambda: not psutil.pid_exists(step) and not psutil.pid_exists(kernel))

        # a second run beside a live one is refused; then the whole command is killed
        order(project, _01="wait")
        study = start(project)
        waiting(project, "01")
        error = failure(start(project))
        assert f"another run is at work in another process (number {study.pid})" in error
        assert error.strip().count("\n") == 0
        study.kill()
        study.communicate(timeout=300)

        order(project)
        study = start(project)
        out, error = study.communicate(timeout=300)
        assert study.returncode == 0, error
        assert "start  00_first" not in out
        assert done(project) == ["00", "01", "06"]
        assert finished(project) == ["00-seed-0", "01-seed-0", "06-seed-0"]
        assert not [p for p in runs.rglob("*") if ".tmp" in p.name or ".failed" in p.name]
        assert reference.wait(timeout=300) == 0
        assert tables(project) == tables(undisturbed)
        assert len(tables(project)) == 3

        # a step that finished while Snakemake was dead: no record of it, and a mark that says incomplete
        records = project / ".snakemake" / "metadata"
        assert len(list(records.iterdir())) == 3
        shutil.rmtree(project / ".snakemake" / "incomplete")
        records.rename(project / ".snakemake" / "incomplete")
        study = start(project)
        assert study.wait(timeout=300) == 0
        assert finished(project) == ["00-seed-0", "01-seed-0", "06-seed-0"]
        assert not list(runs.glob(".testbed")), "no testbed is trained for notebooks that take no model"


def test_an_error_banner_is_no_finished_step(tmp_path):
    """What papermill leaves of a failed notebook has another name, and Snakemake looks for the right one."""
    from nt_utils.study import batch

    project = make_project(tmp_path)
    order(project, _00="raise")
    output = project / "runs" / "toy" / "seed-0" / "00_first.ipynb"
    refused("this cell fails", lambda: batch.run_notebook("00_first", {"seed": 0}, output, project))
    assert not output.exists()
    banner = json.loads(output.with_suffix(".failed.ipynb").read_text())
    assert any("papermill-error" in str(cell["metadata"]) for cell in banner["cells"])
