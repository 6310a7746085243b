"""Adaptive activation adjustment: every chosen neuron's activation times its own alpha [NT, stage 2].

``x_k <- alpha_k x_k`` for N_s safety and N_u utility neurons, base weights frozen: one multiplication a site, whatever
the number of neurons. Alpha is learnt by MAML (Finn et al., ICML 2017) over attack classes, first or second order, or
jointly; :func:`dial` then turns the number of neurons and the strength without training again.

Alpha acts on the channels that write to the residual stream (FFN channels and o_proj inputs, the study's pool): there it
folds into the weights that read the channel. Sets with q, k or v rows are refused.

**A neuron that ranks high for both safety and utility** goes to the list in which it stands higher (the same place: to
safety), and the other list moves on to its next neuron, so that both counts hold (:func:`assign`). Sets given by hand
must not overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nt_utils import hooks
from nt_utils.data.records import PromptSet
from nt_utils.errors import InputError
from nt_utils.files import digest_of, read_header, sealed
from nt_utils.models import LanguageModel, device_of
from nt_utils.neurons import POOL, NeuronSet, NeuronSpace, Site
from nt_utils.scoring.attribution import Responses, frozen
from nt_utils.selection import Ranking
from nt_utils.work import track

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("first", "second", "joint")
BOUNDS = (0.0, 3.0)
#: What :func:`find_inner_rate` tries: 1/16 to 256.
RATES = tuple(2.0**k for k in range(-4, 9))

# -------------------------------------------------------------------------------------------------- intervention


@dataclass(frozen=True, eq=False)
class Modulation:
    """Alpha for some neurons; an intervention.

    Args:
        safety, utility: disjoint sets over FFN channels and o_proj inputs; one of them may be empty.
        alpha: float [len(safety) + len(utility)], in the order of iteration, safety first; no unit.
        bounds: smallest and largest alpha allowed.
        name: for tables.
        weights: fingerprint of the weights it was learnt on (recorded; only adapters demand it).
        meta: how it was made; JSON-able.

    Raises:
        InputError: sets that overlap, are both empty or hold q, k or v rows; alpha out of bounds, NaN or of wrong length.
    """

    safety: NeuronSet
    utility: NeuronSet
    alpha: Tensor
    bounds: tuple[float, float] = BOUNDS
    name: str = "modulation"
    weights: str = ""
    meta: Mapping = field(default_factory=dict)

    def __post_init__(self):
        _check_sets(self.safety, self.utility)
        _check_bounds(self.bounds)
        alpha = torch.as_tensor(self.alpha).detach().to("cpu", torch.float32).clone()
        count = len(self.safety) + len(self.utility)
        if tuple(alpha.shape) != (count,):
            raise InputError(f"alpha: needs one value for each of the {count} neurons, got shape {list(alpha.shape)}")
        low, high = self.bounds
        if not ((alpha >= low) & (alpha <= high)).all():  # NaN fails both
            bad = alpha[~((alpha >= low) & (alpha <= high))][0].item()
            raise InputError(f"alpha: got {bad:g}; allowed: {low:g} to {high:g}")
        object.__setattr__(self, "alpha", alpha)

    @property
    def space(self) -> NeuronSpace:
        """The neurons of its architecture."""
        return self.safety.space

    @cached_property
    def factors(self) -> dict[Site, Tensor]:
        """site -> float32 [width] with alpha at the chosen neurons and 1 elsewhere; sites without neurons are left out."""
        return scatter(_places(self.safety, self.utility), self.alpha)

    @property
    def safety_alpha(self) -> Tensor:
        """[len(safety)], in the order of iteration over the set."""
        return self.alpha[: len(self.safety)]

    @property
    def utility_alpha(self) -> Tensor:
        """[len(utility)]."""
        return self.alpha[len(self.safety) :]

    @property
    def key(self) -> str:
        """Hash of what acts: architecture and the factors that are not 1."""
        digest = hashlib.sha256(self.space.architecture.encode())
        for site, values in sorted(self.factors.items()):
            if (values != 1).any():
                digest.update(repr(site).encode() + values.numpy().tobytes())
        return f"modulation-{digest.hexdigest()[:16]}"

    def active(self, lm: LanguageModel) -> AbstractContextManager:
        """Multiply while inside; one multiplication a site. Raises InputError on another architecture."""
        if lm.view.space.architecture != self.space.architecture:
            raise InputError(
                f"modulation: made for architecture {self.space.architecture}; the model at hand is "
                f"{lm.view.space.architecture}"
            )
        acting = {site: values for site, values in self.factors.items() if (values != 1).any()}
        return hooks.scale(lm.view, _ready(acting, lm), self.name) if acting else nullcontext()

    def save(self, path) -> Path:
        """Write one safetensors file; atomic."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"alpha": self.alpha}
        for role, chosen in (("safety", self.safety), ("utility", self.utility)):
            tensors |= {f"{role}.{layer}.{kind}": m.to(torch.uint8) for (layer, kind), m in chosen.masks.items()}
        header = {
            "format": "nt_utils.modulation.2",
            "space": self.space.to_json(),
            "name": self.name,
            "weights": self.weights,
            "bounds": json.dumps(list(self.bounds)),
            "meta": json.dumps(dict(self.meta), sort_keys=True),
            "key": self.key,
        }
        _write(path, tensors, header)
        return path

    @classmethod
    def load(cls, path, space: NeuronSpace | None = None) -> Modulation:
        """Read a modulation; raises InputError when it is damaged or, given ``space``, of another architecture."""
        path = Path(path)
        header, tensors = _read(path, "nt_utils.modulation.2")
        found = NeuronSpace.from_json(header["space"])
        if space is not None and space.architecture != found.architecture:
            raise InputError(f"{path}: made for {found.architecture}; the model at hand is {space.architecture}")
        masks: dict[str, dict[Site, Tensor]] = {"safety": {}, "utility": {}}
        try:
            alpha = tensors.pop("alpha")
            for name, mask in tensors.items():
                role, layer, kind = name.split(".")
                masks[role][int(layer), kind] = mask.bool()
            safety, utility = (NeuronSet(found, masks[role], header["weights"]) for role in ("safety", "utility"))
            low, high = json.loads(header["bounds"])
            meta = json.loads(header["meta"])
            out = cls(safety, utility, alpha, (low, high), header["name"], header["weights"], meta)
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: damaged modulation file ({str(error).splitlines()[0]})") from error
        return out


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(dict(tensors), tmp, metadata=sealed({**header, "digest": digest_of(tensors.items())}))
    tmp.replace(path)


