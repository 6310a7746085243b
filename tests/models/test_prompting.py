"""Rendering, system prompts, dates, template arguments, stop tokens, lengths: what a model is prompted with."""

import copy

import pytest
from transformers import Phi3Config

from nt_utils import models
from nt_utils.errors import InputError
from nt_utils.models import LanguageModel, Prompter, parse_arguments
from nt_utils.models.prompting import TEMPLATES, find_template
from tests.common import refused, saved
from tests.tiny import CONFIGS, SHAPE, tiny_lm, tiny_model, tiny_tokenizer

#: Templates as vendors write them, shortened to the parts that matter here.
QWEN = (  # Qwen 2.5: inserts a system message of its own
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    + TEMPLATES["chatml"]
)
SMOLLM = QWEN.replace("Qwen", "SmolLM")
QWEN_3 = (  # thinks unless told not to
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA_3_2 = (  # writes the date into a system message that is always there
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = "
    "strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% else %}"
    "{% set system = '' %}{% endif %}<|system|>Today Date: {{ date_string }}\n\n{{ system }}<|end|>"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GRANITE = "{% set day = strftime_now('%B %d, %Y') %}<|system|>Today's Date: {{ day }}.<|end|>" + TEMPLATES["chatml"]
GEMMA = (  # refuses a system message
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SINGLE_TURN = "Be brief. {{ messages[0].content }}"
VENDORS = {"qwen": QWEN, "smollm": SMOLLM, "qwen 3": QWEN_3, "llama 3.2": LLAMA_3_2, "granite": GRANITE, "gemma": GEMMA}


def prompter(template, system_prompt=None, **options) -> Prompter:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return Prompter(tokenizer, "someone/some-model", system_prompt, **options)


# ----------------------------------------------------------------------------------------------------- rendering


def test_rendering_uses_the_chat_template(lm):
    assert lm.render(["hello"]) == ["<s><|user|>hello<|end|><|assistant|>"]
    assert lm.render(["hello"], ["no"]) == ["<s><|user|>hello<|end|><|assistant|>no<|end|>"]


def test_rendering_without_a_template(base_lm):
    assert base_lm.render(["hello"]) == ["hello\n"]
    assert base_lm.render(["hello"], ["no"]) == ["hello\nno</s>"]
    assert base_lm.suffix_length == 1


@pytest.mark.parametrize("template", VENDORS.values(), ids=VENDORS)
def test_the_default_is_what_the_template_itself_writes(template):
    for default in (None, "default"):
        found = prompter(template, default)
        own = found.tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}],
            tokenize=False,
            add_generation_prompt=True,
            date_string="26 Jul 2024",
            enable_thinking=False,
        )
        if "strftime_now" not in template or "date_string" in template:
            assert found.render(["hello"]) == [own]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (QWEN, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"),
        (QWEN_3, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (LLAMA_3_2, "<s><|user|>hello<|end|><|assistant|>"),
        (GEMMA, "<s><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"),
        (TEMPLATES["llama-2"], "<s>[INST] hello [/INST]"),
    ],
)
def test_none_is_no_system_message_even_where_the_template_writes_one(template, text):
    assert prompter(template, "none").render(["hello"]) == [text]


@pytest.mark.parametrize("template", VENDORS.values(), ids=VENDORS)
@pytest.mark.parametrize("prompt", ["a", "start", "user", "model", "<|im_start|>user\na", "a\n"])
def test_none_finds_a_prompt_whose_words_stand_in_the_template_too(template, prompt):
    found = prompter(template, "none")
    text = prompt.strip() if "| trim" in template else prompt
    assert found.render([prompt]) == [found.render(["hello"])[0].replace("hello", text)]
    assert found.suffix_length == prompter(template).suffix_length


def test_none_keeps_blanks_before_a_prompt_and_a_template_that_marks_no_turn():
    assert prompter(QWEN, "none").render([" a"]) == [prompter(TEMPLATES["chatml"]).render([" a"])[0]]
    bare = "Be brief.\n{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}"
    assert prompter(bare, "none").render(["A"]) == ["A\nAnswer: "]


