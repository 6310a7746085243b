"""Attack-aware attribution: through which neurons does an attack change the loss of the response we want [NT, stage 1].

A *case* is one request, plain and attacked, with the response that is wanted and the one that is not. Its loss is
``L = nll(wanted) - nll(unwanted)``, in nats a response token, so minus the refusal-minus-compliance margin for safety
and minus the helpful-minus-refusal margin for utility. Activations are compared at the positions that *predict* the
response's tokens, from the last prompt token on: there plain and attacked run read the same tokens. Sites are the FFN
channels and the attention channels at the output projection's input.

**Sign.** The score of a neuron is the change of L as the neuron moves from its plain to its target value while nothing
else does: positive = this neuron's move hurts the wanted response. The target is its value in the attacked run, or zero
(``target="zero"``, no attack needed: positive = the wanted response loses when the neuron is silenced).

Only tokens from the first predicting position on can change, so only they are recomputed: what stands before enters
through the keys and values of one plain run.

Methods:

* ``integrated``: integrated gradients (Sundararajan et al., ICML 2017) from plain to target, one site (layer, kind) at a
  time, later layers recomputed in the plain context. Per site the scores add up to L(site at its target) - L(plain).
* ``patching``: (target - plain) x gradient at the plain run; all sites from one backward pass.
* ``direct``: integrated gradients with *all* sites of all layers replaced at once. Later replacements block every path
  through a later site, so what is left is each neuron's direct effect on the logits (over all sites the scores add up
  to L(everything at its target) - L(plain)). Not the effect of the neuron on the model; kept for comparison.
* ``exact``: every neuron patched by itself, one forward each: the oracle, for tiny models and checks.

Ours, where the paper leaves it open: positions, one site at a time, loss per token, the unwanted response's part in L.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nt_utils import hooks
from nt_utils.data.records import Prompt
from nt_utils.errors import InputError, check_choice, check_count
from nt_utils.models import Encoded, LanguageModel, check_evaluating, decoder, pad
from nt_utils.neurons import POOL, NeuronScores, ScoreWriter, Site, check_kinds
from nt_utils.work import count, track

if TYPE_CHECKING:
    from nt_utils.data.attacks import Attack

METHODS = ("integrated", "patching", "direct", "exact")
TARGETS = ("attacked", "zero")

# --------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One request under one attack: what is said, what should be answered and what should not.

    ``unwanted`` may be "" (the loss is then that of the wanted response alone, the paper's wording); ``group`` is what
    :func:`aggregate` averages over apart (the attack class).
    """

    plain: Prompt
    attacked: Prompt
    wanted: str
    unwanted: str = ""
    group: str = ""

    def __post_init__(self):
        if not self.wanted.strip():
            raise InputError("wanted: the response is empty; every case needs the response whose loss is attributed")


def safety_cases(prompts: Sequence[Prompt], attacks: Sequence[Attack], per_class: int | None = 1) -> list[Case]:
    """Harmful requests, plain and attacked; wanted = the refusal, unwanted = the compliance.

    Args:
        attacks: representatives; per_class: how many of each attack class are used (the first ones; None = all).
    """
    if not attacks:
        raise InputError("attacks: the list is empty; at least one representative of an attack class is needed")
    chosen = representatives(attacks, per_class)
    return [Case(p, a.apply(p), p.refusal, p.helpful, a.attack_class) for a in chosen for p in prompts]


def utility_cases(prompts: Sequence[Prompt], attacks: Sequence[Attack] = (), per_class: int | None = 1) -> list[Case]:
    """Benign or borderline requests; wanted = the helpful answer, unwanted = the refusal.

    With attacks the requests are wrapped as the harmful ones are; without, the cases serve ``target="zero"`` only.
    The group is the attack class, or the prompt's kind.
    """
    if not attacks:
        return [Case(p, p, p.helpful, p.refusal, p.kind) for p in prompts]
    chosen = representatives(attacks, per_class)
    return [Case(p, a.apply(p), p.helpful, p.refusal, a.attack_class) for a in chosen for p in prompts]


