"""Batched greedy generation with a cache, likelihoods of given responses, and perplexity of plain text.

Decoding is greedy by construction: a checkpoint's own sampling defaults (temperature, repetition penalty) do not enter.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.files import cache_folder

if TYPE_CHECKING:
    import numpy
    import torch

    from nt_utils.models import LanguageModel


class Response(NamedTuple):
    """What the model wrote. `hit_limit` says that it had not finished when the token limit was reached."""

    text: str
    hit_limit: bool


PADDING = 64  # tokens of padding that are cheaper than another batch

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
) -> list[Response]:
    """Greedy responses to the prompts, in their order.

    Prompts are sorted by length into left-padded batches; rows that have finished leave the batch, and a batch ends
    with its last row. `batch_size` None takes the largest that keeps the key-value cache within an eighth of the free
    device memory (1 GiB on a CPU), at most 512. A prompt's `prefill` stands before the generated words in the model's
    context and is not repeated in the response's text.

    intervention  an object with `.key` and `.active(lm)`; its context is entered around the whole run
    cache         True keeps responses under NT_CACHE (a folder may be given instead) by weights, intervention, prompts
                  and decoding; an intervention without a key is never cached
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, got {batch_size}")
    records = as_prompts(prompts)
    if not records:
        return []
    path = _cache_path(lm, records, max_new_tokens, intervention, cache) if cache else None
    if path is not None and (stored := _read_cache(path, len(records))) is not None:
        return stored
    with intervention.active(lm) if intervention is not None else contextlib.nullcontext():
        responses = _generate(lm, records, max_new_tokens, batch_size, progress)
    if path is not None:
        _write_cache(path, responses)
    return responses


def as_prompts(prompts: PromptSet | Sequence[Prompt | str]) -> list[Prompt]:
    """A list of Prompt records from a set, records or plain strings."""
    if isinstance(prompts, (str, Prompt)):
        raise InputError("prompts must be a list or a PromptSet, got a single prompt")
    return [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]


def _generate(
    lm: LanguageModel, prompts: list[Prompt], max_new_tokens: int, batch_size: int | None, progress: bool
) -> list[Response]:
    from tqdm.auto import tqdm

    inputs = prompt_ids(lm, prompts, room=max_new_tokens)
    order = sorted(range(len(inputs)), key=lambda i: (-len(inputs[i]), i))
    responses: dict[int, Response] = {}
    with tqdm(total=len(inputs), desc="generating", unit="prompt", disable=not progress, leave=False) as bar:
        while order:
            longest = len(inputs[order[0]])
            size = batch_size or _fitting_batch(lm, longest + max_new_tokens)
            # Rows much shorter than the longest would mostly be padding: they wait for a batch of their own.
            size = min(size, sum(2 * len(inputs[i]) + PADDING >= longest for i in order))
            batch, order = order[:size], order[size:]
            responses |= zip(batch, _greedy(lm, [inputs[i] for i in batch], max_new_tokens), strict=True)
            bar.update(len(batch))
    return [responses[i] for i in range(len(inputs))]


def prompt_ids(lm: LanguageModel, prompts: list[Prompt], room: int = 0) -> list[list[int]]:
    """Token ids of every rendered prompt with its prefill. A prompt that leaves no `room` for the answer is refused."""
    ids = [list(row) for row in lm.tokens(lm.render([p.text for p in prompts]))]
    for row, prompt in zip(ids, prompts, strict=True):
        if prompt.prefill:
            row += lm.tokenizer(prompt.prefill, add_special_tokens=False)["input_ids"]
    limit = context_length(lm)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if limit is not None and len(ids[longest]) + room > limit:
        under = f" (attack {prompts[longest].attack})" if prompts[longest].attack else ""
        raise InputError(
            f"prompt {longest}{under} has {len(ids[longest])} tokens and max_new_tokens is {room}: together they must not "
            f"exceed the model's context of {limit} tokens"
        )
    return ids


def context_length(lm: LanguageModel) -> int | None:
    """The longest sequence the model was built for, or None where its config does not say."""
    config = lm.model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def stop_token_ids(lm: LanguageModel) -> list[int]:
    """Every id that ends a response: the generation config's (one or several) and the tokenizer's."""
    stops: set[int] = set()
    for holder in (getattr(lm.model, "generation_config", None), lm.tokenizer):
        value = getattr(holder, "eos_token_id", None)
        stops.update([value] if isinstance(value, int) else value or [])
    return sorted(stops)


