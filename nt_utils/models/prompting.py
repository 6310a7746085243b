"""From prompts to token ids: chat template, system prompt, date, lengths. Needs a tokenizer and no weights."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nt_utils.errors import InputError, check_choice, first_line
from nt_utils.models.families import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# -------------------------------------------------------------------------------------------------------- batches


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
        return {name: getattr(self, name) for name in ("input_ids", "attention_mask", "position_ids")}

    def to(self, device) -> Encoded:
        """The same batch on a device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.inputs.items()}
        return dataclasses.replace(self, **moved)


def pad(rows: Sequence[Sequence[int]], *, pad_id: int, side: str, prompt_lengths: Sequence[int]) -> Encoded:
    """Token lists to a padded batch."""
    check_choice("side", side, ("left", "right"))
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, span] = torch.tensor(row, dtype=torch.long)
        mask[i, span] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Encoded(ids, mask, positions, tuple(prompt_lengths), tuple(len(row) for row in rows), side)


# ------------------------------------------------------------------------------------------------------ templates

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VICUNA = (  # lm-sys/FastChat, vicuna_v1.1
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% else %}A chat between a curious "
    "user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
    "user's questions. {% endif %}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_LLAMA_2 = (  # facebookresearch/llama, without its long system prompt, as Meta advises since July 2023
    "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {% if s and loop.index0 == 1 %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n"
    "{% endif %}{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
#: Templates by name, for chat models that ship none; "plain" is the text and a line break, as for a base model.
TEMPLATES: dict[str, str] = {"chatml": _CHATML, "vicuna": _VICUNA, "llama-2": _LLAMA_2, "plain": ""}
#: What names of models that ship no template say of the template they were trained with.
TRAINED_WITH = {r"vicuna": "vicuna", r"llama-?2.*chat": "llama-2"}
#: Words in a model's name that say that it was trained to answer in a chat.
CHAT_WORDS = re.compile(r"(?:^|[-_./ ])(chat|instruct|it|sft|dpo|rlhf|assistant|aligned)(?=$|[-_./ ])", re.IGNORECASE)

#: The date that templates write unless a run says otherwise (Llama 3.1's own default).
DATE = "2024-07-26"
#: Template arguments unless a run says otherwise: models that can think before they answer do not (Qwen 3, Granite 3).
ARGUMENTS = {"enable_thinking": False, "thinking": False}
# The calendar module's would follow the machine's language.
_MONTHS = "January February March April May June July August September October November December".split()
_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MARKERS = "\u2063first\u2063", "\u2063second\u2063", "\u2063third\u2063"


def find_template(tokenizer, name: str, wanted: str = "auto") -> tuple[str | None, str]:
    """The chat template of a model, and what provenance calls it.

    Args:
        name: of the model; decides only where the tokenizer has no template and ``wanted`` is "auto".
        wanted: "auto": the tokenizer's; else the one that the model's name tells (``TRAINED_WITH``); else "plain", unless
            the name tells a chat model (``CHAT_WORDS``), which is refused. Or a name of ``TEMPLATES``, or of one of the
            tokenizer's several templates, or a file with a Jinja template.

    Raises:
        InputError: an unknown name; a chat model without a template.
    """
    own = getattr(tokenizer, "chat_template", None)
    several = own if isinstance(own, dict) else {}
    if wanted in TEMPLATES:
        return TEMPLATES[wanted] or None, wanted
    if wanted in several:
        return several[wanted], f"the tokenizer's {wanted}"
    if wanted != "auto":
        path = Path(wanted).expanduser()
        if not path.is_file():
            allowed = ", ".join(["auto", *TEMPLATES, *several])
            raise InputError(f"chat_template: got {wanted!r}; allowed: {allowed}, or a file with a template")
        return path.read_text(encoding="utf-8"), path.name
    if own:
        text = several.get("default") if several else own
        if text is None:
            raise InputError(f"chat_template: {name} has several and no default; name one of {', '.join(several)}")
        return text, "the tokenizer's"
    short = Path(name).name
    for pattern, known in TRAINED_WITH.items():
        if re.search(pattern, short, re.IGNORECASE):
            return TEMPLATES[known], known
    if CHAT_WORDS.search(short):
        raise InputError(
            f"chat_template: {short} looks like a chat model and has no chat template; name the one it was trained with "
            f"({', '.join(TEMPLATES)}, or a file); 'plain' prompts it like a base model"
        )
    return None, "plain"


