"""Random models of a given shape, batches without a tokenizer, and interleaved timing."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from nt_utils.models import Encoded, LanguageModel, decoder, pad

VOCABULARY = 256


@dataclass(frozen=True)
class Shape:
    """A Llama-like model and a batch for it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    batch: int
    tokens: int


SHAPES = {
    "a": Shape(512, 4, 8, 2, 1376, 8, 48),
    "b": Shape(1024, 2, 16, 4, 2816, 4, 64),
}


def random_model(shape: Shape, seed: int = 0):
    """Random weights, float32, sdpa, on the CPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


class RandomPrompts(LanguageModel):
    """A language model whose "prompts" are numbers: each stands for as many random tokens."""

    tokens_a_prompt = 48

    def token_counts(self, prompts) -> list[int]:
        """Tokens of each prompt: all have the same number."""
        return [self.tokens_a_prompt] * len(prompts)

    def encode(self, prompts, responses=None, side="left") -> Encoded:
        """Random token ids, as a padded batch; each prompt is the seed of its own."""
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(int(prompt))
            rows.append(torch.randint(0, VOCABULARY, (self.tokens_a_prompt,), generator=generator).tolist())
        return pad(rows, pad_id=0, side=side, prompt_lengths=[len(row) for row in rows])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, without a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def batch_of(shape: Shape) -> Encoded:
    """The shape's batch of equally long random prompts."""
    return random_batch(shape.batch, shape.tokens, seed=1)


def random_batch(prompts: int, tokens: int, seed: int, vocabulary: int = VOCABULARY) -> Encoded:
    """Equally long prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, vocabulary, (tokens,), generator=generator).tolist() for _ in range(prompts)]
    return pad(rows, pad_id=0, side="right", prompt_lengths=[tokens] * prompts)


def forward(model, batch: Encoded) -> Callable[[], None]:
    """The model's own forward on the batch: decoder without the output head, no cache, no gradients."""
    body = decoder(model)

    def run() -> None:
        with torch.no_grad():
            body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    return run


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = CLOCKS["wall"]


def set_clock(name: str) -> None:
    """Time by the wall, or by processor seconds (for a machine that others use; meaningful with one thread)."""
    global _clock
    _clock = CLOCKS[name]


def seconds(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time the functions in turn, round after round, so that a busy moment hits all of them; one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for name in list(functions):
        functions[name]()
    gc.collect()
    for _ in range(repeats):
        for name, function in functions.items():
            start = _clock()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[name].append(_clock() - start)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median over rounds of one function's time over another's."""
    return statistics.median(x / y for x, y in zip(times[above], times[below], strict=True))
