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

import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from nt_utils import hooks
from nt_utils.data.records import Prompt
from nt_utils.errors import DivergedError, InputError, check_choice, check_count
from nt_utils.interventions import kept
from nt_utils.interventions.delta import Delta
from nt_utils.interventions.parallel import Processes, average
from nt_utils.interventions.precision import check_train_dtype, computing, training_copy
from nt_utils.interventions.trainable import AllBut, Everything, LoRA, Only, Training
from nt_utils.interventions.trunk import FrozenTrunk
from nt_utils.models import LanguageModel, is_sharded, pad
from nt_utils.scoring.attribution import Prefix
from nt_utils.work import COUNTS, count, memory_released, track

if TYPE_CHECKING:
    import pandas
    from accelerate import Accelerator

IGNORED = -100  # the label of tokens that carry no loss, as in transformers
#: Bytes of snapshots that a training keeps in main memory; further ones lie in a temporary folder.
SNAPSHOT_BYTES = 2**31
#: Float16 gradients below 6e-8 are 0, so the loss is multiplied by this first and the masters' gradients divided again.
LOSS_SCALE = 2.0**12


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
    check_choice("target", target, ("refusal", "helpful"))
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


def response_loss(lm: LanguageModel, batch: Mapping[str, Tensor], prefix: Prefix | None = None) -> Tensor:
    """Mean negative log-likelihood per response token, in nats; a scalar, float32 (float64 from a float64 model).

    The model's own forward, but the head reads only the positions that predict a response token: in a model with many
    words most of its work would be for the prompt's. Tokens of a ``prefix`` have run already.
    """
    start = prefix.length if prefix is not None else 0
    inputs: dict[str, Any] = {name: value.to(lm.device) for name, value in batch.items() if name != "labels"}
    if prefix is not None and start:
        inputs |= {name: inputs[name][:, start:] for name in ("input_ids", "position_ids")}
        inputs["past_key_values"] = prefix.repeated(1, 0)
    targets = torch.full_like(batch["labels"], IGNORED)
    targets[:, :-1] = batch["labels"][:, 1:]
    targets = targets[:, start:]
    learnt = targets != IGNORED

    def only_learnt(module: nn.Module, args: tuple) -> tuple:
        return (args[0][learnt.to(args[0].device)][None], *args[1:])

    with hooks.attached([hooks.before(lm.model.get_output_embeddings(), only_learnt)]):
        logits = lm.model(**inputs, use_cache=False).logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(logits, targets[learnt].to(logits.device))


@dataclass
class Tuned:
    """What `tune` gives back.

    Attributes:
        delta: the trained entries; merge it, activate it or save it. Raises DivergedError after a divergence.
        diverged: the step after which the loss or the gradient was no longer finite and the training ended; or None.
        losses: mean loss of each step, before its update (nats a token).
        history: one dict an evaluation: step, loss (mean over the steps since the last one), what the callback returned;
            after a divergence a last one: step, loss (NaN), diverged (True).
        final: the delta, None where the training diverged or somebody dropped it to save memory.
        snapshots: step -> Delta at each evaluation, if asked for: in main memory up to ``SNAPSHOT_BYTES`` in all, mapped
            from a temporary folder beyond. After a divergence those from before it.
        trained: number of trained parameters; trained_bytes: their size as they were trained (masters in float32).
        share: of all the model's parameters (0 to 1).
        seconds: time in training steps alone, without evaluations.
    """

    final: Delta | None
    losses: list[float]
    history: list[dict[str, Any]]
    trained: int
    trained_bytes: int
    share: float
    seconds: float
    snapshots: dict[int, Delta] = field(default_factory=dict)
    diverged: int | None = None
    folder: tempfile.TemporaryDirectory | None = field(default=None, repr=False)

    @property
    def delta(self) -> Delta:
        """What the last step changed in the weights. Raises DivergedError, or InputError where it was not kept."""
        if self.diverged is not None:
            raise DivergedError(f"learning_rate: the training diverged at step {self.diverged}; try a smaller one")
        if self.final is None:
            raise InputError("delta: this training's was not kept, to save memory")
        return self.final

    @property
    def parts(self) -> tuple[dict[str, Delta], dict[str, Any]]:
        """Its deltas by name and its facts, of which :meth:`of` makes it again."""
        deltas = {str(step): delta for step, delta in self.snapshots.items()}
        if self.final is not None and not deltas:  # else it is the last snapshot
            deltas[kept.FINAL] = self.final
        names = ("losses", "history", "trained", "trained_bytes", "share", "seconds", "diverged")
        return deltas, {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, deltas: Mapping[str, Delta], facts: Mapping[str, Any]) -> Tuned:
        """A training from its parts."""
        snapshots = {int(step): delta for step, delta in deltas.items() if step != kept.FINAL}
        last = snapshots[max(snapshots)] if snapshots and facts["diverged"] is None else None
        return cls(deltas.get(kept.FINAL, last), **facts, snapshots=snapshots)

    @property
    def table(self) -> pandas.DataFrame:
        """The history, one row an evaluation."""
        import pandas

        return pandas.DataFrame(self.history)


