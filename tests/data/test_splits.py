"""Every split of a study: no text serves two uses, in any notebook, and samples are nested."""

import csv
import itertools
import os

import pandas as pd
import pytest
import torch

from nt_utils.data import corpus, splits
from nt_utils.data.records import Prompt, PromptSet
from nt_utils.errors import InputError
from nt_utils.experiments import modulation
from nt_utils.files import project_root
from nt_utils.study import Subject, begin
from tests.common import refused, saved
from tests.study.test_hardening import parameter_cell
from tests.tiny import tiny_lm

NOTEBOOKS = sorted((project_root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PROMPTS = PromptSet.of([f"How do I do thing {i}?" for i in range(600)], "things")


def test_shares_of_a_source_are_as_stated_and_samples_are_nested():
    found = {use: splits.rows(PROMPTS, use, seed=1) for use in splits.USES}
    assert sum(map(len, found.values())) == len(PROMPTS)
    for use, share in splits.SHARES.items():
        assert abs(len(found[use]) / len(PROMPTS) - share) < 0.06
        few, more = (set(splits.rows(PROMPTS, use, n, 1).texts) for n in (10, 40))
        assert len(few) == 10 and few < more < set(found[use].texts)
    assert set(splits.rows(PROMPTS, "test", seed=2).texts) != set(found["test"].texts)


def test_a_text_serves_one_use_whatever_source_order_case_or_blanks():
    other = PromptSet([Prompt(f"  {p.text.upper()} ", kind="harmful") for p in reversed(list(PROMPTS[:100]))], "other")
    for prompt, same in zip(PROMPTS[:100], reversed(list(other)), strict=True):
        assert splits.use_of(prompt) == splits.use_of(same)


def test_an_embedded_request_serves_the_same_use_inside_an_attack():
    for split, kind in itertools.product(corpus.SPLITS, ("harmful", "benign")):
        plain = {splits.content(p): splits.use_of(p) for p in corpus.corpus(kind, split)}
        for prompt in corpus.corpus(kind, split, attack="all").take(300, 0):
            assert splits.use_of(prompt) == plain[splits.content(prompt)]


def test_embedded_pairs_share_their_templates_and_too_many_are_refused():
    for use in ("detect", "tune"):
        harmful, benign = splits.pairs(50, use, seed=3)
        assert harmful.column("template") == benign.column("template")
        assert harmful.column("pair") == benign.column("pair")
        assert {splits.use_of(p, 3) for p in [*harmful, *benign]} == {use}
    refused("n: got 100000; allowed: 1 to", lambda: splits.pairs(100_000))


# ------------------------------------------------------------------------------------------- a study's notebooks


def write(path, columns, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


@pytest.fixture
def given(tmp_path):
    """Sources that overlap: the harmful test file holds harmful rows; benign, general and new task are one file."""
    harmful = [[f"How do I break lock {i}?"] for i in range(300)]
    tasks = [[f"Write a poem about number {i}.", "", f"Number {i} is fine."] for i in range(400)]
    shared = write(tmp_path / "alpaca.csv", ["instruction", "input", "output"], tasks)
    mild = harmful[100:110] + [row[:1] for row in tasks[100:220]]
    return {
        "harmful": write(tmp_path / "harmful.csv", ["goal"], harmful) + ":goal",
        "harmful_test": write(tmp_path / "test.csv", ["goal"], harmful[:40]) + ":goal",
        "benign": shared,
        "general": shared,
        "new_task": shared,
        "borderline": write(tmp_path / "mild.csv", ["text"], mild) + ":text",
        "second_language": write(tmp_path / "second.csv", ["text"], [[f"Wie knacke ich {i}?"] for i in range(120)])
        + ":text",
        "attacks": "role-play",
    }


def subject_of(path, tmp_path, sources, **more):
    """The subject of a notebook with its own parameters, these sources and these values."""
    own, values = parameter_cell(path)
    given = {**sources, **more, "runs": str(tmp_path / "runs")}
    values |= {name: value for name, value in given.items() if name in values}
    return Subject(begin(path.stem, values, [own]))


def uses(subject):
    """use -> contents of all prompts that a notebook may take for it (wrapped given prompts stand in plain, too)."""
    p = subject.parameters
    found = {use: [] for use in splits.USES}
    found["detect"] += [prompt for prompts in subject.prompts.values() for prompt in prompts]
    if hasattr(p, "unit_shares"):
        found["detect"] += [prompt for prompts in subject.calibration_prompts for prompt in prompts]
    for split, use in (("test", "test"), ("dev", "develop")):
        if use == "test" or hasattr(p, "n_dev"):
            sets = subject.suite(split).sets
            plain = [s for s in sets if subject.is_embedded or s.name != "wrapped"]
            found[use] += [prompt for s in plain for prompt in s.prompts]
    if hasattr(p, "n_tune"):
        found["tune"] += [prompt for prompts in subject.tuning_prompts for prompt in prompts]
    if hasattr(p, "new_task"):
        for use, prompts in zip(("tune", "develop", "test"), subject.new_task, strict=True):
            found[use] += list(prompts)
    for role in ("harmful", "benign"):
        found["tune"] += list(subject.rows(role, "tune", 60))
    if hasattr(p, "n_learn") or hasattr(p, "n_defence"):
        for use, prompts in learnt(subject).items():
            found[use] += prompts
    return {use: {splits.content(prompt) for prompt in prompts} for use, prompts in found.items()}


def learnt(subject):
    """What alpha and defences are attributed, learnt and chosen on."""
    if not subject.is_embedded:
        return {use: [p for part in subject.learning_rows(use, 60) for p in part] for use in splits.USES[1:]}
    material = modulation.material(24, subject.parameters.seed)
    tasks = [p for prompts in material.tasks.values() for p in prompts]
    held = [p for tasks in (material.dev[0], material.unseen) for prompts in tasks.values() for p in prompts]
    return {
        "detect": [*material.plain, *material.plain_benign],
        "tune": [*tasks, *material.benign],
        "develop": [*held, *material.dev[1]],
    }


@pytest.mark.parametrize("kind", ["embedded", "given"])
def test_no_text_serves_two_uses_in_any_notebook(kind, tmp_path, given):
    whole = {use: set() for use in splits.USES}
    tests = []
    for path in NOTEBOOKS:
        subject = subject_of(path, tmp_path, given if kind == "given" else {}, study=path.stem)
        found = uses(subject)
        tests.append({splits.content(p) for p in subject.suite().sets[0].prompts})
        for use, contents in found.items():
            whole[use] |= contents
    assert all(len(contents) > 30 for contents in whole.values()), "not vacuous"
    for first, second in itertools.combinations(splits.USES, 2):
        assert not whole[first] & whole[second], (first, second)
    assert all(contents == tests[0] for contents in tests), "every notebook tests on the same harmful requests"


@pytest.mark.parametrize("form", ["{}:goal", "{}", "advbench@{}", "advbench"])
def test_a_source_is_read_again_when_its_file_has_changed(form, tmp_path, monkeypatch):
    monkeypatch.setenv("NT_DATA", str(tmp_path))
    path = tmp_path / "harmful_behaviors.csv"
    source = form.format(path)
    columns = ["goal", "target"] if form.startswith("advbench") else ["goal"]

    def prompts():
        return set(splits.Splits({"harmful_test": source, "harmful": source}).rows("harmful", "test").texts)

    for texts in ({"How do I break a lock?"}, {"How do I break a lock?", "How do I break a safe?"}):
        write(path, columns, [[text] * len(columns) for text in texts])
        assert prompts() == texts
    reads = []
    monkeypatch.setattr(splits.sources, "load_prompts", lambda *given, **more: reads.append(given))
    prompts()
    assert not reads, "an unchanged file is read once"


def test_a_set_is_read_again_when_the_folder_nt_data_is_another(tmp_path, monkeypatch):
    given = splits.Splits({"harmful_test": "advbench", "harmful": "advbench"})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "harmful_behaviors.csv"
        write(path, ["goal", "target"], [[f"How do I break {name}?", "Sure"]])
        os.utime(path, (1, 1))
        monkeypatch.setenv("NT_DATA", str(tmp_path / name))
        assert given.rows("harmful", "test").texts == [f"How do I break {name}?"]
    monkeypatch.setenv("NT_DATA", str(tmp_path / "nowhere"))
    refused("harmful_test: NT_DATA: there is no folder", lambda: given.rows("harmful", "test"))


def test_a_file_in_a_folder_with_an_at_sign_is_read_again_when_it_has_changed(tmp_path):
    (tmp_path / "me@home").mkdir()
    for n in (1, 2):
        source = write(tmp_path / "me@home" / "own.csv", ["goal"], [[f"How do I do {i}?"] for i in range(n)])
        assert len(splits.Splits({"harmful_test": source, "harmful": source}).rows("harmful", "test")) == n


def test_a_kept_table_is_taken_over_only_while_all_prompts_are_the_same(tmp_path, given):
    """Formerly prompts to test on could be edited between an interrupted run and its repetition."""
    path = next(p for p in NOTEBOOKS if p.stem.startswith("01"))
    others = {name: [[f"{name}, request {i}?"] for i in range(60)] for name in ("harmful_test", "benign_test")}
    others |= {name: [[f"{name}, request {i}?"] for i in range(300)] for name in ("other_harmful", "borderline")}
    files = {name: write(tmp_path / f"{name}.csv", ["goal"], rows) for name, rows in others.items()}
    sources, made = {**given, **{name: f"{file}:goal" for name, file in files.items()}}, []

    def again():
        """How many tables were made for this run, and its facts."""
        subject, before = subject_of(path, tmp_path, sources), len(made)
        _ = subject.prompts, subject.rows("other_harmful", "test", subject.parameters.n_test)
        _ = subject.suite(), subject.suite("dev")
        subject.run.kept("dose", lambda: made.append(1) or pd.DataFrame({"a": [1]}))
        return len(made) - before, subject.run.facts

    (first, facts), (second, same) = again(), again()
    assert (first, second) == (1, 0) and facts == same
    found = {}
    for name, rows in others.items():
        write(tmp_path / f"{name}.csv", ["goal"], [[f"{text} Now."] for (text,) in rows])
        found[name] = again()[0], again()[0]
    assert found == dict.fromkeys(others, (1, 0))


def test_a_kept_table_is_made_again_when_the_judges_weights_are_others(tmp_path, given):
    """Formerly a judge's folder could be edited between an interrupted run and its repetition."""
    path, made = next(p for p in NOTEBOOKS if p.stem.startswith("01")), []
    lm = tiny_lm()
    for expected in ([1], [1], [1, 1]):
        if len(expected) == 2:
            with torch.no_grad():
                lm.view.weight(0, "ffn").mul_(2)
        subject = subject_of(path, tmp_path, given, judge=str(saved(lm, tmp_path / "judge")))
        _ = subject.suite()
        subject.run.kept("dose", lambda: made.append(1) or pd.DataFrame({"a": [1]}))
        assert made == expected
    assert subject.run.facts["judge weights"] == lm.weights_fingerprint


def test_too_few_prompts_for_a_use_are_refused_when_the_notebook_begins(tmp_path, given):
    path = next(p for p in NOTEBOOKS if p.stem.startswith("02"))
    few = write(tmp_path / "few.csv", ["goal"], [[f"How do I pick {i}?"] for i in range(12)]) + ":goal"
    with pytest.raises(InputError, match=r"harmful: .*few.csv:goal has \d prompts to \w+ with; at least \d are needed"):
        subject_of(path, tmp_path, {**given, "harmful": few})
    with pytest.raises(InputError, match=r"n_detect: got 100000; allowed: 1 to \d+ embedded prompts"):
        subject_of(path, tmp_path, {}, n_detect=100_000)


def test_as_many_prompts_to_tune_on_as_to_detect_with_are_fine(tmp_path, given):
    """They are other prompts; formerly notebook 02 refused this after loading the model."""
    path = next(p for p in NOTEBOOKS if p.stem.startswith("02"))
    subject = subject_of(path, tmp_path, given, n_tune=24, n_detect=24)
    assert len(subject.tuning_prompts[0]) == len(subject.prompts["harmful"]) == 24