def representatives(attacks: Sequence[Attack], per_class: int | None = 1) -> list[Attack]:
    """The first ``per_class`` attacks of every class, classes in the order given."""
    if per_class is not None:
        check_count("per_class", per_class)
    by_class: dict[str, list[Attack]] = {}
    for attack in attacks:
        by_class.setdefault(attack.attack_class, []).append(attack)
    return [attack for group in by_class.values() for attack in group[:per_class]]


# ----------------------------------------------------------------------------------------------------- responses


@dataclass(frozen=True)
class Responses:
    """A padded batch of prompts with their responses, and where the response's tokens are predicted.

    Attributes:
        batch: the tokens, padded on the right.
        rows, places: int64 [M], one entry a response token: its row and the position that predicts it.
        targets: int64 [M], the token.
        weights: float32 [M], 1 / tokens of the row's response.
    """

    batch: Encoded
    rows: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, lm: LanguageModel, prompts: Sequence[Prompt], responses: Sequence[str]) -> Responses:
        """Encode; a prompt's ``prefill`` stands between prompt and response and is not scored.

        Raises:
            InputError: no prompts, an empty response, or a row longer than the model's context.
        """
        encoded = lm.encode([p.text for p in prompts], responses, side="right")
        starts = list(encoded.prompt_lengths)
        tokens = [encoded.input_ids[i, :n].tolist() for i, n in enumerate(encoded.lengths)]
        for i, prompt in enumerate(prompts):
            if prompt.prefill:
                words = lm.tokenizer(prompt.prefill, add_special_tokens=False)["input_ids"]
                tokens[i] = tokens[i][: starts[i]] + words + tokens[i][starts[i] :]
                starts[i] += len(words)
            if len(tokens[i]) == starts[i]:
                raise InputError(f"responses: number {i} has no tokens")
        _check_context(lm, tokens)
        lengths = [len(row) - start for row, start in zip(tokens, starts, strict=True)]
        rows = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(lengths))
        spans = zip(starts, lengths, strict=True)
        places = torch.cat([torch.arange(start - 1, start - 1 + n) for start, n in spans])
        batch = pad(tokens, pad_id=lm.pad_id, side="right", prompt_lengths=starts)
        targets = batch.input_ids[rows, places + 1]
        weights = torch.repeat_interleave(1 / torch.tensor(lengths, dtype=torch.float32), torch.tensor(lengths))
        on = lm.device
        return cls(batch.to(on), rows.to(on), places.to(on), targets.to(on), weights.to(on))

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.batch.lengths)

    def prefix(self, lm: LanguageModel) -> Prefix:
        """The plain run of the tokens that stand before every row's first predicting position."""
        first = int(self.places.min())
        if not first:
            return Prefix(0)
        from transformers import DynamicCache

        cache, ids = DynamicCache(config=lm.model.config), self.batch.input_ids[:, :first]
        with torch.no_grad():
            decoder(lm.model)(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
        return Prefix(first, cache)

    def loss(self, lm: LanguageModel, copies: int = 1, prefix: Prefix | None = None, layer: int = 0) -> Tensor:
        """Negative log-likelihood of each row's response, nats a token, float [copies, rows]; with gradients if on.

        With a ``prefix`` only the tokens behind it are run; ``layer``: the first layer that is (see ``hooks.start_at``).
        """
        start = prefix.length if prefix is not None else 0
        first, last = int(self.places.min()), int(self.places.max())
        # Nothing is masked: padding follows the real tokens, which the causal mask keeps from seeing it, and so a query
        # that sees nothing at all (NaN in some attentions under a sliding window) cannot occur.
        ids = self.batch.input_ids.repeat(copies, 1)
        inputs: dict[str, Any] = {
            "input_ids": ids[:, start:],
            "attention_mask": torch.ones_like(ids),
            "use_cache": False,
        }
        if prefix is not None and start:
            inputs["past_key_values"] = prefix.repeated(copies, layer)
        inputs["logits_to_keep"] = torch.arange(first - start, last - start + 1, device=ids.device)
        kind = "gradient_tokens" if torch.is_grad_enabled() else "read_tokens"
        count(**{kind: inputs["input_ids"].numel()})
        logits = lm.model(**inputs).logits.unflatten(0, (copies, self.size))
        on = logits.device
        rows, places = self.rows.to(on), (self.places - first).to(on)
        chosen = logits[:, rows, places]
        chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
        nll = nn.functional.cross_entropy(
            chosen.flatten(0, 1), self.targets.to(on).repeat(copies), reduction="none"
        ).view(copies, -1)
        empty = nll.new_zeros(copies, self.size)
        return empty.index_add(1, rows, nll * self.weights.to(nll))

    def take(self, activation: Tensor, start: int = 0) -> Tensor:
        """The predicting positions of [rows, tokens, width]: [M, width]; ``start``: its first token's position."""
        return activation[self.rows.to(activation.device), self.places.to(activation.device) - start]

    def put(self, activation: Tensor, values: Tensor, start: int = 0) -> Tensor:
        """A new [copies * rows, tokens, width] whose predicting positions hold ``values`` [copies, M, width]."""
        copies, on = values.shape[0], activation.device
        offset = torch.arange(copies, device=on)[:, None] * self.size
        rows = (self.rows.to(on)[None] + offset).flatten()
        places = (self.places.to(on) - start).repeat(copies)
        return activation.index_put((rows, places), values.to(activation).flatten(0, 1))


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the first ``length`` tokens of every row; no cache where there are none."""

    length: int
    cache: Any = None

    def repeated(self, copies: int, layer: int):
        """A cache of its own for one forward, each row ``copies`` times over; layers before ``layer`` are not read."""
        fresh = copy.copy(self.cache)
        fresh.layers = [copy.copy(part) for part in self.cache.layers]
        for part in fresh.layers[layer:]:
            part.keys, part.values = (kept.repeat(copies, 1, 1, 1) for kept in (part.keys, part.values))
        return fresh


def _check_context(lm: LanguageModel, tokens: Sequence[Sequence[int]]) -> None:
    limit = lm.context_length
    longest = max(range(len(tokens)), key=lambda i: len(tokens[i]))
    if limit and len(tokens[longest]) > limit:
        raise InputError(
            f"prompts: number {longest} has {len(tokens[longest])} tokens with its response; the model's context "
            f"holds {limit}"
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients inside: nothing is kept for them in the backward pass."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


# -------------------------------------------------------------------------------------------------------- public


def attribution(
    lm: LanguageModel,
    cases: Sequence[Case],
    *,
    method: str = "integrated",
    target: str = "attacked",
    steps: int = 16,
    kinds: Sequence[str] = POOL,
    batch_size: int = 4,
    rows: int = 64,
    path=None,
    progress: bool = True,
) -> NeuronScores:
    """Attribute every case's loss to the neurons (see the module's docstring for methods and sign).

    Args:
        lm: the model, in evaluation mode; its weights are neither changed nor differentiated.
        cases: from :func:`safety_cases`, :func:`utility_cases` or made by hand.
        method: integrated, patching, direct or exact.
        target: "attacked" or "zero", where each neuron moves to from its plain value.
        steps: points of the Gauss-Legendre rule on the path (integrated and direct).
        kinds: "ffn", "o" or both.
        batch_size: cases whose plain and attacked run are taken together (a case is one or two rows).
        rows: sequences in one forward and backward pass; points of the path share a pass up to this many.
        path: the score file; default a temporary one.

    Returns:
        Float32 scores [n_cases, width] per site, nats a response token, on file; ``meta["groups"]`` has each case's
        group.

    Raises:
        InputError: bad arguments, a case whose attacked text equals the plain one, a model in training mode, or NaN.
    """
    _check(lm, cases, method, target, kinds, {"steps": steps, "batch_size": batch_size, "rows": rows})
    sites = lm.view.space.sites(kinds)
    work = {"integrated": _integrated, "patching": _patching, "direct": _direct, "exact": _exact}[method]
    meta = {
        "score": "attribution",
        "method": method,
        "target": target,
        "steps": steps if method in ("integrated", "direct") else 0,
        "model": lm.name,
        "groups": [case.group for case in cases],
    }
    with ScoreWriter(path, lm.view.space, kinds, len(cases), meta) as writer:
        total = -(-len(cases) // batch_size) * (len(sites) if method in ("integrated", "exact") else 1)
        bar = track(total=total, desc=f"attribution, {method}", unit="site", disable=not progress)
        with frozen(lm.model), bar:
            for start in range(0, len(cases), batch_size):
                runs = _Runs(lm, cases[start : start + batch_size], sites, target)
                for scores in work(runs, steps, rows):
                    writer.write(start, scores)
                    bar.update()
        return writer.close()


def aggregate(scores: NeuronScores, how: str = "signed", kinds: Sequence[str] = POOL) -> Tensor:
    """One number a neuron, float64 [space.size(kinds)]: the mean within each group of cases, then over the groups.

    Args:
        how: "signed" averages the scores, "absolute" their absolute values (a neuron that hurts here and helps there
            counts).
    """
    check_choice("how", how, ("signed", "absolute"))
    values = scores.matrix(kinds).double()
    values = values.abs() if how == "absolute" else values
    labels = scores.meta.get("groups") or [""] * (max(scores.rows) + 1)
    groups: dict[str, list[int]] = {}
    for position, row in enumerate(scores.rows):
        groups.setdefault(labels[row], []).append(position)
    return torch.stack([values[members].mean(0) for members in groups.values()]).mean(0)


def _check(lm, cases, method, target, kinds, numbers: Mapping[str, int]) -> None:
    check_choice("method", method, METHODS)
    check_choice("target", target, TARGETS)
    check_kinds(kinds)
    if set(kinds) - set(POOL):
        raise InputError(f"kinds: got {list(kinds)}; attribution is defined for {', '.join(POOL)}")
    for name, value in numbers.items():
        check_count(name, value)
    if not cases:
        raise InputError("cases: the list is empty; at least one case is needed")
    if target == "attacked":
        same = [
            i for i, c in enumerate(cases) if (c.plain.text, c.plain.prefill) == (c.attacked.text, c.attacked.prefill)
        ]
        if same:
            raise InputError(f"cases: number {same[0]} is not attacked (its two texts are equal); use target='zero'")
    check_evaluating(lm.model)


# ---------------------------------------------------------------------------------------------------------- runs


class _Runs:
    """The plain and the target activations of a few cases, and forwards that patch them.

    A case is one row with the wanted response and, if there is one, a second row with the unwanted response, which
    enters the loss with a minus sign.
    """

    def __init__(self, lm: LanguageModel, cases: Sequence[Case], sites: Sequence[Site], target: str):
        self.lm, self.sites, self.view = lm, list(sites), lm.view
        rows = [(i, 1.0, c.wanted) for i, c in enumerate(cases)]
        rows += [(i, -1.0, c.unwanted) for i, c in enumerate(cases) if c.unwanted]
        self.n_cases = len(cases)
        self.case = torch.tensor([i for i, _, _ in rows], device=lm.device)
        self.sign = torch.tensor([s for _, s, _ in rows], device=lm.device)
        texts = [text for _, _, text in rows]
        self.responses = Responses.of(lm, [cases[i].plain for i, _, _ in rows], texts)
        self._target: dict[Site, Tensor] | None = None
        if target == "attacked":
            attacked = Responses.of(lm, [cases[i].attacked for i, _, _ in rows], texts)
            self._target = self._read(attacked, None)[0]

    # -- activations

    @cached_property
    def prefix(self) -> Prefix:
        return self.responses.prefix(self.lm)

    def _read(self, responses: Responses, prefix: Prefix | None) -> tuple[dict[Site, Tensor], list, Tensor]:
        """Activations [M, width] of the sites, the input of every layer, and the loss [rows]; behind a prefix if given."""
        start = prefix.length if prefix is not None else 0
        seen: dict[Site, Tensor] = {}
        hidden: list[Tensor | None] = [None] * self.view.num_layers

        def keep(activation: Tensor, site: Site) -> None:
            seen[site] = responses.take(activation, start)

        def enter(args: tuple, kwargs: dict, layer: int) -> None:
            hidden[layer] = args[0] if args else kwargs["hidden_states"]

        layers = range(self.view.num_layers if prefix is not None else 0)
        watched = [(self.view.layers[i], partial(enter, layer=i)) for i in layers]
        edits = {site: partial(keep, site=site) for site in self.sites}
        with torch.no_grad(), hooks.edit(self.view, edits), hooks.observe(watched):
            loss = responses.loss(self.lm, prefix=prefix)[0]
        return seen, hidden, loss

    @cached_property
    def _plain(self) -> tuple[dict[Site, Tensor], list, Tensor]:
        return self._read(self.responses, self.prefix)

    def plain(self, site: Site) -> Tensor:
        """Plain activation at the predicting positions [M, width]."""
        return self._plain[0][site]

    def target(self, site: Site) -> Tensor:
        """Where the site moves to [M, width]."""
        return torch.zeros_like(self.plain(site)) if self._target is None else self._target[site]

    # -- forwards

    def forward(self, layer: int, values: Mapping[Site, Tensor]) -> Tensor:
        """Loss [copies, rows] with ``values[site]`` [copies, M, width] in place, computed from ``layer`` on."""
        copies = next(iter(values.values())).shape[0]
        start = self.prefix.length
        edits = {site: (lambda x, v=v: self.responses.put(x, v, start)) for site, v in values.items()}
        hidden = self._plain[1][layer].repeat(copies, 1, 1) if layer else self.sign  # layer 0 skips nothing
        with hooks.start_at(self.view, layer, hidden), hooks.edit(self.view, edits):
            return self.responses.loss(self.lm, copies, self.prefix, layer)

    def patched(self, site: Site, values: Tensor) -> Tensor:
        """L with ``values`` [copies, M, width] at the site minus L(plain), float64 [copies, n_cases]."""
        change = self.forward(site[0], {site: values}).double() - self._plain[2].double()
        return self.by_case(change * self.sign.to(change.device), dim=1)

    # -- sums

    def by_case(self, values: Tensor, dim: int) -> Tensor:
        """Sum rows (``dim`` of ``values``) that belong to one case."""
        shape = list(values.shape)
        shape[dim] = self.n_cases
        return values.new_zeros(shape).index_add(dim, self.case.to(values.device), values)

    def scores(self, products: Tensor) -> Tensor:
        """Activation change x gradient [M, width] to scores [n_cases, width]."""
        rows = products.new_zeros(self.responses.size, products.shape[1])
        rows = rows.index_add(0, self.responses.rows.to(products.device), products)
        return self.by_case(rows, dim=0)

    def signed(self, loss: Tensor) -> Tensor:
        """Sum over cases and copies of L, a scalar to differentiate."""
        return (loss * self.sign.to(loss)).sum()


# ------------------------------------------------------------------------------------------------------- methods


def gauss_legendre(steps: int) -> tuple[list[float], list[float]]:
    """Points and weights of the Gauss-Legendre rule on [0, 1]."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return ((points + 1) / 2).tolist(), (weights / 2).tolist()


