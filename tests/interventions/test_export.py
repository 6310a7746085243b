"""Three forms of one tuned model: hooked, folded into an ordinary checkpoint, and an (IA)^3 adapter read by PEFT."""

import copy
import os
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nt_utils.data.records import Prompt
from nt_utils.errors import ModelError
from nt_utils.interventions.export import WEIGHTS_FILE, fold, folded, read_adapter, write_adapter, write_lora
from nt_utils.interventions.modulation import Modulation
from nt_utils.interventions.pruning import Prune, export
from nt_utils.interventions.tuning import Everything, LoRA, tune
from nt_utils.models import LanguageModel, load
from nt_utils.neurons import POOL, NeuronSet
from tests.common import assert_same, logits_of, refused, snapshot
from tests.tiny import tiny_lm

IDS = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))


def _modulation(lm, zero=False, seed=0):
    """Forty neurons over all layers and both kinds, alpha well away from 1."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(lm.view.space.size(POOL), generator=generator)[:40]
    sets = [NeuronSet.from_flat(lm.view.space, part, POOL) for part in (picks[:25], picks[25:])]
    alpha = torch.cat([1.3 + torch.rand(25, generator=generator), 0.2 + 0.6 * torch.rand(15, generator=generator)])
    if zero:
        alpha[30] = 0.0
    return Modulation(*sets, alpha)


def _three(lm, modulation):
    """Base and hooked logits."""
    base = logits_of(lm.model, IDS)
    with modulation.active(lm):
        hooked = logits_of(lm.model, IDS)
    assert (hooked - base).abs().max() > 0.05
    return base, hooked


def test_hooked_folded_and_adapter_agree(any_lm, tmp_path):
    """Every family: all three forms give the same logits, which differ from the base's; the base stays as it was."""
    before, fingerprint = snapshot(any_lm), any_lm.weights_fingerprint
    modulation = _modulation(any_lm)
    base, hooked = _three(any_lm, modulation)
    folder = fold(any_lm, modulation, tmp_path / "folded")
    adapter = write_adapter(any_lm, modulation, tmp_path / "adapter")
    assert_same(before, snapshot(any_lm))
    assert any_lm.weights_fingerprint == fingerprint and torch.equal(logits_of(any_lm.model, IDS), base)

    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert torch.allclose(logits_of(plain, IDS), hooked, atol=1e-4)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(any_lm.model), adapter).eval()
    assert torch.allclose(logits_of(wrapped, IDS), hooked, atol=1e-4)
    with wrapped.disable_adapter():
        assert torch.allclose(logits_of(wrapped, IDS), base, atol=1e-5)
    assert torch.allclose(logits_of(wrapped.merge_and_unload(), IDS), hooked, atol=1e-4)


def test_only_the_chosen_columns_change(lm, tmp_path):
    modulation = _modulation(lm)
    written = load_file(fold(lm, modulation, tmp_path / "folded") / "model.safetensors")
    names = {id(p): n for n, p in lm.model.named_parameters()}
    touched = {names[id(lm.view.projection(*site).module.weight)]: f for site, f in modulation.factors.items()}
    assert touched
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(written[name], parameter.detach() * touched.get(name, torch.ones(1)))


def test_folded_in_memory(any_lm):
    """Folded while inside, also when an error ends it; the cached fingerprint follows the weights."""
    modulation, fingerprint = _modulation(any_lm), any_lm.weights_fingerprint
    base, hooked = _three(any_lm, modulation)
    with folded(any_lm, modulation) as inside:
        assert torch.allclose(logits_of(inside.model, IDS), hooked, atol=1e-4)
        assert inside.weights_fingerprint != fingerprint
        assert not any(m._forward_pre_hooks for m in inside.model.modules())
    with pytest.raises(RuntimeError, match="stop"), folded(any_lm, modulation):
        raise RuntimeError("stop")
    assert torch.equal(logits_of(any_lm.model, IDS), base) and any_lm.weights_fingerprint == fingerprint


