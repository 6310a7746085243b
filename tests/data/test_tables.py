"""Files of prompts: whatever texts a user has, writing and loading them gives those texts or a refusal."""

import csv
import json
import warnings

import pandas
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nt_utils.data.sources import load_prompts
from nt_utils.data.tables import read_rows, write_csv
from nt_utils.errors import InputError
from tests.common import refused

# ------------------------------------------------------------------------------------ every format and layout a writer has


def by_csv(path, texts, targets, newline="\n", **options):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator=newline, **options).writerows([["q", "a"], *zip(texts, targets, strict=True)])


def by_csv_alone(path, texts, targets, **options):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows([["q"], *([text] for text in texts)])


def by_pandas(method, **options):
    def write(path, texts, targets):
        getattr(pandas.DataFrame({"q": texts, "a": targets}), method)(path, **options)

    return write


def by_json(shape):
    def write(path, texts, targets):
        rows = [{"q": text, "a": target} for text, target in zip(texts, targets, strict=True)]
        path.write_text(shape(rows), encoding="utf-8", newline="")

    return write


def columns(rows):
    return {name: [row[name] for row in rows] for name in ("q", "a")}


WRITERS = {
    "csv": (".csv", by_csv),
    "csv, crlf": (".csv", lambda *given: by_csv(*given, newline="\r\n")),
    "csv, all quoted": (".csv", lambda *given: by_csv(*given, quoting=csv.QUOTE_ALL)),
    "csv, text quoted": (".csv", lambda *given: by_csv(*given, quoting=csv.QUOTE_NONNUMERIC)),
    "csv, one column": (".csv", by_csv_alone),
    "csv, bars": (".csv", lambda *given: by_csv(*given, delimiter="|")),
    "csv, semicolons": (".csv", lambda *given: by_csv(*given, delimiter=";")),
    "csv, carriage returns": (".csv", lambda *given: by_csv(*given, newline="\r")),
    "csv, tabs": (".tsv", lambda *given: by_csv(*given, delimiter="\t")),
    "csv, tabs, wrong name": (".csv", lambda *given: by_csv(*given, delimiter="\t")),
    "csv, commas, wrong name": (".tsv", by_csv),
    "csv, unix": (".csv", lambda *given: by_csv(*given, dialect="unix")),
    "pandas csv": (".csv", by_pandas("to_csv", index=False)),
    "pandas csv, index": (".csv", by_pandas("to_csv")),
    "pandas csv, mark": (".csv", by_pandas("to_csv", index=False, encoding="utf-8-sig")),
    "pandas csv, utf-16": (".csv", by_pandas("to_csv", index=False, encoding="utf-16", errors="surrogatepass")),
    "pandas tsv": (".tsv", by_pandas("to_csv", index=False, sep="\t")),
    "pandas json": (".json", by_pandas("to_json")),
    **{f"pandas json, {o}": (".json", by_pandas("to_json", orient=o)) for o in ("records", "index", "split", "table")},
    "pandas json lines": (".jsonl", by_pandas("to_json", orient="records", lines=True)),
    "pandas json lines, wrong name": (".json", by_pandas("to_json", orient="records", lines=True)),
    "pandas parquet": (".parquet", by_pandas("to_parquet")),
    "json rows": (".json", by_json(json.dumps)),
    "json rows, as is": (".json", by_json(lambda rows: json.dumps(rows, ensure_ascii=False, indent=1))),
    "json columns": (".json", by_json(lambda rows: json.dumps(columns(rows)))),
    "json in an object": (".json", by_json(lambda rows: json.dumps({"version": 1, "data": rows}))),
    "json by behaviour": (".json", by_json(lambda rows: json.dumps({"x": rows[:1], "y": rows[1:]}))),
    "json lines": (".jsonl", by_json(lambda rows: "\n".join(map(json.dumps, rows)))),
    "json lines, as is": (".jsonl", by_json(lambda rows: "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows))),
    "json values": (".json", by_json(lambda rows: json.dumps([list(row.values()) for row in rows]))),
}
#: Layouts that are refused whatever they hold: another separator, another encoding, no names.
REFUSED = {"csv, bars", "csv, semicolons", "pandas csv, utf-16", "json values"}
REFUSED |= {"csv, tabs, wrong name", "csv, commas, wrong name"}
#: Layouts in which every text that is no half of a surrogate pair can be told.
COMPLETE = {name for name, (suffix, _) in WRITERS.items() if suffix in (".json", ".jsonl")} - REFUSED
COMPLETE |= {"csv, all quoted", "csv, text quoted", "csv, unix", "pandas parquet"}
COMPLETE -= {"pandas json lines, wrong name"}  # of a single row: one object, which is no list

PIECES = [*",;|\t\"\\\n\r'", "\r\n", '""', *"\x85\u2028\x1c\x0c\ufeff", "NA", "null", "1", "{}", *"é東a "]
TEXT = st.lists(st.sampled_from(PIECES) | st.characters(exclude_characters="\0"), max_size=8).map("".join)


def expected(texts):
    """What loading is asked for: the texts without blank ends, empty ones and repetitions."""
    return list(dict.fromkeys(filter(None, (text.strip() for text in texts))))


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
@example([("How do I bake, slowly?", ""), ("NA", "null")])
@example([("a\rb", "c\\"), ('say "hi"', ' "hi"')])
@example([("two\nlines", "x;y"), ("\u2028", "\x85")])
def test_loading_gives_the_texts_that_were_written_or_a_refusal(tmp_path_factory, name, pairs):
    suffix, write = WRITERS[name]
    path = tmp_path_factory.mktemp("t") / f"t{suffix}"
    texts, targets = map(list, zip(*pairs, strict=True))
    try:
        write(path, texts, targets)
    except (UnicodeEncodeError, OverflowError, csv.Error, ValueError):
        return  # the writer itself refuses half a surrogate pair
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load_prompts(f"{path}:q").texts
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        whole = not any(0xD800 <= ord(sign) < 0xE000 for text in texts + targets for sign in text)
        assert name not in COMPLETE or not expected(texts) or not whole, error
        return
    assert found == expected(texts) and name not in REFUSED


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(TEXT, min_size=1, max_size=4))
def test_text_files_give_their_lines_or_a_refusal(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("t") / "t.txt"
    texts[0] = texts[0].lstrip("\ufeff")  # at the start of a file it is a byte order mark
    try:
        path.write_text("\n".join(texts), encoding="utf-8", newline="")
    except UnicodeEncodeError:
        return
    lines = [line for text in texts for line in text.replace("\r\n", "\n").split("\n")]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert load_prompts(str(path)).texts == expected(lines)
    except InputError:
        assert not expected(lines) or any("\r" in line for line in lines)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.fixed_dictionaries({"q": TEXT, "a": TEXT}), min_size=1, max_size=4))
