"""Everything that runs studies: parameters, runs, subjects, claims, the ledger, seeds, plans, reports, batches."""

from nt_utils.study.run import Run, begin
from nt_utils.study.subject import Subject

__all__ = ["Run", "Subject", "begin"]