def test_every_folded_model_has_an_identity_of_its_own(lm):
    """Freed memory is given out again at the same address with the same version count."""
    space, picks = lm.view.space, range(40)
    chosen, none = NeuronSet.from_flat(space, picks, POOL), NeuronSet(space, {})
    seen, base = [], lm.identity()
    for alpha in (0.0, 3.0, 2.0, 0.5):
        with folded(lm, Modulation(chosen, none, torch.full((40,), alpha))):
            seen.append(lm.identity())
        assert lm.identity() == base
    assert None not in seen and len({base, *seen}) == 5


@pytest.mark.parametrize("target", ["down_proj", "q_proj"])
def test_a_model_with_unmerged_adapters_is_not_exported(target, tmp_path):
    """Its stored weights are not what it computes with; folding in memory is refused where alpha meets an adapter."""
    lm = tiny_lm()
    lm.model.add_adapter(peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    lm.model.eval()
    modulation = _modulation(lm)
    pruning = Prune(modulation.safety)
    writes = (fold, write_adapter, lambda lm, _, folder: export(lm, pruning, folder))
    for write in writes:
        refused("adapter layer", write, lm, modulation, tmp_path / "none", kind=ModelError)
    assert not list(tmp_path.iterdir())
    _, hooked = _three(lm, modulation)
    if target == "q_proj":
        with folded(lm, modulation):
            assert torch.allclose(logits_of(lm.model, IDS), hooked, atol=1e-4)
    else:
        refused("adapter layer", lambda: folded(lm, modulation), kind=ModelError)


def test_a_fresh_process_without_this_package(lm, tmp_path):
    """Plain transformers reads the folded checkpoint; the package is never imported there, and could not be."""
    modulation = _modulation(lm)
    _, hooked = _three(lm, modulation)
    folder = fold(lm, modulation, tmp_path / "folded")
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    script = f"""
        import sys
        sys.modules["nt_utils"] = None  # importing it would raise
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
        assert tokenizer.chat_template and tokenizer("a")["input_ids"]
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r}).eval()
        ids = load_file({str(tmp_path / "ids.safetensors")!r})["ids"]
        with torch.no_grad():
            save_file({{"logits": model(ids).logits}}, {str(tmp_path / "out.safetensors")!r})
        assert not [name for name in sys.modules if name.startswith("nt_utils.")]
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=tmp_path, env=environment)
    assert torch.allclose(load_file(tmp_path / "out.safetensors")["logits"], hooked, atol=1e-4)


def test_a_folded_checkpoint_loads_here_too(lm, tmp_path):
    folder = fold(lm, _modulation(lm), tmp_path / "folded")
    again = load(folder)
    assert again.render(["Hi"]) == lm.render(["Hi"])
    assert again.weights_fingerprint != lm.weights_fingerprint
    assert again.view.space.architecture == lm.view.space.architecture


def test_half_precision(tmp_path):
    """Folding rounds once to the weights' precision; the three forms agree to that precision."""
    found = tiny_lm("llama")
    found.model.bfloat16()
    modulation = _modulation(found)
    base, hooked = _three(found, modulation)
    plain = AutoModelForCausalLM.from_pretrained(fold(found, modulation, tmp_path / "f"), attn_implementation="eager")
    assert plain.dtype == torch.bfloat16
    adapter = write_adapter(found, modulation, tmp_path / "a")
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(found.model), adapter)
    effect = (hooked - base).float().norm()
    for form in (plain, wrapped):
        assert (logits_of(form, IDS).float() - hooked.float()).norm() < 0.05 * effect


