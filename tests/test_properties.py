"""Properties that hold for any input: set algebra, selection, files that come back, damaged files that never lie."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nt_utils import selection
from nt_utils.errors import InputError
from nt_utils.interventions.delta import Delta, Part
from nt_utils.interventions.modulation import Modulation
from nt_utils.neurons import KINDS, NeuronScores, NeuronSet, NeuronSpace, ScoreWriter
from nt_utils.scoring.fluctuation import Fluctuation
from nt_utils.units import CATEGORIES, UnitMap
from tests.common import refused

#: Layers of different widths, as after pruning.
SPACE = NeuronSpace(
    {"q": (4, 4), "k": (2, 2), "v": (2, 2), "o": (4, 4), "ffn": (5, 3)}, dict.fromkeys(KINDS, 3), 999, "tiny-1"
)
SIZE = SPACE.size()
TRIALS = 500

indices = st.sets(st.integers(0, SIZE - 1))
columns = SPACE.size(("ffn", "o"))
pools = st.lists(st.integers(-3, 3), min_size=columns, max_size=columns)


def neuron_set(chosen, **more):
    return NeuronSet.from_flat(SPACE, sorted(chosen), KINDS, **more)


def members(found):
    return set(found.flat().nonzero().flatten().tolist())


# ------------------------------------------------------------------------------------------------------ algebra


@settings(deadline=None, max_examples=60)
@given(indices, indices, indices)
def test_neuron_sets_are_sets(a, b, c):
    x, y, z = map(neuron_set, (a, b, c))
    assert members(x | y) == a | b
    assert members(x & y) == a & b
    assert members(x - y) == a - b
    assert members(x ^ y) == a ^ b
    assert (x | y) & z == (x & z) | (y & z)
    assert x - (y | z) == (x - y) & (x - z)
    assert len(x | y) == len(x) + len(y) - len(x & y)
    assert (x == y) == (a == b) == (x.fingerprint == y.fingerprint)
    assert x.flat().nonzero().flatten().tolist() == sorted(a)
    assert x.jaccard(y) == (len(a & b) / len(a | b) if a | b else 1.0)
    assert sum(x.counts().values()) == sum(x.per_layer()) == sum(x.per_kind().values()) == len(a) == len(list(x))
    assert sum(len(x.only([kind])) for kind in KINDS) == len(a)


# ---------------------------------------------------------------------------------------------------- selection


def ranking(values):
    return selection.Ranking(SPACE, ("ffn", "o"), torch.tensor(values, dtype=torch.float32))


@settings(deadline=None, max_examples=60)
@given(pools, st.integers(1, columns), st.integers(1, columns))
def test_the_top_is_nested_exact_and_on_top(values, n, m):
    found = ranking(values)
    small, large = found.top(min(n, m)), found.top(max(n, m))
    assert len(small) == min(n, m)
    assert small - large == neuron_set(())
    inside, flat = small.flat(("ffn", "o")), torch.tensor(values)
    if (~inside).any():
        assert flat[inside].min() >= flat[~inside].max()
    assert len(found.at_least(0)) == sum(v >= 0 for v in values)


@settings(deadline=None, max_examples=40)
@given(st.sets(st.integers(0, SIZE - 1), min_size=1, max_size=SIZE // 2), st.integers(0, 5))
def test_random_controls_have_the_same_size_and_are_disjoint_where_there_is_room(chosen, seed):
    taken = neuron_set(chosen)
    controls = selection.matched_random(taken, draws=3, seed=seed)
    assert controls == selection.matched_random(taken, draws=3, seed=seed)
    crowded = {site for site, n in taken.counts().items() if 2 * n > SPACE.width(site)}  # too few others to draw from
    for control in controls:
        assert {(layer, kind) for layer, kind, _ in control & taken} <= crowded
        assert control.counts() == taken.counts()


# -------------------------------------------------------------------------------------------------------- files


def some_set(generator):
    return NeuronSet.from_flat(
        SPACE, generator.choice(SIZE, 7, replace=False), KINDS, weights="w", meta={"rule": "top"}
    )


def some_scores(generator, path):
    with ScoreWriter(path, SPACE, ("ffn", "o"), 3, {"positions": "all"}) as writer:
        for site in SPACE.sites(("ffn", "o")):
            writer.write(0, {site: torch.tensor(generator.random((3, SPACE.width(site))))})
        writer.close()


def some_delta(generator):
    parts = {
        "a.weight": Part(0, torch.tensor([1, 3]), torch.tensor(generator.random((2, 4)), dtype=torch.bfloat16)),
        "a.bias": Part(0, None, torch.tensor(generator.random(4), dtype=torch.float32)),
    }
    return Delta(parts, architecture="tiny-1", weights="w", moved=3, meta={"rate": 0.1}, name="tuned")


def some_modulation(generator):
    flat = generator.choice(columns, 6, replace=False)
    sets = [NeuronSet.from_flat(SPACE, part, ("ffn", "o")) for part in (flat[:4], flat[4:])]
    alpha = torch.tensor(generator.uniform(0.5, 2, 6)).float()
    alpha[0] = 1  # acts on nothing, and must come back all the same
    return Modulation(sets[0], sets[1], alpha, meta={"steps": 3}, name="mine")


def some_fluctuation(generator):
    sites = SPACE.sites(("ffn", "o"))
    found = Fluctuation(SPACE, {s: torch.tensor(generator.random(SPACE.width(s))) for s in sites}, head_dim=2)
    for site in sites:
        found.update(site, torch.tensor(generator.random((4, SPACE.width(site)))))
    return found


def some_units(generator):
    labels = {
        s: torch.tensor(generator.integers(0, len(CATEGORIES), SPACE.width(s))) for s in SPACE.sites(("ffn", "o"))
    }
    return UnitMap(SPACE, labels, 1, "w", {"rule": "ratio"})


def state(found):
    """All that a loaded object says, for comparison."""
    if isinstance(found, NeuronSet):
        return found.fingerprint, found.space, found.weights, found.meta
    if isinstance(found, NeuronScores):
        tables = [found.get(*site).tolist() for site in found.space.sites(found.kinds)]
        return tables, found.space, found.kinds, found.meta, found.rows
    if isinstance(found, Delta):
        parts = {
            n: (p.axis, None if p.index is None else p.index.tolist(), p.values.dtype, p.values.tolist())
            for n, p in found.parts.items()
        }
        return parts, found.architecture, found.weights, found.moved, found.meta, found.name
    if isinstance(found, Modulation):
        sets = found.safety.fingerprint, found.utility.fingerprint
        return sets, found.alpha.tolist(), found.bounds, found.name, found.weights, found.meta, found.space
    if isinstance(found, UnitMap):
        return found.fingerprint, found.head_dim, found.weights, found.meta, found.space
    sites = list(found.readers)
    numbers = [(found.mean(*s).tolist(), found.variance(*s).tolist(), found.readers[s].tolist()) for s in sites]
    return numbers, sites, found.tokens, found.head_dim, found.space


FILES = {
    NeuronSet: some_set,
    NeuronScores: some_scores,
    Delta: some_delta,
    Modulation: some_modulation,
    Fluctuation: some_fluctuation,
    UnitMap: some_units,
}


def saved(kind, seed, path):
    generator = np.random.default_rng(seed)
    if kind is NeuronScores:
        some_scores(generator, path)
        return state(kind.load(path))
    made = FILES[kind](generator)
    made.save(path)
    return state(made)


@pytest.mark.parametrize("kind", FILES)
def test_files_come_back(kind, tmp_path):
    states = [saved(kind, seed, tmp_path / f"{seed}.safetensors") for seed in range(5)]
    for seed, before in enumerate(states):
        assert state(kind.load(tmp_path / f"{seed}.safetensors")) == before
    assert states[0] != states[1]
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


@pytest.mark.parametrize("kind", FILES)
def test_files_of_another_kind_or_architecture_are_refused(kind, tmp_path):
    path, other = tmp_path / "good.safetensors", tmp_path / "other.safetensors"
    saved(kind, 0, path)
    saved(Delta if kind is NeuronSet else NeuronSet, 0, other)
    refused("none: no such file", lambda: kind.load(tmp_path / "none"))
    refused("other.safetensors: not a nt_utils", lambda: kind.load(other))
    other.write_text('{"layers": [1]}')
    refused("other.safetensors: damaged or not a safetensors file", lambda: kind.load(other))
    if kind is not Delta:  # it is checked against a model
        elsewhere = NeuronSpace(SPACE.widths, SPACE.parameters_per_neuron, 999, "tiny-2")
        refused("made for architecture tiny-1; the model at hand is tiny-2", lambda: kind.load(path, elsewhere))


def damage(content, generator):
    """One random fault: a changed byte, a cut, a stretch of zeros or of noise, bytes put in or taken out."""
    at, n = int(generator.integers(len(content))), int(generator.integers(1, 40))
    noise = generator.bytes(n)
    return [
        content[:at] + bytes([content[at] ^ int(generator.integers(1, 256))]) + content[at + 1 :],
        content[:at],
        content[:at] + bytes(n) + content[at + n :],
        content[:at] + noise + content[at + n :],
        content[:at] + noise + content[at:],
        content[:at] + content[at + n :],
    ][int(generator.choice(6, p=[0.6, 0.16, 0.06, 0.06, 0.06, 0.06]))]


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_refused_or_identical(kind, tmp_path):
    before = saved(kind, 0, tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    generator, refused, path = np.random.default_rng(1), 0, tmp_path / "bad.safetensors"
    for _ in range(TRIALS):
        path.write_bytes(damage(content, generator))
        try:
            found = kind.load(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
            assert path.name in str(error)
        else:
            assert state(found) == before
    assert refused > 0.8 * TRIALS
