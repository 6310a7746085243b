"""Learning alpha with the weights frozen: MAML over attack classes, first or second order, or jointly [NT, stage 2].

Tasks are attack classes. The inner step moves alpha on a support set (attacked prompts with their refusals, benign ones
with their helpful answers); the outer loss is ``lambda * safety + (1 - lambda) * utility`` on the query set (Finn et al.,
ICML 2017). Joint training, without an inner step, is the ablation.

Precision: alpha, its gradient and Adam's state are float32, and float64 where training computes in float64, as models of
less than ``precision.SMALL`` parameters do by default. Below the lowest layer with a chosen neuron hidden states do not
depend on alpha: they are computed once a row.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nt_utils import hooks
from nt_utils.data.records import PromptSet
from nt_utils.errors import DivergedError, InputError, check_choice, check_count
from nt_utils.files import read_sealed, write_sealed
from nt_utils.interventions import kept
from nt_utils.interventions.modulation import BOUNDS, Modulation, check_bounds, check_sets, places, scatter
from nt_utils.interventions.precision import check_train_dtype, computing, master_dtype, training_copy
from nt_utils.interventions.trunk import FrozenTrunk
from nt_utils.models import LanguageModel, check_evaluating
from nt_utils.neurons import NeuronSet
from nt_utils.scoring.attribution import Responses, frozen
from nt_utils.work import COUNTS, count, is_older, track

METHODS = ("first", "second", "joint")
TIES = ("", "layer")
#: What :func:`find_inner_rate` tries: 1/16 to 256.
RATES = tuple(2.0**k for k in range(-4, 9))
STATE = "nt_utils.learning.5"


@dataclass(frozen=True)
class Recipe:
    """How alpha is learnt.

    Args:
        method: "first" or "second" order MAML, or "joint" (no inner step: support and query prompts together).
        safety_start, utility_start: alpha before the first step [NT: above 1, slightly below 1; values ours].
        bounds: alpha is held within.
        iterations: outer steps, each over all attack classes; outer_rate: Adam's.
        inner_rate, inner_steps: plain gradient steps on the support prompts. The rate is ours to choose: the history
            shows by how much the inner step moves the support loss, :func:`find_inner_rate` finds one.
        support, query: attacked prompts drawn from each attack class, and as many benign ones, for the inner and outer loss.
        balance: lambda; the loss is ``balance * safety + (1 - balance) * utility``.
        tied: "" for a factor of its own for every neuron, "layer" for one factor that all neurons of a layer share.
        train_dtype: what training computes in, as in :func:`nt_utils.interventions.tuning.tune`.
        validate_every: iterations between validations; patience: validations without gain before it stops (0: never).
    """

    method: str = "first"
    safety_start: float = 1.2
    utility_start: float = 0.9
    bounds: tuple[float, float] = BOUNDS
    iterations: int = 30
    outer_rate: float = 0.05
    inner_rate: float = 0.5
    inner_steps: int = 1
    support: int = 4
    query: int = 4
    balance: float = 0.5
    validate_every: int = 5
    patience: int = 3
    seed: int = 0
    tied: str = ""
    train_dtype: str = "auto"

    def __post_init__(self):
        check_train_dtype(self.train_dtype)
        check_bounds(self.bounds)
        if self.tied not in TIES:
            raise InputError(f"tied: got {self.tied!r}; allowed: {', '.join(map(repr, TIES))}")
        check_choice("method", self.method, METHODS)
        low, high = self.bounds
        for name in ("safety_start", "utility_start"):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name}: got {getattr(self, name)!r}; allowed: {low:g} to {high:g}")
        for name in ("iterations", "inner_steps", "support", "query", "validate_every"):
            check_count(name, getattr(self, name))
        for name in ("outer_rate", "inner_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name}: got {getattr(self, name)!r}; allowed: a number above 0")
        if not 0 <= self.balance <= 1:
            raise InputError(f"balance: got {self.balance!r}; allowed: 0 (utility alone) to 1 (safety alone)")


@dataclass(frozen=True)
class Learnt:
    """What :func:`learn` gives back.

    Attributes:
        modulation: the alpha with the smallest validation loss (the last one without validation).
        history: a row an iteration: iteration, query (outer loss, mean over tasks) and, where it was validated, support
            and adapted (support loss before and after the inner step; nats a token) and validation.
        stopped_early: whether patience ran out.
        diverged: the iteration whose loss was not finite, which ended the learning with a row without a loss; or None.
    """

    modulation: Modulation
    history: pd.DataFrame
    stopped_early: bool
    diverged: int | None = None


Tasks = Mapping[str, PromptSet]


def learn(
    lm: LanguageModel,
    safety: NeuronSet,
    utility: NeuronSet,
    tasks: Tasks,
    benign: PromptSet,
    recipe: Recipe = Recipe(),
    *,
    validation: tuple[Tasks, PromptSet] | None = None,
    measure: Callable[[Modulation], float] | None = None,
    checkpoint=None,
    name: str = "modulation",
    progress: bool = True,
) -> Learnt:
    """Learn alpha for these neurons; the model's weights are frozen and its own forward runs throughout.

    Args:
        safety, utility: disjoint sets (see :class:`Modulation`).
        tasks: attack class -> attacked harmful prompts; their ``refusal`` is the target.
        benign: benign prompts (borderline ones among them); their ``helpful`` answer is the target.
        validation: (tasks, benign) of a split apart; its loss decides when to stop and which alpha is kept.
        measure: instead of that loss, a number to be small (say from an evaluation of the intervention).
        checkpoint: file that holds the state after every iteration; an interrupted run goes on from it and ends with the
            same alpha. It must be of the same recipe (``iterations`` may grow), neurons, prompts and model with its text
            (``LanguageModel.identity``); "{key}" in its name stands for a hash of these, so that one name serves several
            runs. A file cannot tell one function from another: it does not go with ``measure``, and with hooks or foreign
            code on the model a warning says that nothing is kept.

    Raises:
        InputError: too few prompts for support and query, prompts without target, sets that overlap, a foreign
            checkpoint, a checkpoint with a measure.
        DivergedError: the loss is not finite before any alpha was validated; later, the best one so far is given back.
    """
    if not tasks:
        raise InputError("tasks: need the attacked prompts of at least one attack class")
    if checkpoint is not None and measure is not None:
        raise InputError(
            f"checkpoint: got {str(checkpoint)!r}; allowed: None with a measure, whose values it cannot tell apart"
        )
    learner = Learner(lm, safety, utility, tasks, benign, recipe)
    validate = _validation(learner, validation, measure)
    state = _State.begin(learner)
    key = learner.key(validation)
    file = None
    if checkpoint is not None and not key:
        warnings.warn(
            "checkpoint: nothing is kept, since hooks or code that no file can name act on the model", stacklevel=2
        )
    elif checkpoint is not None:
        file = Path(str(checkpoint).replace("{key}", key))
        state.resume(file, key, recipe.iterations)
    bar = track(total=recipe.iterations, initial=state.iteration, desc="alpha", unit="step", disable=not progress)
    with frozen(learner.lm.model), bar:
        while state.iteration < recipe.iterations and not 0 < recipe.patience <= state.waited:
            try:
                row = learner.step(state)
            except DivergedError:
                if state.best is None:
                    raise
                state.diverged = state.iteration
                state.history.append({"iteration": state.iteration, "query": math.nan})
                break
            if validate and (state.iteration % recipe.validate_every == 0 or state.iteration == recipe.iterations):
                row["validation"] = validate(state.alpha.detach())
                state.compare(row["validation"])
            state.history.append(row)
            if file is not None:
                state.save(file, key)
            bar.update()
    return learner.result(state, name, validated=validate is not None)


def adapt(
    lm: LanguageModel, modulation: Modulation, attacked: PromptSet, benign: PromptSet, recipe: Recipe
) -> Modulation:
    """The modulation after ``recipe.inner_steps`` inner steps on a few prompts of (say) an unseen attack class."""
    learner = Learner(lm, modulation.safety, modulation.utility, {}, benign, recipe)
    batch = learner.batch(attacked, benign)
    with frozen(learner.lm.model):
        alpha = learner.adapted(learner.leaf(modulation.alpha[learner.firsts]), batch, second=False)
    alpha = learner.spread(alpha.detach().cpu()).clamp(*modulation.bounds)
    return replace(modulation, alpha=alpha, name=f"{modulation.name}, adapted")


def find_inner_rate(
    lm: LanguageModel,
    safety: NeuronSet,
    utility: NeuronSet,
    tasks: Tasks,
    benign: PromptSet,
    recipe: Recipe = Recipe(),
    *,
    share: float = 0.2,
    rates: Sequence[float] = RATES,
) -> tuple[float, float]:
    """The smallest rate whose inner step lowers the support loss by ``share``, and the share it lowers it by.

    Means over the tasks' first draw, at the starting alpha. Where no rate reaches the share, the one that lowers most.
    """
    if not 0 < share < 1:
        raise InputError(f"share: got {share!r}; allowed: above 0, below 1")
    learner = Learner(lm, safety, utility, tasks, benign, recipe)
    alpha, supports, found = learner.start(), [learner.draw(task, 0)[0] for task in tasks], []
    for rate in sorted(rates):
        learner.recipe = replace(recipe, inner_rate=rate)
        with frozen(learner.lm.model):
            effect = learner.inner_effect(alpha, supports)
        found.append((rate, 1 - effect["adapted"] / effect["support"]))
        if found[-1][1] >= share:
            return found[-1]
    return max(found, key=lambda pair: pair[1])


class Learner:
    """One outer step after another: draws prompts, adapts, differentiates.

    Attributes:
        lm: what is computed with (see ``Recipe.train_dtype``); base: the model that was given.
        owners: of each neuron its factor, int [neurons]; firsts: of each factor its first neuron, int [factors].
    """

    def __init__(
        self, lm: LanguageModel, safety: NeuronSet, utility: NeuronSet, tasks: Tasks, benign: PromptSet, recipe: Recipe
    ):
        check_sets(safety, utility)
        safety.space.check("safety: found on", lm.view.space)
        check_evaluating(lm.model)
        self.base, self.safety, self.utility, self.recipe = lm, safety, utility, recipe
        self.tasks, self.benign = dict(tasks), benign
        self.owners, self.firsts = _owners(safety, utility, recipe.tied)
        self.places = {s: (c, self.owners[p], w) for s, (c, p, w) in places(safety, utility).items()}
        _check_targets(self.tasks, benign)
        _check_counts(self.tasks, benign, recipe)
        self.lm = training_copy(lm, recipe.train_dtype)
        self.dtype = master_dtype(next(self.lm.model.parameters()).dtype)
        self.trunk = FrozenTrunk.of(self.lm, min(layer for layer, _ in self.places))
        self._slopes: deque[tuple[Tensor, tuple, tuple[Tensor, float]]] = deque(maxlen=32)

    def leaf(self, alpha: Tensor) -> Tensor:
        """These values as what is differentiated: on the model's device, in the precision of masters."""
        return alpha.detach().to(self.lm.device, self.dtype, copy=True).requires_grad_()

    def start(self) -> Tensor:
        """Alpha before the first step."""
        values = [self.recipe.safety_start] * len(self.safety) + [self.recipe.utility_start] * len(self.utility)
        return self.leaf(torch.tensor(values, dtype=torch.float64)[self.firsts])

    def spread(self, alpha: Tensor) -> Tensor:
        """One factor a neuron, [neurons], of the factors that are learnt, [factors]."""
        return alpha[self.owners.to(alpha.device)]

    # -- data

    def draw(self, task: str, iteration: int) -> tuple[tuple, tuple]:
        """Support and query batch of a task: disjoint prompts, decided by seed, iteration and task alone."""
        attacked, n = self.tasks[task], self.recipe.support
        pick = _picks(f"{self.recipe.seed} {iteration} {task}", len(attacked), n + self.recipe.query)
        others = _picks(f"{self.recipe.seed} {iteration} {task} benign", len(self.benign), n + self.recipe.query)
        return (
            self.batch(attacked[pick[:n]], self.benign[others[:n]]),
            self.batch(attacked[pick[n:]], self.benign[others[n:]]),
        )

    def batch(self, attacked: PromptSet, benign: PromptSet) -> tuple[Responses, Tensor]:
        """All rows in one padded batch, and each row's weight in the loss; one of the two sets may be empty."""
        responses = Responses.of(
            self.lm, [*attacked, *benign], [*attacked.column("refusal"), *benign.column("helpful")]
        )
        balance = self.recipe.balance
        weights = [balance / max(1, len(attacked))] * len(attacked) + [(1 - balance) / max(1, len(benign))] * len(
            benign
        )
        return responses, torch.tensor(weights, device=self.lm.device)

    # -- losses and gradients

    def loss(self, alpha: Tensor, batch: tuple[Responses, Tensor]) -> Tensor:
        """balance * safety + (1 - balance) * utility under this alpha, nats a token; with a gradient where alpha wants one."""
        responses, weights = batch
        scaled = hooks.scale(self.lm.view, scatter(self.places, alpha))
        with computing(self.lm), torch.set_grad_enabled(alpha.requires_grad), scaled, self._reused(responses) as prefix:
            layer = 0 if self.trunk is None else self.trunk.layer
            found = (responses.loss(self.lm, prefix=prefix, layer=layer)[0] * weights).sum()
        if not torch.isfinite(found):
            raise DivergedError("alpha: the loss is not finite; lower inner_rate or outer_rate, or narrow the bounds")
        return found

    def _reused(self, responses: Responses) -> AbstractContextManager:
        """What need not run again: the layers below every chosen neuron, tokens that all rows begin with."""
        if self.trunk is None:
            return nullcontext()
        batch = responses.batch
        rows = [tuple(r[:n].tolist()) for r, n in zip(batch.input_ids, batch.lengths, strict=True)]
        return self.trunk.reused(rows, batch.prompt_lengths)

    def slope(self, alpha: Tensor, batch: tuple[Responses, Tensor]) -> tuple[Tensor, float]:
        """Gradient of the loss by alpha, and the loss. What was found lately is not computed again."""
        for at, same, found in self._slopes:
            if same is batch and torch.equal(at, alpha):
                return found
        loss = self.loss(alpha, batch)
        found = torch.autograd.grad(loss, alpha)[0], float(loss.detach())
        self._slopes.append((alpha.detach().clone(), batch, found))
        return found

    def adapted(self, alpha: Tensor, support, second: bool) -> Tensor:
        """Alpha after the inner steps; with ``second`` a function of ``alpha`` that can be differentiated."""
        for _ in range(self.recipe.inner_steps):
            if second:
                (slope,) = torch.autograd.grad(self.loss(alpha, support), alpha, create_graph=True)
            else:
                slope, _ = self.slope(alpha, support)
            alpha = (alpha - self.recipe.inner_rate * slope).clamp(*self.recipe.bounds)
            alpha = alpha if second else alpha.detach().requires_grad_()
        return alpha

    def gradient(self, alpha: Tensor, support, query) -> tuple[Tensor, float]:
        """Outer gradient and query loss of one task."""
        method = self.recipe.method
        if method == "joint":
            loss = (self.loss(alpha, support) + self.loss(alpha, query)) / 2
            return torch.autograd.grad(loss, alpha)[0], float(loss.detach())
        # Fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if method == "second" else nullcontext():
            adapted = self.adapted(alpha, support, second=method == "second")
            loss = self.loss(adapted, query)
            # First order: the adapted alpha's gradient stands in for alpha's own.
            return torch.autograd.grad(loss, alpha if method == "second" else adapted)[0], float(loss.detach())

    def step(self, state: _State) -> dict:
        """One outer step over all tasks, in place on the state; the row for the history."""
        batches = [self.draw(task, state.iteration) for task in self.tasks]
        row: dict[str, float] = {"iteration": state.iteration}
        if state.iteration % self.recipe.validate_every == 0 and self.recipe.method != "joint":
            row |= self.inner_effect(state.alpha, [support for support, _ in batches])
        found = [self.gradient(state.alpha, support, query) for support, query in batches]
        state.alpha.grad = torch.stack([g for g, _ in found]).mean(0)
        state.optimiser.step()
        with torch.no_grad():
            state.alpha.clamp_(*self.recipe.bounds)
        row["query"] = sum(loss for _, loss in found) / len(found)
        state.iteration += 1
        return row

    def inner_effect(self, alpha: Tensor, supports: Sequence) -> dict[str, float]:
        """Mean support loss before and after the inner step."""
        before = [self.slope(alpha, s)[1] for s in supports]
        after = [float(self.loss(self.adapted(alpha, s, second=False).detach(), s)) for s in supports]
        return {"support": sum(before) / len(before), "adapted": sum(after) / len(after)}

    # -- ends

    def modulation(self, alpha: Tensor, name: str, **meta) -> Modulation:
        """The modulation with these factors, and how they were learnt in its meta."""
        weights = self.base.weights_fingerprint
        meta = {"recipe": asdict(self.recipe), **meta}
        return Modulation(self.safety, self.utility, self.spread(alpha), self.recipe.bounds, name, weights, meta)

    def result(self, state: _State, name: str, validated: bool) -> Learnt:
        """What was learnt: the validated factors where there were any to keep, else the last ones."""
        columns = ["iteration", "query", "support", "adapted", "validation"]
        history = pd.DataFrame(state.history, columns=columns)
        alpha = state.best if validated and state.best is not None else state.alpha
        stopped = validated and state.iteration < self.recipe.iterations and state.diverged is None
        kept = state.best_iteration if validated else state.iteration
        return Learnt(self.modulation(alpha.detach(), name, iterations=kept), history, stopped, state.diverged)

    def key(self, validation: tuple[Tasks, PromptSet] | None) -> str:
        """Identifies the run a checkpoint belongs to; "" where what acts on the model is not known."""
        model = self.base.identity()
        if model is None:
            return ""
        recipe = {k: v for k, v in asdict(self.recipe).items() if k != "iterations"}
        data = [(task, prompts.fingerprint) for task, prompts in self.tasks.items()] + [self.benign.fingerprint]
        if validation is not None:
            data += [(t, p.fingerprint) for t, p in validation[0].items()] + [validation[1].fingerprint]
        sets = (self.safety.fingerprint, self.utility.fingerprint)
        parts = (recipe, data, sets, model)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class _State:
    """Where the learning stands: what a checkpoint holds."""

    alpha: Tensor
    optimiser: torch.optim.Adam
    iteration: int = 0
    best: Tensor | None = None
    best_value: float = math.inf
    best_iteration: int = 0
    waited: int = 0
    history: list[dict] = field(default_factory=list)
    diverged: int | None = None
    counted: Counter[str] = field(default_factory=lambda: Counter(COUNTS))  # before any of its own work

    @classmethod
    def begin(cls, learner: Learner) -> _State:
        alpha = learner.start()
        return cls(alpha, torch.optim.Adam([alpha], lr=learner.recipe.outer_rate))

    def compare(self, value: float) -> None:
        """Keep the alpha if its validation is the best so far."""
        if value < self.best_value:
            self.best, self.best_value = self.alpha.detach().clone(), value
            self.best_iteration, self.waited = self.iteration, 0
        else:
            self.waited += 1

    def save(self, path: Path, key: str) -> None:
        moments = self.optimiser.state[self.alpha]
        tensors = {"alpha": self.alpha, "best": self.alpha if self.best is None else self.best}
        tensors |= {name: moments[name] for name in ("step", "exp_avg", "exp_avg_sq")}
        tensors = {name: value.detach().clone() for name, value in tensors.items()}  # a file takes no tensor twice
        numbers = {n: getattr(self, n) for n in ("iteration", "best_iteration", "waited", "history", "best_value")}
        numbers |= {"has_best": self.best is not None, "work": COUNTS - self.counted}
        write_sealed(path, tensors, {"format": STATE, "key": key, "numbers": json.dumps(numbers)})

    def resume(self, path: Path, key: str, iterations: int) -> None:
        """Take over a checkpoint's state, of at most so many iterations; nothing happens where there is none."""
        if not path.exists():
            return
        header, tensors = read_sealed(path, STATE)
        if header["key"] != key:
            raise InputError(
                f"checkpoint: {path} belongs to another run (recipe, neurons, prompts, or the model with its text "
                "differ); remove it or name another file"
            )
        numbers = json.loads(header["numbers"])
        if numbers["iteration"] > iterations:
            raise InputError(
                f"iterations: got {iterations}; allowed: {numbers['iteration']} and more, which {path} has behind it, or "
                "another file as checkpoint"
            )
        kept.REUSED.append(key)
        has_best, work = numbers.pop("has_best"), Counter(numbers.pop("work"))
        if is_older(path):  # this process's own has been counted
            count(**work)
        self.counted = COUNTS - work
        for name, value in numbers.items():
            setattr(self, name, value)
        device = self.alpha.device
        with torch.no_grad():
            self.alpha.copy_(tensors["alpha"])
        self.best = tensors["best"].to(device) if has_best else None
        self.optimiser.state[self.alpha] = {
            "step": tensors["step"],
            "exp_avg": tensors["exp_avg"].to(device),
            "exp_avg_sq": tensors["exp_avg_sq"].to(device),
        }


