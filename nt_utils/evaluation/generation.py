"""Batched greedy generation with a cache.

Decoding is greedy by construction: a checkpoint's own sampling defaults (temperature, repetition penalty) do not enter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError, ModelError, check_count
from nt_utils.evaluation import batching
from nt_utils.evaluation.judges import THINKING_MARK
from nt_utils.files import atomic, cache_folder
from nt_utils.models import context_of
from nt_utils.work import count, is_older, track

if TYPE_CHECKING:
    from nt_utils.models import LanguageModel


@dataclass(frozen=True, slots=True)
class Response:
    """What the model wrote.

    Attributes:
        text: without special tokens and outer blanks.
        hit_limit: it had not finished when the token limit was reached.
        cut: it was stopped by an :class:`EarlyEnd`: more would have followed.
        tokens: its ids, with the stop token where it wrote one.
        log_probability: of these tokens under the model that wrote them, in nats.
    """

    text: str
    hit_limit: bool
    cut: bool = False
    tokens: tuple[int, ...] = field(default=(), compare=False)
    log_probability: float = field(default=math.nan, compare=False)

    @property
    def perplexity(self) -> float:
        """Perplexity a token under the model that wrote it; NaN without tokens."""
        return math.exp(-self.log_probability / len(self.tokens)) if self.tokens else math.nan


@dataclass(frozen=True)
class EarlyEnd:
    """Ends a response as soon as ``decided(text so far)``; asked each ``every`` tokens. ``key`` names it for caches."""

    decided: Callable[[str], bool]
    key: str
    every: int = 8


# --------------------------------------------------------------------------------------------------- generation


def generate(
    lm: LanguageModel,
    prompts: PromptSet | Sequence[Prompt | str],
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    progress: bool = True,
    intervention: Any = None,
    cache: bool | str | Path = False,
    early_end: EarlyEnd | None = None,
    identity: str | None = "",
) -> list[Response]:
    """Greedy responses to the prompts, in their order. A prompt that occurs twice is answered once.

    Prompts are sorted by length into left-padded batches of at most `batch_size` rows (None: BATCH_SIZE) and
    BATCH_TOKENS tokens, so batches are the same on every machine; rows that have finished leave the batch. Tokens that
    all prompts begin with are read once. A prompt's `prefill` stands before the generated words in the model's context
    and is not repeated in the response's text.

    intervention  an object with `.key` and `.active(lm)`; its context is entered around the whole run
    cache         True keeps responses under NT_CACHE (a folder may be given instead) by what acts on the model's
                  output, prompts, decoding and batch size; what cannot be identified is never cached
    early_end     see EarlyEnd
    identity      `lm.identity(intervention.key)` where the caller has taken it already

    Raises:
        InputError: a prompt that leaves no room for the answer. ModelError: logits that are not numbers, with the prompt.
    """
    size = batching.BATCH_SIZE if batch_size is None else batch_size
    check_count("max_new_tokens", max_new_tokens)
    check_count("batch_size", size)
    records = as_prompts(prompts)
    if not records:
        return []
    path = None
    if cache:
        if identity == "":
            identity = lm.identity("" if intervention is None else getattr(intervention, "key", None))
        path = _cache_path(lm, records, max_new_tokens, size, identity, cache, early_end)
    if path is not None and (stored := _read_cache(path, len(records))) is not None:
        if is_older(path):
            count(cached_answers=len(records))
        return stored
    with intervention.active(lm) if intervention is not None else contextlib.nullcontext():
        responses = _generate(lm, records, max_new_tokens, size, progress, early_end)
    if path is not None:
        _write_cache(path, responses)
    return responses


def as_prompts(prompts: PromptSet | Sequence[Prompt | str]) -> list[Prompt]:
    """A list of Prompt records from a set, records or plain strings."""
    if isinstance(prompts, (str, Prompt)):
        raise InputError("prompts must be a list or a PromptSet, got a single prompt")
    return [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]


def _generate(
    lm: LanguageModel,
    prompts: list[Prompt],
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
    early_end: EarlyEnd | None = None,
) -> list[Response]:
    rows = prompt_ids(lm, prompts, room=max_new_tokens)
    names = [f"prompt {i}, {prompt.text[:60]!r}" for i, prompt in enumerate(prompts)]
    return continued(
        lm, rows, max_new_tokens, batch_size=batch_size, early_end=early_end, names=names, progress=progress
    )


def continued(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = batching.BATCH_SIZE,
    early_end: EarlyEnd | None = None,
    names: Sequence[str] = (),
    progress: bool = False,
) -> list[Response]:
    """Greedy continuations of rows of token ids (see :func:`generate`); ``names`` are what errors call the rows."""
    inputs = [tuple(row) for row in rows]
    unique = list(dict.fromkeys(inputs))
    found: dict[tuple[int, ...], Response] = {}
    with torch.no_grad(), track(total=len(unique), desc="generating", unit="prompt", disable=not progress) as bar:
        prefix = batching.Prefix(lm, unique, [1] * len(unique))
        for batch in batching.batches(list(map(len, unique)), max_new_tokens, batch_size):
            asked = [unique[i] for i in batch]
            try:
                answers = _greedy(lm, asked, max_new_tokens, prefix, early_end)
            except _NotANumber as error:
                number = inputs.index(asked[error.args[0]])
                name = names[number] if names else f"row {number}"
                raise ModelError(f"model: its logits are not numbers (NaN) at {name}") from None
            found |= zip(asked, answers, strict=True)
            bar.update(len(batch))
    return [found[row] for row in inputs]


def prompt_ids(lm: LanguageModel, prompts: list[Prompt], room: int = 0) -> list[list[int]]:
    """Token ids of every rendered prompt with its prefill. A prompt that leaves no `room` for the answer is refused."""
    ids = [list(row) for row in lm.tokens(lm.render([p.text for p in prompts]))]
    for row, prompt in zip(ids, prompts, strict=True):
        if prompt.prefill:
            row += lm.tokenizer(prompt.prefill, add_special_tokens=False)["input_ids"]
    limit, why = context_of(lm.model.config)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if limit is not None and len(ids[longest]) + room > limit:
        under = f" (attack {prompts[longest].attack})" if prompts[longest].attack else ""
        raise InputError(
            f"prompt {longest}{under} has {len(ids[longest])} tokens and max_new_tokens is {room}; {why} {limit} tokens"
        )
    return ids


class _NotANumber(Exception):
    """Row args[0] of a batch has logits that are not numbers."""


def _greedy(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    prefix: batching.Prefix,
    early_end: EarlyEnd | None = None,
) -> list[Response]:
    """One batch: token ids in, responses out. Finished rows are dropped from the cache as soon as it pays."""
    stops = torch.tensor(lm.stop_ids, dtype=torch.long, device=lm.device)
    ids, mask = batching.left_padded(lm, rows, prefix)
    past = prefix.cache(len(rows))
    written: list[list[int]] = [[] for _ in rows]
    totals = [0.0] * len(rows)
    end: list[str] = [""] * len(rows)  # how each row ended: "stop", "cut", or not yet
    alive = list(range(len(rows)))
    for step in range(1, max_new_tokens + 1):
        out = batching.forward(lm, ids, mask, 1, past, True)
        past, logits = out.past_key_values, out.logits[:, -1].float()
        best, token = logits.max(-1)
        chance = (best - logits.logsumexp(-1)).tolist()
        ended = torch.isin(token, stops).tolist()
        for row, (i, value) in enumerate(zip(alive, token.tolist(), strict=True)):
            if end[i]:
                continue
            if math.isnan(chance[row]):
                raise _NotANumber(i)
            written[i].append(value)
            totals[i] += chance[row]
            if ended[row]:
                end[i] = "stop"
            elif early_end and step % early_end.every == 0 and early_end.decided(text_of(lm, written[i])):
                end[i] = "cut"
        keep = [row for row, i in enumerate(alive) if not end[i]]
        if not keep:
            break
        if len(keep) <= 0.75 * len(alive):
            kept = torch.tensor(keep, device=lm.device)
            batching.keep_rows(past, kept)
            mask, token, alive = mask[kept], token[kept], [alive[row] for row in keep]
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
    return [
        Response(text_of(lm, tokens[:-1] if how == "stop" else tokens), not how, how == "cut", tuple(tokens), total)
        for tokens, how, total in zip(written, end, totals, strict=True)
    ]


def text_of(lm: LanguageModel, tokens: Sequence[int]) -> str:
    """The text of an answer, without special tokens apart from those that begin and end a thought."""
    special = {i: str(token) for i, token in lm.tokenizer.added_tokens_decoder.items() if token.special}
    if any(THINKING_MARK.fullmatch(special.get(i, "")) for i in tokens):
        kept = [i for i in tokens if i not in special or THINKING_MARK.fullmatch(special[i])]
        return str(lm.tokenizer.decode(kept, skip_special_tokens=False)).strip()
    return str(lm.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


# --------------------------------------------------------------------------------------------------- cache


def _cache_path(
    lm: LanguageModel,
    prompts: list[Prompt],
    max_new_tokens: int,
    batch_size: int,
    identity: str | None,
    cache: bool | str | Path,
    early_end: EarlyEnd | None,
) -> Path | None:
    """The file that holds these responses, or None where what acts on them cannot be identified."""
    if identity is None:
        return None
    settings = {
        "identity": identity,
        "prompts": [(text, p.prefill) for text, p in zip(lm.render([p.text for p in prompts]), prompts, strict=True)],
        "decoding": {"method": "greedy", "max_new_tokens": max_new_tokens, "stops": list(lm.stop_ids)},
        "batch": [batch_size, batching.BATCH_TOKENS, batching.PADDING, batching.SAVED],
        "end": [early_end.key, early_end.every] if early_end else None,
        "form": 2,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "generations" if isinstance(cache, bool) else Path(cache)
    return folder / f"{digest[:40]}.json"


def _read_cache(path: Path, n: int) -> list[Response] | None:
    """The stored responses, or None where there are none or the file is damaged."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["responses"]
        found = [Response(str(t), bool(h), bool(c), tuple(map(int, ids)), float(p)) for t, h, c, ids, p in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if len(found) == n else None


def _write_cache(path: Path, responses: list[Response]) -> None:
    """A folder that cannot be written costs the cache, not the run."""
    import warnings

    rows = [[r.text, r.hit_limit, r.cut, r.tokens, r.log_probability] for r in responses]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            Path(temporary).write_text(json.dumps({"responses": rows}, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        warnings.warn(f"responses are not cached: {path.parent} cannot be written ({error.strerror})", stacklevel=3)
