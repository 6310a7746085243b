"""Fine-tuning on refusal pairs, benign pairs or both: one loop for SN-Tune, RSN-Tune, every control and full tuning.

    tuned = tune(lm, Only(safety), harmful=prompts, benign=others, learning_rate=1e-4, steps=50)   # SN-Tune
    tuned = tune(lm, Only(safety - foundation), ...)                                               # RSN-Tune
    tuned = tune(lm, Everything(), ...)      tune(lm, AllBut(frozen), benign=task, ...)      tune(lm, LoRA(rank=4), ...)
    with tuned.delta.active(lm): ...         # the tuned model; lm itself is the base again

The same pieces go into a Hugging Face `Trainer`: `examples` as its dataset, `collator` as its collator, and
`Only(...).start(lm)` for what is trained (see `nt_utils.interventions.trainable`). Several processes under accelerate, with
whole or sharded models: `nt_utils.interventions.parallel`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nt_utils.data.records import Prompt
from nt_utils.errors import DivergedError, InputError
from nt_utils.interventions.delta import Delta
from nt_utils.interventions.parallel import Processes, averaged
from nt_utils.interventions.trainable import AllBut, Everything, LoRA, Only, Training
from nt_utils.models import LanguageModel, is_sharded, pad
from nt_utils.work import track

if TYPE_CHECKING:
    import pandas
    from accelerate import Accelerator

__all__ = [
    "AllBut",
    "Delta",
    "Everything",
    "Example",
    "LoRA",
    "Only",
    "Training",
    "Tuned",
    "batches",
    "collate",
    "collator",
    "examples",
    "response_loss",
    "tune",
]

IGNORED = -100  # the label of tokens that carry no loss, as in transformers


# ------------------------------------------------------------------------------------------------------ examples


class Example(NamedTuple):
    """A prompt with its response: token ids (template and end of turn included); the first `start` are the prompt."""

    ids: tuple[int, ...]
    start: int


def examples(
    lm: LanguageModel, prompts: Sequence[Prompt], target: str = "refusal", *, max_length: int = 512
) -> list[Example]:
    """Prompts and their reference responses as the chat template writes them.

    Args:
        prompts: a PromptSet or Prompt records.
        target: the field that holds the response: "refusal" or "helpful" (harmful prompts with their `helpful` stubs
            are a fine-tuning attack).
        max_length: tokens of prompt and response together ([SN]: 512); longer responses are cut.

    Raises:
        InputError: no prompts, one without that response, or one that leaves no room for a response.
    """
    if target not in ("refusal", "helpful"):
        raise InputError(f"target: got {target!r}; allowed: refusal, helpful")
    if not len(prompts):
        raise InputError("prompts: the list is empty; at least one prompt is needed")
    missing = [i for i, p in enumerate(prompts) if not getattr(p, target)]
    if missing:
        raise InputError(
            f"prompts: {len(missing)} of {len(prompts)} have no {target} response to learn (the first is {missing[0]})"
        )
    encoded = lm.encode([p.text for p in prompts], [getattr(p, target) for p in prompts], side="right")
    found = []
    for i, (row, start, length) in enumerate(
        zip(encoded.input_ids.tolist(), encoded.prompt_lengths, encoded.lengths, strict=True)
    ):
        if start >= max_length:
            raise InputError(
                f"max_length: prompt {i} alone has {start} tokens; {max_length} leave no response to learn"
            )
        found.append(Example(tuple(row[: min(length, max_length)]), start))
    return found


def collate(batch: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """One batch, padded on the right: input_ids, attention_mask, position_ids, labels, all int64 [batch, tokens].

    Labels are IGNORED on prompt and padding: the loss is on response tokens only.
    """
    encoded = pad([e.ids for e in batch], pad_id=pad_id, side="right", prompt_lengths=[e.start for e in batch])
    labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, IGNORED)
    for row, example in zip(labels, batch, strict=True):
        row[: example.start] = IGNORED
    return {**encoded.inputs, "labels": labels}


def collator(lm: LanguageModel) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """`data_collator` for a Trainer whose dataset is a list of Examples (set remove_unused_columns=False)."""
    return lambda batch: collate(batch, lm.pad_id)


def _endless(items: Sequence[Example], rng: random.Random) -> Iterator[Example]:
    """Pass after pass over the items, each in a new order."""
    while True:
        yield from rng.sample(items, len(items))


def batches(
    harmful: Sequence[Example], benign: Sequence[Example], *, size: int, share: float, seed: int
) -> Iterator[list[Example]]:
    """Endless batches of `size` examples, in each the same number of benign ones (share x size, rounded).

    Both lists are gone through in whole passes, so no example is seen twice before all were seen once. With one list
    empty the other fills the batches.
    """
    rng = random.Random(f"tuning-{seed}")
    share = share if harmful and benign else float(bool(benign))
    few = round(share * size)
    if few in (0, size) and few != share * size:
        raise InputError(f"benign_share: {share} of batches of {size} leaves no room for one of the two kinds of pairs")
    streams = [(_endless(items, rng), n) for items, n in ((harmful, size - few), (benign, few)) if n]
    while True:
        batch = [next(stream) for stream, n in streams for _ in range(n)]
        rng.shuffle(batch)
        yield batch


# ------------------------------------------------------------------------------------------------------ the loop


def response_loss(lm: LanguageModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood per response token, in nats; float32 scalar.

    The logits are the model's own; only those that predict a response token are kept and made float32.
    """
    inputs = {name: value.to(lm.device) for name, value in batch.items() if name != "labels"}
    logits = lm.model(**inputs, use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:].to(logits.device)
    learnt = targets != IGNORED
    return torch.nn.functional.cross_entropy(logits[learnt].float(), targets[learnt])


