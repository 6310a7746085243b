"""What acts on the output is in the key, or nothing is cached."""

import contextlib
import copy
import datetime

import pytest
import torch
from peft import LoraConfig
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrizations
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nt_utils import hooks, models
from nt_utils.models import identity
from tests.tiny import CONFIGS, tiny_lm, tiny_tokenizer


def weight(lm):
    return lm.model.model.layers[0].mlp.down_proj.weight


def swap_columns(lm):
    weight(lm).data[:, :2] = weight(lm).data[:, [1, 0]].clone()


def swap_rows(lm):
    weight(lm).data[:2] = weight(lm).data[[1, 0]].clone()


@pytest.mark.parametrize(
    "change",
    [
        lambda lm: weight(lm).data.mul_(1.01),
        lambda lm: weight(lm).data[0, 0].add_(1e-6),
        lambda lm: setattr(weight(lm), "data", weight(lm).data * 1.01),
        lambda lm: weight(lm).data.numpy().__setitem__((0, 0), 1.0),
        swap_rows,
        lambda lm: torch.no_grad()(lambda: weight(lm).add_(1))(),
        lambda lm: setattr(lm.model.model.layers[0].mlp.down_proj, "weight", torch.nn.Parameter(weight(lm) * 2)),
        lambda lm: lm.model.lm_head.weight.data[-1, -1].add_(1),
        lambda lm: lm.model.to(torch.bfloat16),
    ],
    ids=["data", "one bit", "data replaced", "numpy", "rows", "in place", "parameter", "last entry", "dtype"],
)
def test_a_write_by_whatever_way_changes_the_fingerprint_to_that_of_a_fresh_model(change):
    lm = tiny_lm("llama")
    before = lm.weights_fingerprint
    change(lm)
    after = lm.weights_fingerprint
    assert after != before
    assert after == models.LanguageModel(copy.deepcopy(lm.model), lm.tokenizer, "fresh").weights_fingerprint


def test_memory_that_is_given_out_again_is_not_taken_for_the_same_weights():
    """Storages of the same size follow each other at one address; each round has weights of its own."""
    lm = tiny_lm("llama")
    original = weight(lm).data
    found = set()
    for factor in (1.0, 2.0, 3.0, 4.0, 5.0):
        weight(lm).data = original * factor
        found.add(lm.weights_fingerprint)
        weight(lm).data = original
    assert len(found) == 5
    assert lm.weights_fingerprint in found


def test_the_fingerprint_of_known_weights_comes_back_without_hashing(monkeypatch):
    lm = tiny_lm("llama")
    base, kept = lm.weights_fingerprint, weight(lm).detach().clone()
    with torch.no_grad():
        weight(lm).mul_(2)
    hashed = []
    true_hash = identity._hash
    monkeypatch.setattr(identity, "_hash", lambda tensor: hashed.append(1) or true_hash(tensor))
    assert lm.weights_fingerprint != base and len(hashed) == 1, "only what changed is hashed again"
    with torch.no_grad():
        weight(lm).copy_(kept)
    lm.weights_changed(known=base)
    assert lm.weights_fingerprint == base and len(hashed) == 1
    lm.weights_changed()
    assert lm.weights_fingerprint == base and len(hashed) > 10


def test_tied_and_offloaded_weights_are_followed():
    import accelerate

    lm = tiny_lm("llama-multi-head-tied")
    plain = lm.weights_fingerprint
    accelerate.cpu_offload(lm.model, execution_device=torch.device("cpu"))
    assert lm.model.model.layers[0].mlp.down_proj.weight.is_meta and lm.weights_fingerprint == plain
    lm.model.model.layers[0].mlp.down_proj._hf_hook.weights_map["weight"].mul_(2)
    assert lm.weights_fingerprint != plain


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_as_loaded_has_an_identity_that_only_depends_on_what_it_is(name):
    lm, again = tiny_lm(name), tiny_lm(name)
    first = lm.identity()
    assert first is not None and first == again.identity()
    with torch.no_grad():
        lm.model(torch.arange(1, 60)[None], use_cache=False)
    assert lm.identity() == first, "a forward pass is no change"
    assert len({first, tiny_lm(name, seed=1).identity(), lm.identity("steered"), lm.identity("pruned")}) == 4


