"""Running notebooks in batches: one papermill process a step, started by Snakemake.

``python -m nt_utils.batch study`` is ``make study``; ``run``, ``testbed`` and ``collect`` are steps of the workflow.
An executed notebook takes its final name only when every cell succeeded.
"""

from nt_utils.batch.files import (
    LAST,
    StudyFile,
    Variant,
    note_settings,
    notebooks,
    parse_seeds,
    read,
    settings,
    study_parameters,
    variants,
)
from nt_utils.batch.step import run_notebook
from nt_utils.batch.sweep import collect
from nt_utils.batch.workflow import main, run_study

__all__ = [
    "LAST", "StudyFile", "Variant", "collect", "main", "note_settings", "notebooks", "parse_seeds", "read", "run_notebook", "run_study", "settings",
    "study_parameters", "variants",
]  # fmt: skip
