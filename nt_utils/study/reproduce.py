"""Does this machine reproduce what was published? Reruns a study and compares every published table and verdict.

``make reproduce STUDY=testbed`` (``python -m nt_utils.study.reproduce --study testbed``) runs the published preset and seed into
``runs/reproduce/``, prints one table, writes it beside the run as reproduced.csv, and exits with 1 when a verdict differs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from nt_utils.errors import InputError, command
from nt_utils.files import project_root, read_json, run_folder, study_name
from nt_utils.study import claims, ledger

TOLERANCE = 1e-4  # of a number's size, up to which a cell counts as close
FLOOR = 1e-7  # difference that counts as close whatever the size: a KL divergence of nothing is rounding
COLUMNS = ("notebook", "table", "cells", "equal", "close", "different", "largest", "says")


class Published(NamedTuple):
    """A published study: its name, the folder with its figures' tables, the preset and seed that made them, and its notebooks."""

    study: str
    folder: Path
    preset: str
    seed: int
    notebooks: tuple[str, ...]


def published(study: str, root: Path) -> Published:
    """What ``make publish`` left of a study. Raises InputError where there is nothing."""
    folder = root / "figures" / study
    notes = sorted(folder.glob("*/made_with.json"))
    if not notes:
        known = sorted({p.parent.parent.name for p in (root / "figures").glob("*/*/made_with.json")})
        raise InputError(f"study: nothing is published of {study!r}; published: {', '.join(known) or 'nothing'}")
    made = read_json(notes[0])
    return Published(study, folder, made["preset"], made["seed"], tuple(note.parent.name for note in notes))


def rerun(what: Published, root: Path, cores: int) -> Path:
    """Run the notebooks that were published into a folder of their own, ``cores`` at a time; returns the run folder.

    Raises InputError naming the notebooks that failed.
    """
    from nt_utils.study import batch

    runs = root / "runs" / "reproduce"
    folder = run_folder(str(runs), study_name(what.study, what.study, what.preset), what.seed)

    def step(notebook: str) -> str:
        options = [f"--study={what.study}", f"--seed={what.seed}", f"--preset={what.preset}"]
        options += [f"--set=runs={json.dumps(str(runs))}", f"--output={folder / notebook}.ipynb"]
        call = [sys.executable, "-m", "nt_utils.study.batch", "run", notebook, *options]
        return notebook if subprocess.run(call, cwd=root, check=False).returncode else ""

    with ThreadPoolExecutor(cores) as pool:
        failed = [n for n in pool.map(step, [n for n in what.notebooks if n not in batch.LAST]) if n]
    failed += [n for n in map(step, [n for n in what.notebooks if n in batch.LAST]) if n]
    if failed:
        raise InputError(f"reproduce: {', '.join(failed)} failed; see {folder}")
    return folder


# ------------------------------------------------------------------------------------------------------ comparing


def compare_tables(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, Any]:
    """How many cells of two tables are equal, close (within TOLERANCE of their size) and different, and the largest difference."""
    if before.shape != after.shape or list(before.columns) != list(after.columns):
        shapes = f"{before.shape[0]} x {before.shape[1]} cells, now {after.shape[0]} x {after.shape[1]}"
        none = {"equal": 0, "close": 0, "different": before.size, "largest": math.nan}
        return {"cells": before.size, **none, "says": shapes}
    equal = close = 0
    largest = 0.0
    for column in before.columns:
        for a, b in zip(before[column].tolist(), after[column].tolist(), strict=True):
            if a == b or (a != a and b != b):
                equal += 1
            elif isinstance(a, (int, float)) and isinstance(b, (int, float)) and a == a and b == b:
                gap = abs(a - b) / max(abs(a), abs(b))
                close += gap <= TOLERANCE or abs(a - b) <= FLOOR
                largest = max(largest, gap)
            else:
                largest = math.inf
    left = before.size - equal - close
    says = "equal" if equal == before.size else f"within {TOLERANCE:g}" if not left else "differs"
    return {"cells": before.size, "equal": equal, "close": close, "different": left, "largest": largest, "says": says}


def compare(what: Published, folder: Path, root: Path) -> pd.DataFrame:
    """One row a published table, and one a published notebook for the verdicts on its claims.

    Raises InputError when the run folder holds nothing.
    """
    lines = ledger.collect([folder]).to_dict("records")
    found = []
    for table in sorted(what.folder.glob("*/*.csv")):
        again = folder / "figures" / table.name
        row: dict[str, Any] = {"notebook": table.parent.name, "table": table.stem}
        if again.is_file():
            found.append(row | compare_tables(pd.read_csv(table), pd.read_csv(again)))
        else:
            found.append(row | {"cells": pd.read_csv(table).size, "says": "was not made"})
    model = lines[0]["model"]
    known = ledger.read(root / "figures" / "measured.csv").to_dict("records")
    known = [line for line in known if (line["model"], line["seed"]) == (model, what.seed)]
    # Lines of an unpublished notebook are left out before the verdicts are taken: a claim may rest on one of another notebook.
    measured = {line["notebook"] for line in known}
    lines = [line for line in lines if line["notebook"] in measured]
    before, after = (
        {(v["notebook"], v["claim"], v["row"]): v["verdict"] for v in ledger.verdicts(part)} for part in (known, lines)
    )
    verdicts = pd.DataFrame(
        [(*key, old, after.get(key, claims.NOT_RUN)) for key, old in before.items() if key[0] in measured],
        columns=["notebook", "claim", "row", "before", "after"],
    )
    for notebook, part in verdicts.groupby("notebook"):
        other = part[part["before"] != part["after"]]
        told = [f"{r.claim} {r.row}: {r.before}, now {r.after}".replace(" :", ":") for r in other.itertuples()]
        row = {"notebook": str(notebook), "table": VERDICTS, "cells": len(part), "equal": len(part) - len(other)}
        found.append(row | {"different": len(other), "says": "; ".join(told) or "equal"})
    return pd.DataFrame(found, columns=list(COLUMNS))


VERDICTS = "verdicts"  # the name of the rows that compare verdicts


def is_reproduced(table: pd.DataFrame) -> bool:
    """Whether all verdicts are equal and every table was made again."""
    verdicts = table[table["table"] == VERDICTS]
    return bool(len(verdicts)) and not verdicts["different"].any() and not (table["says"] == "was not made").any()


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of ``make reproduce``."""
    parser = argparse.ArgumentParser(prog="python -m nt_utils.study.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--study", default="testbed")
    parser.add_argument("--cores", type=int, default=1, help="notebooks that run at the same time")
    parser.add_argument("--folder", default="", help="a run folder to compare, instead of running the study")
    options = parser.parse_args(arguments)
    if options.cores < 1:
        raise InputError(f"cores: got {options.cores}; allowed: 1 or more")
    root = project_root()
    what = published(options.study, root)
    folder = Path(options.folder) if options.folder else rerun(what, root, options.cores)
    table = compare(what, folder, root)
    ledger.write_table(folder / "reproduced.csv", table)
    print(table.to_string(index=False, na_rep="", float_format="%.3g"))
    print(f"{folder}: {'reproduced' if is_reproduced(table) else 'not reproduced'}")
    return 0 if is_reproduced(table) else 1


if __name__ == "__main__":
    raise SystemExit(main())