CHANGES = {
    "system prompt": lambda lm: lm.set_system_prompt("Be kind."),
    "date": lambda lm: lm.set_date("2025-01-01"),
    "template": lambda lm: setattr(lm.tokenizer, "chat_template", lm.tokenizer.chat_template + " "),
    "template arguments": lambda lm: lm.template_arguments.update(enable_thinking=True),
    "tokenizer": lambda lm: lm.tokenizer.add_tokens(["another"]),
    "attention": lambda lm: setattr(lm.model.config, "_attn_implementation", "sdpa"),
    "config": lambda lm: setattr(lm.model.config, "rms_norm_eps", 1e-3),
    "generation config": lambda lm: setattr(lm.model.generation_config, "eos_token_id", 7),
    "epsilon": lambda lm: setattr(lm.model.model.norm, "variance_epsilon", 0.5),
    "scale of attention": lambda lm: setattr(lm.model.model.layers[0].self_attn, "scaling", 0.5),
    "buffer": lambda lm: lm.model.model.rotary_emb.inv_freq.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_else_acts_on_the_output_is_in_the_identity(change):
    lm = tiny_lm("llama")
    lm.tokenizer = copy.deepcopy(tiny_tokenizer())
    before = lm.identity()
    assert before == tiny_lm("llama").identity()
    change(lm)
    assert lm.identity() not in (None, before)


def test_adapters_their_scale_and_their_state_are_in_the_identity():
    lm = tiny_lm("llama")
    found = [lm.identity()]
    lm.model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lm.model.eval()
    found.append(lm.identity())
    layer = lm.model.model.layers[0].self_attn.q_proj
    layer.scaling["default"] *= 2
    found.append(lm.identity())
    lm.model.disable_adapters()
    found.append(lm.identity())
    lm.model.enable_adapters()
    layer.lora_A["default"].weight.data.add_(1)
    found.append(lm.identity())
    assert None not in found and len(set(found)) == len(found)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(torch.nn.Module):
    def forward(self, w):
        return w / 2


def replaced(lm):
    lm.model.model.layers[0].mlp.down_proj = Doubled(40, 32, bias=False).eval()


def own_attention(lm):
    ALL_ATTENTION_FUNCTIONS["mine"] = lambda *args, **more: ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **more)
    lm.model.config._attn_implementation = "mine"


UNKNOWN = {
    "forward hook": lambda lm: lm.model.model.norm.register_forward_hook(lambda m, a, out: out * 2),
    "pre-hook": lambda lm: lm.model.model.norm.register_forward_pre_hook(lambda m, a: None),
    "replaced forward": lambda lm: setattr(lm.model.model.norm, "forward", lambda x: x),
    "module of other code": replaced,
    "parametrisation of other code": lambda lm: torch.nn.utils.parametrize.register_parametrization(
        lm.model.model.layers[0].mlp.down_proj, "weight", Halved().eval()
    ),
    "attention of other code": own_attention,
    "training mode": lambda lm: lm.model.train(),
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_what_cannot_be_known_has_no_identity(change):
    lm = tiny_lm("llama")
    change(lm)
    assert lm.identity() is None


def test_hooks_for_all_modules_and_hooks_of_the_project_have_no_identity():
    lm = tiny_lm("llama")
    handle = torch_modules.register_module_forward_hook(lambda m, a, out: None)
    assert lm.identity() is None
    handle.remove()
    with contextlib.suppress(Exception), hooks.scale(lm, {(0, "ffn"): torch.full((40,), 2.0)}):
        assert lm.identity() is None
        lm.model(torch.ones(1, 2, dtype=torch.long))
    assert lm.identity() is not None and lm.identity(None) is None


def test_a_weight_norm_of_torch_is_known_code():
    lm = tiny_lm("llama")
    parametrizations.weight_norm(lm.model.model.layers[0].mlp.down_proj)
    lm.model.eval()
    first = lm.identity()
    with torch.no_grad():
        lm.model.model.layers[0].mlp.down_proj.parametrizations.weight.original0.mul_(2)
    assert None not in (first, lm.identity()) and lm.identity() != first


def test_the_clock_is_not_in_the_identity(monkeypatch):
    import transformers.utils.chat_template_utils as templates

    lm = tiny_lm("llama")
    lm.tokenizer = copy.deepcopy(tiny_tokenizer())
    lm.tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}" + lm.tokenizer.chat_template
    before = lm.identity(), lm.render(["hi"])

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr(templates, "datetime", Later)
    assert before == (lm.identity(), lm.render(["hi"]))
    assert "26 July 2024" in before[1][0]
