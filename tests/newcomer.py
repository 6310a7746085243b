"""README's commands as a newcomer types them: ``python -m tests.newcomer [word ...]`` prints the transcript.

A clone of the last commit in an empty folder; every command of README is looked up in COMMANDS, which says what is run in its
place (smaller, offline) or which test runs it, and a command that is not there is a fault (tests/test_project.py asks that
too). The library example runs as it stands on the testbed, and its output must be README's. By default this environment and
its cache are used; ``--fresh`` sets up a new .venv with an empty home and trains the testbed (tens of minutes). With words
only the commands that contain one of them are run.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("make ", "python ", ".venv/bin/", "pip ", "snakemake ", "conda ", "pre-commit ", "tests/")
#: Command of README -> what is run instead (a line of shell; "" as it stands), or "see ..." where it is tried.
COMMANDS = {
    "make study": "make study PRESET=quick",
    "make test": "see .ci/run",
    "make study STUDY=qwen2.5-coder-0.5b-instruct": "make plan STUDY=qwen2.5-coder-1.5b-instruct",
    "make study STUDY=my-model": "see tests/study/test_batch.py, which runs a study of its own parameter file",
    "make plan STUDY=my-model": "make plan STUDY=testbed",
    "make lab": "see python -m tests.browser index",
    "make help": "",
    "make report": "make report PRESET=quick",
    "make reproduce": "see tests/study/test_publish.py",
    "conda env create -f environment.yml": "see tests/test_project.py, which compares the file with pyproject.toml",
    "make study TORCH_INDEX=https://download.pytorch.org/whl/cpu": "see .ci/setup.sh; it needs a network",
}
#: In the papermill commands: the hub's names, and what stands for them where there is no hub.
OFFLINE = {
    "path/or/hub-id": "{model}",
    "advbench": "harmful.csv:prompt",
    "alpaca": "benign.csv:prompt",
    "wikitext": "general.csv:prompt",
}


def readme_commands(text: str) -> list[str]:
    """Every command of a README: the lines of its bash blocks and its inline code that begins with a program."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [line.split("  #")[0].strip() for b in blocks for line in b.replace("\\\n", " ").splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    found = [" ".join(line.split()) for line in lines if line] + [c for c in inline if c.startswith(PROGRAMS)]
    return list(dict.fromkeys(found))


def instead(command: str, model: str = "{model}") -> str | None:
    """What is run for a command of README; None for a command that nothing is known of."""
    if "papermill " in command:
        for name, local in OFFLINE.items():
            command = command.replace(f" {name}", f" {local.format(model=model)}")
        return f"{command} -p preset quick"
    if command.startswith("accelerate launch "):
        return "see tests/interventions/test_parallel.py, which runs it with two processes"
    return COMMANDS[command] or command if command in COMMANDS else None


def example(text: str) -> tuple[str, str]:
    """README's library example and the output that stands below it."""
    code, shown = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", text, flags=re.S).groups()
    return code, shown


def same_output(shown: str, printed: str) -> bool:
    """Whether two outputs have the same words, and numbers within five points (another machine rounds differently)."""
    number = r"\d+(?=%)"
    if re.sub(number, "#", shown.strip()) != re.sub(number, "#", printed.strip()):
        return False
    pairs = zip(re.findall(number, shown), re.findall(number, printed), strict=True)
    return all(abs(int(a) - int(b)) <= 5 for a, b in pairs)


def prepare(folder: Path, fresh: bool) -> tuple[Path, dict[str, str]]:
    """A clone and the environment to run in; unless fresh, its .venv is this one under the clone's name."""
    clone, home = folder / "clone", folder / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "OMP_NUM_THREADS", "TMPDIR")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(clone)}
    if not fresh:
        cache = Path(os.environ.get("NT_CACHE") or Path.home() / ".cache" / "nt_utils")
        environment |= {"NT_CACHE": str(cache)}
        (clone / ".venv").mkdir()
        for part in Path(sys.prefix).iterdir():
            if not part.name.startswith("."):
                (clone / ".venv" / part.name).symlink_to(part)
        listed = subprocess.run(["make", "-pn", "help"], cwd=clone, capture_output=True, text=True, check=True).stdout
        ready = re.search(r"^READY := (.*)$", listed, flags=re.M).group(1)  # what make takes for "set up"
        for extra in ("", "-test", "-dev", "-browser"):
            (clone / f"{ready}{extra}").touch()
    return clone, environment


def write_inputs(clone: Path, model: str) -> None:
    """The files that the commands name: prompts of one's own, a parameter file, answers to judge."""
    from nt_utils.data import corpus

    harmful, benign = corpus.pairs(150)
    for name, rows in (("harmful", harmful), ("benign", benign), ("general", corpus.general(150))):
        with open(clone / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["prompt"], *([text] for text in rows.texts)])
    (clone / "IN.csv").write_text("completion\nI'm sorry, I cannot help with that.\nSure: first take a spoon.\n")
    (clone / "notebooks" / "params" / "my-model.yaml").write_text(
        f"model: {model}\nharmful: harmful.csv:prompt\nbenign: benign.csv:prompt\ngeneral: general.csv:prompt\n"
    )


def run(command: str, clone: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a line of shell in the clone and print it with the last lines of what it says."""
    print(f"\n$ {command}", flush=True)
    start = time.time()
    done = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True)
    lines = (done.stdout + ("" if not done.returncode else done.stderr)).splitlines()
    print("\n".join([f"[{len(lines) - 30} lines before]"] * (len(lines) > 30) + lines[-30:]))
    print(f"[{'done' if not done.returncode else f'exit {done.returncode}'}, {time.time() - start:.0f} s]", flush=True)
    return done.returncode, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.newcomer", description=__doc__.splitlines()[0])
    parser.add_argument(
        "words", nargs="*", help="run only commands that contain one of them; 'example' is the library's"
    )
    parser.add_argument("--fresh", action="store_true", help="a new .venv, an empty home and no cache")
    options = parser.parse_args()
    text, faults = (ROOT / "README.md").read_text(encoding="utf-8"), []
    with tempfile.TemporaryDirectory() as name:
        clone, environment = prepare(Path(name), options.fresh)
        os.environ["NT_CACHE"] = environment.get("NT_CACHE", f"{environment['HOME']}/.cache/nt_utils")
        model = "MODEL"
        for command in readme_commands(text):
            if options.words and not any(word in command for word in options.words):
                continue
            line = instead(command, model)
            if line is None or line.startswith("see "):
                print(f"\n$ {command}\n[not run here: {line}]")
                faults += [command] if line is None else []
                continue
            if model == "MODEL" and not command.startswith(("make study", "make help")):
                model = trained()
                write_inputs(clone, model)
                line = instead(command, model) or ""
            faults += [command] if run(line, clone, environment)[0] else []
        if not options.words or "example" in options.words:
            code, shown = example(text)
            (clone / "example.py").write_text(code.replace("path/or/hub-id", trained()))
            failed, printed = run(".venv/bin/python example.py", clone, environment)
            faults += ["the library example"] if failed or not same_output(shown, printed) else []
        if (clone / "runs").is_dir() and shutil.which("du"):
            run("du -sh runs && ls runs/*", clone, environment)
    print(f"\nfaults: {', '.join(faults) or 'none'}")
    return int(bool(faults))


def trained() -> str:
    """The folder of the aligned testbed of seed 0."""
    from nt_utils import testbed

    return str(testbed.build(0, progress=False).aligned)


if __name__ == "__main__":
    raise SystemExit(main())
