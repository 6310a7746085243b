"""Running notebooks in batches: one papermill process a step, started by Snakemake.

``python -m nt_utils.study.batch study`` is ``make study``; ``run``, ``testbed`` and ``collect`` are steps of the workflow.
An executed notebook takes its final name only when every cell succeeded.
"""

from nt_utils.study.batch.parameter_files import (
    LAST,
    note_settings,
    notebooks,
    parse_names,
    parse_seeds,
    parser,
    read,
    settings,
    study_parameters,
    variants,
)
from nt_utils.study.batch.step import run_notebook
from nt_utils.study.batch.workflow import main

__all__ = [
    "LAST",
    "main",
    "note_settings",
    "notebooks",
    "parse_names",
    "parse_seeds",
    "parser",
    "read",
    "run_notebook",
    "settings",
    "study_parameters",
    "variants",
]
