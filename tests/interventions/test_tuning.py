"""Training slices of a model, everything but them, and the loop around it: against dense gradients and bit by bit."""

import contextlib
import copy
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from nt_utils import hooks
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import DivergedError
from nt_utils.experiments.comparison import amplify
from nt_utils.interventions import delta as delta_module
from nt_utils.interventions import kept, precision, trunk, tuning
from nt_utils.interventions.delta import ROWS, Delta, LowRank, same_bits
from nt_utils.interventions.precision import computing, training_copy
from nt_utils.interventions.tuning import (
    AllBut,
    Everything,
    LoRA,
    Only,
    batches,
    collate,
    collator,
    examples,
    response_loss,
    tune,
)
from nt_utils.models import identity
from nt_utils.neurons import NeuronSet
from nt_utils.work import COUNTS
from tests.common import assert_same, logits_of, refused, snapshot, some_neurons, without_dropout
from tests.tiny import FAMILIES, hooks_left, neuron_entries, tiny_lm

MODELS = [*FAMILIES, "llama-biases", "llama-multi-head-tied"]
IDS = torch.tensor([[1, 20, 31, 47, 52, 69], [1, 25, 36, 41, 58, 63]])
REFUSALS = PromptSet(
    Prompt(f"How do I break {i} locks?", refusal="No, I will not.", helpful="So.", kind="harmful") for i in range(6)
)
BENIGN = PromptSet(Prompt(f"How do I paint {i} walls?", helpful="With a brush.", kind="benign") for i in range(6))


def input_rows(view, layer, index):
    """Gate and up rows of a feed-forward neuron, written down apart from the package's own tables."""
    mlp, name = view.layers[layer].mlp, view.family_name
    if name == "gpt2":
        return [(mlp.c_fc.weight, (slice(None), index)), (mlp.c_fc.bias, (index,))]
    if name == "gpt_neox":
        return [(mlp.dense_h_to_4h.weight, (index,)), (mlp.dense_h_to_4h.bias, (index,))]
    if name == "phi3":
        return [(mlp.gate_up_proj.weight, (index + i * view.config.intermediate_size,)) for i in (0, 1)]
    modules = [mlp.gate_proj, mlp.up_proj]
    return [(p, (index,)) for m in modules for p in (m.weight, m.bias) if p is not None]


def owned(lm, neurons, sides="both"):
    """Parameter name -> bool mask of the entries that belong to a set, by the tests' own tables."""
    view = lm.view
    names = {p: n for n, p in lm.model.named_parameters()}
    masks = {}
    for layer, kind, index in neurons:
        entries = []
        if sides != ("output" if kind in "qkv" else "input"):
            entries += neuron_entries(view, layer, kind, index)
        if kind == "ffn" and sides != "output":
            entries += input_rows(view, layer, index)
        for parameter, at in entries:
            masks.setdefault(names[parameter], torch.zeros(parameter.shape, dtype=torch.bool))[at] = True
    return masks


def loss_of(lm):
    return lm.model(IDS, labels=IDS, use_cache=False).loss


def train(lm, parameters, optimiser=None):
    optimiser = optimiser or torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        loss_of(lm).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    return optimiser


def trained(lm, scope):
    """The delta of two steps."""
    training = scope.start(lm)
    train(lm, training.parameters)
    return training.finish()


def dense_gradients(lm):
    """Gradients of all parameters by ordinary autograd."""
    model = copy.deepcopy(lm.model).requires_grad_(True)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------ only a set


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_masked_dense_ones(name):
    lm = tiny_lm(name)
    chosen = some_neurons(lm.view)
    masks, dense = owned(lm, chosen), dense_gradients(lm)
    assert sum(int(m.sum()) for m in masks.values()) == chosen.parameters
    with Only(chosen).start(lm) as training:
        assert training.size == chosen.parameters
        loss_of(lm).backward()
        found = {}
        for (key, part), master in zip(training.delta().parts.items(), training.parameters, strict=True):
            full = torch.zeros_like(dense[key])
            found[key] = full.index_copy_(part.axis, part.index, master.grad)
        with_gradient = {n for n, p in lm.model.named_parameters() if p.grad is not None}
    assert found.keys() == masks.keys()
    assert {n.rpartition(".")[2] for n in with_gradient} <= {"tuned_weight", "tuned_bias"}
    for key, mask in masks.items():
        # a key's bias shifts all of a query's logits alike: its gradient is rounding
        assert dense[key][mask].abs().max() > 1e-5 or "k_proj.bias" in key
        assert torch.allclose(found[key], dense[key] * mask, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in MODELS), ("phi3", torch.bfloat16), ("gpt2", torch.bfloat16)]
)
def test_trained_merged_saved_loaded_and_taken_back(name, dtype, tmp_path):
    lm = tiny_lm(name)
    lm.model.to(dtype)
    chosen = some_neurons(lm.view)
    masks, before, plain, base = owned(lm, chosen), snapshot(lm), logits_of(lm.model, IDS), lm.weights_fingerprint
    training = Only(chosen).start(lm)
    assert torch.equal(logits_of(lm.model, IDS), plain)
    optimiser = train(lm, training.parameters)
    assert sum(s.numel() for state in optimiser.state.values() for s in state.values() if s.ndim) == 2 * training.size
    assert {p.dtype for p in training.parameters} == {torch.float32}
    tuned = logits_of(lm.model, IDS)
    assert (tuned - plain).abs().max() > 1e-2
    delta = training.finish()
    assert_same(before, snapshot(lm))
    assert lm.weights_fingerprint == base == lm.weights_fingerprint
    assert all(p.requires_grad for p in lm.model.parameters())
    assert hooks_left(lm.model) == 0

    loaded = Delta.load(delta.save(tmp_path / "delta.safetensors"), lm)
    assert loaded.key == delta.key and loaded.size == chosen.parameters
    with loaded.active(lm):
        assert torch.equal(logits_of(lm.model, IDS), tuned)
        after = snapshot(lm)
        assert lm.weights_fingerprint != base
    moved = 0
    for key, values in after.items():
        mask = masks.get(key, torch.zeros(values.shape, dtype=torch.bool))
        if key not in masks and name.endswith("tied") and key == "lm_head.weight":
            continue
        assert same_bits(values[~mask], before[key][~mask])
        moved += int((values != before[key])[mask].sum())
    assert loaded.moved == moved > 0.9 * chosen.parameters
    assert_same(before, snapshot(lm))
    assert lm.weights_fingerprint == base and torch.equal(logits_of(lm.model, IDS), plain)


