"""Baselines without training: adding or removing a refusal direction, and a system prompt.

The direction is the difference of means of Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction"
(NeurIPS 2024), section 2.3: the residual stream at the last prompt token, mean over harmful minus mean over benign
prompts, at one place between the layers. Added there (section 2.4, activation addition) it makes the model refuse;
projected out of everything that enters the residual stream (directional ablation) it takes refusal away.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_utils import hooks
from nt_utils.errors import InputError
from nt_utils.models import LanguageModel, decoder

MODES = ("add", "ablate")


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
        if self.mode not in MODES:
            raise InputError(f"mode: got {self.mode!r}; allowed: {', '.join(MODES)}")
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


def last_token_means(lm: LanguageModel, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Mean over the prompts of the residual stream at the last prompt token, float32 [layers + 1, hidden size]."""
    total, places = torch.zeros((), dtype=torch.float64), range(lm.view.num_layers + 1)
    for start in range(0, len(prompts), batch_size):
        batch = lm.encode(list(prompts[start : start + batch_size]), side="left").to(lm.device)
        seen: dict[int, Tensor] = {}

        def keep(place: int, seen=seen) -> hooks.Edit:
            def read(stream: Tensor) -> None:
                seen[place] = stream[:, -1].double().sum(0).cpu()

            return read

        with torch.no_grad(), hooks.residual(lm.view, {place: keep(place) for place in places}):
            decoder(lm.model)(**batch.inputs, use_cache=False)
        total = total + torch.stack([seen[place] for place in places])
    if not len(prompts):
        raise InputError("prompts: the list is empty; a mean needs at least one")
    return (total / len(prompts)).float()


def mean_difference(lm: LanguageModel, harmful: Sequence[str], benign: Sequence[str], batch_size: int = 32) -> Tensor:
    """Refusal directions, one a place: mean over harmful minus mean over benign prompts, float32 [layers + 1, hidden]."""
    return last_token_means(lm, harmful, batch_size) - last_token_means(lm, benign, batch_size)


def candidates(
    lm: LanguageModel, directions: Tensor, mode: str, strengths: Iterable[float] = (1.0,), last_share: float = 0.8
) -> list[Steering]:
    """One steering for every place and strength to choose from.

    Place 0 (the last prompt token is the template's there, the same for all prompts) and places behind the first
    ``last_share`` of the layers are left out, as in the paper's appendix C.
    """
    places = range(1, max(2, math.floor(last_share * lm.view.num_layers) + 1))
    verb = {"add": "refusal direction added", "ablate": "refusal direction ablated"}
    return [
        Steering(directions[place], place, mode, strength, lm.view.space.architecture, verb[mode])
        for place in places
        for strength in strengths
        if directions[place].norm() > 0
    ]


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
