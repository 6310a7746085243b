"""The embedded corpus and the wrapper attacks: sizes, splits that share nothing, matched pairs, known answers."""

import itertools

import pytest

from nt_utils.data import corpus as c
from nt_utils.data.attacks import ATTACKS, attack, attacks
from tests.common import refused

MIX = c.Mix(
    dict.fromkeys(c.ROW_KINDS, 1.0),
    wrapped={"benign": 0.5, "harmful": 0.5, "facts": 0.5},
    asides={"benign": 0.5, "refusal": 0.5},
)


@pytest.mark.parametrize("kind", c.KINDS)
@pytest.mark.parametrize(("one", "other"), itertools.combinations(c.SPLITS, 2))
def test_splits_share_no_topic_and_no_template(kind, one, other):
    first, second = c.corpus(kind, one), c.corpus(kind, other)
    assert len(first) and len(second)
    for field in ("topic", "template", "text"):
        assert not set(first.column(field)) & set(second.column(field))
    assert not set(c.templates("en", one)) & set(c.templates("en", other))
    assert not set(c.templates("de", one)) & set(c.templates("de", other))


def test_sets_are_large_enough():
    for split in ("dev", "test"):
        assert len(c.corpus("harmful", split)) >= 100
        assert len(c.corpus("borderline", split)) >= 100
        assert len(c.corpus("harmful", split, attack="all")) >= 300
        assert len(c.utility(20, split)) >= 100
    assert len(c.corpus("harmful", "train")) >= 200
    assert len(set(c.general(300).texts)) == 300


@pytest.mark.parametrize("split", c.SPLITS)
@pytest.mark.parametrize("language", c.LANGUAGES)
def test_no_prompt_twice_and_every_answer_is_told_apart(split, language):
    prompts = c.corpus("harmful", split, language)
    assert len(set(prompts.texts)) == len(prompts)
    for prompt in prompts:
        assert prompt.topic in prompt.text
        assert prompt.answer and prompt.answer in prompt.helpful
        assert prompt.topic in prompt.answer
        assert prompt.answer not in prompt.refusal
        assert prompt.language == language and prompt.split == split


def test_no_act_is_of_two_kinds():
    named = [act.text for kind, language in c._ACTS for act in c.acts(kind, language)]
    assert len(named) == len(set(named)) > 500


def test_pairs_share_their_template_and_nothing_else():
    harmful, benign = c.pairs(200, "train")
    assert len(harmful) == len(benign) == 200
    assert len(set(harmful.texts)) == 200
    assert len(set(harmful.column("template"))) > 10
    for bad, good in zip(harmful, benign, strict=True):
        assert bad.pair == good.pair and bad.template == good.template
        assert bad.text.replace(bad.topic, "") == good.text.replace(good.topic, "")
        assert (bad.kind, good.kind) == ("harmful", "benign")
    assert harmful.fingerprint == c.pairs(200, "train")[0].fingerprint
    assert harmful.fingerprint != c.pairs(200, "train", seed=1)[0].fingerprint


def test_judged_share_holds_in_every_split():
    chosen = c.judged(0.6)
    for split in c.SPLITS:
        total = len(c.acts("borderline", "en", split))
        assert sum(act.split == split for act in chosen) == int(0.6 * total)
    assert c.judged(0.0) == ()


def test_training_rows_never_use_a_held_out_template_or_wording():
    held = [form.split("{x}")[0] for split in ("dev", "test") for form in c.templates("en", split)]
    held = [start for start in held if start and not any(t.startswith(start) for t in c.templates("en", "train"))]
    assert len(held) >= 8
    rows = c.training_rows(MIX, 3000, 0)
    assert {row.kind for row in rows} == set(c.ROW_KINDS)
    assert not [row for row in rows if row.prompt.startswith(tuple(held))]
    wordings = [a("|").split("|") for a in attacks() if a.split in ("dev", "test")]
    kept = {a("|") for a in attacks(split="train")}
    for before, after in wordings:
        if f"{before}|{after}" not in kept:
            assert not [r for r in rows if r.prompt.startswith(before or "\0") and r.prompt.endswith(after or "?")]