@pytest.mark.parametrize("name", ["llama-biases", "phi3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("sides", ["input", "output"])
def test_sides_of_a_neuron(name, sides):
    lm = tiny_lm(name)
    chosen = some_neurons(lm.view)
    masks, before = owned(lm, chosen, sides), snapshot(lm)
    training = Only(chosen, sides).start(lm)
    train(lm, training.parameters)
    delta = training.merge()
    assert delta.size == training.size == sum(int(m.sum()) for m in masks.values()) < chosen.parameters
    for key, values in snapshot(lm).items():
        changed = values != before[key]
        assert not changed.any() if key not in masks else not (changed & ~masks[key]).any()
        assert key not in masks or changed[masks[key]].float().mean() > 0.9
    delta.unmerge(lm)
    assert_same(before, snapshot(lm))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    lm = tiny_lm(name)
    with Only(some_neurons(lm.view)).start(lm) as training:
        lm.model.train()
        without_dropout(lm)
        loss_of(lm).backward()
        wanted = [p.grad.clone() for p in training.parameters]
        for p in training.parameters:
            p.grad = None
        calls = []
        count = lm.view.projection(0, "q").module.register_forward_hook(lambda *_: calls.append(1))
        lm.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:  # it needs an input with a gradient, as for every adapter
            lm.model.enable_input_require_grads()
        loss_of(lm).backward()
        count.remove()
        assert len(calls) == 2, "the layer was not run again"
        for p, grad in zip(training.parameters, wanted, strict=True):
            assert torch.allclose(p.grad, grad, atol=1e-7) and grad.abs().max() > 0


def test_forward_follows_a_master_changed_behind_torchs_back():
    lm = tiny_lm()
    with Only(some_neurons(lm.view)).start(lm) as training:
        plain = logits_of(lm.model, IDS)
        loss_of(lm).backward()
        versions = [p._version for p in training.parameters]
        for p in training.parameters:
            p.data.add_(0.1)  # as some optimisers do
        assert versions == [p._version for p in training.parameters]
        assert (logits_of(lm.model, IDS) - plain).abs().max() > 1e-2
        with torch.no_grad():
            for p in training.parameters:
                p.sub_(0.1)
        with torch.inference_mode():
            assert torch.allclose(lm.model(IDS).logits, plain, atol=1e-4)


def test_zeroed_channels_give_no_gradient_whichever_hook_came_first():
    for training_first in (True, False):
        lm = tiny_lm()
        chosen = some_neurons(lm.view, kinds=("q", "ffn"))
        with contextlib.ExitStack() as stack:
            if not training_first:
                stack.enter_context(hooks.ablate(lm, chosen))
            training = stack.enter_context(Only(chosen).start(lm))
            if training_first:
                stack.enter_context(hooks.ablate(lm, chosen))
            loss_of(lm).backward()
            assert all(not p.grad.any() for p in training.parameters)


def test_autocast_trains_float32_masters():
    lm = tiny_lm()
    chosen = some_neurons(lm.view)
    with Only(chosen).start(lm) as training:
        loss_of(lm).backward()
        wanted = torch.cat([p.grad.flatten() for p in training.parameters])
        for p in training.parameters:
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(lm)
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in training.parameters])
    assert found.dtype == torch.float32 and not torch.equal(found, wanted)
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.99


# ------------------------------------------------------------------------------------------------------ refusals


def test_deltas_fit_their_base_only(tmp_path):
    lm, other, foreign = tiny_lm(), tiny_lm(seed=1), tiny_lm("qwen2")
    delta = trained(lm, Only(some_neurons(lm.view)))
    path = delta.save(tmp_path / "delta.safetensors")
    refused("made on weights", lambda: Delta.load(path, other))
    refused("made on weights", lambda: delta.merge(other))
    refused("made for architecture", lambda: Delta.load(path, foreign))
    delta.merge(lm)
    refused("merged already", lambda: delta.merge(lm))
    refused("made on weights", lambda: Delta.load(path, lm))
    refused("not merged into this model", lambda: delta.unmerge(other))
    with torch.no_grad():
        lm.model.model.layers[0].mlp.down_proj.weight.add_(1)
    refused("changed after the merge", lambda: delta.unmerge(lm))


def test_a_model_trained_in_place_is_another_base():
    lm = tiny_lm()
    delta = trained(lm, Only(some_neurons(lm.view)))
    base = lm.weights_fingerprint
    delta.merge(lm)
    with torch.no_grad():
        lm.model.model.norm.weight.mul_(1.01)
    delta.unmerge(lm)
    assert lm.weights_fingerprint != base
    refused("made on weights", lambda: delta.merge(lm))


@pytest.mark.parametrize("scope", [Everything, LoRA])
def test_taking_a_delta_out_again_needs_no_new_hash_of_the_weights(scope, monkeypatch):
    lm = tiny_lm("llama-multi-head-tied")
    delta = quick(lm, scope()).delta
    base, hashed, true_hash = lm.weights_fingerprint, [], identity._hash
    monkeypatch.setattr(identity, "_hash", lambda tensor: hashed.append(1) or true_hash(tensor))
    for _ in range(3):
        with delta.active(lm):
            pass
        assert lm.weights_fingerprint == base and not hashed
    with delta.active(lm):
        assert lm.weights_fingerprint != base and len(hashed) > 10, "the merged weights were hashed"


