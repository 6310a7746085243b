"""Baselines without training: adding or removing a refusal direction, and a system prompt.

The direction is the difference of means of Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction"
(NeurIPS 2024), section 2.3: the residual stream at one of the template's tokens behind the user's text, mean over harmful
minus mean over benign prompts, at one place between the layers; :func:`refusal_direction` chooses both as the paper
does. Added there (section 2.4, activation addition) it makes the model refuse; projected out of everything that enters
the residual stream (directional ablation) it takes refusal away.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nt_utils import hooks
from nt_utils.errors import InputError, check_choice
from nt_utils.evaluation.batching import forward
from nt_utils.models import LanguageModel, decoder

MODES = ("add", "ablate")
#: The paper's bounds on a candidate: the KL divergence it may cause on harmless prompts, and how deep it may lie.
MAX_KL, MAX_DEPTH = 0.1, 0.8


@dataclass(frozen=True, eq=False)
class Steering:
    """A direction added to the residual stream at one place, or projected out of all of it; an intervention.

    Args:
        direction: float [hidden size], as :func:`mean_difference` gives it (its length counts when it is added).
        place: where it is added: 0 = what enters the first layer, n = what leaves layer n - 1.
        mode: "add" (``x + strength * direction`` at every token) or "ablate" (``x - strength * r r^T x`` with r of length
            1, from everything that is written into the stream; ``place`` then only says where the direction was found).
        strength: 1 is the paper's in both modes; a negative one adds the opposite direction.
        architecture: of the model it was found on; "" leaves only the width to check.
        name: for tables.

    Raises:
        InputError: a direction that is zero, not finite or no vector; an unknown mode; a strength that is not finite.
    """

    direction: Tensor
    place: int
    mode: str = "add"
    strength: float = 1.0
    architecture: str = ""
    name: str = "steering"

    def __post_init__(self):
        vector = torch.as_tensor(self.direction).detach().to("cpu", torch.float32).clone()
        if vector.ndim != 1 or not torch.isfinite(vector).all() or not vector.norm() > 0:
            raise InputError("direction: needs one finite vector that is not zero")
        check_choice("mode", self.mode, MODES)
        if not math.isfinite(self.strength):
            raise InputError(f"strength: got {self.strength!r}; allowed: a finite number")
        object.__setattr__(self, "direction", vector)

    @property
    def key(self) -> str:
        """Hash of what acts."""
        acts = f"{self.mode} {self.strength:.9g} {self.place if self.mode == 'add' else ''}"
        digest = hashlib.sha256(acts.encode() + self.direction.numpy().tobytes())
        return f"steering-{digest.hexdigest()[:16]}"

    def active(self, lm: LanguageModel) -> AbstractContextManager:
        """Steer while inside. Raises InputError on another architecture or a place the model does not have."""
        view = lm.view
        if self.architecture not in ("", view.space.architecture) or len(self.direction) != view.hidden_size:
            raise InputError(
                f"steering: made for architecture {self.architecture} and width {len(self.direction)}; the model at hand "
                f"is {view.space.architecture} with width {view.hidden_size}"
            )
        if self.mode == "add":
            return hooks.residual(view, {self.place: self._add}, self.name)
        return hooks.written(view, self._project, self.name)

    def _add(self, stream: Tensor) -> Tensor:
        return stream + self.strength * self.direction.to(stream.device, stream.dtype)

    def _project(self, written: Tensor) -> Tensor:
        """In float32 whatever the model's precision: a unit vector in bfloat16 has not length 1."""
        unit = (self.direction / self.direction.norm()).to(written.device)
        wide = written.float()
        return (wide - self.strength * (wide @ unit)[..., None] * unit).to(written.dtype)


def token_means(
    lm: LanguageModel, prompts: Sequence[str], positions: Sequence[int] = (-1,), batch_size: int = 32
) -> Float[Tensor, "positions places hidden"]:
    """Mean over the prompts of the residual stream at these positions, counted from the end, at every place."""
    if not len(prompts):
        raise InputError("prompts: the list is empty; a mean needs at least one")
    total, places = torch.zeros((), dtype=torch.float64), range(lm.view.num_layers + 1)
    for start in range(0, len(prompts), batch_size):
        batch = lm.encode(list(prompts[start : start + batch_size]), side="left").to(lm.device)
        if min(batch.lengths) < -min(positions):
            raise InputError(
                f"positions: {min(positions)} lies before the shortest prompt's {min(batch.lengths)} tokens"
            )
        seen: dict[int, Tensor] = {}

        def read(stream: Tensor, place: int, seen=seen) -> None:
            seen[place] = stream[:, list(positions)].double().sum(0).cpu()

        with torch.no_grad(), hooks.residual(lm.view, {place: partial(read, place=place) for place in places}):
            decoder(lm.model)(**batch.inputs, use_cache=False)
        total = total + torch.stack([seen[place] for place in places], dim=1)
    return (total / len(prompts)).float()


