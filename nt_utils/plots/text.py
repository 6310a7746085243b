"""A figure's table for a report: Markdown and LaTeX (booktabs), four significant digits."""

from __future__ import annotations

import math

import pandas as pd

from nt_utils.files import escaped

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def cell(value) -> str:
    """A number with four significant digits, a missing value as nothing, anything else as it is, on one line."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return " ".join(str(value).split())


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown; numbers to the right."""
    marks = ["---:" if pd.api.types.is_numeric_dtype(table[c]) else "---" for c in table]
    rows = [[str(c) for c in table], marks, *([cell(v) for v in row] for row in table.astype(object).to_numpy())]
    return "".join(f"| {' | '.join(row if i == 1 else map(escaped, row))} |\n" for i, row in enumerate(rows))


def latex(table: pd.DataFrame) -> str:
    """The table as a LaTeX tabular with the rules of booktabs."""
    columns = "".join("r" if pd.api.types.is_numeric_dtype(table[c]) else "l" for c in table)

    def line(values) -> str:
        cells = ("".join(_LATEX.get(letter, letter) for letter in cell(v)) for v in values)
        return " & ".join(cells) + r" \\"

    body = [line(row) for row in table.astype(object).to_numpy()]
    head = [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        line(table.columns),
        r"\midrule",
    ]
    return "\n".join([*head, *body, r"\bottomrule", r"\end{tabular}", ""])