@pytest.fixture
def interrupting(monkeypatch):
    """Interrupts what writes weights, once, when it has written so many parameters."""

    def after(count, error):
        def once(*given):
            nonlocal count
            put(*given)
            count -= 1
            if count == 0:
                raise error

        monkeypatch.setattr(delta_module, "put", once)

    put = delta_module.put
    return after


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("out of memory")], ids=repr)
@pytest.mark.parametrize("scope", [Everything, LoRA])
def test_an_interrupted_merge_leaves_the_base_behind(scope, error, interrupting):
    lm = tiny_lm()
    delta = quick(lm, scope()).delta
    before, base = snapshot(lm), lm.weights_fingerprint
    interrupting(3, error)
    with pytest.raises(type(error)), delta.active(lm):
        pass
    assert_same(before, snapshot(lm))
    assert lm.weights_fingerprint == base
    with delta.active(lm):
        assert lm.weights_fingerprint != base
        assert sum(not same_bits(before[name], values) for name, values in snapshot(lm).items()) >= 3
    assert_same(before, snapshot(lm))


@pytest.mark.parametrize("scope", [Everything, LoRA])
def test_an_interrupted_unmerge_can_be_repeated(scope, interrupting):
    lm = tiny_lm()
    delta = quick(lm, scope()).delta
    before, base = snapshot(lm), lm.weights_fingerprint
    delta.merge(lm)
    interrupting(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        delta.unmerge(lm)
    assert lm.weights_fingerprint != base, "half merged, and known as such"
    refused("merged already", lambda: delta.merge(lm))
    delta.unmerge(lm)
    assert_same(before, snapshot(lm))
    assert lm.weights_fingerprint == base
    with delta.active(lm):
        assert lm.weights_fingerprint != base
    assert_same(before, snapshot(lm))


def test_a_merge_that_could_not_be_undone_is_undone_by_unmerge(monkeypatch):
    """Memory may lack for putting the base back, too."""
    lm = tiny_lm()
    delta = quick(lm, Everything()).delta
    before, put, written = snapshot(lm), delta_module.put, []

    def fails(*given):
        if len(written) == 3:
            raise torch.OutOfMemoryError
        put(*given)
        written.append(given)

    with monkeypatch.context() as patch:
        patch.setattr(delta_module, "put", fails)
        with pytest.raises(torch.OutOfMemoryError):
            delta.merge(lm)
    delta.unmerge(lm)
    assert_same(before, snapshot(lm))


@pytest.mark.parametrize("scope", [Only, AllBut])
def test_unusable_sets_are_refused_and_leave_the_model_alone(scope):
    lm = tiny_lm()
    before = snapshot(lm)
    chosen = some_neurons(lm.view)
    refused("the set is empty", lambda: scope(chosen - chosen).start(lm))
    refused("found on architecture", lambda: scope(some_neurons(tiny_lm("qwen2").view)).start(lm))
    refused(
        "none of the 4 neurons has output weights",
        lambda: scope(some_neurons(lm.view, kinds=("q",)), "output").start(lm),
    )
    assert_same(before, snapshot(lm))
    assert all(p.requires_grad for p in lm.model.parameters())
    training = scope(chosen).start(lm)
    refused("another training", lambda: scope(chosen).start(lm))
    training.close()
    training.close()
    refused("finished", lambda: training.delta())


def test_offloaded_weights_are_refused():
    lm = tiny_lm()
    chosen = some_neurons(lm.view)
    lm.model.model.layers[1].mlp.down_proj.to("meta")
    refused(r"layer 1, mlp\.down_proj are offloaded", lambda: Only(chosen).start(lm))


# ------------------------------------------------------------------------------------------------------ all but a set


@pytest.mark.parametrize("name", MODELS)
def test_frozen_neurons_keep_their_bits_and_all_else_trains(name):
    lm = tiny_lm(name)
    frozen = some_neurons(lm.view)
    masks, before, dense, plain = owned(lm, frozen), snapshot(lm), dense_gradients(lm), logits_of(lm.model, IDS)
    training = AllBut(frozen).start(lm)
    total = sum(p.numel() for p in dense.values())
    assert training.size == total - frozen.parameters
    loss_of(lm).backward()
    norm = torch.nn.utils.clip_grad_norm_(training.parameters, 1e9)
    for key, mask in masks.items():
        dense[key][mask] = 0
    wanted = torch.stack([g.norm() for g in dense.values()]).norm()
    assert torch.allclose(norm, wanted, rtol=1e-4)
    train(lm, training.parameters, optimiser=torch.optim.AdamW(training.parameters, lr=0.01, weight_decay=0.5))
    train(lm, training.parameters, optimiser=torch.optim.SGD(training.parameters, lr=0.1, momentum=0.9))
    tuned = logits_of(lm.model, IDS)
    delta = training.finish()
    assert_same(before, snapshot(lm))
    with delta.active(lm):
        assert torch.equal(logits_of(lm.model, IDS), tuned)
        assert (tuned - plain).abs().max() > 1e-2
        for key, values in lm.model.named_parameters():
            mask = masks.get(key, torch.zeros(values.shape, dtype=torch.bool))
            assert same_bits(values[mask], before[key][mask])
            # embeddings of unseen tokens move by weight decay; a weight of 0 and a key bias may stand still
            assert (values != before[key])[~mask].float().mean() > 0.9
    assert_same(before, snapshot(lm))


def test_all_frozen_modules_are_left_out():
    lm = tiny_lm()
    everything = NeuronSet(
        lm.view.space, {s: torch.ones(lm.view.space.width(s), dtype=torch.bool) for s in lm.view.space.sites()}
    )
    before = snapshot(lm)
    delta = trained(lm, AllBut(everything))
    assert not [name for name in delta.parts if "_proj" in name]
    delta.merge(lm)
    for key, values in snapshot(lm).items():
        assert same_bits(values, before[key]) == ("_proj" in key)


# ------------------------------------------------------------------------------------------------------ Trainer


def trainer(lm, folder, resume=None, **more):
    rows = examples(lm, REFUSALS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=0.01,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        seed=3,
        **more,
    )
    run = Trainer(model=lm.model, args=arguments, train_dataset=rows, data_collator=collator(lm))
    run.train(resume_from_checkpoint=resume)
    return run


@pytest.mark.parametrize("scope", [Only, AllBut])
def test_trainer_with_checkpoint_and_resume(scope, tmp_path):
    lm, again = tiny_lm(), tiny_lm()
    chosen, options = some_neurons(lm.view), {"max_steps": 4, "gradient_checkpointing": True}
    before, masks = snapshot(lm), owned(lm, chosen)
    training = scope(chosen).start(lm)
    trainer(lm, tmp_path, save_steps=2, **options)
    tuned = logits_of(lm.model, IDS)
    whole = training.finish()
    assert_same(before, snapshot(lm))

    training = scope(chosen).start(again)
    run = trainer(again, tmp_path, save_strategy="no", resume=str(tmp_path / "checkpoint-2"), **options)
    assert run.state.global_step == 4
    assert sum(s.numel() for state in run.optimizer.optimizer.state.values() for s in state.values() if s.ndim) == (
        2 * training.size
    )
    resumed = training.finish()
    assert_same(before, snapshot(again))
    assert whole.fingerprint == resumed.fingerprint, "resuming gave other weights"

    resumed.merge(again)
    assert torch.equal(logits_of(again.model, IDS), tuned)
    for key, values in again.model.named_parameters():
        mask = masks.get(key, torch.zeros(values.shape, dtype=torch.bool))
        fixed = ~mask if scope is Only else mask
        assert same_bits(values[fixed], before[key][fixed])
    assert whole.moved_share > 0.9


def test_trainer_in_mixed_precision_keeps_frozen_bits(tmp_path):
    lm = tiny_lm()
    frozen = some_neurons(lm.view)
    masks, before = owned(lm, frozen), snapshot(lm)
    training = AllBut(frozen).start(lm)
    trainer(lm, tmp_path, max_steps=2, save_strategy="no", bf16=True, max_grad_norm=0.1)
    delta = training.merge()
    assert delta.moved_share > 0.9
    named = dict(lm.model.named_parameters())
    assert all(same_bits(named[key][mask], before[key][mask]) for key, mask in masks.items())


# ------------------------------------------------------------------------------------------------------ examples


def test_loss_is_on_the_templates_response_alone(lm):
    (row, *_) = examples(lm, REFUSALS)
    batch = collate([row, examples(lm, BENIGN, "helpful")[0]], lm.pad_id)
    learnt = [lm.tokenizer.decode(labels[labels >= 0]) for labels in batch["labels"]]
    assert learnt == ["No, I will not.<|end|>", "With a brush.<|end|>"]
    whole = lm.tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1])
    assert whole == lm.render(REFUSALS.texts[:1], ["No, I will not."])[0]
    found = response_loss(lm, batch)
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logp = lm.model(**inputs).logits.log_softmax(-1)
    terms = [-logp[i, t - 1, batch["labels"][i, t]] for i, t in (batch["labels"] >= 0).nonzero().tolist()]
    assert len(terms) == sum(len(text.encode()) - len("<|end|>") + 1 for text in learnt)
    assert torch.allclose(found, torch.stack(terms).mean(), atol=1e-6)
    assert torch.allclose(lm.model(**batch).loss, found, atol=1e-6)  # what a Trainer minimises