Callback = Callable[[LanguageModel, int], Mapping[str, Any] | None]


@memory_released
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
    train_dtype: str = "auto",
) -> Tuned:
    """Fine-tune with AdamW on the loss of the response tokens; afterwards `lm` is the base again, bit for bit.

    SN-Tune is `Only(safety)` on harmful prompts with their refusals ([SN] section 4: 50 pairs, one epoch, learning rate
    1e-6, length 512), RSN-Tune `Only(safety - foundation)`. **Ours**: benign pairs can be mixed in, since refusals alone
    teach to refuse everything. A training that diverges ends there and says so in its last row of history. Where a study
    keeps its trainings (:mod:`nt_utils.interventions.kept`) the same call without a callback takes over what it left.

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
        train_dtype: what training computes in; masters, gradients and AdamW's state are float32 at least in any case.
            "auto": float64 for models of less than `precision.SMALL` parameters, so that no machine's rounding decides
            what is learnt, else "model"; "model": the model's own; "float32" and "float64": a copy in that precision.
            The delta is rounded once to the model's precision, in which the callback evaluates too.

    Raises:
        InputError: parameters out of range, no pairs, pairs without the response they should learn, an empty or foreign
            neuron set; fewer pairs in a batch than processes, a callback with several of them (evaluate the snapshots
            afterwards), settings of accelerate that cannot be honoured.
    """
    check_train_dtype(train_dtype)
    _check(harmful, benign, benign_share, learning_rate, steps, batch_size, warmup, schedule, every)
    learnt = [
        examples(lm, prompts, target, max_length=max_length) if len(prompts) else []
        for prompts, target in ((harmful, "refusal"), (benign, "helpful"))
    ]
    stream = batches(*learnt, size=batch_size, share=benign_share, seed=seed)
    processes = Processes.of(lm, accelerator)
    _check_processes(processes.count, batch_size, callback)
    total = lm.view.space.total_parameters
    before, key = Counter(COUNTS), ""
    stops = {steps, *(range(every, steps, every) if isinstance(every, int) else every or ())}
    if callback is None and accelerator is None:
        numbers = (benign_share, learning_rate, steps, batch_size, warmup, schedule, weight_decay, clip, seed)
        how = (*numbers, sorted(stops), snapshots, gradient_checkpointing, train_dtype)
        key = kept.key_of(lm, scope, examples=learnt, how=how)
        if found := kept.load(key):
            return Tuned.of(*found)
    trained = training_copy(lm, train_dtype)
    with _seeded(seed), scope.start(trained) as training:
        run = _Run(lm, training, callback, snapshots, processes)
        kind = "tuned" if training.size > total / 2 else "trained"
        optimiser = torch.optim.AdamW(training.parameters, lr=learning_rate, weight_decay=weight_decay)
        with _training_mode(trained, gradient_checkpointing):
            run.evaluate(0)
            run.trunk = FrozenTrunk.of(trained, training.lowest_layer)
            hidden = not progress or processes.index > 0
            for step in track(range(steps), desc=f"tuning, {scope.name}", unit="step", disable=hidden):
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate * _rate(step, steps, warmup, schedule)
                batch = next(stream)
                tokens = len(batch) * max(len(example.ids) for example in batch)
                count(**{f"{kind}_steps": 1, f"{kind}_rows": len(batch), f"{kind}_tokens": tokens})
                if not run.step(batch, optimiser, clip):
                    break
                if step + 1 in stops:
                    optimiser.zero_grad(set_to_none=True)  # an evaluation may need the memory
                    run.evaluate(step + 1)
        size, size_bytes = training.size, training.bytes
        final = run.delta() if run.diverged is None else None
    facts = (run.losses, run.history, size, size_bytes, size / total, run.seconds, run.snapshots, run.diverged)
    tuned = Tuned(final, *facts, run.folder)
    kept.save(key, *tuned.parts, before)
    return tuned


