"""Selection rules against their definitions written out in plain Python, and the controls' promises."""

import math

import pytest
import torch

from nt_utils import selection
from nt_utils.neurons import POOL, NeuronScores, NeuronSet, NeuronSpace, ScoreWriter
from tests.common import refused

SPACE = NeuronSpace(
    {"q": (5, 7), "k": (3, 3), "v": (3, 3), "o": (12, 10), "ffn": (20, 16)},
    {"q": 9, "k": 9, "v": 9, "o": 8, "ffn": 24},
    total_parameters=5000,
    architecture="toy",
)
KINDS = tuple(SPACE.widths)


def scored(tmp_path, seed=0, n=6, positions="all", values=torch.rand) -> NeuronScores:
    torch.manual_seed(seed)
    with ScoreWriter(tmp_path / f"{seed}-{positions}", SPACE, KINDS, n, {"positions": positions}) as writer:
        for row in range(n):
            writer.write(row, {site: values(1, SPACE.width(site)) for site in SPACE.sites()})
        return writer.close()


def with_ties(*shape):
    return torch.randint(5, shape).float()


def chosen_by_hand(scores, k, rho, kinds, per):
    """Top-k counted prompt by prompt with sorted lists."""
    blocks = SPACE.sites(kinds) if per == "projection" else [None]
    chosen = set()
    for block in blocks:
        sites = SPACE.sites(kinds) if block is None else [block]
        hits = {}
        for row in range(scores.n_prompts):
            flat = [((s, i), float(v)) for s in sites for i, v in enumerate(scores.get(*s)[row])]
            for neuron, _ in sorted(flat, key=lambda item: -item[1])[:k]:
                hits[neuron] = hits.get(neuron, 0) + 1
        chosen |= {neuron for neuron, n in hits.items() if n >= rho * scores.n_prompts - 1e-9}
    return {(layer, kind, i) for (layer, kind), i in chosen}


@pytest.mark.parametrize("rho", [1.0, 0.5, 0.34])
@pytest.mark.parametrize(("per", "k"), [("projection", 2), ("projection", 4), ("pool", 9), ("pool", 25)])
@pytest.mark.parametrize("values", [torch.rand, with_ties])
def test_consistent_is_the_papers_rule(tmp_path, rho, per, k, values):
    scores = scored(tmp_path, values=values)
    kinds = KINDS if per == "projection" else POOL
    expected = chosen_by_hand(scores, k, rho, kinds, per)
    assert set(selection.consistent(scores, k, rho, kinds, per)) == expected
    assert selection.consistency(scores, rho, kinds, per).at_least(-k) == selection.consistent(
        scores, k, rho, kinds, per
    )
    if rho < 1:
        assert expected