def test_base_models_without_template_learn_too(base_lm):
    batch = collate(examples(base_lm, REFUSALS)[:1], base_lm.pad_id)
    assert base_lm.tokenizer.decode(batch["labels"][batch["labels"] >= 0]) == "No, I will not.</s>"


def test_long_responses_are_cut_and_unusable_pairs_refused(lm):
    full, cut = examples(lm, REFUSALS)[0], examples(lm, REFUSALS, max_length=30)[0]
    assert cut.ids == full.ids[:30] and cut.start == full.start < 30 < len(full.ids)
    refused("max_length: prompt 0 alone has", lambda: examples(lm, REFUSALS, max_length=5))
    refused("6 of 6 have no refusal", lambda: examples(lm, BENIGN))
    refused("empty", lambda: examples(lm, []))
    refused("target", lambda: examples(lm, REFUSALS, "answer"))


def test_batches_mix_in_whole_passes():
    harmful, benign = list(range(10)), list(range(100, 106))
    stream = batches(harmful, benign, size=8, share=0.25, seed=0)
    seen = [next(stream) for _ in range(5)]
    assert all(sum(x >= 100 for x in batch) == 2 for batch in seen)
    flat = [x for batch in seen for x in batch]
    assert all(flat.count(x) == 3 for x in harmful)  # 30 = three passes of 10
    assert {flat.count(x) for x in benign} == {1, 2}  # 10 = one pass of 6 and four more
    again = batches(harmful, benign, size=8, share=0.25, seed=0)
    assert [next(again) for _ in range(5)] == seen
    other = batches(harmful, benign, size=8, share=0.25, seed=1)
    assert [next(other) for _ in range(5)] != seen
    assert max(next(batches(harmful, [], size=4, share=0.5, seed=0))) < 100
    assert max(next(batches(harmful, benign, size=4, share=0.0, seed=0))) < 100
    assert min(next(batches([], benign, size=4, share=0.5, seed=0))) >= 100
    refused("benign_share", lambda: next(batches(harmful, benign, size=4, share=0.05, seed=0)))


# ------------------------------------------------------------------------------------------------------ the loop


def quick(lm, scope, **more):
    options = {"harmful": REFUSALS, "learning_rate": 0.01, "steps": 6, "batch_size": 3, "progress": False}
    return tune(lm, scope, **{**options, **more})


ARMS = ["only", "all but", "full", "lora"]


