"""What is measured on real models, here on tiny ones (no times are asserted)."""

import pytest
import torch

from nt_utils.bench import dtypes, lengths
from nt_utils.data.splits import Splits
from nt_utils.evaluation.suite import make_suite
from tests.tiny import hooks_left, tiny_lm


@pytest.fixture
def splits(tmp_path):
    """Short prompts of three kinds, 40 each."""
    given = {}
    for role in ("harmful", "benign", "borderline"):
        given[role] = f"{tmp_path / role}.csv:text"
        rows = "".join(f"{role[:3]} {i} {'abcd'[i % 4]}\n" for i in range(40))
        (tmp_path / f"{role}.csv").write_text("text\n" + rows)
    return Splits(given)


def test_one_long_answer_serves_every_length_and_condition(splits, tmp_path):
    lm = tiny_lm()
    actions = lengths.conditions(lm, splits, 0.1, 6, 2)
    assert list(actions)[:2] == ["untouched", "contrast 10% zeroed"] and hooks_left(lm.model) == 0
    assert len(actions["contrast 10% zeroed"].neurons) == round(0.1 * lm.view.space.size(("ffn", "o")))
    sets = {role: splits.rows(role, "test", 4) for role in ("harmful", "borderline")}
    table = lengths.answer_lengths(lm, sets, actions, (2, 5, 9), cache=tmp_path / "cache")
    assert len(table) == 3 * 2 * len(actions) and len(list((tmp_path / "cache").glob("*.json"))) == 2 * len(actions)
    assert (table[table["length"] == 9]["compliance_agreement"] == 1).all()


def test_precisions_are_compared_with_the_same_model(splits):
    """The same model twice differs in nothing; in bfloat16 it differs a little."""
    parts = [splits.rows(role, "detect", 4) for role in ("harmful", "benign")]
    suite = make_suite(harmful=splits.rows("harmful", "test", 3), max_new_tokens=4)
    same = {"float32": tiny_lm(), "bfloat16": tiny_lm()}
    lines = [*dtypes.scores(same, *parts), *dtypes.rates(same, suite)]
    between = {name: value for name, *_, value, _ in lines}
    apart = [value for name, value in between.items() if "difference" in name or "asr" in name]
    assert apart == [0.0] * len(apart) and [v for k, v in between.items() if "Jaccard" in k] == [1.0] * 4
    assert between["direct, answers that are equal"] == between["direct, verdicts that agree"] == 1
    other = tiny_lm()
    other.model.to(torch.bfloat16)
    changed = {name: value for name, *_, value, _ in dtypes.scores(same | {"bfloat16": other}, *parts)}
    assert 0 < changed["scores, relative difference, median"] < 0.02
    assert changed["scores, Spearman, mean of prompts"] > 0.99
    names = [name for name, *_ in dtypes.speed(same, ["a", "b"], 1, 2)]
    assert names == ["forward, seconds", "answers, seconds", "scoring, seconds"]
