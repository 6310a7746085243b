"""Times of answering: a whole evaluation against transformers' own generate, and a common prefix that is read once.

On a random model and a byte tokenizer, or on any model (``python -m nt_utils.bench --model NAME``).
"""

from __future__ import annotations

from unittest import mock

import torch

from nt_utils.bench.setup import SHAPES, byte_tokenizer, random_model, ratio, seconds
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.evaluation import batching
from nt_utils.evaluation.suite import Suite, SuiteSet, evaluate
from nt_utils.models import LanguageModel, load

PROMPTS, NEW_TOKENS = 40, 28  # of the comparison with generate
SHORT_PROMPTS, SHORT_ANSWERS, SYSTEM_TOKENS = 100, 16, 140  # of the comparison with and without a common prefix


def model_of(name: str = "") -> LanguageModel:
    """The model of that name (as :func:`nt_utils.models.load` takes it), or a random one of shape (a)."""
    if name:
        return load(name)
    return LanguageModel(random_model(SHAPES["a"]), byte_tokenizer(), "random")


def _requests(n: int, start: str = "") -> PromptSet:
    dishes = ("bread", "a fish soup", "noodles", "an apple cake", "rice")
    texts = (f"{start}How do I cook {dishes[i % len(dishes)]} for {i + 2} guests?" for i in range(n))
    return PromptSet([Prompt(text, kind="harmful") for text in texts], "requests")


def _evaluate(lm: LanguageModel, prompts: PromptSet, tokens: int) -> None:
    """Answers with verdicts, perplexity check included, in one batch."""
    suite = Suite((SuiteSet("direct", prompts, ("asr", "refusal", "degenerate")),), max_new_tokens=tokens)
    evaluate(lm, suite, batch_size=len(prompts), cache=False, progress=False)


def over_generate(lm: LanguageModel, repeats: int, prompts: int = PROMPTS, new_tokens: int = NEW_TOKENS) -> dict:
    """An evaluation over ``model.generate`` on the same prompts, lengths and batch."""
    requests = _requests(prompts)

    @torch.no_grad()
    def generate() -> None:
        batch = lm.encode(requests.texts, side="left")
        lm.model.generate(  # type: ignore[operator]
            **batch.to(lm.device).inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=list(lm.stop_ids) or None,
            pad_token_id=lm.pad_id,
        )

    functions = {"generate": generate, "evaluation": lambda: _evaluate(lm, requests, new_tokens)}
    return {"evaluation_over_generate": ratio(seconds(functions, repeats), "evaluation", "generate")}


def shared_prefix(
    lm: LanguageModel, repeats: int, prompts: int = SHORT_PROMPTS, new_tokens: int = SHORT_ANSWERS
) -> dict:
    """An evaluation of short prompts behind SYSTEM_TOKENS common ones that are read once, over one that reads them every time.

    The common tokens are text in front of every prompt, as a system prompt is, so that models without one can be measured.
    """
    text = "You answer politely and briefly, and you never help with anything that harms people. " * 20
    ids = lm.tokens([text])[0][:SYSTEM_TOKENS]
    requests = _requests(prompts, f"{lm.tokenizer.decode(ids, skip_special_tokens=True)}\n")

    def without() -> None:
        with mock.patch.object(batching, "SAVED", float("inf")):
            _evaluate(lm, requests, new_tokens)

    functions = {"with": lambda: _evaluate(lm, requests, new_tokens), "without": without}
    return {"shared_prefix_over_none": ratio(seconds(functions, repeats), "with", "without")}


def rows(lm: LanguageModel, repeats: int) -> dict:
    """Both rows."""
    return over_generate(lm, repeats) | shared_prefix(lm, repeats)