def _read(path: Path, wanted: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of what ``_write`` wrote; raises InputError when either was changed since."""
    header = read_header(path, wanted)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise InputError(f"{path}: damaged file ({str(error).splitlines()[0]})") from error
    if digest_of(tensors.items()) != header.get("digest"):
        raise InputError(f"{path}: damaged file: its values do not match its digest")
    return header, tensors


def _check_bounds(bounds) -> None:
    if not (len(bounds) == 2 and math.isfinite(bounds[1]) and 0 <= bounds[0] <= 1 <= bounds[1]):
        raise InputError(f"bounds: got {bounds!r}; allowed: two numbers around 1, the lower one not below 0")


def _check_sets(safety: NeuronSet, utility: NeuronSet) -> None:
    if safety.space.architecture != utility.space.architecture:
        raise InputError("utility: found on another architecture than safety")
    if not len(safety) and not len(utility):
        raise InputError("safety, utility: both sets are empty; there is nothing to modulate")
    for role, chosen in (("safety", safety), ("utility", utility)):
        wrong = sorted({kind for _, kind in chosen.masks} - set(POOL))
        if wrong:
            raise InputError(f"{role}: holds {', '.join(wrong)} rows; alpha acts on {', '.join(POOL)} channels only")
    both = len(safety & utility)
    if both:
        raise InputError(f"safety, utility: {both} neurons are in both sets; use assign() to share them out")


def _places(safety: NeuronSet, utility: NeuronSet) -> dict[Site, tuple[Tensor, Tensor, int]]:
    """site -> (channels, their positions in alpha, width)."""
    found: dict[Site, tuple[list, list, int]] = {}
    for position, (layer, kind, index) in enumerate([*safety, *utility]):
        site = (layer, kind)
        channels, positions, _ = found.setdefault(site, ([], [], safety.space.width(site)))
        channels.append(index)
        positions.append(position)
    return {s: (torch.tensor(c), torch.tensor(p), w) for s, (c, p, w) in found.items()}


def scatter(places: Mapping[Site, tuple[Tensor, Tensor, int]], alpha: Tensor) -> dict[Site, Tensor]:
    """One factor [width] a site; gradients flow back into ``alpha``."""
    return {
        site: alpha.new_ones(width).index_put((channels.to(alpha.device),), alpha[positions.to(alpha.device)])
        for site, (channels, positions, width) in places.items()
    }


def _ready(factors: Mapping[Site, Tensor], lm: LanguageModel) -> dict[Site, Tensor]:
    """Factors on the device and in the precision of their site, so that no forward copies them."""
    ready = {}
    for site, values in factors.items():
        projection = lm.view.projection(*site)
        ready[site] = values.to(device_of(projection.module), projection.weight.dtype)
    return ready


# ------------------------------------------------------------------------------------------------------ choosing


def assign(safety: Ranking, utility: Ranking, n_safety: int, n_utility: int) -> tuple[NeuronSet, NeuronSet]:
    """The top ``n_safety`` and ``n_utility`` neurons as disjoint sets of exactly these sizes.

    Both lists are walked place by place; a neuron goes to the list that reaches it first, at the same place to safety.

    Raises:
        InputError: a count that is negative, or more neurons than there are.
    """
    _check_rankings(safety, utility)
    size = safety.values.numel()
    for name, count in (("n_safety", n_safety), ("n_utility", n_utility)):
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= size:
            raise InputError(
                f"{name}: got {count!r}; allowed: a whole number from 0 to {size}, the neurons of the pool"
            )
    if not 1 <= n_safety + n_utility <= size:
        raise InputError(
            f"n_safety, n_utility: {n_safety} + {n_utility} neurons; allowed: from 1 to {size} in all, the neurons of the pool"
        )
    orders = [torch.sort(r.values, descending=True, stable=True).indices.tolist() for r in (safety, utility)]
    chosen: tuple[list[int], list[int]] = ([], [])
    taken: set[int] = set()
    for place in range(size):
        for role, count in enumerate((n_safety, n_utility)):
            neuron = orders[role][place]
            if len(chosen[role]) < count and neuron not in taken:
                chosen[role].append(neuron)
                taken.add(neuron)
    first, second = (
        NeuronSet.from_flat(r.space, picks, r.kinds, meta={"rule": r.name})
        for r, picks in zip((safety, utility), chosen, strict=True)
    )
    return first, second


def whole_layers(by: Ranking, layers: int) -> NeuronSet:
    """Every neuron of the ``layers`` layers whose neurons rank highest on average: the layer-level baseline."""
    blocks = by.space.split(by.values.double(), by.kinds)
    mean = {
        layer: float(torch.cat([v for (i, _), v in blocks.items() if i == layer]).mean())
        for layer in range(by.space.num_layers)
    }
    if not isinstance(layers, int) or not 1 <= layers <= len(mean):
        raise InputError(f"layers: got {layers!r}; allowed: a whole number from 1 to {len(mean)}")
    best = sorted(mean, key=lambda layer: -mean[layer])[:layers]
    masks = {s: torch.ones_like(v, dtype=torch.bool) for s, v in blocks.items() if s[0] in best}
    return NeuronSet(by.space, masks, meta={"rule": f"layers {sorted(best)}"})


def _check_rankings(safety: Ranking, utility: Ranking) -> None:
    for name, found in (("safety", safety), ("utility", utility)):
        wrong = sorted(set(found.kinds) - set(POOL))
        if wrong:
            raise InputError(f"{name}: ranks {', '.join(wrong)} rows; alpha acts on {', '.join(POOL)} channels only")
    if (safety.space.architecture, safety.kinds) != (utility.space.architecture, utility.kinds):
        raise InputError("utility: ranks other neurons than safety (architecture or kinds differ)")


# ------------------------------------------------------------------------------------------------------ the dial


@dataclass(frozen=True)
class Preset:
    """A setting of the dial: shares of the pool (0 to 1) and the strength."""

    safety_share: float
    utility_share: float
    strength: float = 1.0


#: More safety neurons for safety-critical use, more utility neurons where utility comes first [NT, tunable mechanism];
#: the counts are ours: a tenth of the pool in all.
PRESETS = {"safety-first": Preset(0.07, 0.03), "utility-first": Preset(0.03, 0.07)}


def dial(
    safety: Ranking,
    utility: Ranking,
    n_safety: int,
    n_utility: int,
    strength: float = 1.0,
    *,
    learnt: Modulation | None = None,
    start: tuple[float, float] = (1.2, 0.9),
    bounds: tuple[float, float] = BOUNDS,
    name: str = "",
) -> Modulation:
    """An intervention for any number of neurons and any strength, without training.

    Args:
        safety, utility: the rankings the neurons are taken from (see :func:`assign`).
        strength: 0 = the untouched model, 1 = alpha as it stands, between: ``1 + strength (alpha - 1)``; above 1 it
            goes on, up to the bounds.
        learnt: a trained modulation. A neuron it holds in the same role takes its alpha, any other the mean alpha of its
            role there. Without it, or for a role it lacks, ``start`` = (safety, utility) is used.
        bounds: as in :class:`Modulation`; those of ``learnt`` where it is given.

    Raises:
        InputError: see :func:`assign`; a strength that is negative or not finite; a modulation of another architecture.
    """
    if not (isinstance(strength, (int, float)) and math.isfinite(strength) and strength >= 0):
        raise InputError(f"strength: got {strength!r}; allowed: a number from 0")
    sets = assign(safety, utility, n_safety, n_utility)
    if learnt is not None and learnt.space.architecture != safety.space.architecture:
        raise InputError("learnt: made for another architecture than the rankings")
    bounds = learnt.bounds if learnt is not None else bounds
    full = torch.cat([_role_alpha(role, chosen, learnt, start[role]) for role, chosen in enumerate(sets)])
    alpha = (1 + strength * (full - 1)).clamp(*bounds)
    meta = {"n_safety": n_safety, "n_utility": n_utility, "strength": strength}
    weights = learnt.weights if learnt is not None else ""
    return Modulation(*sets, alpha, bounds, name or f"dial {n_safety}+{n_utility} x{strength:g}", weights, meta)


def _role_alpha(role: int, chosen: NeuronSet, learnt: Modulation | None, start: float) -> Tensor:
    """Alpha of a role's neurons: learnt where it was learnt, else that role's mean, else ``start``."""
    if learnt is None:
        return torch.full((len(chosen),), float(start))
    known = (learnt.safety, learnt.utility)[role]
    values = (learnt.safety_alpha, learnt.utility_alpha)[role]
    other = float(values.mean()) if len(known) else float(start)
    table = dict(zip(known, values.tolist(), strict=True))
    return torch.tensor([table.get(neuron, other) for neuron in chosen], dtype=torch.float32)


def preset(name: str, safety: Ranking, utility: Ranking, *, learnt: Modulation | None = None, **more) -> Modulation:
    """The dial at a named setting, "safety-first" or "utility-first" (at least one neuron of each role)."""
    if name not in PRESETS:
        raise InputError(f"preset: got {name!r}; allowed: {', '.join(PRESETS)}")
    setting, size = PRESETS[name], safety.values.numel()
    n_safety, n_utility = (max(1, round(share * size)) for share in (setting.safety_share, setting.utility_share))
    return dial(safety, utility, n_safety, n_utility, setting.strength, learnt=learnt, name=name, **more)


def sweep(
    safety: Ranking,
    utility: Ranking,
    n_safety: Iterable[int],
    n_utility: Iterable[int],
    strengths: Iterable[float],
    measure: Callable[[Modulation | None], Mapping[str, float]],
    *,
    progress: bool = True,
    **more,
) -> pd.DataFrame:
    """``measure`` over the grid of the dial's settings, one row each, the untouched model (0, 0, 0) first.

    Args:
        measure: intervention (None = untouched) -> named numbers, such as rates from an evaluation.
        more: what :func:`dial` takes besides.
    """
    import pandas as pd

    strengths, n_utility = list(strengths), list(n_utility)
    grid = [(s, u, x) for s in n_safety for u in n_utility if s + u for x in strengths if x]
    rows = [{"n_safety": 0, "n_utility": 0, "strength": 0.0, **measure(None)}]
    for s, u, strength in track(grid, desc="sweep", unit="setting", disable=not progress):
        setting = dial(safety, utility, s, u, strength, **more)
        rows.append({"n_safety": s, "n_utility": u, "strength": float(strength), **measure(setting)})
    return pd.DataFrame(rows)


def mark_dominated(table: pd.DataFrame, lower: Sequence[str] = (), higher: Sequence[str] = ()) -> pd.DataFrame:
    """The table with a column ``dominated``: another row is as good in every named column and better in one.

    Args:
        lower, higher: columns in which less, or more, is better. A row with NaN in one of them is dominated.
    """
    missing = [column for column in [*lower, *higher] if column not in table]
    if missing or not (lower or higher):
        raise InputError(f"lower, higher: no such column: {', '.join(missing) or 'none was named'}")
    cost = torch.tensor(
        [[row[c] for c in lower] + [-row[c] for c in higher] for row in table.to_dict("records")], dtype=torch.float64
    )
    no_worse = (cost[:, None] <= cost[None]).all(-1)
    better = (cost[:, None] < cost[None]).any(-1)
    dominated = (no_worse & better).any(0) | cost.isnan().any(1)
    return table.assign(dominated=dominated.tolist())


# ------------------------------------------------------------------------------------------------------ learning


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

    def __post_init__(self):
        _check_bounds(self.bounds)
        if self.method not in METHODS:
            raise InputError(f"method: got {self.method!r}; allowed: {', '.join(METHODS)}")
        low, high = self.bounds
        for name in ("safety_start", "utility_start"):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name}: got {getattr(self, name)!r}; allowed: {low:g} to {high:g}")
        for name in ("iterations", "inner_steps", "support", "query", "validate_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)!r}; allowed: a whole number from 1")
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
    """

    modulation: Modulation
    history: pd.DataFrame
    stopped_early: bool


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
            same alpha. It must be of the same recipe (``iterations`` may grow), neurons, prompts and weights.

    Raises:
        InputError: too few prompts for support and query, prompts without target, sets that overlap, a foreign
            checkpoint, or a loss that is not finite.
    """
    if not tasks:
        raise InputError("tasks: need the attacked prompts of at least one attack class")
    learner = _Learner(lm, safety, utility, tasks, benign, recipe)
    judge = _judge(learner, validation, measure)
    state = _State.begin(learner)
    if checkpoint is not None:
        state.resume(Path(checkpoint), learner.key(validation))
    with frozen(lm.model), _bar(recipe.iterations, state.iteration, progress) as bar:
        while state.iteration < recipe.iterations and not state.exhausted(recipe.patience):
            row = learner.step(state)
            if judge is not None and learner.validates(state.iteration):
                row["validation"] = judge(state.alpha.detach())
                state.compare(row["validation"])
            state.history.append(row)
            if checkpoint is not None:
                state.save(Path(checkpoint), learner.key(validation))
            bar.update()
    return learner.result(state, name, judged=judge is not None)


def adapt(
    lm: LanguageModel, modulation: Modulation, attacked: PromptSet, benign: PromptSet, recipe: Recipe
) -> Modulation:
    """The modulation after ``recipe.inner_steps`` inner steps on a few prompts of (say) an unseen attack class."""
    learner = _Learner(lm, modulation.safety, modulation.utility, {}, benign, recipe)
    batch = learner.batch(attacked, benign)
    with frozen(lm.model):
        alpha = learner.adapted(modulation.alpha.clone().to(lm.device).requires_grad_(), batch, second=False)
    return replace(modulation, alpha=alpha.detach().clamp(*modulation.bounds), name=f"{modulation.name}, adapted")


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
    found = []
    for rate in sorted(rates):
        learner = _Learner(lm, safety, utility, tasks, benign, replace(recipe, inner_rate=rate))
        with frozen(lm.model):
            found.append((rate, learner.inner_gain()))
        if found[-1][1] >= share:
            return found[-1]
    return max(found, key=lambda pair: pair[1])


class _Learner:
    """One outer step after another: draws prompts, adapts, differentiates."""

    def __init__(self, lm, safety: NeuronSet, utility: NeuronSet, tasks: Tasks, benign: PromptSet, recipe: Recipe):
        _check_sets(safety, utility)
        if lm.view.space.architecture != safety.space.architecture:
            raise InputError("safety: found on another architecture than the model at hand")
        if lm.model.training:
            raise InputError("model: it is in training mode; call model.eval() first")
        self.lm, self.safety, self.utility, self.recipe = lm, safety, utility, recipe
        self.tasks, self.benign = dict(tasks), benign
        self.places = _places(safety, utility)
        _check_targets(self.tasks, benign)
        _check_counts(self.tasks, benign, recipe)

    def start(self) -> Tensor:
        """Alpha before the first step, a leaf on the model's device."""
        values = [self.recipe.safety_start] * len(self.safety) + [self.recipe.utility_start] * len(self.utility)
        return torch.tensor(values, dtype=torch.float32, device=self.lm.device).requires_grad_()

    # -- data

    def draw(self, task: str, iteration: int) -> tuple[tuple, tuple]:
        """Support and query batch of a task: disjoint prompts, decided by seed, iteration and task alone."""
        attacked, n = self.tasks[task], self.recipe.support
        pick = _picks(f"{self.recipe.seed} {iteration} {task}", len(attacked), n + self.recipe.query)
        calm = _picks(f"{self.recipe.seed} {iteration} {task} benign", len(self.benign), n + self.recipe.query)
        return (
            self.batch(attacked[pick[:n]], self.benign[calm[:n]]),
            self.batch(attacked[pick[n:]], self.benign[calm[n:]]),
        )

    def batch(self, attacked: PromptSet, benign: PromptSet) -> tuple[Responses, Tensor]:
        """All rows in one padded batch, and each row's weight in the loss."""
        responses = Responses.of(
            self.lm, [*attacked, *benign], [*attacked.column("refusal"), *benign.column("helpful")]
        )
        balance = self.recipe.balance
        weights = [balance / len(attacked)] * len(attacked) + [(1 - balance) / len(benign)] * len(benign)
        return responses, torch.tensor(weights, device=self.lm.device)

    # -- losses and gradients

    def loss(self, alpha: Tensor, batch: tuple[Responses, Tensor]) -> Tensor:
        """balance * safety + (1 - balance) * utility under this alpha, nats a token."""
        responses, weights = batch
        with torch.enable_grad(), hooks.scale(self.lm.view, scatter(self.places, alpha)):
            found = (responses.loss(self.lm)[0] * weights).sum()
        if not torch.isfinite(found):
            raise InputError("alpha: the loss is not finite; lower inner_rate or outer_rate, or narrow the bounds")
        return found

    def adapted(self, alpha: Tensor, support, second: bool) -> Tensor:
        """Alpha after the inner steps; with ``second`` a function of ``alpha`` that can be differentiated."""
        for _ in range(self.recipe.inner_steps):
            (slope,) = torch.autograd.grad(self.loss(alpha, support), alpha, create_graph=second)
            alpha = (alpha - self.recipe.inner_rate * slope).clamp(*self.recipe.bounds)
            alpha = alpha if second else alpha.detach().requires_grad_()
        return alpha

    def gradient(self, alpha: Tensor, support, query) -> tuple[Tensor, float]:
        """Outer gradient and query loss of one task."""
        method = self.recipe.method
        if method == "joint":
            loss = (self.loss(alpha, support) + self.loss(alpha, query)) / 2
            return torch.autograd.grad(loss, alpha)[0], float(loss.detach())
        with _twice_differentiable() if method == "second" else nullcontext():
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

    def validates(self, iteration: int) -> bool:
        """Whether to validate after so many iterations: every ``validate_every``, and at the end."""
        return iteration % self.recipe.validate_every == 0 or iteration == self.recipe.iterations

    def inner_effect(self, alpha: Tensor, supports: Sequence) -> dict[str, float]:
        """Mean support loss before and after the inner step."""
        before = [float(self.loss(alpha, s).detach()) for s in supports]
        after = [float(self.loss(self.adapted(alpha, s, second=False), s).detach()) for s in supports]
        return {"support": sum(before) / len(before), "adapted": sum(after) / len(after)}

    def inner_gain(self) -> float:
        """Share by which one inner adaptation lowers the support loss at the starting alpha."""
        effect = self.inner_effect(self.start(), [self.draw(task, 0)[0] for task in self.tasks])
        return 1 - effect["adapted"] / effect["support"]

    # -- ends

    def modulation(self, alpha: Tensor, name: str, **meta) -> Modulation:
        weights = self.lm.weights_fingerprint
        meta = {"recipe": asdict(self.recipe), **meta}
        return Modulation(self.safety, self.utility, alpha, self.recipe.bounds, name, weights, meta)

    def result(self, state: _State, name: str, judged: bool) -> Learnt:
        import pandas as pd

        columns = ["iteration", "query", "support", "adapted", "validation"]
        history = pd.DataFrame(state.history, columns=columns)
        alpha = state.best if judged and state.best is not None else state.alpha
        stopped = judged and state.iteration < self.recipe.iterations
        kept = state.best_iteration if judged else state.iteration
        return Learnt(self.modulation(alpha.detach(), name, iterations=kept), history, stopped)

    def key(self, validation: tuple[Tasks, PromptSet] | None) -> str:
        """Identifies the run a checkpoint belongs to."""
        recipe = {k: v for k, v in asdict(self.recipe).items() if k != "iterations"}
        data = [(task, prompts.fingerprint) for task, prompts in self.tasks.items()] + [self.benign.fingerprint]
        if validation is not None:
            data += [(t, p.fingerprint) for t, p in validation[0].items()] + [validation[1].fingerprint]
        parts = (recipe, data, self.safety.fingerprint, self.utility.fingerprint, self.lm.weights_fingerprint)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


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

    @classmethod
    def begin(cls, learner: _Learner) -> _State:
        alpha = learner.start()
        return cls(alpha, torch.optim.Adam([alpha], lr=learner.recipe.outer_rate))

    def compare(self, value: float) -> None:
        """Keep the alpha if its validation is the best so far."""
        if value < self.best_value:
            self.best, self.best_value = self.alpha.detach().clone(), value
            self.best_iteration, self.waited = self.iteration, 0
        else:
            self.waited += 1

    def exhausted(self, patience: int) -> bool:
        return bool(patience) and self.waited >= patience

    def save(self, path: Path, key: str) -> None:
        moments = self.optimiser.state[self.alpha]
        tensors = {"alpha": self.alpha.detach().cpu(), "best": (self.alpha if self.best is None else self.best).cpu()}
        tensors |= {name: moments[name].detach().cpu() for name in ("step", "exp_avg", "exp_avg_sq")}
        numbers = {n: getattr(self, n) for n in ("iteration", "best_iteration", "waited", "history", "best_value")}
        numbers["has_best"] = self.best is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().clone() for name, value in tensors.items()}
        _write(path, tensors, {"format": "nt_utils.learning.2", "key": key, "numbers": json.dumps(numbers)})

    def resume(self, path: Path, key: str) -> None:
        """Take over a checkpoint's state; nothing happens where there is none."""
        if not path.exists():
            return
        header, tensors = _read(path, "nt_utils.learning.2")
        if header["key"] != key:
            raise InputError(
                f"checkpoint: {path} belongs to another run (recipe, neurons, prompts or weights differ); remove it or "
                "name another file"
            )
        numbers = json.loads(header["numbers"])
        has_best = numbers.pop("has_best")
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


def _judge(learner: _Learner, validation, measure) -> Callable[[Tensor], float] | None:
    """alpha -> a number to be small: the caller's measure, or the loss on the validation split."""
    if measure is not None:
        return lambda alpha: float(measure(learner.modulation(alpha, "candidate")))
    if validation is None:
        return None
    tasks, benign = validation
    _check_targets(tasks, benign)
    if not tasks:
        raise InputError("validation: has no attack class; at least one is needed")
    batches = [learner.batch(attacked, benign) for attacked in tasks.values()]

    def loss(alpha: Tensor) -> float:
        return sum(float(learner.loss(alpha, batch).detach()) for batch in batches) / len(batches)

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


def _picks(label: str, size: int, count: int) -> list[int]:
    """``count`` different positions below ``size``, decided by the label alone."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big")
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def _twice_differentiable() -> AbstractContextManager:
    """Attention whose backward pass can be differentiated again: fused kernels' cannot."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def _bar(total: int, done: int, progress: bool):
    return track(total=total, initial=done, desc="alpha", unit="step", disable=not progress)
