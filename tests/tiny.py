"""Tiny random models of every supported family, a tiny tokenizer with a chat template, and where their neurons lie."""

from __future__ import annotations

import functools

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from nt_utils.models import DecoderView, LanguageModel
from nt_utils.scoring.reference import importance_by_hand

VOCABULARY = 300
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SHAPE = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
NEOX_SHAPE = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
HEAD = {"head_dim": 12}  # not hidden / heads, on purpose
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

#: name -> config; the name's first part is the family.
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama-multi-head-tied": lambda: LlamaConfig(**{**SHAPE, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases": lambda: LlamaConfig(**SHAPE, **HEAD, attention_bias=True, mlp_bias=True),
    "llama-llama3-rope": lambda: LlamaConfig(**SHAPE, rope_parameters=dict(LLAMA3_ROPE)),
    "llama-linear-rope": lambda: LlamaConfig(**SHAPE, rope_parameters=dict(LINEAR_ROPE)),
    "llama-yarn-rope": lambda: LlamaConfig(**SHAPE, rope_parameters=dict(YARN_ROPE)),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, **HEAD),
    "gemma2": lambda: Gemma2Config(
        **SHAPE, **HEAD, sliding_window=5, query_pre_attn_scalar=10, attn_logit_softcapping=3.0
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **SHAPE, **HEAD, sliding_window=5, query_pre_attn_scalar=10, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: Phi3Config(**SHAPE),
    "phi3-partial-rope": lambda: Phi3Config(
        **SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "granite": lambda: GraniteConfig(
        **SHAPE, attention_multiplier=0.5, residual_multiplier=0.22, embedding_multiplier=2.0, attention_bias=True
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        **NEOX_SHAPE,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "gpt_neox-sequential": lambda: GPTNeoXConfig(**NEOX_SHAPE, use_parallel_residual=False),
    "gpt2": lambda: GPT2Config(**GPT2_SHAPE),
    "gpt2-scaled-by-layer": lambda: GPT2Config(**GPT2_SHAPE, scale_attn_by_inverse_layer_idx=True),
}
#: One name a family: for tests where variants add nothing.
FAMILIES = [name for name in CONFIGS if "-" not in name]


def tiny_model(name: str = "llama", seed: int = 0, attn_implementation: str = "eager", layers: int = 0) -> nn.Module:
    """A random model whose weights and biases are of normal size, so that no neuron's effect is vacuous."""
    config = CONFIGS[name]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                inputs = parameter.shape[0] if type(_owner(model, key)).__name__ == "Conv1D" else parameter.shape[1]
                parameter.copy_(noise * (1.0 if "emb" in key or "wte" in key else inputs**-0.5))
            elif key.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(parameter + 0.3 * noise)
    return model.eval()


def _owner(model: nn.Module, key: str) -> nn.Module:
    return model.get_submodule(key.rpartition(".")[0])


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def tiny_tokenizer(template: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: every text is representable, every vocabulary id below 300."""
    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    core = Tokenizer(BPE(vocabulary, [], unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = TEMPLATE if template else None
    return tokenizer


def tiny_lm(name: str = "llama", seed: int = 0, template: bool = True, **more) -> LanguageModel:
    """A tiny random model with the tiny tokenizer."""
    return LanguageModel(tiny_model(name, seed, **more), tiny_tokenizer(template), f"tiny-{name}")


def double_lm(name: str = "llama", **more) -> LanguageModel:
    """A tiny model in float64."""
    found = tiny_lm(name, **more)
    found.model.double()
    return found


def training_lm() -> LanguageModel:
    """A tiny Llama in training mode, as no score may be taken from."""
    found = tiny_lm()
    found.model.train()
    return found


# ------------------------------------------------------------------------------------------------------- oracle


def neuron_entries(view: DecoderView, layer: int, kind: str, index: int) -> list[tuple[Tensor, tuple]]:
    """(parameter, position) of a neuron's weights and bias, written down apart from the package's own tables."""
    block, name = view.layers[layer], view.family_name
    d, h, n = view.head_dim, view.num_heads, view.num_kv_heads
    if name == "gpt2":
        if kind in "qkv":
            column = "qkv".index(kind) * h * d + index
            return [(block.attn.c_attn.weight, (slice(None), column)), (block.attn.c_attn.bias, (column,))]
        module = block.attn.c_proj if kind == "o" else block.mlp.c_proj
        return [(module.weight, (index,))]
    if name == "gpt_neox":
        if kind in "qkv":
            row = index // d * 3 * d + "qkv".index(kind) * d + index % d
            module = block.attention.query_key_value
            return [(module.weight, (row,)), (module.bias, (row,))]
        module = block.attention.dense if kind == "o" else block.mlp.dense_4h_to_h
        return [(module.weight, (slice(None), index))]
    attention = block.self_attn
    if kind in ("o", "ffn"):
        module = attention.o_proj if kind == "o" else block.mlp.down_proj
        return [(module.weight, (slice(None), index))]
    if name == "phi3":
        row = index + {"q": 0, "k": h * d, "v": (h + n) * d}[kind]
        return [(attention.qkv_proj.weight, (row,))]
    module = getattr(attention, f"{kind}_proj")
    entries = [(module.weight, (index,))]
    return entries if module.bias is None else [*entries, (module.bias, (index,))]


def brute_force(view: DecoderView, ids: Tensor) -> dict[tuple[int, str], Tensor]:
    """Importance of every neuron on one prompt, one pass of its block for each."""
    return {(layer, kind): importance_by_hand(view, ids, layer, kind) for layer, kind in view.space.sites()}


def hooks_left(model) -> int:
    """Hooks on a model's modules, apart from those that transformers leaves for good once hidden states were asked for."""
    found = [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in hooks.values()
    ]
    return sum(not getattr(hook, "__module__", "").startswith("transformers.") for hook in found)
