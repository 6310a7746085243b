"""Neuron spaces, streamed scores and neuron sets."""

import gc

import pytest
import torch
from safetensors.torch import load_file

from nt_utils.errors import InputError
from nt_utils.neurons import KINDS, POOL, NeuronScores, NeuronSet, NeuronSpace, ScoreWriter
from tests.common import refused

SPACE = NeuronSpace(
    {"q": (4, 4), "k": (2, 2), "v": (2, 2), "o": (4, 4), "ffn": (6, 6)},
    {"q": 9, "k": 9, "v": 9, "o": 8, "ffn": 24},
    total_parameters=1000,
    architecture="toy-a",
)
OTHER = NeuronSpace(SPACE.widths, SPACE.parameters_per_neuron, 1000, "toy-b")
SIZE = SPACE.size()


def make(indices, space=SPACE):
    return NeuronSet.from_flat(space, sorted(indices), KINDS)


def write_scores(path, values, kinds=POOL, space=SPACE, meta=None):
    """Scores file with ``values`` [n, size(kinds)], written in two pieces."""
    with ScoreWriter(path, space, kinds, len(values), meta) as writer:
        for start in range(0, len(values), 2):
            writer.write(start, space.split(values[start : start + 2], kinds))
        return writer.close()


# ---------------------------------------------------------------------------------------------------- space


def test_space_counts_and_splits_in_site_order():
    assert SPACE.num_layers == 2
    assert SPACE.sites(POOL) == [(0, "ffn"), (0, "o"), (1, "ffn"), (1, "o")]
    assert SPACE.size(POOL) == 20
    parts = SPACE.split(torch.arange(20), POOL)
    assert parts[1, "ffn"].tolist() == [10, 11, 12, 13, 14, 15]
    assert NeuronSpace.from_json(SPACE.to_json()) == SPACE


@pytest.mark.parametrize("site", [(2, "ffn"), (-1, "ffn"), (0, "gate")])
def test_a_site_the_model_lacks_is_refused(site):
    refused("layers 0 to 1", lambda: SPACE.width(site))


# --------------------------------------------------------------------------------------------------- scores


def test_scores_stream_to_a_plain_safetensors_file(tmp_path):
    values = torch.rand(5, 20)
    scores = write_scores(tmp_path / "s.safetensors", values, meta={"positions": "last"})
    assert scores.n_prompts == 5
    assert torch.equal(scores.matrix(POOL), values)
    assert torch.equal(scores.get(1, "o"), values[:, 16:])
    assert scores.meta["positions"] == "last"
    assert set(load_file(tmp_path / "s.safetensors")) == {"0.ffn", "0.o", "1.ffn", "1.o"}
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_subset_selects_and_orders_prompts(tmp_path):
    values = torch.rand(5, 20)
    scores = write_scores(tmp_path / "s.safetensors", values)
    assert torch.equal(scores.subset([3, 0]).matrix(), values[[3, 0]])
    assert torch.equal(scores.subset([3, 0, 1]).subset([2]).matrix(), values[[1]])
    refused("rows", lambda: scores.subset([-1]))


def test_missing_prompts_nan_and_interruptions_leave_no_file(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(InputError, match="2 of 3 prompts have no score"), ScoreWriter(path, SPACE, POOL, 3) as writer:
        writer.write(0, SPACE.split(torch.rand(1, 20), POOL))
        writer.close()
    bad = torch.rand(1, 20)
    bad[0, 7] = float("nan")
    with pytest.raises(InputError, match="layer 0, projection o"), ScoreWriter(path, SPACE, POOL, 1) as writer:
        writer.write(0, SPACE.split(bad, POOL))
    with pytest.raises(KeyboardInterrupt), ScoreWriter(path, SPACE, POOL, 1):
        raise KeyboardInterrupt
    refused("prompts", lambda: ScoreWriter(path, SPACE, POOL, 0))
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_score_file_goes_with_the_last_scores_that_read_it():
    values = torch.rand(3, 20)
    scores = write_scores(None, values)
    folder, some = scores.path.parent, scores.subset([2, 0])
    del scores
    gc.collect()
    assert torch.equal(some.matrix(), values[[2, 0]])
    del some
    gc.collect()
    assert not folder.exists()


def test_scores_of_another_architecture_or_kind_are_refused(tmp_path):
    scores = write_scores(tmp_path / "s.safetensors", torch.rand(2, 20))
    refused("toy-a.*toy-b", lambda: NeuronScores.load(tmp_path / "s.safetensors", OTHER))
    refused("'q' was not scored", lambda: scores.get(0, "q"))


# ----------------------------------------------------------------------------------------------------- sets


def test_share_of_parameters_counts_each_neurons_weights():
    chosen = NeuronSet(SPACE, {(0, "q"): torch.tensor([True, False, True, False]), (1, "ffn"): torch.ones(6).bool()})
    assert chosen.parameters == 2 * 9 + 6 * 24
    assert chosen.share_of_parameters() == pytest.approx(0.162)


def test_the_mask_given_is_copied():
    mask = torch.tensor([True, False, False, False])
    chosen = NeuronSet(SPACE, {(0, "q"): mask})
    mask[:] = True
    assert len(chosen) == 1


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({(0, "q"): torch.ones(5).bool()}, r"needs bool \[4\]"),
        ({(0, "q"): torch.ones(4)}, "float32"),
        ({(3, "q"): torch.ones(4).bool()}, "layers 0 to 1"),
    ],
)
def test_wrong_masks_are_refused(masks, message):
    refused(message, lambda: NeuronSet(SPACE, masks))
