"""What is read is what is computed with: adapters, parametrisations and wrapped modules in place of plain projections."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.utils import parametrizations, prune

from nt_utils import models
from nt_utils.errors import ModelError
from nt_utils.interventions.export import folded
from nt_utils.interventions.modulation import Modulation
from nt_utils.models import DecoderView, LanguageModel
from nt_utils.neurons import POOL, NeuronSet
from nt_utils.scoring.importance import importance
from tests.common import refused, saved
from tests.tiny import FAMILIES, brute_force, tiny_lm, tiny_model, tiny_tokenizer

PROMPT = "how do I bake bread"
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}


def randomised(model, seed=1):
    """Adapter weights away from their start, at which an adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "ia3_")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def with_adapter(family="llama", **options) -> LanguageModel:
    """A tiny model with a LoRA adapter on every projection, and with random values in it."""
    config = LoraConfig(**{**LORA, "target_modules": TARGETS.get(family.split("-")[0], LLAMA), **options})
    return LanguageModel(randomised(get_peft_model(tiny_model(family), config)), tiny_tokenizer(), "adapted")


def merged_by_peft(model) -> LanguageModel:
    """The same model with its adapter merged by PEFT."""
    return LanguageModel(copy.deepcopy(model).merge_and_unload(), tiny_tokenizer(), "merged")


def assert_reads_as(lm: LanguageModel, plain: LanguageModel) -> None:
    """Weights, biases and exact scores of an adapted model are those of a plain one that computes the same."""
    ids = torch.tensor(lm.tokens(lm.render([PROMPT])))
    with torch.no_grad():
        assert torch.allclose(lm.model(ids).logits, plain.model(ids).logits, rtol=1e-3, atol=1e-3), (
            "the oracle is not the model"
        )
    exact = brute_force(plain.view, ids)
    found = importance(lm, [PROMPT], progress=False)
    for site in lm.view.space.sites():
        assert torch.allclose(lm.view.weight(*site), plain.view.weight(*site), atol=1e-6)
        assert torch.allclose(found.get(*site)[0].double(), exact[site], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_beside_a_lora_adapter_equal_brute_force_on_the_merged_weights(family):
    model = randomised(
        get_peft_model(tiny_model(family), LoraConfig(**LORA, target_modules=TARGETS.get(family, LLAMA)))
    )
    plain = merged_by_peft(model)
    lm = LanguageModel(model, tiny_tokenizer(), "adapted")
    base = DecoderView(tiny_model(family))
    assert not torch.allclose(lm.view.weight(0, "ffn"), base.weight(0, "ffn"), atol=1e-3), "vacuous: nothing adapted"
    assert_reads_as(lm, plain)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA, target_modules=LLAMA, use_dora=True),
        LoraConfig(**LORA, target_modules=LLAMA, use_rslora=True),
        LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["down_proj", "lm_head"]),
        LoraConfig(**LORA, target_modules=LLAMA, lora_dropout=0.5),
        IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"]),
    ],
    ids=["DoRA", "rank-stabilised", "modules_to_save", "dropout", "IA3"],
)
def test_other_adapters_read_as_their_merged_weights(config):
    model = randomised(get_peft_model(tiny_model("llama-biases"), config))
    if config.modules_to_save:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(1.5)
    assert_reads_as(LanguageModel(model, tiny_tokenizer(), "adapted"), merged_by_peft(model))


