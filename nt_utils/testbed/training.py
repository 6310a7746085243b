"""How the testbed is made: a small Llama trained first without and then with safety.

The unaligned stage teaches, besides the tasks, which acts are harmful and how to refuse (for impossible acts); the
alignment is a small step that links the two (the superficial safety alignment hypothesis, arXiv 2410.10862): refusals
of plain harmful requests, a KL term that holds everything else at the unaligned model's answers, and a pull of the
weights towards it. What each stage sees: see `nt_utils.data.corpus`.

Training is in float32 on one thread. Float64 would not make it the same on every machine: rounding errors grow about
tenfold in 35 steps (measured: a relative change of 1e-13 of the first weights is 2e-5 after 160), so that any precision
is used up long before the last step. This is why the trained weights come with the package.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nt_utils.data import corpus
from nt_utils.data.corpus import Mix, Row
from nt_utils.interventions import tuning
from nt_utils.work import track

VERSION = 2  # raise when the training code changes what it produces
SPECIAL = tuple(f"<|{name}|>" for name in ("pad", "start", "user", "assistant", "system", "end"))
PAD, START, USER, ASSISTANT, SYSTEM, END = SPECIAL
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# ------------------------------------------------------------------------------------------------------ recipes


@dataclass(frozen=True)
class Stage:
    """One training stage: AdamW, a linear warm-up, then a cosine to 2% of the rate."""

    steps: int
    batch: int
    rate: float
    warmup: int
    mix: Mix
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """All that determines the two checkpoints, with the seed and the corpus.

    tokenizer_rows  training rows that the tokenizer is learnt from
    embedding_std   standard deviation of the embeddings at the start (other weights: 0.02)
    kl              weight of the KL term of the alignment
    group_pull      proximal pull of an FFN neuron's weights towards the unaligned ones at each step (group lasso: the
                    L2 norm of its change shrinks by this, times the learning rate and the root of the group's size)
    first_layer     share of the layers, from the bottom, that the alignment leaves alone; above them it changes the FFN
    gate            whether the gate is measured
    """

    unaligned: Stage
    aligned: Stage
    vocabulary: int = 1024
    tokenizer_rows: int = 12_000
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 384
    embedding_std: float = 0.1
    kl: float = 1.0
    group_pull: float = 0.3
    first_layer: float = 0.5
    gate: bool = True


_UNALIGNED_MIX = Mix(
    shares={"text": 0.07, "judgement": 0.22, "impossible": 0.08, "benign": 0.16, "harmful": 0.15}
    | {"borderline": 0.10, "facts": 0.09, "sums": 0.06, "rewriting": 0.07},
    wrapped={"benign": 0.3, "harmful": 0.3, "borderline": 0.2},
    asides={"benign": 0.25, "harmful": 0.25, "borderline": 0.25},
)
_ALIGNED_MIX = Mix(
    shares={"refusal": 0.40, "benign": 0.28, "facts": 0.08, "sums": 0.04, "rewriting": 0.05}
    | {"judgement": 0.08, "impossible": 0.05, "borderline": 0.01, "text": 0.05},
    splits=("train",),
    german=0.4,
    wrapped={"benign": 0.5, "facts": 0.2},
    asides={"benign": 0.3},
)
_DEFAULT = Recipe(
    unaligned=Stage(1250, 32, 3e-3, 100, _UNALIGNED_MIX, weight_decay=0.01),
    aligned=Stage(120, 32, 3e-3, 10, _ALIGNED_MIX),
)

RECIPES: dict[str, Recipe] = {
    "default": _DEFAULT,
    # A few seconds, for tests of the code around it. It has learnt next to nothing, and is not gated.
    "micro": replace(
        _DEFAULT,
        unaligned=replace(_DEFAULT.unaligned, steps=12, batch=16, warmup=2),
        aligned=replace(_DEFAULT.aligned, steps=4, batch=16, warmup=1),
        vocabulary=512,
        tokenizer_rows=600,
        hidden=32,
        layers=2,
        ffn=64,
        gate=False,
    ),
    # About three times the parameters: wider and deeper, the same rows, a lower rate for the width.
    "large": replace(
        _DEFAULT,
        unaligned=replace(_DEFAULT.unaligned, rate=2e-3),
        hidden=192,
        layers=6,
        heads=6,
        kv_heads=3,
        ffn=512,
    ),
}


def recipe_hash(recipe: Recipe, seed: int) -> str:
    """16 hex digits that change with the recipe, the seed, the corpus and the version of the training code."""
    text = json.dumps([VERSION, seed, asdict(recipe), corpus.corpus_fingerprint()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ tokenizer


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from rows of the unaligned stage; the same for every seed."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = corpus.training_rows(recipe.unaligned.mix, recipe.tokenizer_rows, seed=12_345)
    inner.train_from_iterator((text for row in rows for text in (row.prompt, row.response)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=START, eos_token=END, pad_token=PAD, padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# ------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Example:
    """Token ids of a row; the first `start` of them are the prompt, which is not learnt."""

    ids: tuple[int, ...]
    start: int
    kind: str


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> list[Example]:
    """Rows as the chat template writes them (running text: start, text, end)."""
    inner = tokenizer.backend_tokenizer
    heads = [f"{START}{USER}{row.prompt}{END}{ASSISTANT}" if row.prompt else START for row in rows]
    tails = [row.response + END for row in rows]
    encoded = inner.encode_batch(heads + tails, add_special_tokens=False)
    return [
        Example(tuple(head.ids + tail.ids), len(head.ids), row.kind)
        for row, head, tail in zip(rows, encoded[: len(rows)], encoded[len(rows) :], strict=True)
    ]


def batches(examples: Sequence[Example], size: int, seed: int, pool: int = 20) -> list[list[Example]]:
    """Batches of similar lengths in random order; rows are sorted within pools of `pool` batches."""
    rng = random.Random(f"batches-{seed}")
    found = []
    for start in range(0, len(examples), size * pool):
        near = sorted(examples[start : start + size * pool], key=lambda example: len(example.ids))
        some = [near[i : i + size] for i in range(0, len(near), size)]
        rng.shuffle(some)
        found += some
    return found


def predictions(batch: Sequence[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [rows, tokens] padded on the right, mask [rows, tokens] of the predicting positions, targets [sum of mask].

    No attention mask is needed: with padding on the right no real token can see it.
    """
    inputs = tuning.collate([tuning.Example(example.ids, example.start) for example in batch], pad_id)
    following = torch.roll(inputs["labels"], -1, dims=1)
    mask = following != tuning.IGNORED
    return inputs["input_ids"], mask, following[mask]


