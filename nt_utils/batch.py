"""Running notebooks in batches: one papermill process a step, started by Snakemake.

``python -m nt_utils.batch study`` is ``make study``; ``python -m nt_utils.batch run`` is one step of the workflow.
An executed notebook takes its final name only when every cell succeeded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from nt_utils import parameters, studies
from nt_utils.errors import InputError

#: Keys of a parameter file that are not notebook parameters.
FILE_KEYS = ("notebooks",)


def notebooks(root: Path) -> list[str]:
    """Names of the study's notebooks, in order."""
    return sorted(p.stem for p in (root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def study_parameters(study: str, notebook: str, root: Path) -> dict:
    """The parameters notebooks/params/<study>.yaml gives to a notebook, checked.

    The file holds parameters for every notebook that takes them and, under ``notebooks:``, for single ones.
    """
    file = root / "notebooks" / "params" / f"{study}.yaml"
    if not file.is_file():
        known = sorted(p.stem for p in file.parent.glob("*.yaml"))
        raise InputError(f"study: {study!r} has no parameter file; known: {', '.join(known)} (notebooks/params/*.yaml)")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not valid YAML ({str(error).splitlines()[0]})") from error
    own = content.pop("notebooks", None) or {}
    for name in own:
        if name not in notebooks(root):
            raise InputError(f"{file}: notebooks: {name!r} is no notebook; known: {', '.join(notebooks(root))}")
    takes = studies.notebook_parameters(root / "notebooks" / f"{notebook}.ipynb")
    for name, value in content.items():
        _check_key(file, name, value, list(parameters.PARAMETERS))
    for name, value in (own.get(notebook) or {}).items():
        _check_key(file, name, value, takes)
    return {k: v for k, v in content.items() if k in takes} | (own.get(notebook) or {})


def _check_key(file: Path, name: str, value, allowed: Sequence[str]) -> None:
    if name not in allowed:
        raise InputError(f"{file}: {name}: unknown parameter; allowed: {', '.join(sorted(allowed))}")
    if value is not None:
        parameters.PARAMETERS[name].check(name, value)


def parse_seeds(text: str) -> list[int]:
    """ "0 1 2" or "0,1,2" -> [0, 1, 2]."""
    words = text.replace(",", " ").split()
    if not words or not all(w.isdigit() for w in words):
        raise InputError(f"seeds: got {text!r}; allowed: whole numbers, 0 or more, separated by blanks or commas")
    return list(dict.fromkeys(int(w) for w in words))


def run_notebook(notebook: str, study: str, seed: int, preset: str, output: Path, root: Path) -> None:
    """Execute one notebook into ``output``; on failure keep ``<output>.failed.ipynb`` and raise InputError."""
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    import papermill

    parameters = study_parameters(study, notebook, root) | {"study": study, "seed": seed, "preset": preset}
    takes = studies.notebook_parameters(root / "notebooks" / f"{notebook}.ipynb")
    parameters = {k: v for k, v in parameters.items() if k in takes}
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    with studies.atomic(output) as tmp:
        try:
            papermill.execute_notebook(
                str(root / "notebooks" / f"{notebook}.ipynb"), str(tmp), parameters, kernel_name="python3",
                progress_bar=False, cwd=str(root),
            )  # fmt: skip
        except Exception as error:  # a failed cell, or a kernel that died: neither may pass for a finished notebook
            if tmp.exists():
                tmp.replace(failed)
            raise InputError(f"{notebook}: {_last_line(error)} (see {failed})") from error


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def run_study(names: Sequence[str], seeds: Sequence[int], preset: str, cores: str, root: Path) -> int:
    """Run the Snakemake workflow on this machine; returns its exit status."""
    for study in names:
        for notebook in notebooks(root):
            study_parameters(study, notebook, root)
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile"), "--directory", str(root),
        "--cores", str(cores), "--rerun-incomplete", "--quiet", "all",
        "--config", f"studies={','.join(names)}", f"seeds={','.join(map(str, seeds))}", f"preset={preset}",
    ]  # fmt: skip
    start = time.time()
    status = subprocess.run(command, check=False).returncode
    for study in names:
        for seed in seeds:
            folder = studies.run_folder("", studies.study_name(study, study, preset), seed)
            print(f"{'done' if status == 0 else 'incomplete'}: {folder}")
    print(f"{time.time() - start:.0f} s")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of ``make study`` and of the workflow's steps."""
    parser = argparse.ArgumentParser(prog="python -m nt_utils.batch", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("study", help="the whole workflow")
    whole.add_argument("--studies", default="testbed")
    whole.add_argument("--seeds", default="0")
    whole.add_argument("--preset", default="default")
    whole.add_argument("--cores", default="all")
    one = commands.add_parser("run", help="one notebook of one study and seed")
    one.add_argument("notebook")
    one.add_argument("--study", required=True)
    one.add_argument("--seed", required=True)
    one.add_argument("--preset", default="default")
    one.add_argument("--output", required=True, type=Path)
    model = commands.add_parser("testbed", help="train the testbed of one seed, if it is not in the cache")
    model.add_argument("--seed", required=True)
    options = parser.parse_args(arguments)
    root = studies.project_root()
    try:
        if options.command == "testbed":
            from nt_utils import testbed

            print(testbed.build(seed=parse_seeds(options.seed)[0]).folder)
            return 0
        parameters.PARAMETERS["preset"].check("preset", options.preset)
        if options.command == "run":
            seed = parse_seeds(options.seed)[0]
            start = time.time()
            run_notebook(options.notebook, options.study, seed, options.preset, options.output, root)
            print(f"{options.notebook} ({options.study}, seed {seed}): {time.time() - start:.0f} s", flush=True)
            return 0
        names = options.studies.replace(",", " ").split()
        return run_study(names, parse_seeds(options.seeds), options.preset, options.cores, root)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