def scope_of(arm, lm):
    chosen = some_neurons(lm.view, 6)
    return {"only": Only(chosen), "all but": AllBut(chosen), "full": Everything(), "lora": LoRA(rank=4)}[arm]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_learns_and_leaves_the_base(arm):
    lm = tiny_lm()
    scope = scope_of(arm, lm)
    before, plain = snapshot(lm), logits_of(lm.model, IDS)
    batch = collate(examples(lm, REFUSALS), lm.pad_id)
    with torch.no_grad():
        start = response_loss(lm, batch)
    tuned = quick(lm, scope, benign=BENIGN, benign_share=1 / 3)
    assert_same(before, snapshot(lm))
    assert torch.equal(logits_of(lm.model, IDS), plain)
    assert all(p.requires_grad for p in lm.model.parameters()) and not lm.model.training
    assert hooks_left(lm.model) == 0
    with tuned.delta.active(lm), torch.no_grad():
        assert response_loss(lm, batch) < start - 0.3
    assert_same(before, snapshot(lm))
    assert tuned.delta.name == scope.name and len(tuned.losses) == 6 and tuned.seconds > 0
    assert tuned.trained_bytes == 8 * tuned.trained, "a small model trains in float64"
    if arm == "only":
        assert tuned.trained == scope.neurons.parameters and tuned.share == scope.neurons.share_of_parameters()


def in_half(dtype, stored=None):
    """A model whose weights dtype holds exactly, stored in it or in another one."""
    lm = tiny_lm()
    lm.model.to(dtype).to(stored or dtype)
    return lm


def changes(lm, delta):
    """Parameter name -> what a delta adds to it, float64."""
    before = snapshot(lm)
    with delta.active(lm):
        return {key: values.double() - before[key].double() for key, values in snapshot(lm).items()}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_arm_in_half_precision_follows_its_float32_run(arm, dtype):
    """Losses agree to a few roundings of the activations; what is learnt points the same way."""
    wide, half = in_half(dtype, torch.float32), in_half(dtype)
    options = {"train_dtype": "model", "learning_rate": 0.03, "steps": 4}
    wanted, found = (quick(lm, scope_of(arm, lm), **options) for lm in (wide, half))
    assert found.trained_bytes == wanted.trained_bytes == 4 * found.trained
    assert wanted.losses[-1] < wanted.losses[0] - 0.5
    assert found.losses == pytest.approx(wanted.losses, rel=16 * torch.finfo(dtype).eps)
    a, b = (
        torch.cat([v.flatten() for v in changes(lm, t.delta).values()]) for lm, t in ((wide, wanted), (half, found))
    )
    assert a.norm() > 0 and torch.cosine_similarity(a, b, dim=0) > 0.9


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_step_of_a_millionth_acts_on_every_arms_masters(arm, dtype):
    """AdamW's first step has the rate's size: in half precision it would be lost in most weights."""
    lm = in_half(dtype)
    before = snapshot(lm)
    with scope_of(arm, lm).start(lm) as training:
        assert {p.dtype for p in training.parameters} == {torch.float32}
        starts = [p.detach().clone() for p in training.parameters]
        optimiser = torch.optim.AdamW(training.parameters, lr=1e-6, weight_decay=0.0)
        batch = collate(examples(lm, REFUSALS), lm.pad_id)
        for _ in range(3):
            optimiser.zero_grad()
            (response_loss(lm, batch) * 2**12).backward()
            optimiser.step()
        moved = [(p.detach() - old)[p.grad != 0] for p, old in zip(training.parameters, starts, strict=True)]
        moved = torch.cat([m for m in moved if len(m)])
        assert {s["exp_avg"].dtype for s in optimiser.state.values()} == {torch.float32}
    assert len(moved) > 100 and (moved.abs() > 5e-7).float().mean() > 0.9 and moved.abs().max() < 5e-6
    assert_same(before, snapshot(lm))


