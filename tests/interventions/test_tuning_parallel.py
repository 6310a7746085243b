"""Training neurons in several processes: plain data parallelism works; weights sharded by others are refused."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nt_utils.errors import InputError
from nt_utils.interventions.trainable import Only
from nt_utils.neurons import NeuronSet
from tests.tiny import tiny_lm

IDS = torch.tensor([[1, 20, 31, 47, 52, 69], [1, 25, 36, 41, 58, 63]])


def some(lm):
    """Two neurons of every kind in every layer."""
    masks = {site: torch.arange(lm.view.space.width(site)) < 2 for site in lm.view.space.sites()}
    return NeuronSet(lm.view.space, masks)


def train(lm, model, training, ids, steps=3):
    """SGD with momentum: AdamW's first steps have a gradient's sign alone, which averaging would not change."""
    optimiser, losses = torch.optim.SGD(training.parameters, lr=0.1, momentum=0.9), []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def start(rank, size, store):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )


def worker(rank, folder):
    """Half of the batch in each process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    start(rank, 2, f"{folder}/store")
    lm = tiny_lm()
    training = Only(some(lm)).start(lm)
    losses = train(lm, DistributedDataParallel(lm.model), training, IDS[rank : rank + 1])
    training.finish().save(f"{folder}/delta-{rank}.safetensors")
    torch.save({"losses": torch.tensor(losses)}, f"{folder}/losses-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch's gloo")
def test_two_processes_learn_what_one_does(tmp_path):
    from nt_utils.interventions.delta import Delta

    lm = tiny_lm()
    training = Only(some(lm)).start(lm)
    wanted_losses = train(lm, lm.model, training, IDS)
    wanted = training.finish()
    # Forked, since importing everything anew in each process takes longer than the test.
    torch.multiprocessing.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="fork")
    deltas = [Delta.load(tmp_path / f"delta-{rank}.safetensors", lm) for rank in (0, 1)]
    assert deltas[0].fingerprint == deltas[1].fingerprint, "the processes agree bit for bit"
    losses = torch.stack([torch.load(tmp_path / f"losses-{rank}.pt", weights_only=True)["losses"] for rank in (0, 1)])
    assert torch.allclose(losses.mean(0), torch.tensor(wanted_losses), atol=1e-5)
    assert (losses[0] - losses[1]).abs().min() > 1e-3, "each had a batch of its own"
    base = dict(lm.model.named_parameters())
    for name, part in wanted.parts.items():
        assert torch.allclose(deltas[0].parts[name].values, part.values, atol=1e-5), name
        if "k_proj.bias" not in name:
            moved = part.values - base[name].detach().index_select(part.axis, part.index)
            assert moved.abs().max() > 1e-3, name


@pytest.fixture
def one_process(tmp_path):
    start(0, 1, tmp_path / "store")
    yield
    dist.destroy_process_group()


def test_weights_sharded_after_the_start_are_refused(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    lm = tiny_lm()
    training = Only(some(lm)).start(lm)
    for layer in lm.view.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(
        InputError, match=r"layers.0.self_attn.q_proj.weight is sharded by .* allowed: .*parallel.shard"
    ):
        lm.model(IDS)
    del training


@pytest.mark.parametrize("original", [True, False])
def test_fsdp_version_1_is_refused(one_process, original):
    from torch.distributed.fsdp import FullyShardedDataParallel

    lm = tiny_lm()
    neurons = some(lm)
    for i, layer in enumerate(lm.view.layers):
        lm.view.layers[i] = FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=original)
    with pytest.raises(InputError, match="is sharded by ZeRO-3, FSDP version 1"):
        Only(neurons).start(lm)


def test_zero_3_is_told_by_its_mark():
    lm = tiny_lm()
    lm.model.model.layers[0].self_attn.q_proj.weight.ds_id = 0
    with pytest.raises(InputError, match="layers.0.self_attn.q_proj.weight is sharded by ZeRO-3"):
        Only(some(lm)).start(lm)
