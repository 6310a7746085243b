"""``make study``: the Snakemake workflow on this machine, and the command line of its steps."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from nt_utils.errors import InputError
from nt_utils.files import cache_folder, project_root, writable
from nt_utils.study import parameters
from nt_utils.study.batch import access, parameter_files, step, sweep
from nt_utils.study.parameters import TESTBED, TESTBEDS
from nt_utils.work import clock, memory


def run_study(names: Sequence[str], seeds: Sequence[int], preset: str, cores: str, root: Path) -> int:
    """Run the workflow on this machine; returns its exit status.

    Every run folder is claimed first, so a second run on it is refused while the first is alive. Snakemake's own lock
    outlives a killed process; ours does not, so Snakemake's is left out. So are its marks of incomplete files, which outlive
    it too: every output takes its name only when it is complete.
    """
    if cores != "all" and not re.fullmatch("[1-9][0-9]{0,5}", cores):
        raise InputError(f"cores: got {cores!r}; allowed: all, or a whole number from 1")
    for study in names:
        access.check_access(parameter_files.read(study, root))
    runs = [v for study in names for v in parameter_files.variants(study, seeds, preset, root)]
    folders = [root / "runs" / v.folder / f"seed-{seed}" for v in runs for seed in v.seeds]
    command = [sys.executable, "-m", "snakemake", f"--snakefile={root / 'Snakefile'}", f"--directory={root}"]
    # The greedy scheduler takes the notebook with the largest file first: about the longest first.
    command += [f"--cores={cores}", "--nolock", "--ignore-incomplete", "--keep-going", "--scheduler=greedy"]
    free = memory()[1] // 2**20
    command += [f"--resources=mem_mb={free}"]
    config = {"studies": ",".join(names), "seeds": ",".join(map(str, seeds)), "preset": preset, "mem_mb": free}
    command += ["--config", *(f"{name}={value}" for name, value in config.items())]
    start = time.time()
    with contextlib.ExitStack() as stack:
        locks = [stack.enter_context(step.claimed(folder / ".lock", f"{folder}: another run")) for folder in folders]
        environment = os.environ | {step.OWNER: str(os.getpid()), step.STARTED: str(start)}
        status = _supervised(command, environment, locks)
    for folder in folders:
        print(f"{'done' if status == 0 else 'incomplete'}: {folder}")
    if status:
        print("the same command goes on from here; finished steps are not repeated")
    print(clock(time.time() - start))
    return status


def _supervised(command: Sequence[str], environment: dict[str, str], locks: Sequence[int]) -> int:
    """Run Snakemake in a process group of its own and leave none of its steps behind, however it or this ends.

    It inherits the claims (``locks``): they hold until both are gone. Of what it and the steps write to the error stream,
    the steps' own lines are shown; where it fails and no step said why, its last lines are. That stream is a file: with a
    pipe, Snakemake would hang when this process is killed.
    """

    def stop(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    written = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
    process = subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=locks, stderr=written)
    last: deque[str] = deque(maxlen=8)
    ended = threading.Event()
    reader = threading.Thread(target=_read, args=(written.fileno(), ended, last), daemon=True)
    reader.start()
    try:
        status = process.wait()
        ended.set()
        reader.join()
        if status > 0 and last:
            print("\n".join(["Snakemake ended without a step's reason; its last lines:", *last]), file=sys.stderr)
        return status if status >= 0 else 128 - status
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ended.set()
        reader.join()
        written.close()


def _read(file: int, ended: threading.Event, last: deque[str]) -> None:
    """Show the steps' errors as they come; keep the last other lines, until a step has said why."""
    place, rest, said = 0, b"", False
    while True:
        over = ended.is_set()  # asked first: what was written until then is still read
        piece = os.pread(file, 1 << 16, place)
        if not piece and over:
            return
        if not piece:
            ended.wait(0.2)
        place += len(piece)
        *lines, rest = (rest + piece).split(b"\n")
        for line in (one.decode(errors="replace").rstrip() for one in lines):
            if line.startswith("error: "):
                print(line, file=sys.stderr, flush=True)
                said = True
                last.clear()
            elif not said and line:
                last.append(step.hide(line))


