"""Everything that runs studies: parameters, run folders, claims, the ledger, seeds, sweeps, plans, reports, batches."""

from nt_utils.study.run import Run, begin

__all__ = ["Run", "begin"]