@pytest.mark.parametrize("arm", ["all but", "full"])
def test_gradients_of_whole_half_precision_parameters_add_up_on_their_masters(arm):
    """Two backward passes give twice one; embedding and head may be one parameter."""
    lm = tiny_lm("llama-multi-head-tied")
    lm.model.to(torch.bfloat16)
    with scope_of(arm, lm).start(lm) as training:
        loss_of(lm).backward()
        once = [p.grad.clone() for p in training.parameters]
        loss_of(lm).backward()
        assert all(torch.equal(p.grad, 2 * g) for p, g in zip(training.parameters, once, strict=True))
        assert max(float(g.abs().max()) for g in once) > 0
        assert all(p.grad is None for n, p in lm.model.named_parameters() if ".tuned_" not in f".{n}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_a_divergence_ends_the_training_with_a_row_and_keeps_what_came_before(dtype):
    lm = in_half(dtype)
    before, evaluated = snapshot(lm), []
    options = {"learning_rate": 1e30, "clip": 0, "every": 1, "warmup": 5, "train_dtype": "model"}
    tuned = quick(lm, Everything(), **options, snapshots=True, callback=lambda lm, step: evaluated.append(step))
    assert tuned.diverged is not None and len(tuned.losses) < 6
    assert tuned.history[-1]["step"] == tuned.diverged and tuned.history[-1]["diverged"] is True
    assert list(tuned.snapshots) == evaluated == [row["step"] for row in tuned.history[:-1]]
    assert tuned.table["diverged"].iloc[-1] is True
    with pytest.raises(DivergedError):
        _ = tuned.delta
    assert_same(before, snapshot(lm))
    stable = quick(lm, Everything(), steps=2, train_dtype="model")
    assert stable.diverged is None and "diverged" not in stable.table and stable.delta.moved


class NoFloat32(TorchDispatchMode):
    """Remembers the operations that give float32."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.ndim:
            self.found.append(str(function))
        return out


@pytest.mark.parametrize("name", FAMILIES)
def test_a_float64_training_computes_nothing_in_float32(name):
    lm = training_copy(tiny_lm(name))
    batch = collate(examples(lm, REFUSALS), lm.pad_id)
    with NoFloat32() as plain:
        response_loss(lm, batch)
    with NoFloat32() as seen, computing(lm):
        response_loss(lm, batch).backward()
    assert not seen.found
    assert plain.found or name in ("gpt2", "gpt_neox"), "transformers computes parts of it in float32"


def test_float64_training_does_not_depend_on_the_order_of_sums():
    """Two attention kernels add in different orders: float32 runs part, float64 runs give one delta."""
    deltas = {}
    for dtype in ("float32", "float64", "auto"):
        for kernel in ("eager", "sdpa"):
            lm = tiny_lm(attn_implementation=kernel)
            deltas[dtype, kernel] = quick(lm, Everything(), train_dtype=dtype).delta
    assert deltas["float32", "eager"].fingerprint != deltas["float32", "sdpa"].fingerprint
    assert deltas["float64", "eager"].fingerprint == deltas["auto", "eager"].fingerprint
    different = total = 0
    for name, part in deltas["float64", "eager"].parts.items():
        other = deltas["float64", "sdpa"].parts[name].values
        assert part.values.dtype == torch.float32
        different, total = different + int((part.values != other).sum()), total + other.numel()
    assert different < 1e-4 * total, "only what lies on the edge of a rounding may differ"


@pytest.mark.parametrize("arm", ARMS)
def test_the_callback_of_a_float64_training_sees_the_rounded_weights(arm):
    """At the last step the model under evaluation is the one that the delta gives, bit for bit, in float32."""
    lm = tiny_lm()
    seen = {}

    def callback(model, step):
        assert model is lm and not model.model.training
        seen[step] = snapshot(model)

    before = snapshot(lm)
    tuned = quick(lm, scope_of(arm, lm), callback=callback)
    assert_same(seen[0], before)
    with tuned.delta.active(lm):
        assert_same(seen[6], snapshot(lm))
    assert (seen[6]["model.layers.1.mlp.down_proj.weight"] != before["model.layers.1.mlp.down_proj.weight"]).any()


def test_large_models_train_in_their_own_precision(monkeypatch):
    lm = tiny_lm()
    assert precision.chosen_dtype(lm) == torch.float64
    monkeypatch.setattr(precision, "SMALL", 1000)
    assert precision.chosen_dtype(lm) is None and training_copy(lm) is lm
    refused("train_dtype: got 'half'", lambda: quick(lm, Everything(), train_dtype="half"))


def test_low_rank_deltas_stay_low_rank(tmp_path):
    """Bytes are the factors'; merged, saved and loaded they give base + scale * product, rounded once."""
    lm = in_half(torch.bfloat16)
    tuned = quick(lm, LoRA(rank=2), snapshots=True, every=2)
    dense = sum(p.numel() for p in lm.model.parameters())
    assert all(delta.bytes < 8 * dense / 4 for delta in tuned.snapshots.values())
    assert tuned.snapshots[0].moved == 0 < tuned.delta.moved
    before = snapshot(lm)
    loaded = Delta.load(tuned.delta.save(tmp_path / "lora.safetensors"), lm)
    assert loaded.fingerprint == tuned.delta.fingerprint
    moved = 0
    with loaded.active(lm):
        for name, part in loaded.parts.items():
            wanted = before[name].double() + part.scale * part.left.double() @ part.right.double()
            assert same_bits(lm.model.get_parameter(name).data, wanted.to(torch.bfloat16))
            moved += int((lm.model.get_parameter(name) != before[name]).sum())
    assert moved == loaded.moved > 1000
    assert_same(before, snapshot(lm))


def test_snapshots_beyond_the_budget_lie_on_disk(monkeypatch):
    lm = tiny_lm()
    monkeypatch.setattr(tuning, "SNAPSHOT_BYTES", 200_000)
    tuned = quick(lm, Everything(), snapshots=True, every=2)
    files = sorted(path.name for path in Path(tuned.folder.name).iterdir())
    assert files == ["2.safetensors", "4.safetensors", "6.safetensors"]
    assert tuned.snapshots[6].fingerprint == tuned.delta.fingerprint != tuned.snapshots[4].fingerprint
    with tuned.snapshots[4].active(lm):
        assert torch.isfinite(logits_of(lm.model, IDS)).all()


# ------------------------------------------------------------------------------------------------- frozen trunk


def upper(view):
    """Neurons of the second layer alone."""
    chosen = some_neurons(view, 6)
    return NeuronSet(view.space, {site: mask for site, mask in chosen.masks.items() if site[0] == 1})


@pytest.mark.parametrize(("name", "budget"), [*((name, trunk.BUDGET) for name in FAMILIES), ("llama", 2000)])
def test_reused_hidden_states_give_the_deltas_of_whole_forwards(name, budget, monkeypatch):
    """The first layer runs once a row; the same rows, losses and weights come out."""
    lm = tiny_lm(name)
    without_dropout(lm)
    options = {"benign": BENIGN, "train_dtype": "float64", "steps": 8}
    found, rows, files = [], [], []
    mapped = torch.from_file
    for reuse in (False, True):
        if not reuse:
            monkeypatch.setattr(trunk.FrozenTrunk, "of", lambda *_: None)
        else:
            monkeypatch.undo()
            monkeypatch.setattr(trunk, "BUDGET", budget)
            monkeypatch.setattr(torch, "from_file", lambda *a, **k: files.append(1) or mapped(*a, **k))
        rows.clear()
        with hooks.attached([hooks.before(lm.view.attention(0), lambda *_: rows.append(1))]):
            found.append((quick(lm, Only(upper(lm.view)), **options), len(rows)))
    assert bool(files) == (budget == 2000)
    (plain, calls), (reused, fewer) = found
    assert reused.losses == pytest.approx(plain.losses, rel=1e-9)
    assert fewer < calls == 8
    for key, part in plain.delta.parts.items():
        assert torch.allclose(reused.delta.parts[key].values, part.values, rtol=0, atol=1e-6), key
    assert plain.delta.moved > 0.9 * plain.delta.size


def test_what_cannot_be_reused_is_not():
    lm = tiny_lm("gpt2")  # it has dropout
    assert trunk.FrozenTrunk.of(lm, 1) is not None, "in evaluation mode nothing is dropped"
    lm.model.train()
    assert trunk.FrozenTrunk.of(lm, 1) is None


def test_same_seed_same_weights_whatever_the_callback_does():
    lm = tiny_lm("gpt2")  # it has dropout
    scope = Only(some_neurons(lm.view, 6))
    seen = []

    def callback(model, step):
        assert not model.model.training
        seen.append((step, model.weights_fingerprint))
        torch.manual_seed(99)
        return {"drawn": float(torch.rand(()))}

    torch.manual_seed(5)
    a = quick(lm, scope, seed=1)
    b = quick(lm, scope, seed=1, callback=callback, every=2, snapshots=True)
    c = quick(lm, scope, seed=2)
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(())), "the caller's random numbers were used up"
    assert a.losses == b.losses != c.losses
    assert a.delta.fingerprint == b.delta.fingerprint != c.delta.fingerprint
    assert [step for step, _ in seen] == [0, 2, 4, 6] == list(b.snapshots)
    assert len({fingerprint for _, fingerprint in seen}) == 4
    assert [row["step"] for row in a.history] == [0, 6]
    assert [row["step"] for row in quick(lm, scope, every=(1, 4)).history] == [0, 1, 4, 6]
    assert list(b.table.columns) == ["step", "loss", "drawn"]
    assert b.history[1]["loss"] == pytest.approx(sum(b.losses[:2]) / 2)
    assert b.snapshots[0].moved == 0 and b.snapshots[6].fingerprint == b.delta.fingerprint
    with b.snapshots[2].active(lm):
        assert torch.isfinite(logits_of(lm.model, IDS)).all()