def _validation(learner: Learner, validation, measure) -> Callable[[Tensor], float] | None:
    """alpha -> a number to be small: the caller's measure, or the loss on the validation split."""
    if measure is not None:
        return lambda alpha: float(measure(learner.modulation(alpha, "candidate")))
    if validation is None:
        return None
    tasks, benign = validation
    _check_targets(tasks, benign)
    if not tasks:
        raise InputError("validation: has no attack class; at least one is needed")
    harmful, harmless = (
        [learner.batch(attacked, benign[:0]) for attacked in tasks.values()],
        learner.batch(benign[:0], benign),
    )

    def loss(alpha: Tensor) -> float:
        """The mean over the tasks; the benign rows are the same for all of them."""
        parts = [float(learner.loss(alpha, batch)) for batch in harmful]
        return sum(parts) / len(parts) + float(learner.loss(alpha, harmless))

    return loss


def _check_targets(tasks: Tasks, benign: PromptSet) -> None:
    for task, prompts in tasks.items():
        if not all(text.strip() for text in prompts.column("refusal")):
            raise InputError(f"tasks: {task!r} has prompts without a refusal to train on")
    if not all(text.strip() for text in benign.column("helpful")):
        raise InputError("benign: has prompts without a helpful answer to train on")
    if not len(benign):
        raise InputError("benign: the set is empty; at least one prompt is needed")


