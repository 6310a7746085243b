import pandas as pd

from nt_utils.evaluation.generation import Response, generate
from nt_utils.evaluation.judges import PhraseJudge
from nt_utils.evaluation.lengths import length_table, shortest, verdicts_by_length
from nt_utils.models import LanguageModel
from tests.common import Says, refused
from tests.tiny import tiny_lm


def test_cut_answers_equal_shorter_generations():
    lm, texts = tiny_lm(), ["bread", "sail", "why"]
    judge = Says(lambda response: "compliance" if len(response) % 2 else "refusal")
    long = generate(lm, texts, max_new_tokens=12, progress=False)
    table = verdicts_by_length(lm, texts, long, (4, 8, 12), judge)
    for n in (4, 8, 12):
        short = generate(lm, texts, max_new_tokens=n, progress=False)
        assert list(table[n]) == judge(texts, [r.text for r in short])
    refused("number 0 breaks off after 12 tokens", lambda: verdicts_by_length(lm, texts, long, (4, 16)))


def test_length_table_counts_by_hand():
    lm = tiny_lm()
    texts = ["Sure! I cannot help with that.", "Mix it well.", "很抱歉"]
    ids = [tuple(lm.tokenizer(text)["input_ids"]) for text in texts]
    responses = [Response(t, False, tokens=i) for t, i in zip(texts, ids, strict=True)]
    found = length_table(verdicts_by_length(lm, texts, responses, (6, 99), PhraseJudge()), model="tiny")
    assert list(found["compliance_agreement"]) == list(found["refusal_agreement"]) == [0.5, 1.0]
    assert list(found["n"]) == [2, 2], "Chinese is not judged"
    assert list(found["compliance"]) == [1.0, 0.5] and set(found["model"]) == {"tiny"}


def test_the_token_that_ends_an_answer_is_not_read(monkeypatch):
    """It need not be special to the tokenizer: a template's end of turn may be an ordinary word."""
    lm = tiny_lm()
    ids = tuple(lm.tokenizer("Mix it well.")["input_ids"])
    monkeypatch.setattr(LanguageModel, "stop_ids", (ids[-1],))
    seen = []
    reads = Says(lambda response: seen.append(response) or "compliance")
    verdicts_by_length(lm, ["a"], [Response("Mix it well", False, tokens=ids)], (99,), reads)
    assert seen == ["Mix it well"]


def test_the_shortest_length_holds_for_every_set_and_every_longer_one():
    rows = [("a", 16, 1.0), ("b", 16, 0.9), ("a", 28, 0.97), ("b", 28, 0.96), ("a", 48, 0.94), ("b", 48, 1.0)]
    rows += [(name, n, value) for name in "ab" for n, value in ((96, 0.95), (256, 1.0))]
    table = pd.DataFrame(rows, columns=["set", "length", "compliance_agreement"])
    assert shortest(table) == 96 and shortest(table[table["set"] == "b"]) == 28 and shortest(table, least=0.99) == 256


def test_an_answer_that_begins_to_loop_is_no_change_of_refusal():
    verdicts = pd.DataFrame({16: ["compliance", "refusal"], 256: ["degenerate", "partial"]}, dtype=object)
    found = length_table(verdicts)
    assert list(found["compliance_agreement"]) == [0.5, 1.0] and list(found["refusal_agreement"]) == [1.0, 1.0]
    assert shortest(found) == 256 and shortest(found, "refusal") == 16
