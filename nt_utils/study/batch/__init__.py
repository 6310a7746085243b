"""Running notebooks in batches: one papermill process a step, started by Snakemake.

``python -m nt_utils.study.batch study`` is ``make study``; ``run``, ``testbed`` and ``collect`` are steps of the workflow.
An executed notebook takes its final name only when every cell succeeded.
"""

from nt_utils.study.batch.parameter_files import (
    LAST,
    StudyFile,
    Variant,
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
from nt_utils.study.batch.sweep import collect
from nt_utils.study.batch.workflow import main, run_study

__all__ = [
    "LAST",
    "StudyFile",
    "Variant",
    "collect",
    "main",
    "note_settings",
    "notebooks",
    "parse_names",
    "parse_seeds",
    "parser",
    "read",
    "run_notebook",
    "run_study",
    "settings",
    "study_parameters",
    "variants",
]
