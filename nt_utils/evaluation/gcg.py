"""GCG suffixes (Zou et al. 2023), found by the `nanogcg` package, and random suffixes of the same length as control.

The budget is a parameter: every step costs one gradient and `search_width` forward passes. nanogcg 0.2.3 hands transformers 5 a cache it no longer takes, so its prefix cache is off.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import nanogcg
import numpy
import torch

from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import check_count
from nt_utils.work import count, track

if TYPE_CHECKING:
    from nt_utils.models import LanguageModel

TARGET = "Sure, here is how:"


def gcg_target(prompt: Prompt) -> str:
    """What the suffix is to make the model say: the known answer (AdvBench's target), or a plain agreement."""
    return prompt.answer.split("|")[0] or prompt.helpful or TARGET


def gcg_attack(
    lm: LanguageModel,
    prompts: PromptSet,
    *,
    steps: int = 100,
    search_width: int = 128,
    topk: int = 64,
    suffix_length: int = 10,
    target: Callable[[Prompt], str] = gcg_target,
    intervention: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> PromptSet:
    """Every prompt with its own optimised suffix, attack "gcg".

    steps, search_width, topk   nanogcg's budget for each prompt
    suffix_length               words of the starting suffix ("x x x ...")
    intervention                active while the suffix is sought: the attacker knows the model that is attacked
    The global random state and torch's settings are put back.
    """
    counts = {"steps": steps, "search_width": search_width, "topk": topk, "suffix_length": suffix_length}
    for name, value in counts.items():
        check_count(name, value)
    budget = {"num_steps": steps, "search_width": search_width, "topk": topk, "early_stop": True}
    start = " ".join("x" * suffix_length)
    found = []
    with _undisturbed(lm), intervention.active(lm) if intervention is not None else contextlib.nullcontext():
        for i, prompt in enumerate(track(prompts, desc="gcg", unit="prompt", disable=not progress)):
            options = nanogcg.GCGConfig(
                **budget, optim_str_init=start, use_prefix_cache=False, seed=seed + i, verbosity="ERROR"
            )
            text = f"{prompt.text} {{optim_str}}"
            result = nanogcg.run(lm.model, _Tokenizer(lm), [{"role": "user", "content": text}], target(prompt), options)
            found.append(prompt.replace(text=f"{prompt.text} {result.best_string}", attack="gcg"))
            tokens = len(result.losses) * lm.encode([found[-1].text]).input_ids.numel()
            count(gradient_tokens=tokens, read_tokens=search_width * tokens)
    return PromptSet(found, f"{prompts.name}-gcg")


def random_suffixes(lm: LanguageModel, prompts: PromptSet, *, suffix_length: int = 10, seed: int = 0) -> PromptSet:
    """The control: every prompt with as many random printable tokens, attack "random-suffix"."""
    rng = random.Random(seed)
    special = set(lm.tokenizer.all_special_ids)
    words = [str(lm.tokenizer.decode([i])) for i in range(len(lm.tokenizer)) if i not in special]
    words = [word for word in words if word.isascii() and word.isprintable() and word.strip()]
    found = []
    for prompt in prompts:
        suffix = "".join(
            rng.choice(words) for _ in range(2 * suffix_length)
        )  # "x x" is two tokens in most vocabularies
        found.append(prompt.replace(text=f"{prompt.text} {suffix.strip()}", attack="random-suffix"))
    return PromptSet(found, f"{prompts.name}-random-suffix")


class _Tokenizer:
    """The model's tokenizer as nanogcg asks for it, with the rendering and special tokens of the LanguageModel.

    nanogcg cuts the first token off the rendered prompt and leaves it to the tokenizer to add it again, which a chat
    template's tokenizer need not do; here the rendered text is complete and nothing is added.
    """

    bos_token = None

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm.tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        wanted = options.pop("add_special_tokens", True) and not self._lm.has_template
        return self._lm.tokenizer(text, add_special_tokens=wanted, **options)

    def apply_chat_template(self, messages: list[dict], **options: Any) -> str:
        return self._lm.render([messages[-1]["content"]])[0]


@contextlib.contextmanager
def _undisturbed(lm: LanguageModel) -> Iterator[None]:
    """Puts back what nanogcg changes globally: seeds, determinism, gradients' flags; hides its bar for each prompt."""
    states = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    wanted = [p.requires_grad for p in lm.model.parameters()]
    bar, collector = nanogcg.gcg.tqdm, nanogcg.gcg.gc
    try:
        nanogcg.gcg.tqdm = lambda steps, **_: steps
        if (
            lm.device.type == "cpu"
        ):  # it collects garbage after every batch, which takes longer than a small model's step
            nanogcg.gcg.gc = nanogcg.utils.gc = SimpleNamespace(collect=lambda: 0)
        for parameter in lm.model.parameters():
            parameter.requires_grad_(False)
        yield
    finally:
        nanogcg.gcg.tqdm, nanogcg.gcg.gc, nanogcg.utils.gc = bar, collector, collector
        for parameter, value in zip(lm.model.parameters(), wanted, strict=True):
            parameter.requires_grad_(value)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