def _dated(template: str, date: datetime.date) -> str:
    """A template whose ``strftime_now`` writes a given date at noon, with English names on every machine."""
    month, weekday = _MONTHS[date.month - 1], _WEEKDAYS[date.weekday()]
    codes = {"%d": f"{date.day:02}", "%m": f"{date.month:02}", "%Y": f"{date.year}", "%y": f"{date.year % 100:02}"}
    codes |= {"%B": month, "%b": month[:3], "%A": weekday, "%a": weekday[:3]}
    codes |= {"%-d": str(date.day), "%e": f"{date.day:2}", "%-m": str(date.month), "%h": month[:3]}
    codes |= {"%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM", "%j": f"{date.timetuple().tm_yday:03}"}
    for _, form in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", template):
        for code in re.findall("%-?.?", form):
            if code not in codes.keys() | {"%F", "%D", "%T"}:
                raise InputError(f"chat_template: writes a date with {code!r}; allowed: {', '.join(codes)}, %F, %D, %T")
    filters = "".join(f" | replace({code!r}, {value!r})" for code, value in codes.items())
    whole = "| replace('%F', '%Y-%m-%d') | replace('%D', '%m/%d/%y') | replace('%T', '%H:%M:%S')"
    return f"{{%- macro strftime_now(format) -%}}{{{{ format {whole}{filters} }}}}{{%- endmacro -%}}{template}"


# ---------------------------------------------------------------------------------------------------------- texts