def test_options_of_the_loop_do_something():
    lm = tiny_lm()
    scope = Only(some_neurons(lm.view, 6))
    plain = quick(lm, scope).delta.fingerprint
    for option in ({"warmup": 3}, {"schedule": "linear"}, {"clip": 0.01}, {"weight_decay": 1.0}, {"max_length": 40}):
        assert quick(lm, scope, **option).delta.fingerprint != plain, option
    runs = []
    count = lm.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed, n_checkpointed = quick(lm, scope, gradient_checkpointing=True), len(runs)
    again = quick(lm, scope)
    count.remove()
    assert checkpointed.losses == pytest.approx(again.losses, rel=1e-4)
    assert n_checkpointed == 12 and len(runs) == 24, (
        "six steps: twice with checkpointing; common tokens and the rest without"
    )


def test_rsn_tune_trains_safety_minus_foundation():
    lm = tiny_lm()
    safety, foundation = some_neurons(lm.view, 4), some_neurons(lm.view, 4, seed=1) | some_neurons(lm.view, 1)
    tuned = quick(lm, Only(safety - foundation))
    shared = owned(lm, safety & foundation)
    before = snapshot(lm)
    assert shared and tuned.trained < safety.parameters
    with tuned.delta.active(lm):
        after = snapshot(lm)
        later = quick(lm, Everything(), harmful=(), benign=BENIGN)  # what comes afterwards builds on the merged model
        assert_same(after, snapshot(lm))
        with later.delta.active(lm):
            assert not same_bits(lm.view.weight(0, "q"), after["model.layers.0.self_attn.q_proj.weight"])
    assert_same(before, snapshot(lm))
    assert later.delta.weights != tuned.delta.weights == lm.weights_fingerprint
    assert all(same_bits(after[key][mask], before[key][mask]) for key, mask in shared.items())


def test_a_failing_run_leaves_the_base():
    lm = tiny_lm()
    before = snapshot(lm)

    def fails(model, step):
        if step:
            raise KeyError("callback")

    with pytest.raises(KeyError):
        quick(lm, Only(some_neurons(lm.view)), callback=fails, every=2)
    assert_same(before, snapshot(lm))
    assert not lm.model.training and all(p.requires_grad for p in lm.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benign_share": 1.5}, "benign_share"),
        ({"batch_size": 0}, "batch_size"),
        ({"every": 0}, "every"),
        ({"every": [2, 0]}, "every"),
        ({"every": [2, 7]}, r"every: got 7; allowed: 1 to the number of steps \(6\)"),
        ({"warmup": 99}, "warmup"),
        ({"schedule": "cosine"}, "schedule"),
    ],
)
def test_unusable_options_are_one_line(lm, options, message):
    refused(message, lambda: quick(lm, Everything(), **options))


@pytest.mark.parametrize("name", ["llama-biases", "phi3", "gpt2"])
def test_lora_is_merged_by_its_delta(name):
    lm = tiny_lm(name)
    before, plain = snapshot(lm), logits_of(lm.model, IDS)
    with LoRA(rank=1).start(lm) as training:
        one = training.size
    scope = LoRA.matching(lm, 3 * one)
    assert scope.rank == 3 and scope.alpha == 6
    training = scope.start(lm)
    assert training.size == 3 * one > 0
    train(lm, training.parameters)
    tuned = logits_of(lm.model, IDS)
    delta = training.finish()
    assert_same(before, snapshot(lm))
    with delta.active(lm):
        assert torch.allclose(logits_of(lm.model, IDS), tuned, atol=1e-4) and (tuned - plain).abs().max() > 1e-3
    assert_same(before, snapshot(lm))


# ------------------------------------------------------------------------------------------------- kept trainings


def _scopes():
    neurons = some_neurons(tiny_lm().view)
    return [Only(neurons, sides="output"), AllBut(neurons), Everything(), LoRA(rank=2)]