def _greedy(lm: LanguageModel, rows: list[list[int]], max_new_tokens: int) -> list[Response]:
    """One batch: token ids in, responses out. Finished rows are dropped from the cache as soon as it pays."""
    import torch

    model, device = lm.model, lm.device
    stops = torch.tensor(stop_token_ids(lm), dtype=torch.long, device=device)
    filler = lm.pad_id
    length = max(map(len, rows))
    ids = torch.tensor([[filler] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    written: list[list[int]] = [[] for _ in rows]
    finished = [False] * len(rows)
    alive = list(range(len(rows)))
    past = None
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            out = model(**inputs, past_key_values=past, use_cache=True, **extra)
            past, token = out.past_key_values, out.logits[:, -1].argmax(-1)
            ended = torch.isin(token, stops).tolist()
            for row, (i, value) in enumerate(zip(alive, token.tolist(), strict=True)):
                if ended[row]:
                    finished[i] = True
                elif not finished[i]:
                    written[i].append(value)
            if all(finished[i] for i in alive):
                break
            keep = [row for row, i in enumerate(alive) if not finished[i]]
            if len(keep) <= 0.75 * len(alive) and hasattr(past, "batch_select_indices"):
                kept = torch.tensor(keep, device=device)
                past.batch_select_indices(kept)
                mask, token, alive = mask[kept], token[kept], [alive[row] for row in keep]
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
    return [
        Response(str(lm.tokenizer.decode(tokens, skip_special_tokens=True)).strip(), not done)
        for tokens, done in zip(written, finished, strict=True)
    ]


def _fitting_batch(lm: LanguageModel, tokens: int) -> int:
    """How many sequences of that many tokens keep the key-value cache within the budget; at least 1, at most 512."""
    import torch

    config, parameter = lm.model.config.get_text_config(), next(lm.model.parameters())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * parameter.element_size()
    budget = 2**30
    if parameter.device.type == "cuda":
        budget = torch.cuda.mem_get_info(parameter.device)[0] // 8
    return int(max(1, min(512, budget // (per_token * tokens))))


# --------------------------------------------------------------------------------------------------- likelihoods


def response_likelihood(
    lm: LanguageModel,
    prompts: PromptSet | Sequence[Prompt | str],
    responses: Sequence[str],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """log p(response | prompt) in nats and the number of response tokens, one value a prompt (float64, int64).

    The response is scored as rendered by the chat template; prefills do not enter. A response that renders to no
    token has likelihood 0 and count 0.
    """
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    texts = [p.text for p in as_prompts(prompts)]
    if len(texts) != len(responses):
        raise InputError(f"responses must be one for each prompt, got {len(responses)} for {len(texts)} prompts")
    totals, counts = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]) + len(responses[i]))
    steps = range(0, len(order), batch_size)
    with torch.inference_mode():
        for start in tqdm(steps, desc="likelihood", unit="batch", disable=not progress, leave=False):
            rows = order[start : start + batch_size]
            encoded = lm.encode([texts[i] for i in rows], [responses[i] for i in rows], side="right")
            encoded, device = encoded.to(lm.device), lm.device
            ids, mask = encoded.input_ids, encoded.attention_mask
            logits = lm.model(**encoded.inputs).logits[:, :-1].float()
            chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double()
            starts = torch.as_tensor(encoded.prompt_lengths, device=device)[:, None]
            place = torch.arange(1, ids.shape[1], device=device)[None]
            kept = (place >= starts) & mask[:, 1:].bool()
            totals[rows] = (chosen * kept).sum(1).cpu().numpy()
            counts[rows] = kept.sum(1).cpu().numpy()
    return totals, counts


def refusal_margin(
    lm: LanguageModel, prompts: PromptSet, *, batch_size: int = 32, progress: bool = False
) -> numpy.ndarray:
    """log p(refusal) - log p(helpful) per response token, one value a prompt (nats a token).

    It moves long before the rate of refusals does. Prompts that lack either known response give NaN.
    """
    import numpy as np

    known = [i for i, p in enumerate(prompts) if p.refusal and p.helpful]
    margin = np.full(len(prompts), math.nan)
    if known:
        subset = prompts[known]
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        refusal, refusal_tokens = response_likelihood(lm, subset, subset.column("refusal"), **options)
        helpful, helpful_tokens = response_likelihood(lm, subset, subset.column("helpful"), **options)
        margin[known] = refusal / np.maximum(refusal_tokens, 1) - helpful / np.maximum(helpful_tokens, 1)
    return margin


def response_perplexity(
    lm: LanguageModel, prompts: PromptSet | Sequence[Prompt | str], responses: Sequence[str], **options: Any
) -> numpy.ndarray:
    """Perplexity of each response given its prompt under this model; NaN for an empty response."""
    import numpy as np

    totals, counts = response_likelihood(lm, prompts, responses, **options)
    empty = np.array([not text.strip() for text in responses], dtype=bool)
    return np.where(empty | (counts == 0), math.nan, np.exp(-totals / np.maximum(counts, 1)))


class TextLikelihood(NamedTuple):
    """Per text: the summed negative log-likelihood (nats) and the number of predicted tokens."""

    nll: numpy.ndarray
    tokens: numpy.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token over all texts; NaN without tokens."""
        return math.exp(self.nll.sum() / self.tokens.sum()) if self.tokens.sum() else math.nan


def text_likelihood(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> TextLikelihood:
    """Likelihood of plain text without a chat template, for perplexity on WikiText or any text.

    Texts longer than `max_length` tokens (default: the model's context, at most 2048) are cut into windows that do not
    overlap; the first token of a window is not predicted.
    """
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    limit = min(max_length or 2048, context_length(lm) or 2048)
    windows: list[tuple[int, list[int]]] = []
    for i, text in enumerate(texts):
        ids = lm.tokenizer(text)["input_ids"]
        windows += [(i, ids[s : s + limit]) for s in range(0, len(ids), limit) if len(ids[s : s + limit]) > 1]
    windows.sort(key=lambda item: len(item[1]))
    nll, tokens = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    device = lm.device
    steps = range(0, len(windows), batch_size)
    with torch.inference_mode():
        for start in tqdm(steps, desc="perplexity", unit="batch", disable=not progress, leave=False):
            batch = windows[start : start + batch_size]
            ids, mask = _pad_right([ids for _, ids in batch], lm.pad_id, device)
            logits = lm.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double()
            sums = (chosen * mask[:, 1:]).sum(1).cpu().numpy()
            counts = mask[:, 1:].sum(1).cpu().numpy()
            for (i, _), total, count in zip(batch, sums, counts, strict=True):
                nll[i] -= total
                tokens[i] += count
    return TextLikelihood(nll, tokens)


def _pad_right(rows: list[list[int]], filler: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    length = max(map(len, rows))
    ids = torch.tensor([row + [filler] * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask


# --------------------------------------------------------------------------------------------------- cache


def _cache_path(
    lm: LanguageModel, prompts: list[Prompt], max_new_tokens: int, intervention: Any, cache: bool | str | Path
) -> Path | None:
    """The file that holds these responses, or None where the intervention cannot be identified."""
    key = "" if intervention is None else getattr(intervention, "key", None)
    if key is None:
        return None
    asked = [(p.text, p.prefill) for p in prompts]
    rendered = hashlib.sha256(json.dumps(lm.render([p.text for p in prompts])).encode()).hexdigest()
    config = lm.model.config
    identity = {
        "weights": lm.weights_fingerprint,
        "dtype": str(next(lm.model.parameters()).dtype),
        "attention": getattr(config, "_attn_implementation", ""),
        "intervention": key,
        "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "rendered": rendered,  # covers the chat template and the system prompt
        "decoding": {"method": "greedy", "max_new_tokens": max_new_tokens, "stops": stop_token_ids(lm)},
        "form": 1,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "generations" if isinstance(cache, bool) else Path(cache)
    return folder / f"{digest[:40]}.json"


def _read_cache(path: Path, n: int) -> list[Response] | None:
    """The stored responses, or None where there are none or the file is damaged."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["responses"]
        responses = [Response(str(text), bool(hit_limit)) for text, hit_limit in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return responses if len(responses) == n else None


def _write_cache(path: Path, responses: list[Response]) -> None:
    """Written under a temporary name and renamed. A folder that cannot be written costs the cache, not the run."""
    import warnings

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as handle:
            json.dump({"responses": [list(r) for r in responses]}, handle, ensure_ascii=False)
    except OSError as error:
        warnings.warn(f"responses are not cached: {path.parent} cannot be written ({error.strerror})", stacklevel=3)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Any]:
    number, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with open(number, "w", encoding="utf-8") as handle:
            yield handle
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
