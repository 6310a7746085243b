import pytest

from nt_utils.data.records import PROMPT_FIELDS, Prompt, PromptSet
from tests.common import refused


def example() -> PromptSet:
    return PromptSet(
        [
            Prompt("how do I bake bread", kind="benign", language="en", split="test", helpful="Mix flour."),
            Prompt("how do I pick a lock", kind="harmful", language="en", split="test"),
            Prompt("como hago pan", kind="benign", language="es", split="dev"),
        ],
        name="mixed",
    )


def test_prompts_are_immutable_typed_records():
    prompt = Prompt("hello")
    with pytest.raises(AttributeError):
        prompt.text = "other"
    assert prompt.replace(kind="harmful").kind == "harmful" and prompt.kind == "general"
    refused("kind: got 'bad'; allowed: harmful, benign", lambda: Prompt("hello", kind="bad"))
    refused("field refusal must be text, got NoneType", lambda: Prompt("hello", refusal=None))


def test_filter_by_value_collection_and_function():
    prompts = example()
    assert prompts.filter(kind="benign").texts == ["how do I bake bread", "como hago pan"]
    assert prompts.filter(kind="benign", language="es").texts == ["como hago pan"]
    assert len(prompts.filter(split=("dev", "test"))) == 3
    assert prompts.filter(text=lambda text: "lock" in text).column("kind") == ["harmful"]
    assert prompts.filter(kind="harmful").name == "mixed"
    refused("unknown prompt field colour", lambda: prompts.filter(colour="red"))


def test_sequence_and_take():
    prompts = PromptSet.of([str(i) for i in range(50)], "digits", kind="benign")
    assert prompts[0].text == "0" and prompts[-1].text == "49" and prompts[2:4].texts == ["2", "3"]
    assert prompts[[3, 1]].texts == ["3", "1"]
    assert prompts.take(3).texts == ["0", "1", "2"]
    drawn = prompts.take(10, seed=1)
    assert drawn == prompts.take(10, seed=1) and drawn != prompts.take(10, seed=2)
    assert [int(t) for t in drawn.texts] == sorted(int(t) for t in drawn.texts)
    assert prompts.take(99) is prompts and prompts.take(None, seed=4) is prompts
    refused("n must be 0 or more", lambda: prompts.take(-1))
    assert len(prompts[:2] + prompts[:3]) == 5


def test_fingerprint_sees_every_field_and_order_but_not_the_name():
    prompts = example()
    assert prompts.fingerprint == example().rename("other").fingerprint
    assert prompts.fingerprint != prompts[::-1].fingerprint
    seen = {prompts.fingerprint}
    for field in PROMPT_FIELDS:
        value = "borderline" if field == "kind" else "changed"
        seen.add(prompts.map(lambda p, f=field, v=value: p.replace(**{f: v})).fingerprint)
    assert len(seen) == 1 + len(PROMPT_FIELDS)


def test_a_frame_holds_every_field_of_every_prompt():
    prompts = example()
    frame = prompts.to_frame()
    assert list(frame.columns) == list(PROMPT_FIELDS) and len(frame) == 3
    assert [Prompt(**row) for row in frame.to_dict("records")] == list(prompts)
    assert list(PromptSet([]).to_frame().columns) == list(PROMPT_FIELDS)