def test_a_template_that_cannot_do_without_its_system_message_is_refused_by_name():
    refused(r"system_prompt: 'none'.*some-model", lambda: prompter(SINGLE_TURN, "none").render(["hello"]))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (QWEN, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello"),
        (GEMMA, "<s><start_of_turn>user\nBe kind.\n\nhello"),
        (TEMPLATES["llama-2"], "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhello [/INST]"),
        (TEMPLATES["vicuna"], "<s>Be kind. USER: hello ASSISTANT:"),
        (None, "Be kind.\nhello\n"),
    ],
)
def test_a_text_is_the_system_message_or_stands_before_the_users(template, text):
    found = prompter(template, "Be kind.")
    assert found.render(["hello"])[0].startswith(text)
    found.set_system_prompt(None)
    assert "kind" not in found.render(["hello"])[0]


# ------------------------------------------------------------------------------------------- dates and arguments


@pytest.mark.parametrize(
    ("template", "day"), [(LLAMA_3_2, "Today Date: 01 Mar 2025\n"), (GRANITE, "Today's Date: March 01, 2025.")]
)
def test_the_date_is_a_parameter_and_never_the_clocks(template, day):
    assert day in prompter(template, date="2025-03-01").render(["hello"])[0]
    assert "2024" in prompter(template).render(["hello"])[0]
    refused("date: got 'today'", lambda: prompter(template, date="today"))


def test_the_date_is_written_as_python_writes_it():
    import datetime

    codes = "%d %-d %m %-m %e %Y %y %B %b %h %A %a %H %M %S %p %j %F %D %T"
    noon = datetime.datetime(2025, 3, 1, 12)
    assert prompter(f"{{{{ strftime_now('{codes}') }}}}", date="2025-03-01").render(["x"]) == [noon.strftime(codes)]


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ strftime_now('%d %Z') }}", "writes a date with '%Z'"), ("{{ ['a', 'b'] | random }}", "at random")],
)
def test_a_template_that_no_parameter_can_make_constant_is_refused(template, message):
    refused(message, lambda: prompter(template + TEMPLATES["chatml"]).render(["hello"]))


def test_thinking_is_off_unless_asked_for():
    assert "</think>" in prompter(QWEN_3).render(["hello"])[0]
    assert "think" not in prompter(QWEN_3, template_arguments={"enable_thinking": True}).render(["hello"])[0]


def test_template_arguments_are_read_as_names_and_values():
    assert parse_arguments("enable_thinking=true, depth = 3,style='a b', tone=dry") == {
        "enable_thinking": True,
        "depth": 3,
        "style": "a b",
        "tone": "dry",
    }
    assert parse_arguments("") == parse_arguments(None) == {} and parse_arguments({"a": 1}) == {"a": 1}
    refused("template_arguments: got 'thinking'", lambda: parse_arguments("thinking"))


# ------------------------------------------------------------------------------------------------- named templates


@pytest.mark.parametrize(
    ("name", "own", "wanted", "expected"),
    [
        ("someone/some-model", "own", "auto", "the tokenizer's"),
        ("lmsys/vicuna-7b-v1.5", None, "auto", "vicuna"),
        ("meta-llama/Llama-2-7b-chat-hf", None, "auto", "llama-2"),
        ("someone/base-model", None, "auto", "plain"),
        ("someone/some-instruct", None, "plain", "plain"),
        ("someone/some-instruct", "own", "plain", "plain"),
        ("someone/some-model", {"default": "own", "tools": "other"}, "auto", "the tokenizer's"),
        ("someone/some-model", {"default": "own", "tools": "other"}, "tools", "the tokenizer's tools"),
    ],
)
def test_a_template_is_the_tokenizers_or_a_named_one_and_is_told(name, own, wanted, expected):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = own
    text, told = find_template(tokenizer, name, wanted)
    assert told == expected
    own_texts = {"the tokenizer's": "own", "the tokenizer's tools": "other"}
    assert text == (own_texts.get(expected) or TEMPLATES[expected] or None)


def test_a_chat_model_without_a_template_is_not_prompted_as_a_base_model(tmp_path):
    lm = tiny_lm("llama", template=False)
    folder = tmp_path / "tiny-7B-Instruct"
    saved(lm, folder)
    refused(r"chat_template: tiny-7B-Instruct .*vicuna.*plain", lambda: models.load(folder))
    assert models.load(folder, chat_template="plain").render(["hello"]) == ["hello\n"]
    assert models.load(folder, chat_template="chatml").render(["x"])[0].startswith("<|im_start|>user")
    (tmp_path / "mine.jinja").write_text("[{{ messages[0].content }}]")
    found = models.load(folder, chat_template=str(tmp_path / "mine.jinja"))
    assert found.render(["x"]) == ["[x]"] and found.template_name == "mine.jinja"
    refused(r"chat_template: got 'nowhere'", lambda: models.load(folder, chat_template="nowhere"))