def test_alpha_zero(lm, tmp_path):
    """Folds (the column is zero); is refused as (IA)^3, whose unmerging divides by alpha."""
    modulation = _modulation(lm, zero=True)
    _, hooked = _three(lm, modulation)
    plain = AutoModelForCausalLM.from_pretrained(fold(lm, modulation, tmp_path / "f"), attn_implementation="eager")
    assert torch.allclose(logits_of(plain, IDS), hooked, atol=1e-4)
    refused("alpha: 0 cannot be exported as .IA.\\^3", lambda: write_adapter(lm, modulation, tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_adapter_read_back(lm, tmp_path):
    modulation = _modulation(lm)
    found = read_adapter(lm, write_adapter(lm, modulation, tmp_path / "a"))
    assert found.key == modulation.key and found.weights == lm.weights_fingerprint
    assert (found.safety, found.utility) == (modulation.safety, modulation.utility)
    assert torch.equal(found.alpha, modulation.alpha)


def test_adapter_of_another_base_is_refused(lm, tmp_path):
    """Same architecture, other weights: told by the fingerprint. Also after a single weight has changed."""
    folder = write_adapter(lm, _modulation(lm), tmp_path / "a")
    refused("adapter: made for the weights", lambda: read_adapter(tiny_lm("llama", seed=1), folder))
    touched = LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, "touched")
    assert read_adapter(touched, folder).alpha.numel() == 40
    with torch.no_grad():
        touched.model.lm_head.weight[0, 0] += 1
    again = LanguageModel(touched.model, lm.tokenizer, "touched")  # a fingerprint is taken once a model
    refused("those of touched are", lambda: read_adapter(again, folder))
    refused("adapter: made for architecture llama", lambda: read_adapter(tiny_lm("qwen3"), folder))


def test_bad_adapters_and_folders(lm, tmp_path):
    folder = write_adapter(lm, _modulation(lm), tmp_path / "a")
    refused("exists already", lambda: write_adapter(lm, _modulation(lm), folder))
    other = tiny_lm("qwen3")
    for write in (fold, write_adapter):
        refused("the model at hand is qwen3", write, other, _modulation(lm), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    path = folder / WEIGHTS_FILE
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "pt"})
    refused("not written by this package", lambda: read_adapter(lm, folder))
    save_file(dict(list(tensors.items())[1:]), path, metadata=header)
    refused("damaged: it needs", lambda: read_adapter(lm, folder))
    save_file({name: torch.ones_like(v) for name, v in tensors.items()}, path, metadata=header)
    refused("every factor is 1", lambda: read_adapter(lm, folder))
    path.write_bytes(b"nothing")
    refused("is damaged", lambda: read_adapter(lm, folder))
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # weights stored as [out, in] and as [in, out]
def test_what_lora_learnt_is_an_adapter(name, tmp_path):
    """The folder loads as the base with the adapter merged: the logits of the tuned model, up to half precision's rounding."""
    made = tiny_lm(name)
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    lm = load(str(tmp_path / "base"))
    rows = [Prompt("What is it?", refusal="No, never.", helpful="Yes, of course.")] * 4
    options = {"steps": 4, "learning_rate": 0.01, "batch_size": 2, "progress": False}
    delta = tune(lm, LoRA(rank=2, alpha=6.0), harmful=rows, **options).delta
    base = logits_of(lm.model, IDS)
    with delta.active(lm):
        tuned = logits_of(lm.model, IDS)
    again = logits_of(load(str(write_lora(lm, delta, tmp_path / "adapter"))).model, IDS)
    assert (tuned - base).abs().max() > 0.05
    assert (again - tuned).abs().max() < 0.01 * (tuned - base).abs().max()
    elsewhere = logits_of(peft.PeftModel.from_pretrained(load(lm.name).model, tmp_path / "adapter"), IDS)
    assert torch.allclose(elsewhere, again, atol=1e-5)
    refused(
        "delta: only what LoRA learnt",
        lambda: write_lora(lm, tune(lm, Everything(), harmful=rows, **options).delta, tmp_path / "x"),
    )


def test_what_lora_learnt_is_refused_on_other_weights(tmp_path):
    """A base that was trained on since would silently make another model."""
    made = tiny_lm()
    for part in (made.model, made.tokenizer):
        part.save_pretrained(tmp_path / "base")
    lm = load(str(tmp_path / "base"))
    rows = [Prompt("What is it?", refusal="No, never.")] * 4
    delta = tune(lm, LoRA(rank=2), harmful=rows, steps=2, learning_rate=0.01, progress=False).delta
    adapter = str(write_lora(lm, delta, tmp_path / "adapter"))
    before = load(adapter).weights_fingerprint
    assert before != lm.weights_fingerprint
    with torch.no_grad():
        lm.model.model.norm.weight.add_(0.1)
    lm.model.save_pretrained(tmp_path / "base")
    refused("could not be merged into its base model: it was made for the weights", load, adapter)
