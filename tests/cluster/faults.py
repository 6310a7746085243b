"""Faults on the real quick study, once: what is killed, how many steps it loses, whether a finished step is repeated.

    python tests/cluster/faults.py WORK [--twice]

Copies the project into WORK, runs the quick study undisturbed, and beside it the same study under kill -9 of kernels, of
papermill, of Snakemake and of the whole command, each time followed by the same command; then compares the results tables
byte for byte. ``--twice`` runs a second undisturbed study (determinism). Every run has a cache of its own, so no generated
answer is shared. Not part of ``make test``: about three studies' time.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
RUN = Path("runs/testbed-quick/seed-0")
#: What is killed during which step. The first run goes on after lost steps; the others end with Snakemake.
FAULTS = (
    ("kernel", "first"),
    ("papermill", "next"),
    ("Snakemake", "next"),
    ("make study", "next"),
    ("kernel", "06"),
    ("Snakemake", "06"),
    ("make study", "06"),
)


def project(folder: Path) -> Path:
    """A copy of the tracked files."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def start(folder: Path, log: Path) -> psutil.Popen:
    command = [
        sys.executable,
        "-m",
        "nt_utils.study.batch",
        "study",
        "--studies",
        "testbed",
        "--preset",
        "quick",
        "--cores",
        "2",
    ]
    environment = os.environ | {"NT_CACHE": str(folder.parent / f"{folder.name}-cache"), "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)
    with log.open("a") as file:
        return psutil.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)


def events(log: Path, what: str) -> list[str]:
    """Steps that were started or done, once for each time."""
    return re.findall(rf"^{what} +(\d\d_\w+) \(", log.read_text(), flags=re.MULTILINE)


def processes(study: psutil.Process) -> dict[str, tuple[psutil.Process, psutil.Process]]:
    """Running steps with a kernel at work: step -> (its process, its kernel)."""
    found = {}
    for child in study.children(recursive=True):
        try:
            words, below = child.cmdline(), child.children()
            if (
                "run" in words
                and "nt_utils.study.batch" in words
                and "-c" not in words
                and "sh" not in Path(words[0]).name
            ):
                kernels = [c for c in below if "ipykernel_launcher" in c.cmdline()]
                # a kernel that has worked for a while is in the middle of the notebook
                if kernels and sum(kernels[0].cpu_times()[:2]) > 6:
                    found[words[words.index("run") + 1]] = child, kernels[0]
        except psutil.Error:
            continue
    return found


def strike(study: psutil.Process, what: str, step: str) -> None:
    """Kill -9 what is named while the step is at work."""
    process, kernel = processes(study)[step]
    victim = {"kernel": kernel, "papermill": process, "Snakemake": study.children()[0], "make study": study}[what]
    os.kill(victim.pid, signal.SIGKILL)


def disturbed(folder: Path, log: Path) -> list[dict]:
    """Run the study to its end under every fault; one row a fault."""
    rows, struck, study = [], set(), start(folder, log)
    for what, where in FAULTS:
        while True:
            if study.poll() is not None:
                study = start(folder, log)
            done = set(events(log, "done")) if log.is_file() else set()
            ready = [s for s in processes(study) if s not in struck and (where != "06") == (s[:2] != "06")]
            if ready:
                break
            if where != "06" and study.poll() is None and "06_comparison" in processes(study):
                raise SystemExit("no step was left for this fault")
            time.sleep(0.5)
        step = ready[0]
        lost = set(processes(study)) if what in ("Snakemake", "make study") else {step}
        strike(study, what, step)
        if where != "06":
            struck.add(step)
        if what in ("Snakemake", "make study") or where == "06":
            study.wait()
        rows.append({"killed": what, "during": step, "lost": sorted(lost), "finished before": sorted(done)})
        print(f"kill -9 of {what} during {step}; steps lost: {', '.join(sorted(lost))}", flush=True)
        if what == "make study":
            time.sleep(2)
    while study.poll() is None or study.poll() != 0:
        if study.poll() is not None:
            study = start(folder, log)
        study.wait()
    return rows


def tables(folder: Path) -> dict[str, bytes]:
    """Every table of the run: results, those behind the figures, and the ledger."""
    files = [p for kind in ("tables", "figures", "claims") for p in (folder / RUN / kind).glob("*.csv")]
    return {p.relative_to(folder / RUN).as_posix(): p.read_bytes() for p in sorted(files)}


def compare(name: str, first: dict[str, bytes], second: dict[str, bytes]) -> bool:
    differ = sorted(n for n in first.keys() | second.keys() if first.get(n) != second.get(n))
    print(
        f"{name}: {len(first)} and {len(second)} tables, {len(differ)} differ{': ' if differ else ''}{', '.join(differ)}"
    )
    return not differ and bool(first)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--twice", action="store_true")
    options = parser.parse_args()
    work = options.work.absolute()
    names = ["undisturbed", *(["again"] if options.twice else [])]
    plain = [start(project(work / n), work / f"{n}.log") for n in names]
    rows = disturbed(project(work / "disturbed"), work / "disturbed.log")
    fine = all([p.wait() == 0 for p in plain])
    done = Counter(events(work / "disturbed.log", "done"))
    repeated = {step: n for step, n in done.items() if n > 1}
    print(f"\n{'killed':12}{'trials':>8}{'steps lost':>12}{'finished steps repeated':>26}")
    for what in dict.fromkeys(row["killed"] for row in rows):
        some = [row for row in rows if row["killed"] == what]
        again = {s for r in some for s in r["finished before"] if s in repeated}
        print(f"{what:12}{len(some):8}{sum(len(r['lost']) for r in some):12}{len(again):26}")
    print(f"steps done: {dict(sorted(done.items()))}")
    reference = tables(work / "undisturbed")
    for name in [*names[1:], "disturbed"]:
        fine = compare(f"undisturbed and {name}", reference, tables(work / name)) and fine
    return 0 if fine and not repeated and len(done) == 7 else 1


if __name__ == "__main__":
    raise SystemExit(main())