class _Run:
    """One training's steps and evaluations; ``lm`` is the model as it is stored, ``training.lm`` what is trained."""

    def __init__(
        self, lm: LanguageModel, training: Training, callback: Callback | None, keep: bool, processes: Processes
    ):
        self.lm, self.training, self.callback, self.keep, self.processes = lm, training, callback, keep, processes
        self.trunk: FrozenTrunk | None = None
        self.losses: list[float] = []
        self.history: list[dict[str, Any]] = []
        self.snapshots: dict[int, Delta] = {}
        self.folder: tempfile.TemporaryDirectory | None = None
        self.diverged: int | None = None
        self.seconds = 0.0
        self._reported = self._snapshot_bytes = 0
        self._scale = LOSS_SCALE if any(p.dtype == torch.float16 for p in training.lm.model.parameters()) else 1.0
        # Norms square activations in float32, so larger weights are no use in any precision.
        self._largest = min(2.0**63, *(torch.finfo(p.dtype).max for p in lm.model.parameters()))

    def delta(self) -> Delta:
        """What was learnt so far, in the precision of the model as it is stored."""
        found = self.training.delta()
        return found if self.training.lm is self.lm else found.rounded(self.lm)

    def loss(self, batch: Sequence[Example]) -> Tensor:
        """The loss of this process's share; its mean over the processes is the whole batch's mean per response token."""
        part = self.processes.part(batch)
        model, inputs = self.training.lm, collate(part, self.lm.pad_id)
        rows, starts = [e.ids for e in part], [e.start for e in part]
        with nullcontext() if self.trunk is None else self.trunk.reused(rows, starts) as prefix:
            loss = response_loss(model, inputs, prefix)
        if self.processes.count == 1:
            return loss
        tokens, all_tokens = (sum(len(e.ids) - e.start for e in examples) for examples in (part, batch))
        return loss * (self.processes.count * tokens / all_tokens)

    def step(self, batch: Sequence[Example], optimiser: torch.optim.Optimizer, clip: float) -> bool:
        """One update; False where the loss, its gradient or the result is not finite, which ends the training."""
        started = time.perf_counter()
        with computing(self.training.lm):
            value, norm = self._gradients(batch, optimiser, clip)
        while math.isfinite(value) and not math.isfinite(norm) and self._scale > 1:  # float16 gradients overflowed
            self._scale /= 16
            value, norm = self._gradients(batch, optimiser, clip)
        finite = math.isfinite(value) and math.isfinite(norm)
        if finite:
            optimiser.step()
            self.losses.append(value)
            finite = all(bool(p.detach().abs().max() <= self._largest) for p in self.training.parameters)
        if not finite:
            self.diverged = len(self.losses)
            self.history.append({"step": self.diverged, "loss": float("nan"), "diverged": True})
        self.seconds += time.perf_counter() - started
        return finite

    def _gradients(
        self, batch: Sequence[Example], optimiser: torch.optim.Optimizer, clip: float
    ) -> tuple[float, float]:
        """The loss and the norm of its gradient, which lies on the masters, clipped."""
        optimiser.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        value = self.processes.mean(loss)
        if not math.isfinite(value):
            return value, float("nan")
        (loss * self._scale).backward()
        gradients = [p.grad for p in self.training.parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(self._scale)
            if self.processes.count > 1 and not is_sharded(self.lm.model):  # a sharded training averages by itself
                average(gradient)
        return value, float(nn.utils.clip_grad_norm_(self.training.parameters, clip or math.inf))

    def evaluate(self, step: int) -> None:
        """A row of the history; the callback may use random numbers without changing the training."""
        since = self.losses[self._reported :]
        self._reported = len(self.losses)
        row: dict[str, Any] = {"step": step, "loss": sum(since) / len(since) if since else float("nan")}
        apart = self.training.lm is not self.lm
        delta = self.delta() if self.keep or (apart and self.callback) else None
        if self.callback is not None:
            was, merged = self.lm.model.training, delta.active(self.lm) if apart and delta else nullcontext()
            self.lm.model.eval()
            with merged, torch.random.fork_rng(devices=_accelerators()):
                row |= dict(self.callback(self.lm, step) or {})
            self.lm.model.train(was)
        self.history.append(row)
        if self.keep and delta is not None:
            self.snapshots[step] = self._kept(delta, step)

    def _kept(self, delta: Delta, step: int) -> Delta:
        """The delta in main memory, or mapped from a file where the budget is spent."""
        self._snapshot_bytes += delta.bytes
        if self._snapshot_bytes <= SNAPSHOT_BYTES:
            return delta
        self.folder = self.folder or tempfile.TemporaryDirectory(prefix="nt_deltas_")
        return Delta.load(delta.save(f"{self.folder.name}/{step}.safetensors"))


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
        # What is run again in the backward pass computes in the same precision.
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), computing(lm))}
        model.activation_checkpointing_enable(again)
    try:
        yield
    finally:
        if checkpointing:
            model.activation_checkpointing_disable()
        model.train(before)


def _check(harmful, benign, benign_share, learning_rate, steps, batch_size, warmup, schedule, every) -> None:
    if not len(harmful) and not len(benign):
        raise InputError("harmful, benign: both are empty; at least one pair is needed")
    if not 0 <= benign_share <= 1:
        raise InputError(f"benign_share: got {benign_share}; allowed: 0 to 1")
    if not learning_rate > 0:
        raise InputError(f"learning_rate: got {learning_rate}; it must be above 0")
    stops = [every] if isinstance(every, int) else every or ()
    for name, value in (("steps", steps), ("batch_size", batch_size), *(("every", stop) for stop in stops)):
        check_count(name, value)
    if not isinstance(every, int) and any(stop > steps for stop in stops):
        raise InputError(f"every: got {max(stops)}; allowed: 1 to the number of steps ({steps})")
    if not 0 <= warmup <= steps:
        raise InputError(f"warmup: got {warmup}; allowed: 0 to the number of steps ({steps})")
    check_choice("schedule", schedule, ("constant", "linear"))