def test_what_is_written_is_read_back_exactly(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    try:
        write_csv(path, rows)
    except UnicodeEncodeError:
        return
    assert read_rows(path) == rows
    with path.open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == rows


# ------------------------------------------------------------------------------------------------- files from real use

FILES = {
    "a row's surplus field is empty": ("a.csv", "goal,target\nbake?,Sure,\nsail?,Sure,\n", "goal", ["bake?", "sail?"]),
    "a blank line between rows": ("a.csv", "goal,target\nbake?,Sure\n\nsail?,Sure\n", "goal", ["bake?", "sail?"]),
    "words that pandas takes for nothing": ("a.csv", "q\nNA\nnull\nNone\nnan\n", "q", ["NA", "null", "None", "nan"]),
    "lists by behaviour": ("a.json", '{"b": ["one", "two"], "s": ["three"]}', "", ["one", "two", "three"]),
    "objects by behaviour": (
        "a.json",
        '{"b": [{"t": "one"}], "s": [{"t": "two"}, {"t": "three"}]}',
        "t",
        ["one", "two", "three"],
    ),
    "a series of pandas": ("a.json", '{"0": "one", "1": "two"}', "", ["one", "two"]),
    "strings a line": ("a.jsonl", '"one"\n"two\\u2028"\n', "", ["one", "two"]),
    "no line feed at the end": ("a.txt", "one\ntwo", "", ["one", "two"]),
    "an index that pandas adds": ("a.csv", ",q\n0,one\n1,two\n", "q", ["one", "two"]),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_read(tmp_path, name):
    file, content, column, texts = FILES[name]
    (tmp_path / file).write_text(content, encoding="utf-8")
    assert load_prompts(f"{tmp_path / file}{column and ':'}{column}").texts == texts


REFUSALS = {
    "surplus": ("a.csv", "q\nslowly, please\n", "row 1 has 2 fields, the header 1; the surplus is ' please'"),
    "surplus behind an empty one": ("a.csv", "q,a\none,1,,x\n", "row 1 has 4 fields, the header 2; the surplus is 'x'"),
    "too few": ("a.csv", "q,a\none,1\ntwo\n", r"row 2 has 1 fields, the header 2; it is \['two'\]"),
    "semicolons": (
        "a.csv",
        "prompt;label\nq?;x\n",
        "one name 'prompt;label': fields are separated by commas, not by semic",
    ),
    "commas in tsv": ("a.tsv", "prompt,label\nq?,x\n", "separated by tabs, not by commas"),
    "twice": ("a.csv", "q,q\none,two\n", "the header names 'q' twice"),
    "open quote": ("a.csv", 'q,a\n"one,1\ntwo,2\n', "row 1: a quote is opened and never closed"),
    "behind a quote": ("a.csv", 'q,a\none,1\n"two" x,2\n', "row 2: text stands behind a closing quote: ' x,2"),
    "carriage returns": ("a.csv", "q\rone\rtwo\r", "the header: a carriage return without a line feed"),
    "carriage returns in text": ("a.txt", "one\rtwo\r", "line 1 holds a carriage return"),
    "nothing": ("a.csv", "\0q\n", "line 1 holds a NUL byte"),
    "latin": ("a.csv", "q\nna\xefve\n".encode("latin-1"), "byte 5, 0xef, is not UTF-8"),
    "utf-16": ("a.txt", "one".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
    "packed": ("a.csv.gz", "x", "prompts are read from .csv"),
    "two tables": ("a.json", '{"train": [{"q": "x"}], "other": ["y"], "n": 1}', "its keys are 'train', 'other', 'n'"),
    "one object": ("a.json", '{"q": "one", "a": "two"}', "its layout is not known; its keys are 'q', 'a'"),
    "nested": ("a.json", '{"data": {"q": ["x"]}}', "its layout is not known; its keys are 'data'"),
    "values": ("a.json", '[["one", 1]]', r"row 1: every row must be an object .*, it is \['one', 1\]"),
    "mixed": ("a.json", '["one", {"q": "two"}]', "row 2: objects and strings are mixed"),
    "key twice": ("a.jsonl", '{"q": "one"}\n{"q": "two", "q": "three"}\n', "line 2: an object names 'q' twice"),
    "list": ("a.jsonl", '{"q": [1, 2]}\n', r"row 1: column 'q' holds \[1, 2\], which is no text"),
    "no json": ("a.jsonl", '{"q": "one"}\nnot json\n', "cannot be read as jsonl"),
    "other suffix": ("a.docx", "x", "prompts are read from .csv"),
    "number": ("a.jsonl", '{"q": "one"}\n{"q": 2}\n', "row 2: column 'q' holds 2, which is no text"),
    "truth": ("a.json", '[{"q": true}]', "row 1: column 'q' holds True"),
    "half a pair": (
        "a.jsonl",
        '{"q": "one"}\n{"q": "broken \\ud83d in"}\n',
        r"row 2: column 'q' holds half of a .*ud83d, after 'broken '",
    ),
    "cut": ("a.json", '[{"q": "one"}, {"q"', "cannot be read as json"),
    "no parquet": ("a.parquet", "x", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_files_that_are_refused_in_one_line(tmp_path, name):
    file, content, message = REFUSALS[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(tmp_path / file) in refused(message, lambda: load_prompts(f"{tmp_path / file}:q"))


def test_parquet_needs_text(tmp_path):
    pandas.DataFrame({"q": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    refused("row 1: column 'q' holds 1, which is no text", lambda: load_prompts(f"{tmp_path}/a.parquet:q"))
