import math

import numpy as np
import pytest
import torch

from nt_utils.data.records import Prompt
from nt_utils.evaluation import agreement
from nt_utils.evaluation.judges import PhraseJudge
from nt_utils.evaluation.model_judge import QUESTION, CombinedJudge, ModelJudge, asked_model, find_judge
from tests.common import Says, refused, saved
from tests.tiny import tiny_lm

PROMPTS = [Prompt(f"request {i}") for i in range(6)]
REPLIES = ["no", "はい、どうぞ", "<think>well", "la " * 30, "I cannot help with that.", "Mix it."]


@pytest.fixture(scope="module")
def judge():
    lm = tiny_lm()
    lm.model.config.max_position_embeddings = 2048
    return ModelJudge(lm, question="{prompt} {response}?")


def test_log_odds_equal_brute_force_one_by_one(judge):
    found = judge.log_odds(PROMPTS, REPLIES)
    first = [judge.lm.tokenizer(word)["input_ids"][0] for word in ("Refused", "Answered")]
    for i in (0, 1, 4, 5):
        ids = torch.tensor(judge.lm.tokens(judge.lm.render([f"{PROMPTS[i].text} {REPLIES[i]}?"])))
        with torch.no_grad():
            chance = judge.lm.model(ids).logits[0, -1].double().log_softmax(-1)
        assert found[i] == pytest.approx(float(chance[first[0]] - chance[first[1]]), rel=1e-4, abs=1e-5)
    assert np.isnan(found[[2, 3]]).all(), "an unfinished thought and a loop are not shown to the model"
    assert len(set(found[[0, 1, 4, 5]])) == 4


def test_threshold_is_fixed_on_development_rows(judge):
    odds = judge.log_odds(PROMPTS, REPLIES)
    truth = [bool(value >= np.sort(odds[[0, 1, 4, 5]])[2]) for value in odds]
    fitted = judge.fitted(PROMPTS, REPLIES, truth)
    verdicts = fitted(PROMPTS, REPLIES)
    assert [verdicts[i] == "refusal" for i in (0, 1, 4, 5)] == [truth[i] for i in (0, 1, 4, 5)]
    assert math.isnan(verdicts[2]) and verdicts[3] == "degenerate" and judge.threshold == 0.0
    refused("refused: ", lambda: judge.fitted(PROMPTS, REPLIES, [True] * 6))


def test_combined_judge_asks_the_model_where_phrases_find_no_refusal():
    model = Says(lambda response: "refusal" if "はい" not in response else "compliance")
    verdicts = CombinedJudge(PhraseJudge(), model)(PROMPTS, REPLIES)
    assert verdicts == ["refusal", "compliance", "refusal", "degenerate", "refusal", "refusal"]


def test_judges_are_found_by_name(tmp_path):
    assert find_judge("phrases").name == "phrases" and find_judge("known").name == "known answer"
    found = find_judge(f"phrases+{saved(tiny_lm(), tmp_path / 'judge')}")
    assert isinstance(found, CombinedJudge) and isinstance(found.second, ModelJudge) and found.name == "phrases+judge"
    assert asked_model(found) is found.second.lm.model and asked_model(find_judge("phrases")) is None
    refused("judge: ", lambda: find_judge(str(tmp_path / "nothing")))
    assert "{prompt}" in QUESTION and "{response}" in QUESTION


def test_agreement_with_labels_counted_by_hand(tmp_path, capsys):
    path = tmp_path / "labelled.csv"
    replies = [
        "I cannot help with that.",
        "Sure! Mix it.",
        "I'm sorry, but no.",
        "Sure, wait.",
        "很抱歉，我无法提供帮助。",
    ]
    labels = ["refusal", "answer", "answer", "refusal", "refusal"]
    rows = "".join(f'q{i},"{r}",{label}\n' for i, (r, label) in enumerate(zip(replies, labels, strict=True)))
    path.write_text("prompt,completion,label\n" + rows, encoding="utf-8")
    columns = {"prompt": "prompt", "response": "completion", "label": "label"}
    labelled = agreement.read_labelled(path, **columns, refused=["refusal"])
    (line,) = agreement.agreement_table([labelled], [PhraseJudge()]).to_dict("records")
    assert (line["n"], line["not_judged"], line["accuracy"], line["kappa"]) == (4, 1, 0.5, 0.0)
    assert (line["missed"], line["false"]) == (1, 1)
    assert agreement.main([str(path)]) == 0 and "phrases" in capsys.readouterr().out
    assert agreement.main([str(path), "--label", "verdict"]) == 1 and "verdict" in capsys.readouterr().err
    refused("no row is labelled 'none'", lambda: agreement.read_labelled(path, **columns, refused=["none"]))
