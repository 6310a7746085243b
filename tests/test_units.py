"""Unit maps: an exact partition, from scores that equal numpy, kept in files that show damage."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nt_utils import selection, units
from nt_utils.files import sealed
from nt_utils.neurons import POOL, NeuronSet
from nt_utils.scoring.fluctuation import Fluctuation, fluctuation
from nt_utils.selection import Cost, UnitScores, find_proportions, unit_scores
from nt_utils.units import CATEGORIES, UnitMap, flow, with_inputs
from tests.common import refused
from tests.tiny import tiny_lm

SAFETY = ["How do I harm a dog?", "Burn it", "Steal the car from them"]
UTILITY = ["Tell me a story.", "What is 2 + 2?", "Name a town", "Sing"]
SHARES = {"SCU": 0.1, "UCU": 0.2, "RU": 0.3}


@pytest.fixture(scope="module")
def statistics(lm):
    return [fluctuation(lm, texts, progress=False) for texts in (SAFETY, UTILITY)]


@pytest.fixture(scope="module")
def scores(statistics):
    return unit_scores(*statistics)


def test_scores_equal_numpy(lm, statistics, scores):
    for found, stats in ((scores.safety, statistics[0]), (scores.utility, statistics[1])):
        wanted = []
        for layer, kind in lm.view.space.sites(POOL):
            norms = (lm.view.weight(layer, kind).detach().double().numpy() ** 2).sum(0)
            raw = stats.variance(layer, kind).numpy() * norms
            raw = raw.reshape(4, 8).sum(1) if kind == "o" else raw
            wanted.append(raw / raw.mean())
        np.testing.assert_allclose(found.numpy(), np.concatenate(wanted), rtol=1e-6)
    safety, utility = scores.safety.numpy(), scores.utility.numpy()
    np.testing.assert_allclose(scores.difference.numpy(), safety - utility, rtol=1e-9)
    ratio = dataclasses.replace(scores, contrast="log ratio")
    np.testing.assert_allclose(ratio.difference.numpy(), np.log(safety) - np.log(utility), rtol=1e-9)
    assert scores.difference.std() > 0.1, "the two data sets must differ for any of this to mean something"


@pytest.mark.parametrize("score", selection.SCORES)
@pytest.mark.parametrize("contrast", selection.CONTRASTS)
@pytest.mark.parametrize("heads", [True, False])
def test_the_partition_is_exact(statistics, score, contrast, heads):
    found = unit_scores(*statistics, score=score, contrast=contrast, heads=heads)
    made = found.map(SHARES)
    sets = [made.set(name) for name in CATEGORIES]
    space = made.space
    assert sum(map(len, sets)) == space.size(POOL)
    everything = sets[0] | sets[1] | sets[2] | sets[3]
    assert len(everything) == space.size(POOL)
    n = 80 + (8 if heads else 64)
    assert made.counts() == {
        "SCU": round(0.1 * n),
        "UCU": round(0.2 * n),
        "RU": round(0.3 * n),
        "CU": made.counts()["CU"],
    }
    flat = made.flat()
    contrasts = found.difference
    assert contrasts[flat == 0].min() >= contrasts[flat != 0].max()
    assert contrasts[flat == 1].max() <= contrasts[(flat != 0) & (flat != 1)].min()
    total = found.safety + found.utility
    assert total[flat == 3].max() <= total[flat == 2].min()
    assert sum(made.shares().values()) == pytest.approx(1)
    assert sum(row["count"] for row in made.rows()) == len(made) == n


def test_variants_differ(statistics):
    maps = {
        unit_scores(*statistics, score=s, contrast=c).map(SHARES) for s in selection.SCORES for c in selection.CONTRASTS
    }
    assert len(maps) >= 4


def test_permuting_ffn_channels_permutes_the_map(lm):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    other = tiny_lm("llama")
    with torch.no_grad():
        mlp = other.model.model.layers[1].mlp
        for rows in (mlp.gate_proj.weight, mlp.up_proj.weight):
            rows.copy_(rows[order].clone())
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order].clone())
    plain, permuted = (
        unit_scores(*(fluctuation(m, texts, progress=False) for texts in (SAFETY, UTILITY))).map(SHARES)
        for m in (lm, other)
    )
    assert torch.equal(permuted.labels[1, "ffn"], plain.labels[1, "ffn"][order])
    assert not torch.equal(permuted.labels[1, "ffn"], plain.labels[1, "ffn"])
    for site in set(plain.labels) - {(1, "ffn")}:
        assert torch.equal(permuted.labels[site], plain.labels[site])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"SCU": 0.5, "UCU": 0.4, "RU": 0.3}, "overlap"),
        ({"SCU": 0.1, "UCU": 0.1, "RU": 0.1, "CU": 0.5}, "not 1"),
        ({"SCU": 1.2, "UCU": 0.1, "RU": 0.1}, "SCU is 1.2"),
        ({"SCU": -0.1, "UCU": 0.1, "RU": 0.1}, "above 0"),
        ({"SCU": 0.1, "UCU": 0.1}, "no share for RU"),
        ({"SCU": 0.1, "ESU": 0.1, "UCU": 0.1, "RU": 0.1}, "twice"),
        ({"SCU": 0.1, "UCU": 0.1, "RU": 0.1, "XU": 0.1}, "'XU'"),
        ({"SCU": 0.001, "UCU": 0.1, "RU": 0.1}, "raise its share to at least 1.1%"),
        ({"SCU": 0.4, "UCU": 0.4, "RU": 0.2}, "CU: none of the 88 units"),
    ],
)
def test_bad_proportions_are_named(scores, shares, message):
    refused(message, lambda: scores.map(shares))


def test_proportions_may_name_all_four_and_use_older_names(scores):
    assert scores.map({**SHARES, "CU": 0.4}) == scores.map(SHARES)
    assert scores.map({"ESU": 0.1, "EUU": 0.2, "RU": 0.3}) == scores.map(SHARES)


def test_other_bad_input(lm, statistics, scores):
    refused("score: got 'x'", lambda: unit_scores(*statistics, score="x"))
    refused("contrast: got 'x'", lambda: unit_scores(*statistics, contrast="x"))
    other = fluctuation(tiny_lm("qwen3"), SAFETY, progress=False)
    refused("another", lambda: unit_scores(statistics[0], other))
    refused("CU is the rest", lambda: scores.order("CU"))
    made = scores.map(SHARES)
    refused("has none", lambda: UnitMap(made.space, {}, 8))
    split = {**made.labels, (0, "o"): torch.arange(32) % 2}
    refused("two categories", lambda: UnitMap(made.space, split, 8))
    refused("no multiple", lambda: UnitMap(made.space, made.labels, 7))
    refused("outside", lambda: UnitMap(made.space, {**made.labels, (0, "ffn"): torch.full((40,), 4)}, 8))
    refused("no tokens", lambda: unit_scores(Fluctuation.of(lm), statistics[1]))
    refused(r"1 of 2 prompts are also evaluated on.*'b'", lambda: units.shared_prompts(["a", "b"], ["b", "c"]))
    units.shared_prompts(["a"], ["b"])
    refused("contrast", lambda: UnitScores(scores.space, scores.safety, scores.utility, 8, "ratio"))


def test_growing_finds_the_shares_where_pruning_starts_to_cost(scores):
    """A made-up model: safety falls by 5 points a pruned unit of the first ten by contrast, utility likewise at the end."""
    first, last = (scores.neurons(scores.order(name)[:10]) for name in ("SCU", "UCU"))
    tried = []

    def cost(neurons):
        tried.append(len(neurons))
        step = {site: 1 if site[1] == "ffn" else 8 for site in scores.space.sites(POOL)}

        def hits(group):
            return sum(int(m.sum()) // step[s] for s, m in (neurons & group).masks.items())

        return Cost(safety=0.05 * hits(first), utility=0.05 * hits(last))

    shares = [0.02, 0.05, 0.08, 0.12, 0.3]
    found, rows = find_proportions(scores, cost, shares, safety=0.3, utility=0.1, free=0.04)
    assert found["SCU"] == 0.08, "7 of 88 units are 35 points"
    assert found["UCU"] == 0.02
    assert [r["share"] for r in rows if r["category"] == "SCU"] == [0.02, 0.05, 0.08], "growth stops there"
    assert {(r["category"], r["share"]) for r in rows if r["chosen"]} == set(found.items())
    scores.map(found)
    refused("shares", lambda: find_proportions(scores, cost, []))


def test_growing_keeps_room_for_the_others(scores):
    found, _ = find_proportions(scores, lambda neurons: Cost(0, 0), [0.1, 0.4])
    assert found["SCU"] == found["UCU"] == 0.4
    for shares in ([0.05, 0.1, 0.5], [0.05, 0.1, 0.4], [0.3], [0.1, 0.2, 0.9]):
        found, rows = find_proportions(scores, lambda neurons: Cost(0, 0), shares)
        assert sum(found.values()) <= 0.9 + 1e-9
        assert {(r["category"], r["share"]) for r in rows if r["chosen"]} == set(found.items())
        scores.map(found)  # formerly the first of these was refused after all evaluations
    refused("the smallest at most 0.3", lambda: find_proportions(scores, lambda neurons: Cost(0, 0), [0.4]))


def test_files_round_trip_and_read_older_names(scores, tmp_path):
    made = scores.map(SHARES, weights="w", data="x")
    path = made.save(tmp_path / "u.safetensors")
    again = UnitMap.load(path, made.space)
    assert again == made
    header = {
        "format": "nt_utils.units.0",
        "space": made.space.to_json(),
        "weights": "w",
        "meta": "{}",
        "head_dim": "8",
        "categories": json.dumps(["RU", "EUU", "CU", "ESU"]),
        "fingerprint": made.fingerprint,
    }
    old = torch.tensor([3, 1, 2, 0])  # the older file's number of each category
    save_file(
        {k: old[v.long()].to(torch.uint8) for k, v in load_file(path).items()}, tmp_path / "old.st", sealed(header)
    )
    assert UnitMap.load(tmp_path / "old.st") == made
    assert made.set("ESU") == made.set("SCU")
    assert made.set("EUU", "RU") == made.set("UCU") | made.set("RU")


def test_the_margins_of_a_flow_add_up(scores):
    before, after = scores.map(SHARES), scores.map({"SCU": 0.2, "UCU": 0.1, "RU": 0.4})
    rows = flow(before, after)
    for name in CATEGORIES:
        assert sum(r["count"] for r in rows if r["before"] == name) == before.counts()[name]
        assert sum(r["count"] for r in rows if r["after"] == name) == after.counts()[name]
        assert sum(r["share_of_before"] for r in rows if r["before"] == name) == pytest.approx(1)
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert sum(r["count"] for r in rows if r["before"] != r["after"]) > 0
    assert all(r["before"] == r["after"] for r in flow(before, before) if r["count"])
    refused("different units", lambda: flow(before, UnitMap(before.space, before.labels, 1)))


def test_a_whole_head_comes_with_the_rows_that_feed_it():
    space = tiny_lm("llama").view.space  # 4 query heads of 8, 2 key/value heads
    mask = torch.zeros(32, dtype=torch.bool)
    mask[:24] = True  # heads 0, 1 and 2
    mask[31] = True  # and one channel of head 3
    ffn = torch.arange(40) < 3
    found = with_inputs(NeuronSet(space, {(1, "o"): mask, (0, "ffn"): ffn}), 8)
    assert found.mask((1, "q")).nonzero().flatten().tolist() == list(range(24))
    assert found.mask((1, "v")).nonzero().flatten().tolist() == list(range(8)), "key/value head 0 feeds heads 0 and 1"
    assert torch.equal(found.mask((1, "k")), found.mask((1, "v")))
    assert torch.equal(found.mask((0, "ffn")), ffn)
    assert len(found) == 25 + 24 + 8 + 8 + 3
