"""A causal language model with its tokenizer, chat template and view: from prompts to padded token ids."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nt_utils.errors import InputError
from nt_utils.models.view import DecoderView, device_of, is_sharded, tensor_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """A padded batch.

    Attributes:
        input_ids, attention_mask: int64 [batch, tokens].
        position_ids: int64 [batch, tokens], counted from the first real token (learned positions need it).
        prompt_lengths: tokens of the rendered prompt (template included) in each row.
        lengths: real tokens in each row (prompt and response).
        side: where the padding is, "left" or "right".
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    prompt_lengths: tuple[int, ...]
    lengths: tuple[int, ...]
    side: str

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of the first real token in each row."""
        width = self.input_ids.shape[1]
        return tuple(width - n if self.side == "left" else 0 for n in self.lengths)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    def to(self, device) -> Encoded:
        """The same batch on a device."""
        tensors = {name: value.to(device) for name, value in self.inputs.items()}
        return Encoded(**tensors, prompt_lengths=self.prompt_lengths, lengths=self.lengths, side=self.side)


def pad(rows: Sequence[Sequence[int]], *, pad_id: int, side: str, prompt_lengths: Sequence[int]) -> Encoded:
    """Token lists to a padded batch."""
    if side not in ("left", "right"):
        raise InputError(f"side: got {side!r}; allowed: left, right")
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, span] = torch.tensor(row, dtype=torch.long)
        mask[i, span] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Encoded(ids, mask, positions, tuple(prompt_lengths), tuple(len(row) for row in rows), side)


_FINGERPRINTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer, chat template and view.

    ``system_prompt`` stands before every prompt; a template without a system role gets it in front of the user's text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    system_prompt: str | None = None
    _marker: str = field(default="\u2063text\u2063", repr=False)

    @property
    def label(self) -> str:
        """What tables call it: its hub id, or its folder's name; where the folder lies differs between machines."""
        path = Path(self.name).expanduser()
        return path.resolve().name if path.is_dir() else self.name

    @cached_property
    def view(self) -> DecoderView:
        """The uniform handle on its projections."""
        return DecoderView(self.model)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return device_of(self.model.get_input_embeddings())

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    # -- text

    def set_system_prompt(self, text: str | None) -> None:
        """Another system prompt from now on; None or "" for none."""
        self.system_prompt = text or None
        self.__dict__.pop("_system_role", None)  # whether the template shows it was looked up for the old one

    def _messages(self, prompt: str, system_role: bool) -> list[dict]:
        if not self.system_prompt:
            return [{"role": "user", "content": prompt}]
        if system_role:
            return [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": prompt}]
        return [{"role": "user", "content": f"{self.system_prompt}\n\n{prompt}"}]

    @cached_property
    def _system_role(self) -> bool:
        """Whether the template accepts a system message (Gemma's raises)."""
        try:
            text = self.tokenizer.apply_chat_template(self._messages("x", True), tokenize=False)
        except Exception:  # templates raise errors of their own making
            return False
        return not self.system_prompt or self.system_prompt in text

    def _apply(self, messages: list[dict], **more) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **more))

    def render(self, prompts: Sequence[str], responses: Sequence[str] | None = None) -> list[str]:
        """The text the model reads: the chat template with its generation prompt, then the response if given.

        A model without a template (a base model) gets the plain text and a line break; responses follow directly.
        """
        _check_texts(prompts, responses)
        heads = [self._head(prompt) for prompt in prompts]
        if responses is None:
            return heads
        return [head + response + self._end for head, response in zip(heads, responses, strict=True)]

    def _head(self, prompt: str) -> str:
        if not self.has_template:
            return f"{self.system_prompt}\n{prompt}\n" if self.system_prompt else f"{prompt}\n"
        return self._apply(self._messages(prompt, self._system_role), add_generation_prompt=True)

    @cached_property
    def _end(self) -> str:
        """What ends a response: the template's end of turn, or the end-of-text token."""
        if self.has_template:
            messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": self._marker}]
            tail = self._apply(messages).rpartition(self._marker)[2].rstrip()
            if tail:
                return tail
        return self.tokenizer.eos_token or ""

    # -- tokens

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts (a template writes its own special tokens; plain text gets the tokenizer's)."""
        return self.tokenizer(list(texts), add_special_tokens=not self.has_template)["input_ids"]

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each rendered prompt, template included."""
        return [len(row) for row in self.tokens(self.render(prompts))]

    def encode(self, prompts: Sequence[str], responses: Sequence[str] | None = None, side: str = "left") -> Encoded:
        """Render and tokenize into a padded batch on the CPU.

        Prompt and response are tokenized apart, so that the prompt's tokens are the same with and without a response.

        Raises:
            InputError: no prompts, or one that is longer than the model's context.
        """
        heads = self.tokens(self.render(prompts))
        rows = heads
        if responses is not None:
            _check_texts(prompts, responses)
            ends = self.tokenizer([r + self._end for r in responses], add_special_tokens=False)["input_ids"]
            rows = [head + end for head, end in zip(heads, ends, strict=True)]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for i, row in enumerate(rows):
            if not row:
                raise InputError(f"prompts: number {i} has no tokens")
            if limit and len(row) > limit:
                raise InputError(f"prompts: number {i} has {len(row)} tokens; the model's context holds {limit}")
        return pad(rows, pad_id=self.pad_id, side=side, prompt_lengths=[len(head) for head in heads])

    @property
    def pad_id(self) -> int:
        """The id that fills padded places."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)

    @cached_property
    def suffix_length(self) -> int:
        """Tokens that follow the user's text in every prompt: end of turn and assistant header (at least 1)."""
        rows = self.tokens(self.render(["a", "7 ?", "One more, longer text.", "zu"]))
        shortest = min(map(len, rows))
        same = 0
        while same < shortest and len({row[-1 - same] for row in rows}) == 1:
            same += 1
        return max(same, 1)

    @property
    def weights_fingerprint(self) -> str:
        """Hash over the names and values of all weights as they are now.

        torch counts the in-place changes of every tensor: while counts and addresses stand still the hash is kept.
        Whoever writes through ``.data``, which torch does not count, calls :meth:`weights_changed`.
        Sharded weights are gathered one by one, so every process must ask at the same time; nothing is kept.
        """
        if is_sharded(self.model):
            return self._hash_weights()
        tensors = [*self.model.parameters(), *self.model.buffers()]
        stamp = tuple((t.data_ptr(), t._version) for t in tensors)
        known = _FINGERPRINTS.get(self.model)
        if known is None or known[0] != stamp:
            known = _FINGERPRINTS[self.model] = (stamp, self._hash_weights())
        return known[1]

    def weights_changed(self) -> None:
        """Forget the kept fingerprint."""
        _FINGERPRINTS.pop(self.model, None)

    def _hash_weights(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            if value.is_meta:
                owner, _, leaf = name.rpartition(".")
                value = tensor_of(self.model.get_submodule(owner), leaf)
            value = value.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            flat = value.cpu().contiguous().reshape(-1)
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def _check_texts(prompts: Sequence[str], responses: Sequence[str] | None) -> None:
    if isinstance(prompts, str) or not len(prompts):
        raise InputError("prompts: need a list with at least one text")
    if responses is not None and len(responses) != len(prompts):
        raise InputError(f"responses: got {len(responses)} for {len(prompts)} prompts")
