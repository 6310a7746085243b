"""The errors that speak to the user: one line that names the parameter, what was wrong and what is allowed."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Collection, Sequence
from numbers import Integral
from typing import Any


class InputError(ValueError):
    """Something the user gave is not usable. The message is one line, fit to be shown without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """What IPython (and so papermill) shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class ModelError(InputError):
    """The model cannot be found, loaded or scored; the message says which part is missing."""


class DivergedError(InputError):
    """A training's loss is no longer finite: its learning rate is too high."""


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raise InputError unless the value of this parameter is one of those allowed."""
    if value not in allowed:
        raise InputError(f"{name}: got {value!r}; allowed: {', '.join(allowed)}")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None, what: str = "") -> None:
    """Raise InputError unless the value of this parameter is a whole number from ``least`` to ``most`` (None: no end)."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        end = "" if most is None else f" to {most}"
        raise InputError(f"{name}: got {value!r}; allowed: a whole number from {least}{end}{what}")


def optional_package(name: str, why: str) -> Any:
    """An optional package, imported; InputError says ``why`` and how it is installed where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(why) from error


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Make a command line's main say what the user got wrong in one line on standard error, with exit status 1."""

    @functools.wraps(main)
    def wrapped(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return wrapped


def gate_message(model: str) -> str:
    """Which page to visit and which variable to set for a gated model of the hub."""
    return (
        f"{model} is gated: accept its licence at https://huggingface.co/{model}, then set the variable HF_TOKEN "
        "to a token of that account (or run `hf auth login`)"
    )


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
