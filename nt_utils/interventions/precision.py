"""In which precision training computes: the model's own with wider masters, or float64 throughout for small models.

What is trained is held in float32 at least (a **master**) with an optimiser state of the same precision, whatever the
model stores: a float16 parameter handed to AdamW diverges, since its epsilon (1e-8) rounds to 0, and a bfloat16 weight
swallows steps below 1/256 of its size. Trained weights are rounded once, when they are merged.

A model below ``SMALL`` parameters trains in float64 by default, on a copy: float32 sums depend on the vector
instructions of the CPU and on the number of threads, and tens of steps make different answers of the last bit. In
float64 the difference stays below what rounding to the stored precision leaves. Evaluation uses the model as stored.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nt_utils.errors import InputError, check_choice
from nt_utils.models import LanguageModel, is_sharded

#: Parameters below which ``train_dtype="auto"`` is float64.
SMALL = 5_000_000
TRAIN_DTYPES = ("auto", "model", "float32", "float64")


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of masters and optimiser state for weights of this precision: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def check_train_dtype(train_dtype: str) -> None:
    """Raise InputError for an unknown name."""
    check_choice("train_dtype", train_dtype, TRAIN_DTYPES)


def chosen_dtype(lm: LanguageModel, train_dtype: str = "auto") -> torch.dtype | None:
    """The precision that training computes in; None: the model's own.

    "auto" is float64 for a model of less than ``SMALL`` parameters that lies whole in this process, on a device that
    has float64, and the model's own precision for any other.
    """
    check_train_dtype(train_dtype)
    if train_dtype != "auto":
        return {"model": None, "float32": torch.float32, "float64": torch.float64}[train_dtype]
    parameters = list(lm.model.parameters())
    whole = not is_sharded(lm.model) and not any(p.is_meta or p.device.type == "mps" for p in parameters)
    return torch.float64 if whole and sum(p.numel() for p in parameters) < SMALL else None


def training_copy(lm: LanguageModel, train_dtype: str = "auto") -> LanguageModel:
    """The model to train: itself, or a copy in the chosen precision where it stores another one.

    Raises:
        InputError: an unknown name; a copy of a model that is sharded or offloaded.
    """
    dtype, parameters = chosen_dtype(lm, train_dtype), list(lm.model.parameters())
    if dtype is None or all(p.dtype == dtype for p in parameters):
        return lm
    if is_sharded(lm.model) or any(p.is_meta for p in parameters):
        raise InputError(
            f"train_dtype: {train_dtype} needs a copy of a model that is sharded or offloaded; use 'model'"
        )
    return copied(lm, dtype)


def copied(lm: LanguageModel, dtype: torch.dtype | None = None) -> LanguageModel:
    """A copy with weights of its own, in another precision where one is given."""
    twin = copy.copy(lm)
    twin.__dict__.pop("view", None)  # the original's
    model: Any = copy.deepcopy(lm.model)
    twin.model = model if dtype is None else model.to(dtype)
    return twin


def computing(lm: LanguageModel) -> AbstractContextManager:
    """Inside, a float64 model computes in float64 throughout, also what transformers computes in float32 by name:
    norms, the softmax of eager attention, rotary angles."""
    double = all(p.dtype == torch.float64 for p in lm.model.parameters())
    return _Float32MeansFloat64() if double else nullcontext()


class _Float32MeansFloat64(TorchFunctionMode):
    """Inside, a function that is asked for float32 computes in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        widened = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return function(*map(_widened, args), **widened)


def _widened(value):
    return torch.float64 if value is torch.float32 else value
