"""One function a figure: table in, figure out. No model is loaded here.

A figure's name is its table's: ``figures/01_dose.csv`` is drawn by the function ``dose``, which registers itself.
``python -m nt_utils.plots FOLDER`` redraws what was not made from its table as it is now, by its function and in the look
of ``plots.style`` as they are now; the picture itself says what it was made from.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import multiprocessing
import os
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

from nt_utils.errors import InputError, command
from nt_utils.plots import style, text
from nt_utils.plots.style import FIGURES, WIDTHS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")  # their figures register themselves

#: What stands beside a table after drawing: pictures with their fonts inside, and the table for a report.
PICTURES, TABLES = (".png", ".pdf", ".svg"), (".md", ".tex")
SUFFIXES = (*PICTURES, *TABLES)
DPI = 200
_KEY = "Made-From"  # of the PNG's text


def figure_name(table: Path) -> str:
    """What a table's figure function is called: its file name without the notebook's number or ``bench``."""
    return re.sub(r"^(\d+|bench)_", "", table.stem)


def draw(table: Path, width: str = "text", folder: Path | None = None, pictures: Sequence[str] = PICTURES) -> Figure:
    """Draw the figure of a saved table: ``pictures``, and the table as Markdown and LaTeX, beside it or in ``folder``.

    Raises InputError when no figure function has the table's name, or for an unknown width (a key of ``style.WIDTHS``).
    """
    from nt_utils.files import atomic

    table = Path(table)
    name = figure_name(table)
    if name not in FIGURES:
        raise InputError(f"{table}: no figure is called {name!r}; known: {', '.join(sorted(FIGURES))}")
    made_from, content = fingerprint(table, width), table.read_bytes()
    frame = pd.read_csv(io.BytesIO(content), keep_default_na=False, na_values=[""])  # "nan" and "NA" are tokens, too
    metadata: dict[str, dict] = {
        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        ".svg": {"Date": None, "Creator": None},
        ".png": {_KEY: made_from},  # the last one: what is half drawn is drawn again
    }
    target = (folder or table.parent) / table.name
    for suffix, write in zip(TABLES, (text.markdown, text.latex), strict=True):
        with atomic(target.with_suffix(suffix)) as tmp:
            tmp.write_text(write(frame), encoding="utf-8")
    with style.look(width):
        drawn = FIGURES[name](style.shown(frame))
        style.fit(drawn)
        if is_quick(table):
            style.watermark(drawn, "quick preset: no result")
        for suffix, extra in metadata.items():
            if suffix not in pictures:
                continue
            with atomic(target.with_suffix(suffix)) as tmp:
                if suffix == ".png":
                    _save_png(drawn, tmp, extra)
                else:
                    drawn.savefig(tmp, dpi=DPI, metadata=extra)
            drawn.set_layout_engine("none")  # the layout is found once
    plt.close(drawn)
    return drawn


def _save_png(drawn: Figure, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a PNG of at most 256 colours, chosen for the picture: a third of the bytes, and no difference to the eye."""
    from PIL import Image, PngImagePlugin

    full = io.BytesIO()
    drawn.savefig(full, format="png", dpi=DPI, metadata={"Software": None})
    notes = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        notes.add_text(key, value)
    picture = Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, "PNG", optimize=True, dpi=(DPI, DPI), pnginfo=notes)


def is_quick(table: Path) -> bool:
    """Whether a table belongs to a quick study: <study>-quick/seed-N/figures/ or <study>-quick/comparison/."""
    return any(folder.endswith("-quick") for folder in table.absolute().parent.parts[-3:])


def fingerprint(table: Path, width: str = "text") -> str:
    """What a picture is made from: the table, its function's module, the look, the width and matplotlib's version."""
    digest = hashlib.sha256(f"{width} {matplotlib.__version__}".encode())
    module = sys.modules[FIGURES[figure_name(table)].__module__].__file__
    for file in (table, module, __file__, style.__file__, text.__file__):
        digest.update(Path(str(file)).read_bytes())
    return digest.hexdigest()[:16]


def is_current(table: Path, width: str = "text", folder: Path | None = None) -> bool:
    """Whether everything :func:`draw` makes is there and the picture was made from what there is now."""
    from PIL import Image

    target = (folder or table.parent) / table.name
    if not all(target.with_suffix(suffix).is_file() for suffix in SUFFIXES):
        return False
    try:
        with Image.open(target.with_suffix(".png")) as picture:
            return getattr(picture, "text", {}).get(_KEY) == fingerprint(table, width)
    except OSError:
        return False


def redraw(folder: Path, width: str = "text", workers: int = 0) -> list[Path]:
    """Draw every figure of a folder and of those below it that is not current; returns the tables drawn.

    Many figures are drawn by several processes: at most ``workers``, 0 for one a core. Another width than "text" goes into a folder of its name beside the table.
    """
    tables = [t for t in sorted(Path(folder).rglob("*.csv")) if figure_name(t) in FIGURES]
    targets = {table: table.parent if width == "text" else table.parent / width for table in tables}
    stale = [(table, width, target) for table, target in targets.items() if not is_current(table, width, target)]
    workers = min(len(stale) // 4, workers or os.cpu_count() or 1)  # a process takes two seconds to start
    if workers < 2:
        return [_drawn(*one) for one in stale]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_drawn, *zip(*stale, strict=True)))


def _drawn(table: Path, width: str, folder: Path) -> Path:
    """Draw a table's figure in a process of the pool, which a figure itself cannot leave."""
    draw(table, width, folder)
    return table


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m nt_utils.plots FOLDER``: what ``make figures`` calls."""
    parser = argparse.ArgumentParser(prog="python -m nt_utils.plots", description="Redraw the figures of a folder.")
    parser.add_argument("folder", type=Path, help="folder with the tables (CSV)")
    parser.add_argument(
        "--width", default="text", choices=list(WIDTHS), help="of the figure; others than text go into FOLDER/WIDTH"
    )
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        raise InputError(f"folder: {options.folder} is no folder")
    drawn = redraw(options.folder, options.width)
    print("\n".join(f"drawn: {p.stem}" for p in drawn) or f"every figure in {options.folder} is up to date")
    return 0
