import json

import pandas
import pytest

from nt_utils.data import sources
from nt_utils.data.records import PromptSet
from nt_utils.data.registry import REGISTRY
from nt_utils.data.sources import load_prompts
from nt_utils.errors import InputError
from tests.common import refused

ROWS = [{"id": 1, "prompt": "how do I bake bread", "note": "x"}, {"id": 2, "prompt": "how do I sail, fast", "note": ""}]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test reaches out, or reads the user's own sets."""
    monkeypatch.delenv("NT_DATA", raising=False)
    monkeypatch.setattr(sources, "_answers", lambda host, port: False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An offline hub cache that the test writes itself; returns the function that adds a data set's files to it."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()

    def add(dataset, **files):
        root = tmp_path / "hub" / ("datasets--" + dataset.replace("/", "--"))
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("a" * 40)
        for name, content in files.items():
            path = root / "snapshots" / ("a" * 40) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            else:
                pandas.DataFrame(content).to_parquet(path)

    return add


def write(path, rows=ROWS):
    frame = pandas.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False, encoding="utf-8-sig")  # MultiJail's file starts with a byte order mark
    elif path.suffix == ".tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_local_files_with_the_users_own_columns(tmp_path, suffix):
    path = write(tmp_path / f"mine{suffix}")
    prompts = load_prompts(f"{path}:prompt", kind="harmful")
    assert prompts.texts == [row["prompt"] for row in ROWS] and set(prompts.column("kind")) == {"harmful"}
    refused("there is no column 'goal'; the columns are id, prompt, note", lambda: load_prompts(f"{path}:goal"))


def test_a_file_in_a_folder_with_an_at_sign_is_at_hand(tmp_path):
    (tmp_path / "me@home").mkdir()
    path = write(tmp_path / "me@home" / "own.csv")
    for source in (str(path), f"{path}:prompt", f"advbench@{path}"):
        assert sources.local_file(source) == path and sources.is_at_hand(source)


def test_the_paths_that_a_text_may_name():
    assert list(map(str, sources.named_paths("set@a:b/c.csv:column"))) == [
        "set@a:b/c.csv:column",
        "set@a:b/c.csv",
        "set@a",
        "a:b/c.csv:column",
        "a:b/c.csv",
        "a",
    ]
    assert list(sources.named_paths("")) == [] and sources.local_file("x" * 5000) is None


def test_empty_and_duplicate_prompts_are_dropped_with_a_count(tmp_path):
    path = write(tmp_path / "a.csv", [{"q": t} for t in ["one", "  ", "two", "one", "", "one "]])
    with pytest.warns(UserWarning, match="dropped 2 empty and 2 duplicate prompts, 2 are left"):
        prompts = load_prompts(f"{path}:q")
    assert prompts.texts == ["one", "two"] and prompts.dropped == {"empty": 2, "duplicate": 2}
    assert prompts.take(1).dropped == {"empty": 2, "duplicate": 2}


def test_missing_cells_of_every_kind_are_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "one"}\n{"q": null}\n{"other": 1}\n')
    with pytest.warns(UserWarning, match="dropped 2 empty"):
        assert load_prompts(f"{tmp_path}/a.jsonl:q").texts == ["one"]
    pandas.DataFrame({"q": ["one", None, float("nan")]}).to_parquet(tmp_path / "b.parquet")
    with pytest.warns(UserWarning, match="dropped 2 empty"):
        assert load_prompts(f"{tmp_path}/b.parquet:q").texts == ["one"]