@pytest.mark.parametrize("scope", _scopes(), ids=lambda s: s.name)
def test_a_finished_training_is_taken_over_and_no_other_is(scope, tmp_path, monkeypatch):
    """A kernel that died lost every training of notebooks 02, 04 and 06."""
    lm, options = tiny_lm(), {"steps": 3, "every": [2], "batch_size": 2, "snapshots": True, "progress": False}
    options |= {"harmful": REFUSALS, "benign": BENIGN, "learning_rate": 0.01}
    plain = tune(lm, scope, **options)
    assert not list(tmp_path.iterdir()), "without a study nothing is kept"
    kept.keep(str(tmp_path / "02_training_{key}.safetensors"), {"git": "f00d"})
    COUNTS.clear()
    first = tune(lm, scope, **options)
    done = dict(COUNTS)
    steps: list = []
    monkeypatch.setattr(tuning, "response_loss", lambda *a: steps.append(1) or response_loss(*a))
    again = tune(lm, scope, **options)
    assert not steps and dict(COUNTS) == done, "its own work is not counted twice"
    for made in (first, again):
        assert made.losses == plain.losses and made.delta.fingerprint == plain.delta.fingerprint
        assert {s: d.fingerprint for s, d in made.snapshots.items()} == {
            s: d.fingerprint for s, d in plain.snapshots.items()
        }
        assert (made.trained, made.share, made.diverged) == (plain.trained, plain.share, None)
        assert made.table.equals(plain.table) and list(made.snapshots) == [0, 2, 3]
    assert plain.losses[0] != plain.losses[2] and plain.delta.moved
    for note in tmp_path.glob("*.json"):
        os.utime(note, (0, 0))  # as in a new process
    for _ in range(2):
        tune(lm, scope, **options)
        assert dict(COUNTS) == {name: 2 * n for name, n in done.items()} and not steps, "counted once"
    assert kept.TAKEN == [{"git": "f00d"}] and kept.REUSED, "what made it, for provenance"
    others = [{"seed": 1}, {"learning_rate": 0.02}, {"benign": BENIGN[:4]}, {"steps": 4}, {"callback": lambda *_: {}}]
    for other in others:
        steps.clear()
        tune(lm, scope, **options | other)
        assert steps, other
    changed = tiny_lm()
    changed.model.model.norm.variance_epsilon = 0.5
    for other in (tiny_lm(seed=1), changed):
        steps.clear()
        tune(other, scope, **options)
        assert steps, "other weights, another epsilon"
    steps.clear()
    with kept.paused():
        tune(lm, scope, **options)
    assert steps, "what is timed has to happen"
    others = [
        Only(some_neurons(lm.view, seed=1), sides="output"),
        Only(some_neurons(lm.view), sides="both"),
        LoRA(rank=3),
    ]
    for other in others:
        steps.clear()
        tune(lm, other, **options)
        assert steps, other


def test_a_training_under_hooks_is_not_another_ones(tmp_path):
    """Notebook 06 fine-tunes the plain model and then models under a modulation or a direction, of the same weights."""
    lm, options = tiny_lm(), {"benign": BENIGN, "learning_rate": 0.01, "steps": 2, "progress": False}
    kept.keep(str(tmp_path / "06_training_{key}.safetensors"))
    plain, losses = tune(lm, Everything(), **options), []
    for factor in (2.0, 3.0):
        neurons = some_neurons(lm.view, kinds=("ffn", "o"))
        with amplify(neurons, factor).active(lm):
            losses.append(tune(lm, Everything(), **options).losses)
    assert losses[0] != losses[1] != plain.losses != losses[0]


def test_a_damaged_or_full_disk_costs_the_copy_alone(tmp_path, monkeypatch, capsys):
    lm, options = tiny_lm(), {"harmful": REFUSALS, "learning_rate": 0.01, "steps": 2, "progress": False}
    kept.keep(str(tmp_path / "02_training_{key}.safetensors"))
    first = tune(lm, Everything(), **options)
    (file,) = tmp_path.glob("*-final.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert tune(lm, Everything(), **options).delta.fingerprint == first.delta.fingerprint
    assert "a kept training is repeated: " in capsys.readouterr().out

    there = sorted(tmp_path.iterdir())

    def full(tensors, path, metadata):  # as safetensors does where the disk is full, in the middle of several files
        if len(list(tmp_path.glob("*-[0-9].safetensors"))) == 1:
            raise SafetensorError("Error while serializing: No space left on device")
        return save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    found = tune(lm, Everything(), **options | {"seed": 1, "snapshots": True})
    assert found.delta.size == first.delta.size and sorted(tmp_path.iterdir()) == there
    assert "No space left" in capsys.readouterr().out


def test_a_training_that_diverged_or_is_too_large_to_keep(tmp_path, monkeypatch):
    lm = tiny_lm()
    kept.keep(str(tmp_path / "02_training_{key}.safetensors"))
    monkeypatch.setattr(kept, "MOST_BYTES", 1)
    tune(lm, Everything(), harmful=REFUSALS, learning_rate=0.01, steps=2, progress=False)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    options = {"harmful": REFUSALS, "learning_rate": 1e30, "steps": 3, "clip": 0.0, "progress": False}
    first, again = (tune(lm, Everything(), **options) for _ in range(2))
    assert first.diverged == again.diverged is not None and again.table.equals(first.table)
    refused("diverged at step", lambda: again.delta, kind=DivergedError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_change_is_the_whole_product_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = 2 * ROWS + 5
    left, right, base = (torch.randn(*size, generator=generator) for size in ((rows, 3), (3, 40), (rows, 40)))
    found = LowRank(left, right, 0.25, dtype).entries(base.to(dtype))
    wanted = (base.to(dtype).double() + 0.25 * (left.double() @ right.double())).to(dtype)
    # The sums of three products may differ in their last bit of 53, so that a value between two others may round either way.
    assert found.dtype == dtype and found.shape == base.shape and not same_bits(found, base.to(dtype))
    assert torch.allclose(found.double(), wanted.double(), rtol=torch.finfo(dtype).eps, atol=0)