def settle_home() -> None:
    """Give libraries that write into the home a folder of the cache where there is no home that can be written.

    Raises InputError in one line when the cache cannot be written either.
    """
    try:
        home = Path.home()
        fine = home.is_dir() and os.access(home, os.W_OK)
        hub = home / ".cache" / "huggingface"
        if not fine and hub.is_dir():  # models that are there can still be read
            os.environ.setdefault("HF_HOME", str(hub))
    except RuntimeError:  # no HOME, and no entry for this user
        fine = False
    if not fine:
        if not os.environ.get("NT_CACHE") and not os.environ.get("XDG_CACHE_HOME"):
            raise InputError("home: there is none that can be written; set NT_CACHE to a folder for the cache")
        os.environ["HOME"] = str(writable(cache_folder().absolute() / "home"))
        os.environ["XDG_CACHE_HOME"] = str(Path(os.environ["HOME"]) / ".cache")
        os.environ["NT_CACHE"] = str(Path(os.environ["HOME"]).parent)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())


def _run_step(options: argparse.Namespace, root: Path) -> None:
    """``batch run``: one notebook, with one line when it starts and one when it ends."""
    step.die_with_the_study()
    seed = parameter_files.parse_seeds(options.seed)[0]
    name = options.name or options.study
    point = parameter_files.Variant(
        options.study, name, "", parameter_files.changes_of(options.set), (options.notebook,), (seed,)
    )
    if options.settings:
        given = parameter_files.noted_parameters(options.settings)
    else:
        given = parameter_files.settings(point, options.notebook, seed, options.preset, root)
    title = f"{options.notebook} ({name}, seed {seed})"
    expected = step.expected_seconds(options.notebook, options.output)
    about = f"expected {clock(expected)}" if expected else "expected time unknown"
    print(f"start  {title}: {about}{step.since_the_start()}", flush=True)
    start = time.time()
    step.run_notebook(options.notebook, given, options.output, root)
    print(f"done   {title}: {clock(time.time() - start)}, {about}{step.since_the_start()}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nt_utils.study.batch", description="Running notebooks in batches.")
    commands = parser.add_subparsers(dest="command", required=True)
    study = argparse.ArgumentParser(add_help=False)
    study.add_argument("--seeds", default="0")
    study.add_argument("--preset", default="default")
    whole = commands.add_parser("study", parents=[study], help="the whole workflow")
    whole.add_argument("--studies", default="testbed")
    whole.add_argument("--cores", default="all")
    table = commands.add_parser("collect", parents=[study], help="the table of a sweep")
    table.add_argument("--study", required=True)
    one = commands.add_parser("run", help="one notebook of one study and seed")
    one.add_argument("notebook")
    one.add_argument("--study", required=True)
    one.add_argument("--seed", required=True)
    one.add_argument("--preset", default="default")
    one.add_argument("--output", required=True, type=Path)
    one.add_argument(
        "--settings", type=Path, help="the workflow's file of this step's parameters; default: decided anew"
    )
    one.add_argument("--name", default="", help="name of the run folder, for a point of a sweep; default: the study's")
    one.add_argument("--set", action="append", default=[], metavar="PARAMETER=JSON", help="a point of a sweep")
    model = commands.add_parser("testbed", help="train the testbed of one seed, if it is not in the cache")
    model.add_argument("--seed", required=True)
    model.add_argument("--model", default=TESTBED, choices=TESTBEDS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of ``make study`` and of the workflow's steps."""
    options = _parser().parse_args(arguments)
    root = project_root()
    try:
        settle_home()
        if options.command == "testbed":
            from nt_utils import testbed

            step.die_with_the_study()
            print(testbed.build(seed=parameter_files.parse_seeds(options.seed)[0], size=TESTBEDS[options.model]).folder)
            return 0
        parameters.PARAMETERS["preset"].check("preset", options.preset)
        if options.command == "run":
            _run_step(options, root)
            return 0
        seeds = parameter_files.parse_seeds(options.seeds)
        if options.command == "collect":
            print(sweep.collect(options.study, seeds, options.preset, root))
            return 0
        return run_study(parameter_files.parse_names(options.studies), seeds, options.preset, options.cores, root)
    except InputError as error:
        said = step.hide(str(error))
    except OSError as error:
        said = f"{error.filename or root}: {error.strerror or error}"
    except json.JSONDecodeError as error:
        said = f"--set: values are JSON ({error})"
    print(f"error: {said}", file=sys.stderr)
    return 1
