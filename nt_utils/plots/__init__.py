"""One function a figure: table in, figure out. No model is loaded here.

A figure's name is its table's: ``figures/01_dose.csv`` is drawn by the function ``dose``. ``python -m nt_utils.plots
FOLDER`` redraws what is older than its table or than this package; every figure takes its look from ``plots.style``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd

from nt_utils.errors import InputError
from nt_utils.plots import (  # noqa: F401  (their figures register themselves)
    behaviour,
    bench,
    comparison,
    detection,
    modulation,
    tuning,
    units,
)
from nt_utils.plots.style import FIGURES, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_name(table: Path) -> str:
    """What a table's figure function is called: its file name without the notebook's number or ``bench``."""
    return re.sub(r"^(\d+|bench)_", "", table.stem)


def draw(table: Path) -> Figure:
    """Draw the figure of a saved table and save it beside the table as PNG and PDF.

    Raises InputError when no figure function has the table's name.
    """
    from nt_utils.studies import atomic

    table = Path(table)
    name = figure_name(table)
    if name not in FIGURES:
        raise InputError(f"{table}: no figure is called {name!r}; known: {', '.join(sorted(FIGURES))}")
    with plt.rc_context(STYLE):
        drawn = FIGURES[name](pd.read_csv(table))
        with atomic(table.with_suffix(".png")) as tmp:
            drawn.savefig(tmp, dpi=200, metadata={"Software": None})
        with atomic(table.with_suffix(".pdf")) as tmp:
            drawn.savefig(tmp, metadata={"CreationDate": None, "Creator": None, "Producer": None})
    plt.close(drawn)
    return drawn


def redraw(folder: Path) -> list[Path]:
    """Draw every figure whose picture is older than its table or than this package; returns the tables drawn."""
    drawn = []
    style = max(file.stat().st_mtime for file in Path(__file__).parent.glob("*.py"))
    for table in sorted(Path(folder).glob("*.csv")):
        if figure_name(table) not in FIGURES:
            continue
        newest = max(table.stat().st_mtime, style)
        pictures = [table.with_suffix(s) for s in (".png", ".pdf")]
        if any(not p.is_file() or p.stat().st_mtime < newest for p in pictures):
            draw(table)
            drawn.append(table)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m nt_utils.plots FOLDER``: what ``make figures`` calls."""
    parser = argparse.ArgumentParser(prog="python -m nt_utils.plots", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the tables (CSV)")
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        print(f"error: folder: {folder} is no folder", file=sys.stderr)
        return 1
    drawn = redraw(folder)
    print("\n".join(f"drawn: {p.with_suffix('.png')}" for p in drawn) or f"every figure in {folder} is up to date")
    return 0
