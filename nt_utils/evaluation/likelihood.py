"""Likelihoods of given responses and of plain text, in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation.batching import BATCH_SIZE, log_probability, tail_logits
from nt_utils.evaluation.generation import as_prompts
from nt_utils.models import context_of

if TYPE_CHECKING:
    from nt_utils.models import LanguageModel

TEXT_TOKENS = 2048
"""Longest window of running text."""


def token_likelihood(lm: LanguageModel, heads, tails, **options: Any) -> np.ndarray:
    """log p(tail | head) of rows of token ids, one value a row (float64); 0 for an empty tail. Options: tail_logits'."""
    totals = np.zeros(len(heads))
    for i, logits, ids in tail_logits(lm, heads, tails, **options):
        totals[i] = log_probability(logits, ids).sum().item()
    return totals


def response_likelihood(
    lm: LanguageModel,
    prompts: PromptSet | Sequence[Prompt | str],
    responses: Sequence[str],
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """log p(response | prompt) in nats and the number of response tokens, one value a prompt (float64, int64).

    The response is scored as rendered by the chat template; prefills do not enter. A response that renders to no
    token has likelihood 0 and count 0.
    """
    texts = [p.text for p in as_prompts(prompts)]
    if len(texts) != len(responses):
        raise InputError(f"responses must be one for each prompt, got {len(responses)} for {len(texts)} prompts")
    encoded = lm.encode(texts, list(responses), side="right")
    rows = [ids[:n].tolist() for ids, n in zip(encoded.input_ids, encoded.lengths, strict=True)]
    heads = [row[:n] for row, n in zip(rows, encoded.prompt_lengths, strict=True)]
    tails = [row[n:] for row, n in zip(rows, encoded.prompt_lengths, strict=True)]
    options: dict[str, Any] = {"batch_size": batch_size or BATCH_SIZE, "name": "likelihood", "progress": progress}
    return token_likelihood(lm, heads, tails, **options), np.array([len(tail) for tail in tails], dtype=np.int64)


def reference_likelihood(lm: LanguageModel, prompts: PromptSet, field: str = "helpful", **options: Any) -> np.ndarray:
    """log p of each prompt's known response per token (nats); NaN where none is known. ``field``: helpful or refusal."""
    known = [i for i, text in enumerate(prompts.column(field)) if text]
    found = np.full(len(prompts), math.nan)
    if known:
        totals, counts = response_likelihood(lm, prompts[known], prompts[known].column(field), **options)
        found[known] = totals / np.maximum(counts, 1)
    return found


def refusal_margin(lm: LanguageModel, prompts: PromptSet, **options: Any) -> np.ndarray:
    """log p(refusal) - log p(helpful) per response token, one value a prompt (nats a token).

    It moves long before the rate of refusals does. Prompts that lack either known response give NaN.
    """
    both = [i for i, p in enumerate(prompts) if p.refusal and p.helpful]
    margin = np.full(len(prompts), math.nan)
    if both:
        refusal, helpful = (reference_likelihood(lm, prompts[both], f, **options) for f in ("refusal", "helpful"))
        margin[both] = refusal - helpful
    return margin


class TextLikelihood(NamedTuple):
    """Per text: the summed negative log-likelihood (nats) and the number of predicted tokens."""

    nll: np.ndarray
    tokens: np.ndarray


def text_likelihood(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> TextLikelihood:
    """Likelihood of plain text without a chat template, for perplexity.

    Texts longer than ``max_length`` tokens (default: the model's context, at most TEXT_TOKENS) are cut into windows that
    do not overlap. Where the tokenizer begins a text with its BOS token, every window begins with it; elsewhere the first
    token of a window is not predicted. ``max_tokens``: only so many tokens of each text are read, special ones included.
    """
    limit = min(max_length or TEXT_TOKENS, context_of(lm.model.config)[0] or TEXT_TOKENS)
    owners: list[int] = []
    heads: list[list[int]] = []
    tails: list[list[int]] = []
    for i, text in enumerate(texts):
        ids = lm.tokenizer(text)["input_ids"][:max_tokens]
        start = ids[:1] if ids and ids[0] == lm.tokenizer.bos_token_id else []
        body, step = ids[len(start) :], limit - len(start)
        for first in range(0, len(body), step):
            window = [*start, *body[first : first + step]]
            owners, heads, tails = [*owners, i], [*heads, window[:1]], [*tails, window[1:]]
    options: dict[str, Any] = {"batch_size": batch_size or BATCH_SIZE, "name": "perplexity", "progress": progress}
    nll, tokens = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    at = np.array(owners, dtype=np.int64)
    np.subtract.at(nll, at, token_likelihood(lm, heads, tails, **options))
    np.add.at(tokens, at, np.array([len(tail) for tail in tails], dtype=np.int64))
    return TextLikelihood(nll, tokens)
