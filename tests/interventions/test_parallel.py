"""Tuning in several processes under accelerate, models whole or sharded: what one process with the whole batch does."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nt_utils.data.records import Prompt
from nt_utils.files import project_root
from nt_utils.interventions import parallel
from nt_utils.interventions.delta import Delta, take
from nt_utils.interventions.tuning import AllBut, Everything, LoRA, Only, tune
from nt_utils.neurons import NeuronSet
from nt_utils.study import tune as command
from tests.common import refused, saved, without_dropout
from tests.tiny import tiny_lm

ROOT = project_root()
gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch's gloo (processes on a CPU)"
)

#: Responses of different lengths, so that processes hold different numbers of response tokens.
HARMFUL = [Prompt(f"how to {w}", refusal=r) for w, r in zip("abc", ("no", "never again", "I will not"), strict=True)]
BENIGN = [Prompt(f"tell {w}", helpful=h) for w, h in zip("def", ("yes", "of course", "ok then, do"), strict=True)]
HOW = {
    "train_dtype": "model",
    "learning_rate": 0.01,
    "steps": 3,
    "batch_size": 3,
    "benign_share": 0.34,
    "clip": 0.5,
    "progress": False,
}
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CASES = ("llama checkpointed", "gpt2", "qwen2", "llama bfloat16")


def model(case):
    """A tiny model without dropout, which draws other numbers for halves of a batch."""
    lm = without_dropout(tiny_lm(case.split()[0]))
    lm.model.to(torch.bfloat16 if "bfloat16" in case else torch.float32)
    return lm


def some(lm):
    """Two neurons of every kind in every layer; no keys with a bias, whose gradient is rounding alone (softmax ignores it)."""
    sites = [(i, kind) for i, kind in lm.view.space.sites() if kind != "k" or lm.view.bias(i, "k") is None]
    return NeuronSet(lm.view.space, {site: torch.arange(lm.view.space.width(site)) < 2 for site in sites})


def learn(lm, scope=None, case="", **more):
    more = {**HOW, "gradient_checkpointing": "checkpointed" in case, **more}
    return tune(lm, scope or Only(some(lm)), harmful=HARMFUL, benign=BENIGN, **more)


# ------------------------------------------------------------------------------------------------------ two processes


def started(rank, folder, environment):
    """This forked process as accelerate finds one that it launched; a file is the meeting place, so no port is needed."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier test's Trainer left in the parent
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False  # a forked process cannot use CUDA
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    os.environ.update({"OMP_NUM_THREADS": "1", **LOOPBACK, **environment})
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    return Accelerator(cpu=True)


def work(rank, job, folder, environment):
    accelerator = started(rank, folder, environment)
    assert (accelerator.num_processes, accelerator.process_index) == (2, rank)
    job(accelerator, lambda name, facts: torch.save(facts, f"{folder}/{name}-{rank}.pt"))
    dist.destroy_process_group()