class Prompter:
    """A tokenizer with everything that turns a prompt into token ids.

    Args:
        system_prompt: None or "default": the template's own, if it writes one; "none": no system message even there; else
            the text of the system message (a template without a system role gets it in front of the user's text).
        template: Jinja source; None = the tokenizer's. ``template_name`` is what provenance calls it.
        template_arguments: variables of the template, beside ``ARGUMENTS``.
        date: what the template takes for today, as YYYY-MM-DD.
        config: of the model, for the length of its context; None = no limit.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        system_prompt: str | None = None,
        *,
        template_name: str = "",
        template_arguments: Mapping[str, Any] | None = None,
        date: str = DATE,
        config: Any = None,
    ):
        self.tokenizer, self.name, self.system_prompt = tokenizer, name, system_prompt
        self.template_name = template_name or ("the tokenizer's" if self.has_template else "plain")
        self.template_arguments = {**ARGUMENTS, **(template_arguments or {})}
        self._config = config
        self.set_date(date)

    # -- what the prompts are written with

    @property
    def label(self) -> str:
        """What tables call it: its hub id, or its folder's name; where the folder lies differs between machines."""
        path = Path(self.name).expanduser()
        return path.resolve().name if path.is_dir() else self.name

    @property
    def context_length(self) -> int | None:
        """Tokens that a prompt and its answer may have together, or None (:func:`~nt_utils.models.context_of`)."""
        return context_of(self.config)[0] if self.config is not None else None

    @property
    def config(self) -> Any:
        """The model's config, or None."""
        return self._config

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def text_identity(self) -> dict[str, Any]:
        """All that turns a prompt into token ids and ids into text, for cache keys and provenance."""
        return {
            "tokenizer": _tokenizer_hash(self.tokenizer),
            "template": getattr(self.tokenizer, "chat_template", None),
            "arguments": self.template_arguments,
            "date": self.date,
            "system prompt": self.system_prompt,
        }

    def set_system_prompt(self, text: str | None) -> None:
        """Another system prompt from now on; None or "default": the template's own; "none": no system message."""
        self.system_prompt = text

    def set_date(self, date: str) -> None:
        """Another date for the template from now on (YYYY-MM-DD)."""
        try:
            self._date = datetime.date.fromisoformat(date)
        except (TypeError, ValueError) as error:
            raise InputError(f"date: got {date!r}; allowed: a day as YYYY-MM-DD") from error

    @property
    def date(self) -> str:
        """What the template takes for today."""
        return self._date.isoformat()

    # -- rendering

    def render(self, prompts: Sequence[str], responses: Sequence[str] | None = None) -> list[str]:
        """The text the model reads: the chat template with its generation prompt, then the response if given.

        A model without a template (a base model) gets the plain text and a line break; responses follow directly.
        """
        _check_texts(prompts, responses)
        has_role = self._shows_system(self._system_text)
        heads = [self._head(prompt, has_role) for prompt in prompts]
        if responses is None:
            return heads
        end = self._end
        return [head + response + end for head, response in zip(heads, responses, strict=True)]

    @property
    def _system_text(self) -> str:
        return "" if self.system_prompt in (None, "default", "none") else str(self.system_prompt)

    def _head(self, prompt: str, has_role: bool) -> str:
        text = self._system_text
        if not self.has_template:
            return f"{text}\n{prompt}\n" if text else f"{prompt}\n"
        if text:
            messages = [("system", text), ("user", prompt)] if has_role else [("user", f"{text}\n\n{prompt}")]
            return self._apply(messages, True)
        head = self._apply([("user", prompt)], True)
        return self._without_system(head) if self.system_prompt == "none" else head

    def _apply(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = False) -> str:
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template["default"]
        if re.search(r"\|\s*random\b", template):
            raise InputError(
                "chat_template: it draws at random (Jinja's filter random), so no prompt is the same twice"
            )
        if "strftime_now" in template:
            template = _dated(template, self._date)
        day = f"{self._date.day:02} {_MONTHS[self._date.month - 1][:3]} {self._date.year}"
        return str(
            self.tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **{"date_string": day, **self.template_arguments},
            )
        )

    def _shows_system(self, text: str) -> bool:
        """Whether the template writes a system message (Gemma's raises, others leave it out)."""
        if not text or not self.has_template:
            return False
        try:
            return text.strip() in self._apply([("system", text), ("user", "x")])
        except Exception:  # templates raise errors of their own making
            return False

    def _without_system(self, head: str) -> str:
        """A rendered prompt without the system message that the template writes by itself.

        What stands before a second user turn, less the end of the answer before it, opens a user turn. Where the user's
        text begins is told by a marker in its place: a short prompt may occur in the template's own words, too.
        """
        bos = self.tokenizer.bos_token or ""
        start = bos if bos and head.startswith(bos) else ""
        first, second, third = _MARKERS
        try:
            turns = self._apply([("user", first), ("assistant", second), ("user", third)])
            end = self._apply([("user", first), ("assistant", second)]).rpartition(second)[2]
            before, found, _ = self._apply([("user", first)], True).partition(first)
        except Exception as error:
            raise self._cannot_do_without(first_line(error)) from error
        between = turns.partition(second)[2].partition(third)[0]
        opening = between.removeprefix(end)
        alike = between.startswith(end) and found and before.endswith(opening) and head.startswith(before)
        if not alike:
            raise self._cannot_do_without("its turns are not marked alike")
        opening = opening if start and opening.startswith(start) else start + opening
        return opening + head[len(before) :]

    def _cannot_do_without(self, why: str) -> InputError:
        return InputError(
            f"system_prompt: 'none' is not possible for {self.label}: its chat template cannot do without ({why}); "
            "allowed: 'default' or a text"
        )

    @property
    def _end(self) -> str:
        """What ends a response: the template's end of turn, or the end-of-text token."""
        if self.has_template:
            marker = _MARKERS[0]
            tail = self._apply([("user", "x"), ("assistant", marker)]).rpartition(marker)[2].rstrip()
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

    def fit(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int | None = None,
        room: int = 0,
        cut: bool = False,
        role: str = "prompts",
    ) -> list[str]:
        """Prompts that leave the model room: the same texts, or shorter ones where ``cut`` allows it.

        Args:
            max_tokens: tokens that a rendered prompt may have; None = what the context holds.
            room: tokens of the context that are kept free for the answer.
            cut: running text is cut at its end, between two tokens; else a prompt that is too long is refused.
            role: what the message calls the prompts.

        Raises:
            InputError: a prompt that is too long; or a limit that leaves no word of one.
        """
        limits = [max_tokens, None if self.context_length is None else self.context_length - room]
        limit = min((n for n in limits if n is not None), default=None)
        texts = list(prompts)
        if limit is None:
            return texts
        for i, count in enumerate(self.token_counts(texts)):
            if count > limit and not cut:
                why = f" ({context_of(self.config)[1]} {self.context_length}, {room} are the answer's)" if room else ""
                raise InputError(f"{role}: number {i} has {count} tokens; allowed: {limit}{why}")
            while count > limit:
                tokens = self.tokenizer(texts[i], add_special_tokens=False, return_offsets_mapping=True)
                starts = tokens["offset_mapping"]
                texts[i] = texts[i][: starts[limit - count][0]].rstrip() if len(starts) > count - limit else ""
                if not texts[i]:
                    why = "the template alone takes them"
                    raise InputError(f"{role}: number {i} cannot be cut to {limit} tokens; {why}")
                count = self.token_counts([texts[i]])[0]
        return texts

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
            ending = self._end
            ends = self.tokenizer([r + ending for r in responses], add_special_tokens=False)["input_ids"]
            rows = [head + end for head, end in zip(heads, ends, strict=True)]
        limit = self.context_length
        for i, row in enumerate(rows):
            if not row:
                raise InputError(f"prompts: number {i} has no tokens")
            if limit and len(row) > limit:
                raise InputError(f"prompts: number {i} has {len(row)} tokens; {context_of(self.config)[1]} {limit}")
        return pad(rows, pad_id=self.pad_id, side=side, prompt_lengths=[len(head) for head in heads])

    @property
    def pad_id(self) -> int:
        """The id that fills padded places."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a response: the tokenizer's end of text and the template's end of turn, if it is one token."""
        stops = {self.tokenizer.eos_token_id} - {None}
        if end := self._end.strip():
            first = self.tokenizer(end, add_special_tokens=False)["input_ids"][:1]
            known = {*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {})}
            stops |= known.intersection(first)
        return tuple(sorted(stops))

    @cached_property
    def suffix_length(self) -> int:
        """Tokens that follow the user's text in every prompt: end of turn and assistant header (at least 1)."""
        rows = self.tokens(self.render(["a", "7 ?", "One more, longer text.", "zu"]))
        shortest = min(map(len, rows))
        same = 0
        while same < shortest and len({row[-1 - same] for row in rows}) == 1:
            same += 1
        return max(same, 1)


def _tokenizer_hash(tokenizer) -> str:
    """Hash of what a tokenizer makes of a text; kept on the tokenizer until its size or its special tokens change."""
    stamp = (len(tokenizer), str(tokenizer.special_tokens_map))
    kept = tokenizer.__dict__.get("_nt_utils_hash")
    if kept is None or kept[0] != stamp:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        core = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
        digest = hashlib.sha256(f"{type(tokenizer).__name__} {stamp} {core}".encode()).hexdigest()[:16]
        kept = tokenizer.__dict__["_nt_utils_hash"] = (stamp, digest)
    return kept[1]


def _check_texts(prompts: Sequence[str], responses: Sequence[str] | None) -> None:
    if isinstance(prompts, str) or not len(prompts):
        raise InputError("prompts: need a list with at least one text")
    if responses is not None and len(responses) != len(prompts):
        raise InputError(f"responses: got {len(responses)} for {len(prompts)} prompts")