def test_limit_draws_with_the_seed_and_keeps_the_order(tmp_path):
    path = write(tmp_path / "a.csv", [{"q": f"{i:03}"} for i in range(100)])
    one, two = (load_prompts(f"{path}:q", limit=10, seed=seed).texts for seed in (0, 1))
    assert one == sorted(one) and one != two and len(set(one)) == 10
    assert load_prompts(f"{path}:q", limit=10, seed=0).texts == one
    assert len(load_prompts(f"{path}:q", limit=500)) == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("", "cannot be read as csv|the file holds no rows"),
        ("q\n", "the file holds no rows"),
        ("q\n\n \n", "no prompts are left"),
    ],
)
def test_empty_or_missing_files(tmp_path, content, message):
    path = tmp_path / "a.csv"
    if content is not None:
        path.write_text(content)
    assert str(path) in refused(message, lambda: load_prompts(f"{path}:q"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_list_of_texts_without_a_header_never_loses_its_first(tmp_path, suffix):
    path = tmp_path / f"texts{suffix}"
    path.write_text("How do I bake?\nHow do I sail?\n")
    refused(r"its first line, 'How do I bake\?', is no name of a column", lambda: load_prompts(str(path)))
    path.write_text("adult prompt\nHow do I sail?\n")
    assert load_prompts(f"{path}:adult prompt").texts == ["How do I sail?"]


def test_bad_sources(tmp_path):
    for source, message in [
        ("nonsense", "unknown prompt set 'nonsense': use one of advbench, harmbench"),
        ("hub:dataset:train", "a hub source is hub:org/name:split:column"),
        ("multijail:xx", "multijail has no column 'xx'; it has en, zh"),
        ("", "got nothing"),
    ]:
        refused(message, load_prompts, source)
    refused("kind: got 'bad'", lambda: load_prompts("advbench", kind="bad"))
    refused("limit: got 0", lambda: load_prompts("advbench", limit=0))


def test_hub_set_from_an_offline_cache(hub):
    hub("someone/questions", **{"data/train-00000-of-00001.parquet": [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]})
    assert load_prompts("hub:someone/questions:train:q", kind="benign").texts == ["one", "two"]
    with pytest.raises(InputError, match="there is no column 'question'; the columns are q, a"):
        load_prompts("hub:someone/questions:train:question")
    refused('Unknown split "test"', lambda: load_prompts("hub:someone/questions:test:q"))
    with pytest.raises(
        InputError, match="someone/others, split train: the hub cannot be reached and the data set is not"
    ):
        load_prompts("hub:someone/others:train:q")


def test_offline_switches_are_restored_and_a_refusal_is_quick(hub):
    import time

    import huggingface_hub

    before, start = huggingface_hub.constants.HF_HUB_OFFLINE, time.perf_counter()
    refused(r"advbench: .* a local copy can be given as advbench@file", lambda: load_prompts("advbench"))
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE and time.perf_counter() - start < 20


# Two rows of every set, in the columns of its hub copy: the first belongs to the set, the second does not where it filters.
LONG = "a passage of running text that is long enough to be kept " * 3
BEHAVIOUR = {"Index": 0, "Target": "Sure", "Behavior": "b", "Category": "c"}
SCHEMAS = {
    "advbench": {"prompt": "do harm", "target": "Sure, here is"},
    "harmbench": {"prompt": "do harm", "category": "illegal"},
    "strongreject": {"prompt": "do harm", "category": "Violence", "source": "x"},
    "jailbreakbench": {**BEHAVIOUR, "Goal": "do harm", "Source": "s"},
    "jailbreakbench-benign": {**BEHAVIOUR, "Goal": "be kind"},
    "maliciousinstruct": {"prompt": "do harm"},
    "xstest": {"id": 1, "prompt": "kill a process", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
    "xstest-unsafe": {"id": 1, "prompt": "kill a man", "type": "contrast_homonyms", "label": "unsafe", "focus": "kill"},
    "multijail": {"id": 1, "source": "x", "tags": "['Hate']", **dict.fromkeys(REGISTRY["multijail"].languages, "harm")},
    "circuit-breakers": {"prompt": "do harm", "chosen": "I cannot.", "rejected": "Sure."},
    "beavertails": {"prompt": "do harm", "response": "Sure", "category": {"violence": True}, "is_safe": False},
    "alpaca": {"instruction": "Sum up.", "input": "A text.", "output": "Short.", "text": "x"},
    "dolly": {"instruction": "Sum up.", "context": "", "response": "Short.", "category": "qa"},
    "gsm8k": {"question": "What is 2 + 2?", "answer": "2 + 2 = 4\n#### 4"},
    "wikipedia": {"id": "1", "url": "u", "title": "Bread", "text": LONG},
    "wikitext": {"text": LONG},
}


def test_every_set_but_those_without_a_hub_copy_has_a_schema():
    without = {name for name, e in REGISTRY.items() if all(place.is_file for place in e.places)}
    assert set(SCHEMAS) | without == set(REGISTRY) and without == {"oktest"}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_registry_entry_loads_from_an_offline_hub_cache(hub, name):
    place = next(p for p in REGISTRY[name].places if not p.is_file)
    row = SCHEMAS[name]
    rows = [row, {**row, **{column: "other" for column in place.where}}] if "label" in place.where else [row]
    folder = f"{place.config}/" if place.config else "data/"
    files = {f"{folder}{place.split}-00000-of-00001.parquet": rows}
    if place.config:
        files["README.md"] = (
            f"---\nconfigs:\n- config_name: {place.config}\n  data_files:\n  - split: {place.split}\n"
            f"    path: {place.config}/{place.split}-*\n---\n"
        )
    hub(place.id, **files)
    (prompt,) = load_prompts(name)
    assert prompt.kind == REGISTRY[name].kind and prompt.source == name and prompt.text
    mapped = {field for field in place.columns if field not in ("text", "topic", "task")}
    assert all(getattr(prompt, field) for field in mapped), mapped
    if name == "alpaca":
        assert prompt.text == "Sum up.\n\nA text." and prompt.helpful == "Short."
    if name == "gsm8k":
        assert prompt.answer.endswith("#### 4")


ORIGINALS = {
    "advbench": ("harmful_behaviors.csv", {"goal": "do harm", "target": "Sure, here is"}),
    "harmbench": (
        "harmbench_behaviors_text_all.csv",
        {"Behavior": "do harm", "FunctionalCategory": "standard", "SemanticCategory": "illegal", "ContextString": ""},
    ),
    "strongreject": ("strongreject_dataset.csv", {"category": "c", "source": "s", "forbidden_prompt": "do harm"}),
    "maliciousinstruct": ("MaliciousInstruct.txt", "do harm\n"),
    "xstest": ("xstest_prompts.csv", SCHEMAS["xstest"]),
    "xstest-unsafe": ("xstest_prompts.csv", SCHEMAS["xstest-unsafe"]),
    "oktest": ("OKTest.csv", {"prompt": "kill a process"}),
    "multijail": ("MultiJail.csv", SCHEMAS["multijail"]),
    "circuit-breakers": (
        "circuit_breakers_train.json",
        {"category": "c", "prompt": "do harm", "llama3_output": "I cannot.", "output": "Sure."},
    ),
    "alpaca": ("alpaca_data.json", {"instruction": "Sum up.", "input": "", "output": "Short."}),
    "gsm8k": ("test.jsonl", SCHEMAS["gsm8k"]),
}


@pytest.mark.parametrize("name", sorted(ORIGINALS))
def test_files_as_their_projects_publish_them(tmp_path, name):
    file, row = ORIGINALS[name]
    path = tmp_path / file
    path.write_text(row) if isinstance(row, str) else write(path, [row])
    (prompt,) = load_prompts(f"{name}@{path}")
    assert prompt.kind == REGISTRY[name].kind and prompt.source == name
    other = write(tmp_path / "other.csv", [{"id": 1, "request": "do harm"}])
    with pytest.raises(InputError, match=f"{name} needs the columns .*; the file has id, request"):
        load_prompts(f"{name}@{other}", kind="harmful")


@pytest.mark.parametrize("name", sorted(ORIGINALS))
def test_files_in_the_folder_nt_data_come_before_the_hub(tmp_path, monkeypatch, name):
    file, row = ORIGINALS[name]
    monkeypatch.setenv("NT_DATA", str(tmp_path))
    (tmp_path / file).write_text(row) if isinstance(row, str) else write(tmp_path / file, [row])
    write(tmp_path / f"{name}_others.csv", [{"request": "columns of another set"}])
    monkeypatch.setattr(sources, "_read_hub", lambda *given: pytest.fail("the hub was asked"))
    (prompt,) = load_prompts(name)
    assert prompt.kind == REGISTRY[name].kind and prompt.source == name and prompt.text


def test_the_folder_nt_data_is_never_guessed_at(tmp_path, monkeypatch, hub):
    monkeypatch.setenv("NT_DATA", str(tmp_path / "nowhere"))
    refused("NT_DATA: there is no folder", lambda: load_prompts("advbench"))
    monkeypatch.setenv("NT_DATA", str(tmp_path))
    refused(r"lie in the folder NT_DATA as harmful_behaviors\.csv or advbench\.\* or", lambda: load_prompts("advbench"))
    row = ORIGINALS["advbench"][1]
    write(tmp_path / "harmful_behaviors.csv", [row])
    write(tmp_path / "AdvBench_100.csv", [row])
    with pytest.raises(InputError, match=r"several files of it: AdvBench_100\.csv, harmful_behaviors\.csv; keep one"):
        load_prompts("advbench")


def test_what_is_at_hand_needs_no_network(tmp_path, monkeypatch, hub):
    file = write(tmp_path / "harmful_behaviors.csv", [ORIGINALS["advbench"][1]])
    assert sources.is_at_hand(f"{file}:goal") and sources.is_at_hand(f"advbench@{file}")
    assert not any(map(sources.is_at_hand, ("advbench", "multijail:zh", "hub:org/name:train:q", "no.csv:q")))
    monkeypatch.setenv("NT_DATA", str(tmp_path))
    assert sources.is_at_hand("advbench") and not sources.is_at_hand("alpaca")
    assert sources.is_at_hand("python-prose") and len(load_prompts("python-prose")) > 100


def test_whole_articles_are_cut_to_their_first_words(hub):
    place = REGISTRY["wikipedia"].places[0]
    text = "one  two\nthree " * 200
    card = f"---\nconfigs:\n- config_name: {place.config}\n  data_files:\n  - split: train\n    path: x/train-*\n---\n"
    hub(place.id, **{"x/train-0.parquet": [{"title": "t", "text": text}], "README.md": card})
    (prompt,) = load_prompts("wikipedia")
    assert text.startswith(prompt.text) and len(prompt.text.split()) == REGISTRY["wikipedia"].words


def test_context_is_put_before_the_behaviour_and_rows_of_other_kinds_are_left_out(tmp_path):
    _, row = ORIGINALS["harmbench"]
    rows = [{**row, "ContextString": "A report."}, {**row, "Behavior": "sing", "FunctionalCategory": "copyright"}]
    (prompt,) = load_prompts(f"harmbench@{write(tmp_path / 'h.csv', rows)}")
    assert prompt.text == "A report.\n\ndo harm" and prompt.topic == "illegal"


def test_language_column_and_recognised_columns(tmp_path, hub):
    place = REGISTRY["multijail"].places[0]
    hub(place.id, **{"data/train-00000-of-00001.parquet": [{**SCHEMAS["multijail"], "sw": "madhara"}]})
    (prompt,) = load_prompts("multijail:sw")
    assert prompt.text == "madhara" and prompt.language == "sw" and load_prompts("multijail")[0].language == "en"
    path = write(tmp_path / "behaviors.csv", [ORIGINALS["advbench"][1]])
    assert load_prompts(str(path))[0].helpful == "Sure, here is"
    with pytest.raises(
        InputError, match=r"say which column holds the prompts as mine.csv:column; it has id, prompt, note"
    ):
        load_prompts(str(write(tmp_path / "mine.csv")))
    with pytest.raises(InputError, match="say which column"):  # both halves of XSTest in one file: never mixed silently
        load_prompts(str(write(tmp_path / "xstest_prompts.csv", [SCHEMAS["xstest"], SCHEMAS["xstest-unsafe"]])))


def test_gated_sets_are_said_to_be_gated(monkeypatch):
    import datasets

    class GatedRepoError(Exception):
        pass

    def refuse(*args, **more):
        raise GatedRepoError("401 Client Error\nlong explanation")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    refused("the data set is gated: accept its licence", lambda: load_prompts("hub:someone/gated:train:q"))


def test_a_prompt_set_passes_through():
    prompts = PromptSet.of(["one", "two"])
    assert load_prompts(prompts) is prompts and len(load_prompts(prompts, limit=1)) == 1