def together(job, folder, environment):
    """Run job(accelerator, save) in two processes, forked: importing everything anew would take longer than the test."""
    torch.multiprocessing.start_processes(work, (job, str(folder), environment), nprocs=2, start_method="fork")

    def load(name):
        return [torch.load(f"{folder}/{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]

    return load


def facts(tuned):
    return {
        "losses": tuned.losses,
        "key": tuned.delta.key,
        "values": {n: p.tensors for n, p in tuned.delta.parts.items()},
    }


def check_same(found, wanted, lm, tolerance=1e-4):
    """The processes agree bit for bit, with one process up to rounding: losses, and weights by how far they moved."""
    assert found[0]["losses"] == found[1]["losses"]
    assert found[0]["key"] == found[1]["key"]
    assert found[0]["losses"] == pytest.approx(wanted.losses, abs=tolerance / 10)
    base = dict(lm.model.named_parameters())
    assert set(found[0]["values"]) == set(wanted.delta.parts)
    for name, part in wanted.delta.parts.items():
        before = take(base[name], part.axis, part.index)
        moved = (part.entries(before) - before).float()
        assert moved.abs().max() > HOW["learning_rate"] / 2, name
        mine = replace(part, **found[0]["values"][name])
        assert (mine.entries(before) - part.entries(before)).float().norm() < tolerance * moved.norm(), name


def tune_sharded(accelerator, save):
    for case in CASES:
        lm = model(case)
        base = lm.weights_fingerprint
        parallel.shard(lm, accelerator)
        assert lm.weights_fingerprint == base, "the fingerprint of gathered weights"
        tuned = learn(lm, case=case, accelerator=accelerator)
        assert lm.weights_fingerprint == base, "the shards never changed"
        save(case, facts(tuned) | {"held": parallel.held(lm.model)})


@gloo
def test_two_processes_with_halves_of_the_weights_learn_what_one_does(tmp_path):
    load = together(tune_sharded, tmp_path, FSDP)
    for case in CASES:
        lm = model(case)
        wanted = learn(lm, case=case)
        found = load(case)
        # In half precision halves of a batch round differently, and AdamW's first steps are a gradient's sign.
        check_same(found, wanted, lm, **({"tolerance": 0.1} if "bfloat16" in case else {}))
        for process in found:
            mine, whole = process["held"]
            assert whole == sum(p.numel() * p.element_size() for p in lm.model.parameters())
            assert mine == pytest.approx(whole / 2, rel=0.01)


def scopes(lm):
    return {"only": Only(some(lm)), "all but": AllBut(some(lm)), "full": Everything(), "lora": LoRA(rank=2)}


def tune_whole(accelerator, save):
    for name in ("only", "all but", "full", "lora"):
        lm = model("llama")
        save(name, facts(learn(lm, scopes(lm)[name], accelerator=accelerator)))

    lm = model("llama")
    training = Only(some(lm)).start(lm)
    mine = IDS[accelerator.process_index :][:1]
    losses = descend(DistributedDataParallel(lm.model), training, mine)
    save("wrapped", {"losses": losses, "values": {n: p.values for n, p in training.finish().parts.items()}})


IDS = torch.tensor([[1, 20, 31, 47, 52, 69], [1, 25, 36, 41, 58, 63]])


def descend(model, training, ids):
    """Losses of three steps of SGD: AdamW's first have a gradient's sign alone, which averaging would not change."""
    optimiser, losses = torch.optim.SGD(training.parameters, lr=0.1, momentum=0.9), []
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@gloo
def test_two_processes_with_whole_models_learn_what_one_does(tmp_path):
    """Every scope by `tune`, and `Only` under torch's own DistributedDataParallel with a row in each process."""
    load = together(tune_whole, tmp_path, {})
    for name in ("only", "all but", "full", "lora"):
        lm = model("llama")
        check_same(load(name), learn(lm, scopes(lm)[name]), lm)
    one, two = load("wrapped")
    lm = model("llama")
    training = Only(some(lm)).start(lm)
    losses = descend(lm.model, training, IDS)
    assert [(a + b) / 2 for a, b in zip(one["losses"], two["losses"], strict=True)] == pytest.approx(losses, abs=1e-5)
    assert min(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) > 1e-3, "each had its own batch"
    for name, part in training.finish().parts.items():
        assert torch.equal(one["values"][name], two["values"][name]), "the processes agree bit for bit"
        assert torch.allclose(one["values"][name], part.values, atol=1e-5), name
        base = take(dict(lm.model.named_parameters())[name], part.axis, part.index)
        assert (part.values - base).abs().max() > 1e-3, name


def whole_blocks(lm):
    """The decoder blocks whose weights are whole in this process at the moment."""
    return [i for i in range(lm.view.num_layers) if not isinstance(lm.view.projection(i, "o").module.weight, DTensor)]


def watch(lm, training):
    """(block, blocks that are whole) in every block's forward and backward pass, as they come."""
    seen = []
    for i in range(lm.view.num_layers):
        module = lm.view.projection(i, "o").module
        module.register_forward_hook(lambda *_, i=i: seen.append((i, whole_blocks(lm))))
        module.tuned_weight.register_post_accumulate_grad_hook(lambda _, i=i: seen.append((i, whole_blocks(lm))))
    return seen


def use_sharded(accelerator, save):
    """A loop of one's own, forward passes without gradients, and everything that is refused."""
    lm = model("llama")
    parallel.shard(lm, accelerator)
    for name in ("all but", "full", "lora"):
        refused("^scope: .*allowed: Only", scopes(lm)[name].start, lm)
    refused("sharded already", parallel.shard, lm, accelerator)
    refused("^accelerator: the model is sharded", learn, lm)
    joined = {"accelerator": accelerator}
    refused("^batch_size: got 1 with 2 processes; allowed: 2 or more$", learn, lm, **joined, batch_size=1)
    message = "^callback: not with 2 processes; allowed: snapshots=True"
    refused(message, learn, lm, **joined, callback=lambda lm, step: None)
    refused("^model: accelerate is set to FSDP and the model is whole", learn, model("llama"), **joined)

    training = Only(some(lm)).start(lm)
    seen = watch(lm, training)
    optimiser = torch.optim.SGD(training.parameters, lr=0.1)
    mine = IDS[accelerator.process_index :][:1]
    for ids in (mine, mine.flip(1)):  # accumulated
        lm.model(input_ids=ids, labels=ids).loss.backward()
    assert seen == 2 * [(0, [0]), (1, [1]), (1, [1]), (0, [0])], "one block at a time is whole"
    assert whole_blocks(lm) == []
    gradients = [p.grad.clone() for p in training.parameters]
    optimiser.step()
    with torch.no_grad():
        logits = [lm.model(IDS).logits for _ in range(3)]
    delta = training.finish()
    with torch.no_grad():
        after = lm.model(IDS).logits
    refused("^delta: the model is sharded over processes; allowed: the same model loaded plainly$", delta.merge, lm)
    if accelerator.is_main_process:
        delta.save(os.environ["DELTA"])
    save("used", {"gradients": gradients, "logits": logits, "after": after})


@gloo
def test_a_loop_of_ones_own_and_what_is_refused(tmp_path):
    load = together(use_sharded, tmp_path, {**FSDP, "DELTA": str(tmp_path / "delta.safetensors")})
    found = load("used")
    lm = model("llama")
    training = Only(some(lm)).start(lm)
    for ids in (IDS, IDS.flip(1)):
        lm.model(input_ids=ids, labels=ids).loss.backward()
    for one, two, wanted in zip(found[0]["gradients"], found[1]["gradients"], training.parameters, strict=True):
        assert torch.equal(one, two)
        assert torch.allclose(one, wanted.grad, atol=1e-5)
    training.close()
    with torch.no_grad():
        base = lm.model(IDS).logits
        with Delta.load(tmp_path / "delta.safetensors", lm).active(lm):
            merged = lm.model(IDS).logits
    assert (merged - base).abs().max() > 0.01
    for logits in found[0]["logits"]:
        assert torch.allclose(logits, merged, atol=1e-5)
    assert torch.allclose(found[0]["after"], base, atol=1e-5)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@gloo
def test_weights_sharded_after_the_start_are_refused(one_process):
    lm = model("llama")
    training = Only(some(lm)).start(lm)
    for layer in lm.view.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    refused(r"q_proj.weight is sharded by .* allowed: .*parallel.shard", lambda: lm.model(IDS))
    del training


@gloo
@pytest.mark.parametrize("original", [True, False])
def test_fsdp_version_1_is_refused(one_process, original):
    lm = model("llama")
    neurons = some(lm)
    for i, layer in enumerate(lm.view.layers):
        lm.view.layers[i] = FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=original)
    refused("is sharded by ZeRO-3, FSDP version 1", lambda: Only(neurons).start(lm))


def test_zero_3_is_told_by_its_mark():
    lm = model("llama")
    lm.model.model.layers[0].self_attn.q_proj.weight.ds_id = 0
    refused("layers.0.self_attn.q_proj.weight is sharded by ZeRO-3", lambda: Only(some(lm)).start(lm))


# ------------------------------------------------------------------------------------------------------ settings


PLUGIN = {"fsdp_version": 2, "cpu_offload": None, "cpu_ram_efficient_loading": False}
PLUGIN |= {"reshard_after_forward": True, "activation_checkpointing": False}


def fake(kind="MULTI_CPU", precision="no", accumulation=1, processes=2, **plugin):
    settings = SimpleNamespace(**PLUGIN | plugin) if plugin else None
    return SimpleNamespace(
        distributed_type=kind,
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        state=SimpleNamespace(fsdp_plugin=settings),
        num_processes=processes,
        process_index=0,
    )


class CPUOffloadPolicy:
    """Told by its name, as torch's."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "DEEPSPEED"}, "distributed_type: got 'DEEPSPEED'; allowed: NO, FSDP, MULTI_CPU"),
        ({"kind": "MEGATRON_LM"}, "distributed_type: got 'MEGATRON_LM'; allowed: NO"),
        ({"precision": "bf16"}, "mixed_precision: got 'bf16'; allowed: 'no'"),
        ({"accumulation": 4}, "gradient_accumulation_steps: got 4; allowed: 1"),
        ({"fsdp_version": 1}, "fsdp_version: got 1; allowed: 2"),
        ({"cpu_offload": CPUOffloadPolicy()}, "fsdp_offload_params: got true; allowed: false"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: got true; allowed: false"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing: got true; allowed: false"),
        ({"reshard_after_forward": False}, "fsdp_reshard_after_forward: got false; allowed: true"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings, message):
    start = f"^{re.escape(message)}"
    refused(start, parallel.check, fake(**settings))
    refused(start, learn, model("llama"), accelerator=fake(**settings))


def test_settings_that_can_be_honoured():
    assert parallel.check(fake()) is False
    assert parallel.check(fake(kind="FSDP", fsdp_version=2)) is True


def test_accelerates_environment_is_read_where_it_ignores_fsdp(monkeypatch):
    for name, value in {**FSDP, "FSDP_VERSION": "1"}.items():
        monkeypatch.setenv(name, value)
    refused("fsdp_version: got 1", lambda: parallel.check(fake()))
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert parallel.check(fake()) is True
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    refused("fsdp_offload_params", lambda: parallel.check(fake()))


def test_one_process_has_nothing_to_shard():
    alone = fake(processes=1, fsdp_version=2)
    refused("accelerator: one process has nothing to shard over", parallel.shard, model("llama"), alone)


# ------------------------------------------------------------------------------------------------------ the command


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch):
    import accelerate

    monkeypatch.setattr(
        accelerate, "Accelerator", lambda cpu: SimpleNamespace(num_processes=1, device=torch.device("mps"))
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("num_processes: got 2; allowed: 1, since accelerate joins none on mps devices", lambda: parallel.join())


@gloo
def test_the_readmes_command(tmp_path):
    """`accelerate launch` with the profile, as docs/batches.md has it, on a machine without a GPU: two processes, gloo."""
    from transformers import AutoModelForCausalLM

    text = (ROOT / "docs" / "batches.md").read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.strip().startswith("accelerate launch"))
    lm = model("llama")
    lm.model.config.max_position_embeddings = 512  # its byte-like tokenizer makes long prompts
    saved(lm, tmp_path / "model")
    some(lm).save(tmp_path / "safety.safetensors")
    assert yaml.safe_load((ROOT / "nt_utils/study/batch/profiles/fsdp.yaml").read_text())["main_process_port"] == 0
    words = line.split("#")[0].split()
    given = {"--model": tmp_path / "model", "--num_processes": 2}
    words = [str(given.get(before, word)) for before, word in zip(["", *words], words, strict=False)]
    words = [str(tmp_path / word) if word.endswith(".safetensors") else word for word in words]
    options = ["--learning-rate", "0.01", "--steps", "3", "--pairs", "6", "--batch-size", "4", "--merged"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **LOOPBACK, "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words[2:], *options, str(tmp_path / "merged")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weights in this process, one of 2: 50." in done.stdout

    harmful, benign = command.prompts(
        command.read_options([*words[words.index("nt_utils.study.tune") + 1 :], *options, "unused"])
    )
    wanted = tune(
        lm, Only(some(lm)), harmful=harmful, benign=benign, learning_rate=0.01, steps=3, batch_size=4, progress=False
    )
    delta = Delta.load(tmp_path / "delta.safetensors", lm)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    plain = dict(merged.named_parameters())
    for name, part in wanted.delta.parts.items():
        assert torch.allclose(delta.parts[name].values, part.values, atol=1e-5), name
    for name, before in lm.model.named_parameters():
        assert torch.equal(plain[name], before) == (name not in delta.parts), name
    with torch.no_grad(), delta.active(lm):
        assert torch.equal(lm.model(IDS).logits, merged(IDS).logits)
