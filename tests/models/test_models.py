"""Loading, rendering, encoding, and the uniform view on every family's projections."""

import pytest
import torch
from transformers import BertConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from nt_utils import models
from nt_utils.errors import ModelError
from nt_utils.models import DecoderView
from tests.common import refused
from tests.tiny import CONFIGS, SHAPE, neuron_entries, tiny_lm, tiny_model

# ------------------------------------------------------------------------------------------------------------ view


@pytest.mark.parametrize("name", CONFIGS)
def test_view_reads_the_shapes(name):
    model = tiny_model(name)
    view = DecoderView(model)
    assert (view.num_layers, view.hidden_size, view.num_heads) == (2, 32, 4)
    assert view.num_kv_heads == (
        model.config.num_key_value_heads if hasattr(model.config, "num_key_value_heads") else 4
    )
    assert view.space.num_layers == 2
    assert view.space.width((0, "q")) == 4 * view.head_dim
    assert view.space.width((1, "k")) == view.space.width((1, "v")) == view.num_kv_heads * view.head_dim
    assert view.space.total_parameters == sum(p.numel() for p in model.parameters())
    assert view.space.architecture.startswith(view.family_name)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_neurons_weights_are_its_own(name):
    """A row or column of the view is the slice of the module's parameter that an independent table names."""
    view = DecoderView(tiny_model(name))
    for layer, kind in view.space.sites():
        for index in (0, view.head_dim, view.space.width((layer, kind)) - 1):
            (parameter, at), *bias = neuron_entries(view, layer, kind, index)
            weight = view.weight(layer, kind)
            assert torch.equal(weight[:, index] if kind in ("o", "ffn") else weight[index], parameter[at])
            if bias:
                assert torch.equal(view.bias(layer, kind)[index], bias[0][0][bias[0][1]])


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gpt2"])
def test_fused_projections_rebuild_the_module(name):
    view = DecoderView(tiny_model(name))
    groups = [("q", "k", "v"), ("gate", "up")] if view.gated else [("q", "k", "v")]
    for roles in groups:
        parts = [view.projection(0, role) for role in roles]
        module = parts[0].module
        assert all(part.module is module for part in parts)
        inputs = torch.randn(2, 3, view.hidden_size)
        whole = module(inputs)
        rebuilt = torch.full_like(whole, torch.nan)
        for part in parts:
            taken = part.take(whole)
            bias = 0 if part.bias is None else part.bias
            assert torch.allclose(taken, inputs @ part.weight.T + bias, atol=1e-5)
            rebuilt = part.put(rebuilt, taken)
        assert torch.equal(rebuilt, whole)
        assert sum(part.weight.numel() for part in parts) == module.weight.numel()


def test_parameters_of_a_neuron():
    plain = DecoderView(tiny_model("llama")).space.parameters_per_neuron
    assert plain == {"q": 32, "k": 32, "v": 32, "o": 32, "ffn": 3 * 32}
    biased = DecoderView(tiny_model("llama-biases")).space.parameters_per_neuron
    assert biased == {"q": 33, "k": 33, "v": 33, "o": 32, "ffn": 32 + 2 * 33}
    ungated = DecoderView(tiny_model("gpt2")).space.parameters_per_neuron
    assert ungated == {"q": 33, "k": 33, "v": 33, "o": 32, "ffn": 32 + 33}


def test_tied_embeddings_are_counted_once():
    tied, free = (DecoderView(tiny_model(n)).space.total_parameters for n in ("llama-multi-head-tied", "llama"))
    assert free - tied == 300 * 32 - 2 * 2 * 16 * 32  # an output head less, two key/value heads a layer more


def test_architecture_fingerprints_tell_shapes_apart_and_weights_not():
    first, second = (DecoderView(tiny_model("llama", seed=s)).space.architecture for s in (0, 1))
    assert first == second
    assert first != DecoderView(tiny_model("qwen2")).space.architecture
    assert first != DecoderView(tiny_model("llama-biases")).space.architecture  # other head size


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MixtralConfig(), "'mixtral'.*mixture-of-experts"),
        (Qwen3MoeConfig(), "'qwen3_moe'.*mixture-of-experts"),
        (BertConfig(), "'bert' is not supported.*supported: llama"),
        (LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
    ],
)
def test_families_we_cannot_read_are_refused_by_name(config, words):
    refused(words, lambda: models.check_family(config), kind=ModelError)


def test_a_missing_part_is_named():
    model = tiny_model("llama")
    del model.model.layers[1].mlp.down_proj
    refused(r"layer 1 .* 'mlp.down_proj'", lambda: DecoderView(model), kind=ModelError)


def test_quantised_weights_are_refused():
    model = tiny_model("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    refused(r"layer 0, self_attn.q_proj .*int8.*quantised", lambda: DecoderView(model), kind=ModelError)


def test_shape_is_what_the_tests_assume():
    assert SHAPE["num_attention_heads"] // SHAPE["num_key_value_heads"] == 2  # grouped queries are really tested


def test_cudnn_attention_whose_gradients_can_be_nan_is_off():
    """On an H200 every training of notebook 02 ended in a gradient that was not a number."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    tiny_lm()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