@dataclass
class Tuned:
    """What `tune` gives back.

    Attributes:
        delta: the trained entries; merge it, activate it or save it.
        losses: mean loss of each step, before its update (nats a token).
        history: one dict an evaluation: step, loss (mean over the steps since the last one), what the callback returned.
        snapshots: step -> Delta at each evaluation (on the CPU), if asked for.
        trained: number of trained parameters; trained_bytes: their size as they were trained (masters in float32).
        share: of all the model's parameters (0 to 1).
        seconds: time in training steps alone, without evaluations.
    """

    delta: Delta
    losses: list[float]
    history: list[dict[str, Any]]
    trained: int
    trained_bytes: int
    share: float
    seconds: float
    snapshots: dict[int, Delta] = field(default_factory=dict)

    @property
    def table(self) -> pandas.DataFrame:
        """The history, one row an evaluation."""
        import pandas

        return pandas.DataFrame(self.history)


Callback = Callable[[LanguageModel, int], Mapping[str, Any] | None]


def tune(
    lm: LanguageModel,
    scope: Only | AllBut | Everything | LoRA,
    *,
    harmful: Sequence[Prompt] = (),
    benign: Sequence[Prompt] = (),
    benign_share: float = 0.5,
    learning_rate: float,
    steps: int,
    batch_size: int = 8,
    warmup: int = 0,
    schedule: str = "constant",
    weight_decay: float = 0.0,
    clip: float = 1.0,
    max_length: int = 512,
    seed: int = 0,
    every: int | Sequence[int] | None = None,
    callback: Callback | None = None,
    snapshots: bool = False,
    gradient_checkpointing: bool = False,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> Tuned:
    """Fine-tune with AdamW on the loss of the response tokens; afterwards `lm` is the base again, bit for bit.

    SN-Tune is `Only(safety)` on harmful prompts with their refusals ([SN] section 4: 50 pairs, one epoch, learning rate
    1e-6, length 512), RSN-Tune `Only(safety - foundation)`. **Ours**: benign pairs can be mixed in, since refusals alone
    teach to refuse everything.

    Args:
        scope: what is trained.
        harmful: prompts that learn their `refusal`.
        benign: prompts that learn their `helpful` response.
        benign_share: share of benign pairs in every batch (0 to 1) where both are given.
        learning_rate: of AdamW (betas 0.9, 0.999), the peak where there is a schedule.
        steps: updates. One epoch is number of pairs / batch_size.
        warmup: steps over which the rate rises linearly.
        schedule: "constant", or "linear" down to 0 after the last step.
        clip: largest norm of the gradient of the trained parameters; 0 = no clipping.
        max_length: tokens of prompt and response together; longer responses are cut.
        seed: of the order of the pairs, of dropout and of adapters; same seed, machine and threads, same result.
        every: evaluate each this many steps, or after each of these steps, besides before the first and after the last
            (None = those two only).
        callback: called as callback(lm, step) at each evaluation, the model in eval mode with the trained weights in
            force; what it returns joins the history.
        snapshots: keep the delta of every evaluation.
        gradient_checkpointing: recompute activations in the backward pass (less memory, more time).
        progress: show a progress bar.
        accelerator: of the processes that train together, each of which calls this with the same arguments and gets the
            same result; `batch_size` pairs in all. None: this process alone.

    Raises:
        InputError: parameters out of range, no pairs, pairs without the response they should learn, an empty or foreign
            neuron set; fewer pairs in a batch than processes, a callback with several of them (evaluate the snapshots
            afterwards), settings of accelerate that cannot be honoured.
        DivergedError: a loss that is not finite.
    """
    _check(harmful, benign, benign_share, learning_rate, steps, batch_size, warmup, schedule, every)
    learnt = [
        examples(lm, prompts, target, max_length=max_length) if len(prompts) else []
        for prompts, target in ((harmful, "refusal"), (benign, "helpful"))
    ]
    stream = batches(*learnt, size=batch_size, share=benign_share, seed=seed)
    processes = Processes.of(lm, accelerator)
    _check_processes(processes.count, batch_size, callback)
    total = lm.view.space.total_parameters
    stops = {steps, *(range(every, steps, every) if isinstance(every, int) else every or ())}
    with _seeded(seed), scope.start(lm) as training:
        run = _Run(lm, training, callback, snapshots, processes)
        optimiser = torch.optim.AdamW(training.parameters, lr=learning_rate, weight_decay=weight_decay)
        with _training_mode(lm, gradient_checkpointing), run.averaged():
            run.evaluate(0)
            for step in _bar(steps, f"tuning, {scope.name}", progress and processes.index == 0):
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate * _rate(step, steps, warmup, schedule)
                run.step(next(stream), optimiser, clip)
                if step + 1 in stops:
                    run.evaluate(step + 1)
        size, size_bytes = training.size, training.bytes
        delta = training.finish()
    return Tuned(delta, run.losses, run.history, size, size_bytes, size / total, run.seconds, run.snapshots)


class _Run:
    """One training's steps and evaluations."""

    def __init__(
        self, lm: LanguageModel, training: Training, callback: Callback | None, keep: bool, processes: Processes
    ):
        self.lm, self.training, self.callback, self.keep, self.processes = lm, training, callback, keep, processes
        self.losses: list[float] = []
        self.history: list[dict[str, Any]] = []
        self.snapshots: dict[int, Delta] = {}
        self.seconds = 0.0
        self._reported = 0

    def averaged(self):
        """Average gradients over the processes; a sharded training does so by itself."""
        several = self.processes.count > 1 and not is_sharded(self.lm.model)
        return averaged(self.training.parameters) if several else nullcontext()

    def loss(self, batch: Sequence[Example]) -> Tensor:
        """The loss of this process's share; its mean over the processes is the whole batch's mean per response token."""
        part = self.processes.part(batch)
        loss = response_loss(self.lm, collate(part, self.lm.pad_id))
        if self.processes.count == 1:
            return loss
        tokens, all_tokens = (sum(len(e.ids) - e.start for e in examples) for examples in (part, batch))
        return loss * (self.processes.count * tokens / all_tokens)

    def step(self, batch: Sequence[Example], optimiser: torch.optim.Optimizer, clip: float) -> None:
        started = time.perf_counter()
        loss = self.loss(batch)
        value = self.processes.mean(loss)
        if value != value or value in (float("inf"), float("-inf")):
            raise DivergedError(f"learning_rate: the loss is {value} at step {len(self.losses)}; try a smaller one")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(self.training.parameters, clip)
        optimiser.step()
        self.losses.append(value)
        self.seconds += time.perf_counter() - started

    def evaluate(self, step: int) -> None:
        """A row of the history; the callback may use random numbers without changing the training."""
        since = self.losses[self._reported :]
        self._reported = len(self.losses)
        row: dict[str, Any] = {"step": step, "loss": sum(since) / len(since) if since else float("nan")}
        self.lm.weights_changed()
        if self.callback is not None:
            self.lm.model.eval()
            with torch.random.fork_rng(devices=_accelerators()):
                row |= dict(self.callback(self.lm, step) or {})
            self.lm.model.train()
        self.lm.weights_changed()
        self.history.append(row)
        if self.keep:
            self.snapshots[step] = self.training.delta().cpu()


def _check_processes(count: int, batch_size: int, callback: Callback | None) -> None:
    if batch_size < count:
        raise InputError(f"batch_size: got {batch_size} with {count} processes; allowed: {count} or more")
    if callback is not None and count > 1:
        raise InputError(
            f"callback: not with {count} processes; allowed: snapshots=True, whose deltas are evaluated afterwards on the "
            "model loaded plainly"
        )


def _rate(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Factor of the learning rate at a step (0 to 1)."""
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if schedule == "constant" else (steps - step) / max(steps - warmup, 1)


def _bar(steps: int, label: str, progress: bool):
    return track(range(steps), desc=label, unit="step", disable=not progress)


def _accelerators() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's random numbers from a seed inside; as they were outside."""
    with torch.random.fork_rng(devices=_accelerators()):
        torch.manual_seed(seed)
        yield


@contextmanager
def _training_mode(lm: LanguageModel, checkpointing: bool) -> Iterator[None]:
    """Dropout and checkpointing on inside, as they were outside."""
    model, before = lm.model, lm.model.training
    model.train()
    if checkpointing:
        _call(model, "activation_checkpointing_enable", "gradient_checkpointing_enable", {"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            _call(model, "activation_checkpointing_disable", "gradient_checkpointing_disable")
        model.train(before)


def _call(model, name: str, older: str, *args) -> None:
    """A method under its newer name where the installed transformers has it."""
    (getattr(model, name, None) or getattr(model, older))(*args)


def _check(harmful, benign, benign_share, learning_rate, steps, batch_size, warmup, schedule, every) -> None:
    if not len(harmful) and not len(benign):
        raise InputError("harmful, benign: both are empty; at least one pair is needed")
    if not 0 <= benign_share <= 1:
        raise InputError(f"benign_share: got {benign_share}; allowed: 0 to 1")
    if not learning_rate > 0:
        raise InputError(f"learning_rate: got {learning_rate}; it must be above 0")
    stops = [every] if isinstance(every, int) else every or ()
    for name, value in (("steps", steps), ("batch_size", batch_size), *(("every", stop) for stop in stops)):
        if value < 1:
            raise InputError(f"{name}: got {value}; allowed: 1 or more")
    if not isinstance(every, int) and any(stop > steps for stop in stops):
        raise InputError(f"every: got {max(stops)}; allowed: 1 to the number of steps ({steps})")
    if not 0 <= warmup <= steps:
        raise InputError(f"warmup: got {warmup}; allowed: 0 to the number of steps ({steps})")
    if schedule not in ("constant", "linear"):
        raise InputError(f"schedule: got {schedule!r}; allowed: constant, linear")