def test_alignment_refuses_train_acts_only_and_never_in_a_wrapper():
    mix = c.Mix({"refusal": 1.0, "benign": 1.0}, splits=("train",), wrapped={"benign": 0.6})
    rows = c.training_rows(mix, 1000, 0)
    refused = [row for row in rows if row.kind == "refusal"]
    plain = {p.text for language in c.LANGUAGES for p in c.corpus("harmful", "train", language)}
    assert len(refused) > 300
    assert {row.prompt for row in refused} <= plain
    benign = [row for row in rows if row.kind == "benign"]
    direct = {p.text for language in c.LANGUAGES for p in c.corpus("benign", "train", language)}
    assert 0.4 < sum(row.prompt not in direct for row in benign) / len(benign) < 0.8


def test_harmful_answers_are_opened_except_in_the_plain_attack_classes():
    rows = c.training_rows(c.Mix({"harmful": 1.0}, wrapped={"harmful": 0.7}, german=0.0), 1000, 0)
    plain = [attack(f"{name}.{i}")("|").split("|") for name in c.Mix({}).plain for i in (1, 2, 3)]
    opened = {True: 0, False: 0}
    for row in rows:
        inside = any(row.prompt.startswith(before) and row.prompt.endswith(after) for before, after in plain)
        assert row.response.startswith(c.words.OPENING["en"]) != inside
        opened[inside] += 1
    assert min(opened.values()) > 100


def test_training_rows_depend_on_the_seed_alone():
    assert c.training_rows(MIX, 50, 3) == c.training_rows(MIX, 50, 3)
    assert c.training_rows(MIX, 50, 3) != c.training_rows(MIX, 50, 4)


def test_facts_and_sums_have_one_right_answer():
    for prompt in c.utility(100, "test"):
        assert prompt.answer.lower() in prompt.helpful.lower()
    sums = c.utility(100, "dev").filter(task="sums")
    assert len(sums) > 10
    for prompt in sums:
        a, b = prompt.topic.split("+")
        assert prompt.answer == f"is {int(a) + int(b)}."


def test_utility_covers_both_languages_and_every_task():
    found = c.utility(20, "test")
    assert set(found.column("language")) == {"en", "de"}
    assert len(set(found.column("task"))) >= 7


def test_wrapped_prompts_keep_their_request_and_name_their_attack():
    wrapped = c.corpus("harmful", "test", attack="unseen")
    direct = set(c.corpus("harmful", "test").texts)
    assert {ATTACKS[p.attack].attack_class for p in wrapped} == {
        a.attack_class for a in ATTACKS.values() if a.split and not a.seen
    }
    for prompt in wrapped:
        assert not ATTACKS[prompt.attack].seen and ATTACKS[prompt.attack].split == "test"
        assert any(text in prompt.text for text in direct)
    assert len(set(wrapped.texts)) == len(wrapped)


def test_attacks_registered_later_do_not_change_the_testbed(monkeypatch):
    before = c.corpus_fingerprint()
    other = ATTACKS["roleplay.1"]
    monkeypatch.setitem(ATTACKS, "later", type(other)("later", "later", True, "train", "x", str.upper))
    c._wordings.cache_clear()
    assert c.corpus_fingerprint() == before
    assert "later" not in {wrapper.name for wrapper in c._wordings()}
    c._wordings.cache_clear()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: c.corpus("rude"), "kind"),
        (lambda: c.corpus("harmful", "final"), "split"),
        (lambda: c.corpus("harmful", "test", "fr"), "language"),
        (lambda: c.corpus("borderline", "test", "de"), "borderline"),
        (lambda: c.corpus("harmful", attack="magic"), "attack"),
        (lambda: c.corpus("harmful", attack=[]), "attack"),
        (lambda: c.pairs(10**6), "n"),
        (lambda: c.training_rows(c.Mix({"spam": 1.0}), 3), "spam"),
    ],
)
def test_bad_input_gets_one_line(call, word):
    refused(word, call)