def test_several_active_a_disabled_and_a_merged_adapter_read_as_the_model_computes():
    lm = with_adapter()
    alone = lm.view.weight(0, "ffn").clone()
    layers = [module for module in lm.model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.update_layer("second", r=2, lora_alpha=2, config=LoraConfig(r=2, init_lora_weights=False))
        layer.set_adapter(["default", "second"])
    both, down = lm.view.weight(0, "ffn"), lm.model.model.layers[0].mlp.down_proj
    assert torch.allclose(both, alone + down.get_delta_weight("second"), atol=1e-6)
    assert not torch.allclose(both, alone, atol=1e-3)
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(lm.view.weight(0, "ffn"), tiny_lm("llama").view.weight(0, "ffn"))
    for layer in layers:
        layer.enable_adapters(True)
        layer.set_adapter(["default"])
        layer.merge()
    assert torch.allclose(lm.view.weight(0, "ffn"), alone, atol=1e-6)
    assert_reads_as(lm, unloaded(lm))


def unloaded(lm):
    """A plain copy of a model whose adapters are merged: each layer's base layer in its place."""
    model = copy.deepcopy(lm.model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.base_layer)
    return LanguageModel(model, tiny_tokenizer(), "plain")


def test_an_adapter_added_after_the_first_reading_is_seen():
    lm = tiny_lm("llama")
    before = lm.view.weight(0, "ffn").clone()
    lm.model.add_adapter(LoraConfig(**LORA, target_modules=LLAMA))
    assert not torch.allclose(lm.view.weight(0, "ffn"), before)


def test_weight_norm_reads_as_the_weight_that_is_computed():
    lm = tiny_lm("llama")
    plain = tiny_lm("llama")
    for layer, other in zip(lm.model.model.layers, plain.model.model.layers, strict=True):
        parametrizations.weight_norm(layer.mlp.down_proj)
        with torch.no_grad():
            layer.mlp.down_proj.parametrizations.weight.original0.mul_(2)
            other.mlp.down_proj.weight.mul_(2)
    assert_reads_as(lm, plain)


class Gated(torch.nn.Linear):
    """A linear layer of somebody's own that computes something else."""

    def forward(self, x):
        return super().forward(x).relu()


def replaced(lm, module):
    module.load_state_dict(lm.model.model.layers[0].mlp.down_proj.state_dict())
    lm.model.model.layers[0].mlp.down_proj = module


def own_forward(lm):
    down = lm.model.model.layers[0].mlp.down_proj
    down.forward = lambda x: 2 * torch.nn.functional.linear(x, down.weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda lm: prune.random_unstructured(lm.model.model.layers[0].mlp.down_proj, "weight", 0.5),
        lambda lm: replaced(lm, Gated(40, 32, bias=False)),
        own_forward,
    ],
    ids=["pruned by a hook", "a class with a forward of its own", "a forward put on the module"],
)
def test_modules_whose_weight_is_not_what_they_compute_with_are_refused_by_name(change):
    lm = tiny_lm("llama")
    change(lm)
    refused(r"layer 0, mlp\.down_proj", lambda: importance(lm, [PROMPT], progress=False), kind=ModelError)


def test_writers_refuse_adapter_layers():
    lm = with_adapter()
    space = lm.view.space
    chosen = NeuronSet.from_flat(space, torch.arange(4), POOL)
    modulation = Modulation(chosen, NeuronSet(space, {}), torch.full((4,), 2.0))
    refused("merge it first", lambda: folded(lm, modulation), kind=ModelError)


def test_prompt_tuning_is_refused():
    tuned = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    refused("virtual tokens", lambda: LanguageModel(tuned, tiny_tokenizer(), "prompt"), kind=ModelError)


# ------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def base_folder(tmp_path):
    lm = tiny_lm("llama")
    saved(lm, tmp_path / "base")
    return tmp_path / "base"


def test_a_folder_with_only_an_adapter_loads_on_its_base_model(base_folder, tmp_path):
    model = tiny_model("llama")
    model.config._name_or_path = model.name_or_path = str(base_folder)
    tuned = randomised(get_peft_model(model, LoraConfig(**LORA, target_modules=LLAMA)))
    tuned.peft_config["default"].base_model_name_or_path = str(base_folder)
    tuned.save_pretrained(tmp_path / "adapter")
    lm = models.load(tmp_path / "adapter")
    ids = torch.tensor(lm.tokens(lm.render([PROMPT])))
    with torch.no_grad():
        assert torch.allclose(lm.model(ids).logits, tuned(ids).logits, atol=1e-3)
        assert not torch.allclose(lm.model(ids).logits, models.load(base_folder).model(ids).logits, atol=1e-2)
    for site in lm.view.space.sites():
        _ = lm.view.projection(*site).parameter  # merged: a plain model


def test_an_adapter_without_its_base_model_says_so(base_folder, tmp_path):
    tuned = get_peft_model(tiny_model("llama"), LoraConfig(**LORA, target_modules=LLAMA))
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    tuned.save_pretrained(tmp_path / "adapter")
    refused(r"gone.*base model of the adapter", lambda: models.check_source(tmp_path / "adapter"), kind=ModelError)
    for path in (tmp_path / "adapter").glob("adapter_*"):
        (base_folder / path.name).write_bytes(path.read_bytes())
    refused("holds a model and an adapter", lambda: models.load(base_folder), kind=ModelError)


def test_an_adapter_of_another_architecture_is_refused(base_folder, tmp_path):
    tuned = get_peft_model(tiny_model("gpt2"), LoraConfig(**LORA, target_modules=TARGETS["gpt2"]))
    tuned.peft_config["default"].base_model_name_or_path = str(base_folder)
    tuned.save_pretrained(tmp_path / "adapter")
    refused("could not be merged", lambda: models.load(tmp_path / "adapter"), kind=ModelError)