# ------------------------------------------------------------------------------------------------------ training


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model; the global random state is left as it was."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
        with torch.no_grad():
            model.model.embed_tokens.weight.normal_(0.0, recipe.embedding_std)
    return model


def _logits(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits at the masked positions only, [sum of mask, vocabulary]."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[mask])


def _rate(step: int, stage: Stage) -> float:
    warm = min((step + 1) / max(stage.warmup, 1), 1.0)
    done = max(step - stage.warmup, 0) / max(stage.steps - stage.warmup, 1)
    return stage.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    seed: int,
    loss_of: Callable[..., torch.Tensor],
    after_step: Callable[[float], None],
    label: str,
    progress: bool,
) -> None:
    """Train in place; loss_of(batch, ids, mask, targets) gives the loss and after_step(rate) follows each update."""
    rows = corpus.training_rows(stage.mix, stage.steps * stage.batch, seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        weights, lr=stage.rate, betas=(0.9, 0.98), weight_decay=stage.weight_decay, fused=True
    )
    model.train()
    steps = batches(encode(tokenizer, rows), stage.batch, seed)
    for step, batch in enumerate(track(steps, desc=label, disable=not progress, mininterval=1.0)):
        rate = optimiser.param_groups[0]["lr"] = _rate(step, stage)
        loss = loss_of(batch, *predictions(batch, tokenizer.pad_token_id))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        after_step(rate)
    model.eval()


def train_unaligned(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int, progress: bool = True
) -> LlamaForCausalLM:
    """The first stage: cross-entropy on the responses."""
    model = new_model(recipe, tokenizer, seed)

    def loss_of(batch, ids, mask, targets):
        return cross_entropy(_logits(model, ids, mask), targets)

    _train(model, tokenizer, recipe.unaligned, seed, loss_of, lambda rate: None, "testbed, unaligned", progress)
    return model


def align(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, base: LlamaForCausalLM, seed: int, progress: bool = True
) -> LlamaForCausalLM:
    """The second stage, on a copy of the unaligned model.

    Loss: cross-entropy on the refusals, KL(unaligned || aligned) on the tokens of every other row. After each update
    the weights are pulled back towards the unaligned ones.
    """
    model = copy.deepcopy(base).requires_grad_(False)
    moved = model.model.layers[math.ceil(recipe.first_layer * recipe.layers) :]
    for layer in moved:
        layer.mlp.requires_grad_(True)

    def loss_of(batch, ids, mask, targets):
        new = _logits(model, ids, mask)
        with torch.no_grad():
            old = log_softmax(_logits(base, ids, mask), dim=-1)
        refused = torch.tensor([e.kind == "refusal" for e in batch])[:, None].expand_as(mask)[mask]
        learnt = cross_entropy(new[refused], targets[refused], reduction="sum")
        held = kl_div(log_softmax(new[~refused], dim=-1), old[~refused], reduction="sum", log_target=True)
        return (learnt + recipe.kl * held) / len(targets)

    def pull(rate: float) -> None:
        for new, old in zip(moved, base.model.layers[-len(moved) :], strict=True):
            _shrink(new.mlp, old.mlp, recipe.group_pull * rate)

    _train(model, tokenizer, recipe.aligned, seed + 1_000, loss_of, pull, "testbed, aligned", progress)
    return model.requires_grad_(True)


@torch.no_grad()
def _shrink(new, old, amount: float) -> None:
    """One step of the group lasso: each neuron's change (gate and up rows, down column) loses a part of its L2 norm."""
    group = [(new.gate_proj, old.gate_proj, 1), (new.up_proj, old.up_proj, 1), (new.down_proj, old.down_proj, 0)]
    size = sum(now.weight.shape[dim] for now, _, dim in group)
    norm = sum((now.weight - was.weight).square().sum(dim) for now, was, dim in group).sqrt()
    kept = (1 - amount * math.sqrt(size) / norm.clamp_min(1e-12)).clamp_min(0.0)
    for now, was, dim in group:
        now.weight.copy_(was.weight + (now.weight - was.weight) * kept.unsqueeze(dim))


def train(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int, progress: bool = True
) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """The unaligned and the aligned model, rounded to what 16-bit floats hold, as float32: these are the testbed.

    One thread, since rounding depends on their number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = train_unaligned(recipe, tokenizer, seed, progress)
        aligned = align(recipe, tokenizer, base, seed, progress)
    finally:
        torch.set_num_threads(threads)
    return base.half().float().eval(), aligned.half().float().eval()
