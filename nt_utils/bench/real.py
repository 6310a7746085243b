"""What the measurements on a real model share: their options, their prompts, and how a table is written."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from nt_utils.data.splits import Splits
from nt_utils.files import study_name
from nt_utils.plots.text import markdown

ROLES = ("harmful", "benign", "borderline")


def parser(module: str, about: str) -> argparse.ArgumentParser:
    """The options of every such measurement: the model, the source of each kind of prompts, the seed, the folder."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    made.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    for role, source in zip(ROLES, ("advbench", "alpaca", "xstest"), strict=True):
        made.add_argument(f"--{role}", default=source)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("runs"), help="folder of the tables")
    return made


def splits(options: argparse.Namespace) -> Splits:
    """Which prompts detect and which are answered."""
    return Splits({role: getattr(options, role) for role in ROLES}, options.seed)


def write(table: pd.DataFrame, name: str, options: argparse.Namespace) -> None:
    """Write NAME_MODEL.csv and .md, and say where."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}_{study_name(options.model)}.csv"
    table.to_csv(path, index=False, float_format="%.6g")
    path.with_suffix(".md").write_text(markdown(table), encoding="utf-8")
    print(f"written: {path}")