def _check_counts(tasks: Tasks, benign: PromptSet, recipe: Recipe) -> None:
    need = recipe.support + recipe.query
    for task, prompts in tasks.items():
        if len(prompts) < need:
            raise InputError(
                f"tasks: {task!r} has {len(prompts)} prompts; a split into support ({recipe.support}) and query "
                f"({recipe.query}) needs {need}"
            )
    if tasks and len(benign) < need:
        raise InputError(f"benign: {len(benign)} prompts; a split into support and query needs {need}")


def _owners(safety: NeuronSet, utility: NeuronSet, tied: str) -> tuple[Tensor, Tensor]:
    """Of each neuron, safety first, the number of its factor (its own, or its role's in its layer), and each factor's first."""
    neurons = [(role, layer) for role, chosen in enumerate((safety, utility)) for layer, _, _ in chosen]
    groups = neurons if tied else range(len(neurons))
    firsts: dict = {}
    for position, group in enumerate(groups):
        firsts.setdefault(group, position)
    numbers = {group: i for i, group in enumerate(firsts)}
    return torch.tensor([numbers[group] for group in groups]), torch.tensor(list(firsts.values()))


def _picks(label: str, size: int, count: int) -> list[int]:
    """``count`` different positions below ``size``, decided by the label alone."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big")
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist()
