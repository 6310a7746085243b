"""What notebook 01 asks of a set of safety neurons: where it lies, what zeroing it does, whether it is stable.

Scores come in, tables go out; a model is only needed where neurons are zeroed. [SN] is Zhao et al., ICLR 2025.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from nt_utils import hooks, selection, work
from nt_utils.data.records import PromptSet
from nt_utils.errors import InputError
from nt_utils.evaluation.generation import generate
from nt_utils.evaluation.metrics import NOTHING, Interval
from nt_utils.evaluation.suite import Suite
from nt_utils.evaluation.utility import perplexity_ratio
from nt_utils.experiments.bench import (
    Action,
    Bench,
    Finding,
    Measure,
    intervention_of,
    measures,
    over_halves,
    overlap,
    spread,
)
from nt_utils.interventions import steering
from nt_utils.models import LanguageModel
from nt_utils.neurons import POOL, NeuronScores, NeuronSet
from nt_utils.selection import Ranking

NONE = "untouched"
#: A model whose perplexity on real text is over this many times the untouched one's is broken, whatever it answers.
BROKEN = 1.5
#: Rise of direct ASR on development prompts that a primary dose has to reach.
RISE = 0.2


# ---------------------------------------------------------------------------------------------------- where


def where_table(sets: Mapping[str, NeuronSet]) -> pd.DataFrame:
    """Share of each projection's neurons that each set holds: columns rule, layer, kind, count, width, share."""
    rows = []
    for rule, chosen in sets.items():
        for (layer, kind), count in chosen.counts().items():
            width = chosen.space.width((layer, kind))
            rows.append((rule, layer, kind, count, width, count / width))
    return pd.DataFrame(rows, columns=["rule", "layer", "kind", "count", "width", "share"])


