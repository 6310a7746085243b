"""Exact scores on a GPU at the shapes of real models (random weights, bf16): ``python -m nt_utils.bench --gpu``."""

from __future__ import annotations

import copy
import datetime
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from nt_utils.bench.setup import forward, random_batch
from nt_utils.errors import InputError
from nt_utils.models import DecoderView
from nt_utils.scoring.importance import Weights, score_batch
from nt_utils.scoring.reference import importance_by_hand

PROMPTS, TOKENS, BATCH, VOCABULARY = 200, 64, 8, 32000
#: bf16 keeps 8 bits: scores from bf16 activations are only this near to those of the same weights in float32.
TOLERANCE = 0.05
CONFIGS = {
    "Llama-2-7B shape": lambda layers: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers or 32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "Qwen2.5-14B shape": lambda layers: Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=layers or 48,
        num_attention_heads=40,
        num_key_value_heads=8,
    ),
}


def gpu_table(layers: int | None = None, device: str = "cuda") -> list[dict]:
    """One row a shape: seconds, tokens a second, peak memory, ratio to the plain forward, error against brute force.

    Args:
        layers: fewer layers for a trial run.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("bench --gpu: no CUDA device is visible to PyTorch; run it on a machine with one")
    return [_row(name, make(layers), device) for name, make in CONFIGS.items()]


def _row(name: str, config, device: str) -> dict:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    view = DecoderView(model)
    weights = Weights(view)
    starts = range(0, PROMPTS, BATCH)
    batches = [random_batch(BATCH, TOKENS, seed=start, vocabulary=VOCABULARY).to(device) for start in starts]

    def plain() -> None:
        for batch in batches:
            forward(model, batch)()

    def exact() -> None:
        for batch in batches:
            score_batch(view, batch, weights=weights)

    times = {"forward": _seconds(plain, device), "exact": _seconds(exact, device)}
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    row = {
        "shape": name,
        "layers": view.num_layers,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "date": datetime.date.today().isoformat(),
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "seconds": times["exact"],
        "tokens_per_second": PROMPTS * TOKENS / times["exact"],
        "peak_gib": peak,
        "exact_over_forward": times["exact"] / times["forward"],
        "brute_error": _error(model, batches[0]),
        "tolerance": TOLERANCE,
    }
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return row


def _seconds(run, device: str, repeats: int = 3) -> float:
    run()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _error(model, batch) -> float:
    """Largest relative error of sampled neurons of the first layer, of every kind, against zeroing them in float32.

    The strongest neurons of a site are sampled. Zeroing is done in a float32 copy of the first layer: the change that
    one neuron makes drowns in bf16's rounding of the block's output.
    """
    found = score_batch(DecoderView(model), batch)
    view = DecoderView(_first_layer(model))
    worst = 0.0
    for kind in ("q", "k", "v", "o", "ffn"):
        strongest = found[0, kind].mean(0).topk(4).indices.tolist()
        for ids, scores in zip(batch.input_ids, found[0, kind], strict=True):
            brute = importance_by_hand(view, ids[None], 0, kind, strongest)
            worst = max(worst, ((scores[strongest].to(brute) - brute).abs() / brute).max().item())
    return worst


def _first_layer(model):
    """The model cut to its first layer, in float32."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.dtype = 1, torch.float32
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device(model.device):
        first = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    own = model.state_dict()
    first.load_state_dict({name: own[name] for name in first.state_dict()})
    return first