def mean_difference(lm: LanguageModel, harmful: Sequence[str], benign: Sequence[str], batch_size: int = 32) -> Tensor:
    """Refusal directions, one a place, at the last prompt token: mean over harmful minus over benign, [layers + 1, hidden]."""
    return token_means(lm, harmful, batch_size=batch_size)[0] - token_means(lm, benign, batch_size=batch_size)[0]


def candidates(
    lm: LanguageModel, directions: Tensor, mode: str, strengths: Iterable[float] = (1.0,), layers: int = 0
) -> list[Steering]:
    """One steering for every place and strength to choose from.

    Place 0 (the last prompt token is the template's there, the same for all prompts) and places from ``MAX_DEPTH`` of the
    depth on are left out, as in the paper's appendix C. layers: as many of them, evenly spread; 0 for all.
    """
    places = [place for place in _places(lm, layers) if place] or [1]
    verb = {"add": "refusal direction added", "ablate": "refusal direction ablated"}
    return [
        Steering(directions[place], place, mode, strength, lm.view.space.architecture, verb[mode])
        for place in places
        for strength in strengths
        if directions[place].norm() > 0
    ]


def _deepest(lm: LanguageModel) -> int:
    """The first layer that is not below ``MAX_DEPTH`` of the depth."""
    return math.ceil(MAX_DEPTH * lm.view.num_layers)


def _places(lm: LanguageModel, layers: int = 0) -> list[int]:
    """So many layers, evenly spread below ``MAX_DEPTH`` of the depth; 0 for all."""
    deepest = _deepest(lm)
    count = min(layers or deepest, deepest)
    return [int((i + 0.5) * deepest / count) for i in range(count)]


def choose(options: Sequence[Steering], measure: Callable[[Steering], float]) -> tuple[Steering, list[float]]:
    """The option with the smallest ``measure`` (say a rate on development prompts; NaN never wins), and all values.

    Raises InputError without options or when every value is NaN.
    """
    values = [float(measure(option)) for option in options]
    known = [value for value in values if not math.isnan(value)]
    if not known:
        raise InputError("measure: gave no number for any option")
    return options[values.index(min(known))], values


@dataclass(frozen=True)
class RefusalDirection:
    """The direction that the paper's rule chooses, and every candidate that it was chosen from.

    Attributes:
        ablate, add: the chosen direction as a steering that takes refusal away, or brings it about; None where no candidate
            met the bounds.
        candidates: one row a candidate: position, layer, ablated (a), added (b), kl (c), chosen; (b) and (c) are NaN for
            candidates that were not looked at because a better one had met the bounds.
        refused, answered: training prompts that were kept, harmful ones that the model refuses and harmless ones it does not.
    """

    ablate: Steering | None
    add: Steering | None
    candidates: pd.DataFrame
    refused: int
    answered: int