def test_k_may_be_a_share_of_each_projection(tmp_path):
    scores = scored(tmp_path)
    share = selection.consistent(scores, 0.5, 0.5)
    for site in SPACE.sites():
        whole = selection.consistent(scores, SPACE.width(site) // 2, 0.5, kinds=(site[1],))
        assert torch.equal(share.mask(site), whole.mask(site))
    assert len(share)


def test_threshold_is_equation_2(tmp_path):
    scores = scored(tmp_path)
    for rho, epsilon in [(1.0, 0.2), (0.5, 0.6)]:
        expected = {
            (*site, i)
            for site in SPACE.sites()
            for i, column in enumerate(scores.get(*site).T.tolist())
            if sum(v >= epsilon for v in column) >= rho * scores.n_prompts
        }
        assert expected
        assert set(selection.threshold(scores, epsilon, rho)) == expected


def test_contrast_normalises_each_prompt_by_its_pool_mean(tmp_path):
    harmful, benign = scored(tmp_path, 1), scored(tmp_path, 2)

    def mean(scores):
        rows = [[float(v) for s in SPACE.sites(POOL) for v in scores.get(*s)[r]] for r in range(scores.n_prompts)]
        rows = [[v / (sum(row) / len(row)) for v in row] for row in rows]
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    expected = torch.tensor([a - b for a, b in zip(mean(harmful), mean(benign), strict=True)])
    ranking = selection.contrast(harmful, benign)
    assert torch.allclose(ranking.values.float(), expected, atol=1e-5)
    assert len(ranking.top_share(0.1)) == round(0.1 * SPACE.size(POOL))
    best = int(expected.argmax())
    assert ranking.top(1) == NeuronSet.from_flat(SPACE, [best], POOL)


def test_contrast_refuses_scores_taken_at_different_positions(tmp_path):
    refused("positions", lambda: selection.contrast(scored(tmp_path, 1), scored(tmp_path, 1, positions="last")))


def test_ties_go_to_the_earlier_neuron():
    ranking = selection.Ranking(SPACE, POOL, torch.zeros(SPACE.size(POOL)))
    assert ranking.top(3) == NeuronSet.from_flat(SPACE, [0, 1, 2], POOL)


CHOSEN = NeuronSet.from_flat(SPACE, [0, 3, 21, 35, 36, 49], POOL)


def test_matched_random_sets_differ_from_draw_to_draw_and_seed_to_seed():
    draws = selection.matched_random(CHOSEN, 20, seed=3)
    assert len(draws) == 20 and len(set(draws)) > 15
    assert selection.matched_random(CHOSEN, 1, seed=4)[0] != draws[0]


def test_where_more_than_half_is_chosen_draws_overlap_as_chance_has_it():
    masks = {(0, "ffn"): torch.arange(20) < 15, (1, "o"): torch.arange(SPACE.width((1, "o"))) < 2}
    chosen = NeuronSet(SPACE, masks)
    draws = selection.matched_random(chosen, 400, seed=0)
    assert all(d.counts() == chosen.counts() and d.meta["overlapping"] == ["0.ffn"] for d in draws)
    hits = [int((d.mask((0, "ffn")) & masks[0, "ffn"]).sum()) for d in draws]
    assert min(hits) >= 10 and sum(hits) / len(hits) == pytest.approx(15 * 15 / 20, abs=0.15)  # hypergeometric
    assert not any(int((d.mask((1, "o")) & masks[1, "o"]).sum()) for d in draws)
    anywhere = selection.matched_random(chosen, 40, seed=0, avoid=False)
    assert any(int((d.mask((1, "o")) & masks[1, "o"]).sum()) for d in anywhere)


def test_units_are_drawn_whole():
    width = SPACE.width((0, "o"))
    chosen = NeuronSet(SPACE, {(0, "o"): torch.arange(width) < 2})
    for draw in selection.matched_random(chosen, 10, seed=1, unit={(0, "o"): 2}):
        pairs = draw.mask((0, "o")).view(-1, 2)
        assert pairs.all(1).sum() == 1 and pairs.any(1).sum() == 1 and not pairs[0].any()


def test_other_controls_exist_where_more_than_half_is_chosen(tmp_path):
    chosen, scores = NeuronSet(SPACE, {(0, "ffn"): torch.arange(20) < 15}), scored(tmp_path, 5)
    for control in (selection.foundation_control(chosen, scores), selection.importance_matched(chosen, scores)):
        assert control.counts() == chosen.counts() and control != chosen


def test_every_free_neuron_can_be_drawn():
    seen = selection.matched_random(CHOSEN, 300, seed=0)
    union = seen[0]
    for draw in seen:
        union = union | draw
    expected = {(s, i) for s, m in CHOSEN.masks.items() for i in (~m).nonzero().flatten().tolist()}
    assert {((layer, kind), i) for layer, kind, i in union} == expected


def test_foundation_control_takes_the_most_important_others(tmp_path):
    general = scored(tmp_path, 5)
    control = selection.foundation_control(CHOSEN, general)
    assert control.counts() == CHOSEN.counts()
    assert len(control & CHOSEN) == 0
    for site, mask in control.masks.items():
        lowest = general.get(*site).min(dim=0).values
        left_out = ~mask & ~CHOSEN.mask(site)
        assert lowest[mask].min() >= lowest[left_out].max()


def test_importance_matched_finds_the_nearest(tmp_path):
    benign = scored(tmp_path, 6)
    one = NeuronSet.from_flat(SPACE, [4], POOL)
    mean = benign.get(0, "ffn").mean(dim=0)
    distance = (mean - mean[4]).abs()
    distance[4] = math.inf
    assert list(selection.importance_matched(one, benign)) == [(0, "ffn", int(distance.argmin()))]
    control = selection.importance_matched(CHOSEN, benign)
    assert control.counts() == CHOSEN.counts()
    assert len(control & CHOSEN) == 0


def test_chance_overlap_agrees_with_drawing():
    a = NeuronSet.from_flat(SPACE, list(range(0, 20)) + [33, 40], POOL)
    b = NeuronSet.from_flat(SPACE, list(range(5, 17)) + [34, 41, 50], POOL)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(400):
        masks = {site: m[torch.randperm(m.numel(), generator=generator)] for site, m in b.masks.items()}
        total += a.jaccard(NeuronSet(SPACE, masks))
    assert selection.expected_jaccard(a, b) == pytest.approx(total / 400, abs=0.02)
    assert 0 < selection.expected_jaccard(a, b) < 1
