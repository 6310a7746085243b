"""Shared fixtures: tiny random models with the tiny tokenizer; one model a session, never changed by a test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from nt_utils.interventions import kept
from tests.tiny import FAMILIES, tiny_lm

collect_ignore = [] if os.environ.get("NT_TEST_REAL") else ["real"]  # `make test-real`


@pytest.fixture(autouse=True)
def no_trainings_kept():
    """A study that a test loads a model for keeps its trainings; no other test takes them over."""
    yield
    kept.keep(None)


@pytest.fixture(scope="session")
def lm():
    """A tiny Llama with a chat template. Shared: do not change its weights."""
    return tiny_lm("llama")


@pytest.fixture(scope="session")
def base_lm():
    """The same without a chat template."""
    return tiny_lm("llama", template=False)


@pytest.fixture(scope="session", params=FAMILIES)
def any_lm(request):
    """A tiny model of each family in turn. Shared: do not change its weights."""
    return tiny_lm(request.param)