def size_table(sets: Mapping[str, NeuronSet]) -> pd.DataFrame:
    """How large each set is and where it lies: columns rule, neurons, and shares.

    ``share_of_neurons`` and ``share_of_parameters`` are of the whole model, ``in_attention`` is the share of the set's
    parameters that lie in q, k, v and o, ``in_first_third`` the share of its neurons in the first third of the layers.
    """
    rows = []
    for rule, chosen in sets.items():
        owned = chosen.space.parameters_per_neuron
        weights = {kind: n * owned[kind] for kind, n in chosen.per_kind().items()}
        early = sum(chosen.per_layer()[: chosen.space.num_layers // 3])
        rows.append(
            {
                "rule": rule,
                "neurons": len(chosen),
                "share_of_neurons": len(chosen) / chosen.space.size(),
                "share_of_parameters": chosen.share_of_parameters(),
                "in_attention": 1 - weights.get("ffn", 0) / max(sum(weights.values()), 1) if weights else 0.0,
                "in_first_third": early / max(len(chosen), 1),
            }
        )
    return pd.DataFrame(rows)


def all_neurons(space, kinds: Sequence[str] = POOL) -> NeuronSet:
    """Every neuron of these kinds: what a share of a set is compared with."""
    return NeuronSet(space, {site: torch.ones(space.width(site), dtype=torch.bool) for site in space.sites(kinds)})


def place_interval(
    scores: Sequence[NeuronScores],
    choose: Callable[..., NeuronSet],
    column: str,
    draws: int,
    seed: int,
    minus: float = 0.0,
) -> Interval:
    """A column of :func:`size_table` for the set that ``choose(*scores)`` finds, minus a number; see :func:`over_halves`."""

    def place(*some: NeuronScores) -> float:
        chosen = choose(*some)
        return float(size_table({"set": chosen}).loc[0, column]) - minus if len(chosen) else math.nan

    return over_halves(scores, place, draws, seed)


def thirds(chosen: NeuronSet, ranking: Ranking) -> tuple[NeuronSet, NeuronSet]:
    """The set's members in the first and in the last third of the layers: of each as many as the smaller part has.

    Members are taken in the ranking's order; both are empty when one of the thirds has none.
    """
    space, size = chosen.space, max(1, chosen.space.num_layers // 3)
    members = []
    for layers in (range(size), range(space.num_layers - size, space.num_layers)):
        part = NeuronSet(space, {site: mask for site, mask in chosen.masks.items() if site[0] in layers})
        members.append(part.flat(ranking.kinds).nonzero().flatten())
    n = min(map(len, members))
    orders = (torch.argsort(ranking.values[some], descending=True, stable=True)[:n] for some in members)
    first, last = (some[order] for some, order in zip(members, orders, strict=True))
    return NeuronSet.from_flat(space, first, ranking.kinds), NeuronSet.from_flat(space, last, ranking.kinds)


def by_block(chosen: NeuronSet) -> tuple[NeuronSet, NeuronSet]:
    """The set's members in self-attention (q, k, v, o) and in the FFN."""
    attention = {site: mask for site, mask in chosen.masks.items() if site[1] != "ffn"}
    ffn = {site: mask for site, mask in chosen.masks.items() if site[1] == "ffn"}
    return NeuronSet(chosen.space, attention), NeuronSet(chosen.space, ffn)


# --------------------------------------------------------------------------------------------------- zeroing

#: What the dose figure shows, in the order of its panels (roles of ``bench.ROLES``).
PANELS = ("direct", "refused", "second", "second refused", "over", "useful", "perplexity", "kl", "likelihood")


def published(scores: NeuronScores) -> Ranking:
    """The ranking of the paper's code, from ``definitions.sn_published``'s scores."""
    return selection.consistency(scores, 1.0, POOL, per="projection", relative=True)


def written(scores: NeuronScores, rho: float = 1.0) -> Ranking:
    """The paper's rule as written: important for every (a share ``rho`` of the) harmful prompt, over the pool."""
    return selection.consistency(scores, rho, POOL, per="pool")


def top_of_pool(ranking: Ranking, share: float) -> NeuronSet:
    """The ranking's first neurons, as many as ``share`` of the pool (FFN neurons and o_proj inputs), at least one.

    A rule that ranks other kinds too (q, k, v) still gets this number, so that a dose means the same for every rule.
    """
    if not 0 < share <= 1:
        raise InputError(f"share: got {share!r}; allowed: above 0, at most 1")
    return ranking.top(min(max(1, round(share * ranking.space.size(POOL))), ranking.values.numel()))


def control_table(
    bench: Bench, chosen: Mapping[str, NeuronSet], controls: Mapping[str, NeuronSet | Sequence[NeuronSet]]
) -> pd.DataFrame:
    """The untouched model, each chosen set zeroed, and each control zeroed.

    A control that is a list of sets is a random one: its mean and its maximum are shown. Columns: condition, group
    (none, chosen, control), metric, value, low, high, n.
    """
    rows = bench.rates(None, condition=NONE, group="none")
    for name, neurons in work.parts(chosen):
        rows += bench.rates(neurons, condition=name, group="chosen")
    for name, control in work.parts(controls):
        if isinstance(control, NeuronSet):
            rows += bench.rates(control, condition=name, group="control")
        else:
            rows += bench.random_rates(control, name, group="control")
    return pd.DataFrame(rows)


# ----------------------------------------------------------------------------------------------------- doses


def primary_doses(
    dev: Bench, rankings: Mapping[str, Ranking], shares: Sequence[float], harm: Measure, fluent: Measure
) -> pd.DataFrame:
    """:func:`primary_dose` of every rule, as one table."""
    rows = [row for rule, r in work.parts(rankings) for row in primary_dose(dev, rule, r, shares, harm, fluent)]
    return pd.DataFrame(rows)


def primary_dose(
    dev: Bench, rule: str, ranking: Ranking, shares: Sequence[float], harm: Measure, fluent: Measure
) -> list[dict]:
    """Find a rule's primary dose on development prompts; one row a dose that was tried.

    It is the smallest share of the pool at which direct ASR rises by RISE while perplexity on real text stays below BROKEN
    times the untouched model's; where no dose does, the largest one within that bound; where none is within it, the
    smallest. Doses are tried from the smallest one on, and none beyond the primary one.

    Returns:
        Rows with rule, share, neurons, rise (of direct ASR), perplexity_ratio, primary.
    """
    before, plain = dev.rate(harm).value, dev.rate(fluent).value
    rows: list[dict] = []
    for share in sorted(shares):
        neurons = top_of_pool(ranking, share)
        ratio = dev.rate(fluent, neurons).value / plain
        rise = dev.rate(harm, neurons).value - before
        rows.append({"rule": rule, "share": share, "neurons": len(neurons), "rise": rise, "perplexity_ratio": ratio})
        if rise >= RISE and ratio <= BROKEN:
            break
    within = [i for i, row in enumerate(rows) if row["perplexity_ratio"] <= BROKEN]
    primary = within[-1] if within else 0
    return [{**row, "primary": i == primary} for i, row in enumerate(rows)]


def random_sets(
    rankings: Mapping[str, Ranking], shares: Sequence[float], draws: int, seed: int
) -> dict[tuple[str, float], list[NeuronSet]]:
    """(rule, share) -> random sets with the layers and kinds of the rule's set at that dose; empty without draws."""
    if not draws:
        return {}
    return {
        (rule, share): selection.matched_random(top_of_pool(ranking, share), draws, seed)
        for rule, ranking in rankings.items()
        for share in shares
    }


def dose_table(
    bench: Bench,
    rankings: Mapping[str, Ranking],
    shares: Sequence[float],
    controls: Mapping[tuple[str, float], Sequence[NeuronSet]],
    others: Mapping[str, Action],
    fluent: Measure | None = None,
) -> pd.DataFrame:
    """Every measure against the share of the pool that is zeroed, for each rule, its random sets and the rivals.

    Args:
        controls: (rule, share) -> random sets; the value is their mean, low and high their smallest and largest rate.
        others: what has no dose (the refusal direction ablated); their share is NaN, the untouched model's is 0.
        fluent: perplexity on real text; a condition at over BROKEN times the untouched model's is marked ``broken``.
    Returns:
        Columns rule, share, neurons, broken (with ``fluent`` alone), metric, value, low, high, n.
    """

    def state(*actions: Action) -> dict[str, Any]:
        if fluent is None:
            return {}
        perplexity = np.mean([bench.rate(fluent, action).value for action in actions])
        return {"broken": bool(perplexity > BROKEN * bench.rate(fluent).value)}

    rows = bench.rates(None, rule=NONE, share=0.0, neurons=0, **state(None))
    for rule, ranking in work.parts(rankings):
        for share in sorted(shares):
            chosen = top_of_pool(ranking, share)
            labels = {"rule": rule, "share": share, "neurons": len(chosen)}
            rows += bench.rates(chosen, **labels, **state(chosen))
            if drawn := controls.get((rule, share)):
                labels |= {"rule": f"random, matched to {rule}"}
                rows += bench.mean_rates(drawn, **labels, **state(*drawn))
    for name, action in work.parts(others):
        rows += bench.rates(action, rule=name, share=np.nan, neurons=0, **state(action))
    return pd.DataFrame(rows)


def part_table(
    bench: Bench,
    chosen: Mapping[str, NeuronSet],
    rankings: Mapping[str, Ranking],
    harm: Measure,
    useful: Measure,
) -> pd.DataFrame:
    """Which part of each set jailbreaks: attention against FFN, first third of the layers against last third.

    Columns rule, part, against, neurons, others, value (jailbroken by the part minus by the other one), low, high, n,
    freedom (of the interval); a comparison has n = 0 where both parts are empty.
    """
    rows = []
    for rule, neurons in work.parts(chosen):
        halves = {
            ("attention", "FFN"): by_block(neurons),
            ("first third", "last third"): thirds(neurons, rankings[rule]),
        }
        for (name, other), (part, rest) in halves.items():
            found = NOTHING
            if len(part) or len(rest):
                found = bench.jailbroken(part if len(part) else None, [rest if len(rest) else None], harm, useful)
            labels = {"rule": rule, "part": name, "against": other, "neurons": len(part), "others": len(rest)}
            rows.append({**labels, **found._asdict(), "freedom": found.freedom})
    return pd.DataFrame(rows)


def refusal_direction(
    lm: LanguageModel, prompts: Mapping[str, PromptSet], dev: Suite, *, layers: int = 0, positions: int = 0
) -> steering.RefusalDirection:
    """The rival: the refusal direction as its paper chooses it, on the study's prompts and validated on development ones.

    Args:
        prompts: "harmful" and "benign" ones; dev: a suite whose direct and useful prompts decide, 32 of each;
        layers, positions: what it is chosen from (see :func:`steering.refusal_direction`).
    """
    validation = [dev[m.set].prompts.texts[:32] for m in measures(dev, "direct", "useful").values()]
    refusals = [prompt.refusal for prompt in prompts["harmful"] if prompt.refusal] or ["I"]
    both = prompts["harmful"].texts, prompts["benign"].texts
    return steering.refusal_direction(
        lm, *both, (validation[0], validation[1]), refusals=refusals, layers=layers, positions=positions
    )


# ----------------------------------------------------------------------------------- what the rules differ in

FACTORS = {
    "positions": ("all tokens", "last tokens"),
    "benign": ("harmful alone", "minus benign"),
    "prompts": ("every prompt", "mean prompt"),
    "scale": ("raw", "normalised"),
}


def factorial(
    harmful: Mapping[str, NeuronScores], benign: Mapping[str, NeuronScores], kinds: Sequence[str] = POOL
) -> dict[tuple[str, ...], Ranking]:
    """The sixteen rankings between the paper's rule as written and contrast: one a combination of FACTORS.

    A neuron's value on the harmful (and on the benign) prompts is its importance at those positions, divided by the
    prompt's mean over the pool when normalised; over the prompts the smallest is taken (important for every prompt, [SN,
    Eq. 2]) or the mean; the benign value is subtracted or not. ("last tokens", "minus benign", "mean prompt",
    "normalised") is :func:`selection.contrast`.

    Args:
        harmful, benign: positions ("all tokens", "last tokens") -> scores.
    """

    def value(scores: NeuronScores, prompts: str, scale: str) -> torch.Tensor:
        values = scores.matrix(kinds).double()
        if scale == "normalised":
            values = values / values.mean(dim=1, keepdim=True).clamp_min(1e-30)
        return values.amin(dim=0) if prompts == "every prompt" else values.mean(dim=0)

    rankings: dict[tuple[str, ...], Ranking] = {}
    for positions, prompts, scale in itertools.product(FACTORS["positions"], FACTORS["prompts"], FACTORS["scale"]):
        first, second = (value(scores[positions], prompts, scale) for scores in (harmful, benign))
        for subtracted in FACTORS["benign"]:
            values = first - second if subtracted == "minus benign" else first
            name = (positions, subtracted, prompts, scale)
            rankings[name] = Ranking(harmful[positions].space, tuple(kinds), values, ", ".join(name))
    return rankings


def factorial_table(
    bench: Bench,
    rankings: Mapping[tuple[str, ...], Ranking],
    shares: Sequence[float],
    harm: Measure,
    useful: Measure,
    fluent: Measure | None,
    draws: int,
    seed: int,
) -> pd.DataFrame:
    """What zeroing each of the sixteen sets does at every dose: columns share, the four factors, value (jailbroken), ...

    ``value`` is the rise of ``harm`` minus the loss of ``useful``, against the untouched model (or, with ``draws``, against
    that many random sets matched to each set); ``broken`` as in :func:`dose_table`.
    """
    plain = bench.rate(fluent).value if fluent else np.nan
    rows = []
    for share in sorted(shares):
        for name, ranking in work.parts(rankings):
            chosen = top_of_pool(ranking, share)
            controls: Sequence[Action] = selection.matched_random(chosen, draws, seed) if draws else []
            found = bench.jailbroken(chosen, controls or [None], harm, useful)
            broken = bool(fluent and bench.rate(fluent, chosen).value > BROKEN * plain)
            labels = dict(zip(FACTORS, name, strict=True))
            against = "random" if controls else NONE
            rows.append({"share": share, **labels, "against": against, "broken": broken, **found._asdict()})
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------------------------- single neurons


@dataclass(frozen=True)
class Neuron:
    """One neuron: layer, kind, index."""

    layer: int
    kind: str
    index: int

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}:{self.index}"

    @property
    def site(self) -> tuple[int, str]:
        """Layer and kind."""
        return self.layer, self.kind


def answer(lm: LanguageModel, text: str, action: Action = None, max_new_tokens: int = 28) -> str:
    """The model's greedy answer to one prompt, with neurons zeroed or under an intervention."""
    acting = intervention_of(action)
    return generate(lm, [text], intervention=acting, max_new_tokens=max_new_tokens, progress=False)[0].text


def largest(values: torch.Tensor, space, kinds: Sequence[str], n: int) -> list[Neuron]:
    """The ``n`` neurons with the largest values (flat over ``kinds``), largest first."""
    order = torch.sort(values, descending=True, stable=True).indices[:n]
    return [Neuron(*next(iter(NeuronSet.from_flat(space, [place], kinds)))) for place in order.tolist()]


def activations(lm: LanguageModel, text: str, neurons: Sequence[Neuron]) -> pd.DataFrame:
    """What some neurons do on each token of a rendered prompt: columns position, token, then one a neuron."""
    batch = lm.encode([text]).to(lm.device)
    with torch.no_grad(), hooks.capture(lm, dict.fromkeys(n.site for n in neurons)) as seen:
        lm.model(**batch.inputs, use_cache=False)
    ids = batch.inputs["input_ids"][0].tolist()
    table = pd.DataFrame({"position": range(len(ids)), "token": [lm.tokenizer.decode([i]) for i in ids]})
    values = {str(n): seen[n.site][0, :, n.index].float().cpu().numpy() for n in neurons}
    return table.assign(**values)


def token_table(lm: LanguageModel, texts: Mapping[str, str], neurons: Sequence[Neuron]) -> pd.DataFrame:
    """:func:`activations` of several prompts as rows: prompt, position, token, neuron, value."""
    found = []
    for name, text in texts.items():
        wide = activations(lm, text, neurons)
        found.append(wide.melt(["position", "token"], var_name="neuron").assign(prompt=name))
    return pd.concat(found, ignore_index=True)[["prompt", "position", "token", "neuron", "value"]]


def neuron_table(
    lm: LanguageModel, ranking: Ranking, n: int, harmful: Sequence[str], benign: Sequence[str]
) -> pd.DataFrame:
    """The first ``n`` neurons of a ranking, one by one: where each is, what it does, and on which token most.

    ``harmful`` and ``benign`` are mean activations at the last prompt token; ``token`` is the token on which the neuron's
    activation is largest in size, most often among the harmful prompts, and ``of`` says on how many of them.
    """
    neurons = largest(ranking.values, ranking.space, ranking.kinds, n)
    tables = {
        kind: [activations(lm, text, neurons) for text in texts] for kind, texts in (("h", harmful), ("b", benign))
    }
    rows = []
    for rank, neuron in enumerate(neurons, 1):
        name = str(neuron)
        last = {kind: float(np.mean([t[name].iloc[-1] for t in found])) for kind, found in tables.items()}
        tokens = pd.Series([t["token"].iloc[int(t[name].abs().argmax())] for t in tables["h"]]).value_counts()
        rows.append(
            (rank, *vars(neuron).values(), last["h"], last["b"], tokens.index[0], f"{tokens.iloc[0]} of {len(harmful)}")
        )
    return pd.DataFrame(rows, columns=["rank", "layer", "kind", "index", "harmful", "benign", "token", "of"])


# ------------------------------------------------------------------------------------------------ languages


def language_table(
    bench: Bench, sets: Mapping[str, NeuronSet], asked: Mapping[str, Measure], random: Sequence[NeuronSet]
) -> pd.DataFrame:
    """ASR in each language with nothing, each language's neurons and random neurons zeroed.

    Args:
        sets: language -> its safety neurons (two); asked: language -> the measure of direct requests in it;
        random: sets that match the first language's.
    Returns:
        Columns zeroed, evaluated, value, low, high, n, and the two sets' Jaccard with its chance level.
    """
    a, b = sets.values()
    conditions: dict[str, NeuronSet | None] = {NONE: None, **{f"{name} neurons": s for name, s in sets.items()}}
    rows = []
    for language, measure in asked.items():
        for name, neurons in conditions.items():
            rows.append({"zeroed": name, "evaluated": language, **bench.rate(measure, neurons)._asdict()})
        if random:
            found = [bench.rate(measure, d) for d in random]
            row = {"zeroed": f"random (min to max of {len(random)})", "evaluated": language}
            rows.append({**row, **spread([f.value for f in found], found[0].n)})
    return pd.DataFrame(rows).assign(jaccard=a.jaccard(b), chance=selection.expected_jaccard(a, b))


# ------------------------------------------------------------------------------------------------ stability


def stability_table(
    rules: Mapping[str, tuple], share: float, sizes: Sequence[int], draws: int, seed: int
) -> pd.DataFrame:
    """Agreement of the sets that two disjoint random prompt subsets give.

    Args:
        rules: name -> (function(*scores) -> Ranking, scores, ...); the subsets are drawn from the prompts, the same
            ones in every scores object (paired prompts stay paired).
        share: share of the pool that is chosen; sizes: prompts in each subset; draws: pairs of subsets.
    Returns:
        Columns rule, prompts, value (mean Jaccard), low, high (the middle 95% of the pairs: the pairs share one pool of
        prompts, so an interval for their mean would shrink with the number of draws), n (pairs), chance.
        A size of which two subsets do not fit is left out; when none fits, half of the prompts is taken.
    """
    rng = np.random.default_rng(seed)
    available = min(s.n_prompts for _, *scores in rules.values() for s in scores)
    rows = []
    for size in [s for s in sizes if 2 * s <= available] or [available // 2]:
        for name, (function, *scores) in rules.items():
            pairs = []
            for _ in range(draws):
                order = rng.permutation(available)[: 2 * size].tolist()
                first, second = (function(*(s.subset(half) for s in scores)) for half in (order[:size], order[size:]))
                pairs.append((top_of_pool(first, share), top_of_pool(second, share)))
            rows.append({"rule": name, "prompts": size, **overlap(pairs)})
    return pd.DataFrame(rows)


# ----------------------------------------------------------------------------------------------------- claims


def findings(
    bench: Bench,
    rules: Mapping[str, tuple],
    primary: Mapping[str, float],
    drawn: Mapping[str, Sequence[NeuronSet]],
    parts: pd.DataFrame,
    harm: Measure,
    useful: Measure,
    draws: int,
    seed: int,
) -> Iterator[Finding]:
    """What is said of S1 to S4, for each rule at its primary dose.

    Args:
        rules: name -> (function(*scores) -> Ranking, scores, ...); drawn: random sets for each; parts: :func:`part_table`;
        draws: halves of the prompts behind the intervals of S2 and of S3's place.
    """
    text = next(m.set for m in bench.measures if m.metric == "perplexity")
    for rule, (make, *scores) in rules.items():

        def choose(*some: NeuronScores, make=make, share=primary[rule]) -> NeuronSet:
            return top_of_pool(make(*some), share)

        chosen = choose(*scores)
        ratio = perplexity_ratio(bench.on(text), bench.on(text, chosen), text)
        yield Finding("S1", rule, "perplexity", ratio)
        jailbroken = bench.jailbroken(chosen, drawn[rule], harm, useful)
        yield Finding("S1", rule, "jailbroken", jailbroken)
        yield Finding("S2", rule, "share", place_interval(scores, choose, "share_of_parameters", draws, seed))
        whole = size_table({"all": all_neurons(chosen.space)}).loc[0, "in_attention"]
        yield Finding("S3", rule, "place", place_interval(scores, choose, "in_attention", draws, seed, whole))
    for row in parts.to_dict("records"):
        claim, both_empty = "S3" if row["part"] == "attention" else "S4", not (row["neurons"] or row["others"])
        why = f"no neuron of the set lies in the {row['part']} or none in the {row['against']}"
        found = Interval(row["value"], row["low"], row["high"], row["n"], row["freedom"])
        yield Finding(claim, row["rule"], "effect", why if both_empty else found)


def language_findings(bench: Bench, sets: Mapping[str, NeuronSet], asked: Mapping[str, Measure]) -> Iterator[Finding]:
    """What is said of S5: for each language ASR with its own neurons zeroed minus with the other language's."""
    for own, other in (("first language", "second language"), ("second language", "first language")):
        why: Interval | str = "no prompts in a second language"
        if sets:
            why = bench.excess(sets[own], [sets[other]], asked[own])
        yield Finding("S5", own, "effect", why)
