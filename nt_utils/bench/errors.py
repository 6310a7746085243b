"""Largest relative error of the scores against brute force: every family, projection and neuron of tiny models."""

from __future__ import annotations

import pandas as pd


def error_table() -> pd.DataFrame:
    """One row a model: the largest relative error per projection, float32, over all neurons of a padded batch."""
    from tests.scoring.test_importance import relative_errors
    from tests.tiny import CONFIGS

    return pd.DataFrame([{"model": name, **relative_errors(name)} for name in CONFIGS])
