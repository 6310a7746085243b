"""Seven definitions of a safety neuron on one model and the same prompts, each as a ranking of the common pool.

From the three papers: the paper's rule and `contrast` [SN], safety-critical units [SSAH], attack-aware attribution [NT];
and two from outside: set difference of weight importance (Wei et al. 2024, by SNIP and by Wanda scores) and activation
change between unaligned and aligned model (Chen et al. 2024). Everything is scored once; any block of the calibration
prompts can then be left out, so that what two definitions disagree about can be told from what one definition makes of
other prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch

from nt_utils import selection
from nt_utils.data.attacks import attacks
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation.generation import generate
from nt_utils.interventions import modulation
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL, NeuronScores
from nt_utils.scoring.activation_change import activation_change
from nt_utils.scoring.attribution import Case, attribution, safety_cases
from nt_utils.scoring.fluctuation import Fluctuation, fluctuation
from nt_utils.scoring.importance import importance
from nt_utils.scoring.saliency import saliency
from nt_utils.selection import Ranking

#: Definition -> where it comes from.
PAPERS = {
    "consistent": "SN",
    "contrast": "ours, after SN",
    "SCU": "SSAH",
    "attribution": "NT",
    "SNIP difference": "Wei et al. 2024",
    "Wanda difference": "Wei et al. 2024",
    "activation change": "Chen et al. 2024",
}
#: Set difference -> the weight scores it is made of.
DIFFERENCES = {"SNIP difference": "snip", "Wanda difference": "wanda"}
REFUSAL = "Sorry, I cannot help with that."
COMPLIANCE = "Sure, here is how to do that."


def answered(prompts: Sequence[Prompt], refusal: str = REFUSAL) -> PromptSet:
    """The prompts with a stock refusal and a stock opening of an answer where they have none of their own."""
    return PromptSet(
        [p.replace(refusal=p.refusal or refusal, helpful=p.helpful or COMPLIANCE) for p in prompts],
        getattr(prompts, "name", "prompts"),
    )


@dataclass
class Definitions:
    """Scores of every definition on harmful prompts and as many benign ones, in blocks.

    Args:
        scored: definition -> function of the blocks to use (None: all) that gives its ranking.
        blocks: number of blocks; prompt i is in block i mod blocks.
        prompts: number of harmful prompts.
        utility_shares: set difference -> share of the pool that it leaves out as useful.
    """

    scored: Mapping[str, Callable[..., Ranking]]
    blocks: int
    prompts: int
    utility_shares: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(DIFFERENCES, 0.1))

    def rankings(self, blocks: Sequence[int] | None = None) -> dict[str, Ranking]:
        """Every definition's ranking of the pool."""
        return {name: self.ranking(name, blocks) for name in self.scored}

    def ranking(self, name: str, blocks: Sequence[int] | None = None, share: float | None = None) -> Ranking:
        """One definition's ranking; ``share``: another share that a set difference leaves out."""
        if name not in self.utility_shares:
            return self.scored[name](blocks)
        return self.scored[name](blocks, self.utility_shares[name] if share is None else share)

    def halves(self, draws: int, seed: int) -> list[tuple[dict[str, Ranking], dict[str, Ranking]]]:
        """Pairs of rankings from two disjoint random halves of the blocks."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(draws):
            order = torch.randperm(self.blocks, generator=generator).tolist()
            half = self.blocks // 2
            found.append((self.rankings(sorted(order[:half])), self.rankings(sorted(order[half : 2 * half]))))
        return found


def _subset(scores: NeuronScores, blocks: Sequence[int] | None, count: int, period: int) -> NeuronScores:
    """The rows of some blocks; rows repeat the prompts with this period (a row for each attack)."""
    if blocks is None:
        return scores
    return scores.subset([row for row in range(scores.n_prompts) if row % period % count in set(blocks)])


def define(
    lm: LanguageModel,
    harmful: PromptSet,
    benign: PromptSet,
    *,
    base: LanguageModel | None = None,
    per_class: int = 1,
    attribution_prompts: int = 24,
    blocks: int = 8,
    batch_size: int = 16,
    max_new_tokens: int = 40,
) -> Definitions:
    """Score every definition.

    Args:
        harmful, benign: calibration prompts, at least ``blocks`` of each; those without reference responses get stock ones.
        base: the unaligned model; without it there is no activation change.
        per_class: attacks of each seen class for attribution, on ``attribution_prompts`` of the harmful prompts.

    Raises:
        InputError: too few prompts for the blocks.
    """
    harmful, benign = answered(harmful), answered(benign)
    n = min(len(harmful), len(benign), attribution_prompts)
    if n < blocks:
        raise InputError(f"n_detect: {n} prompts cannot be cut into {blocks} blocks; give more prompts")
    options: dict[str, Any] = {"batch_size": batch_size, "progress": False}
    scored = _importance_rules(lm, harmful, benign, blocks, options)
    scored["SCU"] = _units(lm, harmful, benign, blocks, options)
    scored["attribution"] = _attribution(lm, harmful[:n], per_class, blocks, batch_size)
    for name, metric in DIFFERENCES.items():
        scored[name] = _difference(lm, harmful, benign, metric, blocks, options)
    if base is not None:
        responses = [r.text or " " for r in generate(lm, harmful, max_new_tokens=max_new_tokens, progress=False)]
        change = activation_change(lm, base, harmful, responses, **options)
        scored["activation change"] = lambda chosen: selection.root_mean_square(
            _subset(change, chosen, blocks, len(harmful))
        )
    return Definitions(scored, blocks, len(harmful))


def _importance_rules(lm, harmful, benign, blocks, options) -> dict:
    all_tokens = importance(lm, harmful.texts, kinds=POOL, positions="all", **options)
    last = [importance(lm, side.texts, kinds=POOL, positions="last", **options) for side in (harmful, benign)]

    def consistent(chosen):
        return selection.consistency(_subset(all_tokens, chosen, blocks, len(harmful)), 1.0, POOL, per="pool")

    def contrast(chosen):
        first, second = (_subset(s, chosen, blocks, s.n_prompts) for s in last)
        return selection.contrast(first, second)

    return {"consistent": consistent, "contrast": contrast}


def _units(lm, harmful, benign, blocks, options):
    """Log ratio of the channels' scores; statistics of every block apart, merged when they are asked for."""

    def parts(prompts: PromptSet, target: str) -> list[Fluctuation]:
        found = []
        for block in range(blocks):
            rows = prompts[block::blocks]
            found.append(fluctuation(lm, [p.text for p in rows], [getattr(p, target) for p in rows], **options))
        return found

    safety, utility = parts(harmful, "refusal"), parts(benign, "helpful")

    def rank(chosen):
        chosen = range(blocks) if chosen is None else chosen
        merged = [reduce(Fluctuation.merge, [side[b] for b in chosen]) for side in (safety, utility)]
        units = selection.unit_scores(*merged, heads=False)
        return Ranking(lm.view.space, POOL, units.difference, "SCU")

    return rank


