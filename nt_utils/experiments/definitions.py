"""All registered definitions on one model and the same prompts, scored once and ranked on any blocks of the prompts.

What two definitions disagree about can so be told from what one definition makes of other prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from nt_utils import definitions, selection
from nt_utils.data import corpus
from nt_utils.data.attacks import ATTACKS, FULL_LENGTH, Attack
from nt_utils.data.attacks import attacks as embedded_attacks
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.definitions import Definition, Material
from nt_utils.errors import InputError
from nt_utils.evaluation.generation import generate
from nt_utils.models import LanguageModel
from nt_utils.scoring.attribution import Case, attribution
from nt_utils.selection import Ranking

#: The set differences, whose share of useful neurons is chosen on development prompts.
DIFFERENCES = tuple(name for name, found in definitions.REGISTRY.items() if "utility_share" in found.needs)
REFUSAL = "Sorry, I cannot help with that."
COMPLIANCE = "Sure, here is how to do that."


def answered(prompts: Sequence[Prompt]) -> PromptSet:
    """The prompts with a stock refusal and a stock opening of an answer where they have none of their own."""
    return PromptSet(
        [p.replace(refusal=p.refusal or REFUSAL, helpful=p.helpful or COMPLIANCE) for p in prompts],
        getattr(prompts, "name", "prompts"),
    )


def study_attacks(prompts: Sequence[Prompt]) -> list[Attack]:
    """The attacks that methods may learn from: the embedded corpus's wordings on its own prompts, else full-length ones."""
    if all(p.source == corpus.SOURCE for p in prompts):
        return embedded_attacks(seen=True, split="train")
    return [ATTACKS[name] for name in FULL_LENGTH if ATTACKS[name].seen]


@dataclass
class Definitions:
    """Every definition whose needs the material meets, on one model.

    Attributes:
        utility_shares: set difference -> share of the pool that it leaves out as useful.
    """

    lm: LanguageModel
    material: Material
    registry: Mapping[str, Definition] = field(default_factory=lambda: definitions.REGISTRY)
    utility_shares: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(DIFFERENCES, 0.1))

    @property
    def prompts(self) -> int:
        """Number of harmful prompts."""
        return len(self.material.harmful)

    @property
    def names(self) -> list[str]:
        """The definitions that can be computed."""
        material = replace(self.material, utility_share=self.utility_shares)
        return [name for name, found in self.registry.items() if all(map(material.has, found.needs))]

    def rankings(self, blocks: Sequence[int] | None = None) -> dict[str, Ranking]:
        """Every definition's ranking of the pool, by all prompts or by some blocks of them."""
        return {name: self.ranking(name, blocks) for name in self.names}

    def ranking(self, name: str, blocks: Sequence[int] | None = None, share: float | None = None) -> Ranking:
        """One definition's ranking; ``share``: another share that a set difference leaves out."""
        shares = self.utility_shares if share is None else {**self.utility_shares, name: share}
        return self.registry[name](self.lm, replace(self.material, utility_share=shares).take(blocks))

    def halves(self, draws: int, seed: int) -> list[tuple[dict[str, Ranking], dict[str, Ranking]]]:
        """Pairs of rankings from two disjoint random halves of the blocks."""
        generator = torch.Generator().manual_seed(seed)
        found, half = [], self.material.blocks // 2
        for _ in range(draws):
            order = torch.randperm(self.material.blocks, generator=generator).tolist()
            found.append((self.rankings(sorted(order[:half])), self.rankings(sorted(order[half : 2 * half]))))
        return found


def define(
    lm: LanguageModel,
    harmful: PromptSet,
    benign: PromptSet,
    *,
    base: LanguageModel | None = None,
    attacks: Sequence[Attack] | None = None,
    per_class: int = 1,
    attribution_prompts: int = 24,
    blocks: int = 8,
    batch_size: int = 16,
    max_new_tokens: int = 40,
) -> Definitions:
    """Score every definition.

    Args:
        harmful, benign: calibration prompts, at least 2 of each; those without reference responses get stock ones.
        blocks: in so many parts, fewer with fewer prompts, the prompts are cut, to be halved at random.
        base: the unaligned model; without it there is no activation change.
        attacks: the study's attacks, for attribution; None for :func:`study_attacks` of the prompts.
        per_class: attacks of each class for attribution, on ``attribution_prompts`` of the harmful prompts.

    Raises:
        InputError: too few prompts to be halved.
    """
    harmful, benign = answered(harmful), answered(benign)
    n = min(len(harmful), len(benign), attribution_prompts)
    if n < 2:
        raise InputError(f"n_detect: {n} prompts cannot be cut into halves; give at least 2 of each kind")
    responses: list[str] = []
    if base is not None:
        responses = [r.text or " " for r in generate(lm, harmful, max_new_tokens=max_new_tokens)]
    material = Material(
        harmful,
        benign,
        base,
        responses,
        study_attacks(harmful) if attacks is None else attacks,
        per_class,
        n,
        options={"batch_size": batch_size},
        blocks=min(blocks, n),
    )
    found = Definitions(lm, material)
    found.rankings()  # the passes through the model are made here, once
    return found


def single_effects(lm: LanguageModel, prompts: PromptSet, *, exact: bool, batch_size: int = 8) -> Ranking:
    """By how much zeroing each neuron alone lowers the refusal-minus-compliance margin, nats a token, mean over prompts.

    ``exact`` zeroes every neuron of the pool in turn (one forward each: small models only); otherwise it is the
    first-order estimate, activation times gradient, from one backward pass.
    """
    cases = [Case(p, p, p.refusal, p.helpful) for p in answered(prompts)]
    method, rows = ("exact", 256) if exact else ("patching", 64)
    scores = attribution(lm, cases, method=method, target="zero", batch_size=batch_size, rows=rows)
    return selection.attributed(scores, name="effect of zeroing one neuron")