def test_vicunas_template_is_the_one_of_its_training_code():
    """fastchat.conversation.get_conv_template("vicuna_v1.1").get_prompt() of one round."""
    expected = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. USER: hello ASSISTANT:"
    )
    assert prompter(TEMPLATES["vicuna"]).render(["hello"]) == ["<s>" + expected]
    assert prompter(TEMPLATES["vicuna"]).render(["hello"], [" no"]) == [f"<s>{expected} no</s>"]


# ------------------------------------------------------------------------------------------------ tokens and lengths


def test_an_answer_ends_at_the_end_of_turn_and_at_every_end_of_text():
    lm = tiny_lm("llama")
    lm.model.generation_config.eos_token_id = [2, 9]
    names = dict(zip(["</s>", "<|end|>"], lm.tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"]), strict=True))
    assert lm.stop_ids == tuple(sorted([*names.values(), 9]))
    assert tiny_lm("llama", template=False).stop_ids == (2,)
    assert prompter("{% for m in messages %}{{ m.content }}and so on{% endfor %}").stop_ids == (2,), "a word is no end"


def test_suffix_length_is_the_templates_tail(lm):
    ids = lm.tokens(lm.render(["abc"]))[0]
    assert lm.suffix_length == 2
    assert lm.tokenizer.convert_ids_to_tokens(ids[-2:]) == ["<|end|>", "<|assistant|>"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoding_pads_on_the_asked_side(lm, side):
    batch = lm.encode(["a", "abcdef"], ["x", "yy"], side=side)
    assert batch.lengths[1] - batch.lengths[0] == 6
    assert batch.attention_mask.sum(1).tolist() == list(batch.lengths)
    for row, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        text = lm.tokenizer.decode(batch.input_ids[row, start : start + length])
        assert text == lm.render(["a", "abcdef"], ["x", "yy"])[row]
        assert batch.position_ids[row, start : start + length].tolist() == list(range(length))
    assert batch.prompt_lengths == tuple(len(t) for t in lm.tokens(lm.render(["a", "abcdef"])))
    assert (batch.starts[0] > 0) == (side == "left")


def test_encoding_refuses_bad_prompts(lm):
    refused(r"number 1 has .* tokens; the model's context holds 128", lambda: lm.encode(["short", "x" * 200]))
    refused("side", lambda: lm.encode(["a"], side="middle"))


def test_running_text_is_cut_to_a_number_of_tokens_and_other_prompts_are_refused(lm):
    texts = ["short", "é " * 100, "x" * 300]
    cut = lm.fit(texts, max_tokens=40, cut=True)
    assert cut[0] == "short" and all(t.startswith(c) for t, c in zip(texts, cut, strict=True))
    assert lm.token_counts(cut)[2] == 40 and 37 <= lm.token_counts(cut)[1] <= 40
    assert max(lm.token_counts(lm.fit(texts, room=28, cut=True))) == 100, "128 of context less 28 for the answer"
    with pytest.raises(
        InputError, match=r"harmful: number 1 has \d+ tokens; allowed: 100 .*holds 128, 28 are the answer's"
    ):
        lm.fit(texts, room=28, role="harmful")
    refused("cannot be cut to 3 tokens", lambda: lm.fit(texts, max_tokens=3, cut=True))
    assert lm.fit(["short"], role="harmful") == ["short"]


def test_lengths_are_known_without_weights(tmp_path):
    lm = tiny_lm("llama")
    lm.model.config.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    found = models.load_prompter(tmp_path, system_prompt="Be kind.")
    lm.set_system_prompt("Be kind.")
    assert found.token_counts(["hello"]) == lm.token_counts(["hello"])
    assert found.context_length == lm.context_length == 128 and found.text_identity == lm.text_identity


def test_the_context_ends_where_rotary_embeddings_begin_to_depend_on_the_batch():
    rope = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    config = Phi3Config(
        **{**SHAPE, "max_position_embeddings": 256},
        original_max_position_embeddings=32,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **rope},
    )
    model = tiny_model("phi3").__class__(config).eval()
    lm = LanguageModel(model, tiny_tokenizer(), "long")
    assert lm.context_length == 32
    with pytest.raises(InputError, match=r"number 1 has 4\d tokens; .*longrope.* 32"):
        lm.encode(["bread?", "how do I bake bread with flour and water"])
    assert tiny_lm("llama-yarn-rope").context_length == 128


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_a_context(name):
    assert tiny_lm(name).context_length == 128