def _chunks(runs: _Runs, steps: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Points and weights of the path, as many at a time as keep a pass within ``rows`` sequences."""
    points, weights = (torch.tensor(v, device=runs.lm.device) for v in gauss_legendre(steps))
    size = max(1, rows // runs.responses.size)
    yield from zip(points.split(size), weights.split(size), strict=True)


def _path_points(runs: _Runs, site: Site, points: Tensor) -> Tensor:
    """The site's activations at points of the path, leaves [points, M, width]."""
    start, end = runs.plain(site), runs.target(site)
    at = points.to(start)[:, None, None]
    return (start + at * (end - start)).requires_grad_()


def _weighted(gradient: Tensor, weights: Tensor) -> Tensor:
    wide = gradient if gradient.dtype == torch.float64 else gradient.float()
    return torch.einsum("s,smw->mw", weights.to(wide), wide)


def _shift(runs: _Runs, site: Site, gradient: Tensor) -> Tensor:
    """Scores [n_cases, width] from the mean gradient along the site's path [M, width]."""
    return runs.scores((runs.target(site) - runs.plain(site)).to(gradient) * gradient)


def _integrated(runs: _Runs, steps: int, rows: int) -> Iterator[dict[Site, Tensor]]:
    for site in runs.sites:
        mean = torch.zeros(())
        for points, weights in _chunks(runs, steps, rows):
            values = _path_points(runs, site, points)
            with torch.enable_grad():
                loss = runs.signed(runs.forward(site[0], {site: values}))
            mean = mean + _weighted(torch.autograd.grad(loss, values)[0], weights)
        yield {site: _shift(runs, site, mean)}


def _direct(runs: _Runs, steps: int, rows: int) -> Iterator[dict[Site, Tensor]]:
    mean = dict.fromkeys(runs.sites, torch.zeros(()))
    for points, weights in _chunks(runs, steps, rows):
        values = {site: _path_points(runs, site, points) for site in runs.sites}
        with torch.enable_grad():
            loss = runs.signed(runs.forward(0, values))
        gradients = torch.autograd.grad(loss, list(values.values()))
        mean = {s: mean[s] + _weighted(g, weights) for s, g in zip(values, gradients, strict=True)}
    yield {site: _shift(runs, site, mean[site]) for site in runs.sites}


def _patching(runs: _Runs, steps: int, rows: int) -> Iterator[dict[Site, Tensor]]:
    """The plain run is taken once, with gradients: its activations and their gradients come from the same pass."""
    seen: dict[Site, Tensor] = {}
    prefix = runs.prefix

    def keep(activation: Tensor, site: Site) -> Tensor:
        # The first sites depend on nothing that asks for gradients: they become the graph's leaves.
        seen[site] = activation if activation.requires_grad else activation.detach().requires_grad_()
        return seen[site]

    with torch.enable_grad(), hooks.edit(runs.view, {site: partial(keep, site=site) for site in runs.sites}):
        loss = runs.signed(runs.responses.loss(runs.lm, prefix=prefix)[0])
    gradients = torch.autograd.grad(loss, list(seen.values()))
    scores = {}
    for (site, activation), gradient in zip(seen.items(), gradients, strict=True):
        plain, slope = (runs.responses.take(x, prefix.length) for x in (activation.detach(), gradient))
        end = torch.zeros_like(plain) if runs._target is None else runs._target[site]
        scores[site] = runs.scores(((end - plain) * slope).to(torch.promote_types(slope.dtype, torch.float32)))
    yield scores


def _exact(runs: _Runs, steps: int, rows: int) -> Iterator[dict[Site, Tensor]]:
    size = max(1, rows // runs.responses.size)
    for site in runs.sites:
        plain, end = runs.plain(site), runs.target(site)
        parts = []
        for neurons in torch.arange(plain.shape[1], device=plain.device).split(size):
            values = plain.repeat(len(neurons), 1, 1)
            copies = torch.arange(len(neurons), device=plain.device)
            values[copies, :, neurons] = end[:, neurons].T
            with torch.no_grad():
                parts.append(runs.patched(site, values))
        yield {site: torch.cat(parts).T}