def refusal_direction(
    lm: LanguageModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    validation: tuple[Sequence[str], Sequence[str]],
    *,
    refusals: Sequence[str] = ("I",),
    positions: int = 0,
    layers: int = 0,
    every: bool = False,
    batch_size: int = 32,
) -> RefusalDirection:
    """Choose a refusal direction as Arditi et al. (NeurIPS 2024, section 2.3 and appendix C) and their code do.

    1. Refusal score of a prompt: log-odds that the first token of the answer is one of the refusal tokens. Harmful prompts
       that score below 0 and harmless ones above are left out (all are kept where that would leave fewer than two).
    2. Candidates: at each of the template's tokens after the user's text and at the input of each layer below .8 of the
       depth, the mean difference between harmful and harmless training prompts.
    3. On the validation prompts: (a) mean refusal score on harmful ones under ablation; (b) on harmless ones with the
       direction added at its layer; (c) mean KL divergence at the last position on harmless ones under ablation.
    4. The smallest (a) wins among candidates with (b) >= 0 and (c) <= .1.

    Every candidate costs one pass over the harmful validation prompts, and, in the order of (a) until one meets the bounds,
    two over the harmless ones.

    Args:
        harmful, harmless: training prompts (the paper: 128 each); validation: others, harmful and harmless (32 each).
        refusals: texts whose first tokens begin a refusal (the paper lists them by family; Llama-3: "I").
        positions, layers: fewer candidates: how many of the template's last positions, and how many layers, evenly spread
            below .8 of the depth; 0 for all, as the paper.
        every: (b) and (c) of all candidates.

    Raises:
        InputError: an empty list of prompts.
    """
    tried = range(-min(positions or lm.suffix_length, lm.suffix_length), 0)
    places = _places(lm, layers)
    tokens = sorted({lm.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in refusals})

    def last_logits(prompts: Sequence[str], steering: Steering | None = None) -> Float[Tensor, "prompts vocabulary"]:
        found = []
        for start in range(0, len(prompts), batch_size):
            batch = lm.encode(list(prompts[start : start + batch_size]), side="left").to(lm.device)
            with torch.no_grad(), steering.active(lm) if steering else nullcontext():
                out = forward(lm, batch.input_ids, batch.attention_mask, last=1, past=None, use_cache=False)
            found.append(out.logits[:, -1].float().cpu())
        return torch.cat(found)

    def score(logits: Tensor) -> Tensor:
        refusing = torch.zeros(logits.shape[-1], dtype=torch.bool).index_fill_(0, torch.tensor(tokens), True)
        return logits[:, refusing].logsumexp(-1) - logits[:, ~refusing].logsumexp(-1)

    def kept(prompts: Sequence[str], sign: int) -> list[str]:
        scores = score(last_logits(prompts))
        found = [p for p, value in zip(prompts, scores.tolist(), strict=True) if sign * value > 0]
        return found if len(found) >= 2 else list(prompts)

    harmful, bad = (kept(prompts, 1) for prompts in (harmful, validation[0]))
    harmless, good = (kept(prompts, -1) for prompts in (harmless, validation[1]))
    difference = token_means(lm, harmful, tried, batch_size) - token_means(lm, harmless, tried, batch_size)
    plain = last_logits(good).log_softmax(-1)
    rows: list[dict[str, Any]] = []
    for i, position in enumerate(tried):
        for layer in (x for x in places if difference[i, x].norm() > 0):
            ablate = Steering(difference[i, layer], layer, "ablate", 1.0, lm.view.space.architecture)
            rows.append(
                {"position": position, "layer": layer, "ablated": float(score(last_logits(bad, ablate)).mean())}
            )
            rows[-1] |= {"added": math.nan, "kl": math.nan, "chosen": False, "steering": ablate}
    best: Steering | None = None
    for row in sorted(rows, key=lambda row: row["ablated"]):
        if best is not None and not every:
            break
        moved = last_logits(good, row["steering"]).log_softmax(-1)
        row["kl"] = float((plain.exp() * (plain - moved)).sum(-1).mean())
        row["added"] = float(score(last_logits(good, replace(row["steering"], mode="add"))).mean())
        if best is None and row["added"] >= 0 and row["kl"] <= MAX_KL:
            best, row["chosen"] = row["steering"], True
    return RefusalDirection(
        best and replace(best, name="refusal direction ablated"),
        best and replace(best, mode="add", name="refusal direction added"),
        pd.DataFrame(rows, columns=["position", "layer", "ablated", "added", "kl", "chosen"]),
        len(harmful),
        len(harmless),
    )


@dataclass(frozen=True)
class SystemPrompt:
    """A system prompt that stands before every prompt while active; an intervention.

    A model that never saw a system prompt in its training gives it no meaning.
    """

    text: str
    name: str = "system prompt"

    def __post_init__(self):
        if not self.text.strip():
            raise InputError("text: the system prompt is empty")

    @property
    def key(self) -> str:
        return f"system-{hashlib.sha256(self.text.encode()).hexdigest()[:16]}"

    @contextmanager
    def active(self, lm: LanguageModel) -> Iterator[None]:
        before = lm.system_prompt
        try:
            lm.set_system_prompt(self.text)
            yield
        finally:
            lm.set_system_prompt(before)
