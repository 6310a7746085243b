"""Is the model still good for anything else? Perplexity of real prose, likelihood of reference answers, and the KL
divergence to the untouched model where it answers benign requests.

"Benign requests answered" does not see a model that has become much worse at language (perplexity from 10 to 27 with
98% answered was measured on Qwen2.5-Coder-0.5B); these three do. They are metrics of a suite's set like any other
(``perplexity`` and ``log_perplexity``, ``reference_likelihood``, ``kl``), with one value a prompt.
"""

from __future__ import annotations

import random
import sys
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nt_utils.data.prose import passages
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation.batching import BATCH_SIZE, tail_logits
from nt_utils.evaluation.generation import generate, prompt_ids
from nt_utils.evaluation.metrics import Interval, ratio

if TYPE_CHECKING:
    from nt_utils.evaluation.suite import Evaluation
    from nt_utils.models import LanguageModel

POSITIONS = 16
"""Positions of an answer at which the KL divergence is taken."""
KEPT_BYTES = 2**30
"""Most memory for the untouched model's log-probabilities, float16 on the CPU."""

# ------------------------------------------------------------------------------------------------------- real text


def prose(n: int = 40, words: int = 120, seed: int = 0) -> PromptSet:
    """n passages of at least `words` words of the language reference that every Python carries (`pydoc_data.topics`).

    Their wording differs a little between versions of Python: the set's name and fingerprint say which one it was.

    Raises:
        InputError: there are fewer passages.
    """
    found = [Prompt(text, kind="general", topic=name) for name, text in passages(words)]
    if not 1 <= n <= len(found):
        raise InputError(f"n: got {n}; there are 1 to {len(found)} passages of {words} words")
    random.Random(seed).shuffle(found)
    return PromptSet(found[:n], f"python-{sys.version_info.major}.{sys.version_info.minor}-prose")


def perplexity_ratio(before: Evaluation, after: Evaluation, set_name: str) -> Interval:
    """Perplexity after over perplexity before on the same texts, with an interval over the texts."""
    rows = [found.rows[found.rows["set"] == set_name] for found in (before, after)]
    if rows[0].empty or list(rows[0]["text"]) != list(rows[1]["text"]):
        raise InputError(f"set {set_name!r} is missing, or holds different texts in the two evaluations")
    nll = [(part["log_perplexity"] * part["tokens"]).to_numpy(float) for part in rows]
    return ratio(nll[1] - nll[0], rows[0]["tokens"].to_numpy(float)).exp()


# ------------------------------------------------------------------------------------------------- KL to the untouched


@dataclass(frozen=True)
class Untouched:
    """What the untouched model says on benign prompts: its greedy answers' first tokens and their log-probabilities.

    Attributes:
        prompts: the prompts, which every model renders for itself (an intervention may add a system prompt);
        tails: token ids of the answers' starts.
        log_probabilities: float16 [tail, vocabulary] for each prompt, on the CPU.
    """

    prompts: list[Prompt]
    tails: list[list[int]]
    log_probabilities: list[Tensor]
    key: tuple


_KEPT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def untouched(
    lm: LanguageModel, prompts: PromptSet, positions: int = POSITIONS, batch_size: int | None = None
) -> Untouched:
    """The reference of :func:`kl` on these prompts; computed once and kept (one set a model) while the model stays as it is.

    Raises:
        InputError: it would take more than KEPT_BYTES.
    """
    words = lm.model.config.get_text_config().vocab_size
    if (most := KEPT_BYTES // (2 * positions * words)) < len(prompts):
        raise InputError(f"kl: at most {most} prompts at {positions} positions of {words} words, got {len(prompts)}")
    size = batch_size or BATCH_SIZE
    heads = prompt_ids(lm, list(prompts), room=positions)
    identity = lm.identity()
    key = (identity, str(heads), positions, size)
    kept = _KEPT.get(lm.model)
    if identity is not None and kept is not None and kept.key == key:
        return kept
    answers = generate(lm, prompts, max_new_tokens=positions, batch_size=size, progress=False)
    tails = [list(answer.tokens) for answer in answers]
    found: list[Tensor] = [torch.empty(0)] * len(heads)
    for i, logits, _ in tail_logits(lm, heads, tails, batch_size=size):
        found[i] = logits.float().log_softmax(-1).to("cpu", torch.float16)
    _KEPT[lm.model] = Untouched(list(prompts), tails, found, key)
    return _KEPT[lm.model]


def kl(lm: LanguageModel, reference: Untouched, batch_size: int | None = None) -> np.ndarray:
    """KL(untouched || model as it is now), mean over the positions of the untouched model's own answer; one value a prompt.

    In nats a position. The answers are those of the reference, so every model is asked at the same places; this is what
    users of abliteration tools look at, taken over POSITIONS positions in place of the first.
    """
    values = np.full(len(reference.prompts), np.nan)
    heads = prompt_ids(lm, reference.prompts)
    rows = tail_logits(lm, heads, reference.tails, batch_size=batch_size or BATCH_SIZE)
    for i, logits, _ in rows:
        now = logits.float().log_softmax(-1)
        was = reference.log_probabilities[i].to(now.device).float().log_softmax(-1)  # it sums to one again
        values[i] = (was.exp() * (was - now)).sum(-1).mean().item()
    return values