def _attribution(lm, harmful, per_class, blocks, batch_size):
    cases = safety_cases(harmful, attacks(seen=True, split="train"), per_class)
    scores = attribution(lm, cases, method="patching", batch_size=batch_size, progress=False)
    return lambda chosen: modulation.ranking(_subset(scores, chosen, blocks, len(harmful)))


def _difference(lm, harmful, benign, metric, blocks, options):
    safety = saliency(lm, harmful, [p.refusal for p in harmful], metric=metric, **options)
    utility = saliency(lm, benign, [p.helpful for p in benign], metric=metric, **options)

    def rank(chosen, share):
        first, second = (_subset(s, chosen, blocks, s.n_prompts) for s in (safety, utility))
        return selection.set_difference(first, second, share)

    return rank


def single_effects(lm: LanguageModel, prompts: PromptSet, *, exact: bool, batch_size: int = 8) -> Ranking:
    """By how much zeroing each neuron alone lowers the refusal-minus-compliance margin, nats a token, mean over prompts.

    ``exact`` zeroes every neuron of the pool in turn (one forward each: small models only); otherwise it is the
    first-order estimate, activation times gradient, from one backward pass.
    """
    cases = [Case(p, p, p.refusal, p.helpful) for p in answered(prompts)]
    method, rows = ("exact", 256) if exact else ("patching", 64)
    scores = attribution(lm, cases, method=method, target="zero", batch_size=batch_size, rows=rows, progress=False)
    return modulation.ranking(scores, name="effect of zeroing one neuron")
