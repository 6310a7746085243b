"""One tidy table of a sweep: the claims' quantities of every point and seed, with the point's values in front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nt_utils.errors import InputError
from nt_utils.files import study_name
from nt_utils.study.batch.parameter_files import variants


def collect(study: str, seeds: Sequence[int], preset: str, root: Path) -> Path:
    """Write ``runs/<study>/sweep.csv``: one row a point, seed and part of a claim; the swept values come first.

    Raises InputError naming a run that has no claims yet.
    """
    import pandas as pd

    from nt_utils.study import ledger

    frames = []
    for variant in variants(study, seeds, preset, root):
        for seed in variant.seeds:
            folder = root / "runs" / variant.folder / f"seed-{seed}"
            files = [folder / "claims" / f"{name}.csv" for name in variant.notebooks]
            found = [ledger.read(file) for file in files if file.is_file()]
            if not found:
                raise InputError(f"sweep: no claims in {folder}; run the study first")
            point = pd.DataFrame([dict(variant.changes) | {"seed": seed}])
            frames += [point.merge(frame.drop(columns="seed"), how="cross") for frame in found]
    path = root / "runs" / study_name(study, study, preset) / "sweep.csv"
    return ledger.write_table(path, pd.concat(frames, ignore_index=True))
