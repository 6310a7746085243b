"""Tables in files: what a row, a field and a line are is decided by the format's rules, never by a guess.

    .csv, .tsv   RFC 4180, with "," or a tab: the first row names the columns, quotes stand at both ends of a field. Rows
                 have as many fields as the header; further fields that are empty are dropped, anything else is refused.
    .txt         one text a line, in the column `text`
    .jsonl       one object or string a line
    .json        a list of objects or strings; an object of equally long columns; an object of lists of objects or of
                 strings (all are read, in order, with their key as the column `key`); an object of plain values and one
                 such list; what pandas writes (records, columns, index, split, table, a series); JSON lines
    .parquet     a table of pyarrow

A line ends with a line feed, before which a carriage return may stand; no other character ends one. Text is UTF-8, with
or without a byte order mark. Refusals name the file, the row (the first one behind the header is row 1) and what was found.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nt_utils.errors import InputError, first_line
from nt_utils.files import atomic

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
SURROGATE = re.compile(r"[\ud800-\udfff]")

Row = dict[str, Any]


def read_rows(path: Path, suffix: str = "") -> list[Row]:
    """The rows of a file, each a mapping of its columns.

    Args:
        suffix: the format, where the file's own name does not say it.

    Raises:
        InputError: one line; see the top of this module.
    """
    suffix = suffix or path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: prompts are read from {', '.join(SUFFIXES)} files")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        rows = _parquet(path) if suffix == ".parquet" else _READERS[suffix](_text(path))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as {suffix[1:]} ({first_line(error)})") from error
    if not rows:
        raise InputError(f"{path}: the file holds no rows")
    return rows


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV that `read_rows` reads back: every field in quotes, missing values empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic(Path(path)) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([["" if (value := row.get(name)) is None else value for name in columns] for row in rows])


def _text(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start + 1}, 0x{content[error.start]:02x}, is not UTF-8; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(f"line {text[: text.index(chr(0))].count(chr(10)) + 1} holds a NUL byte")
    return text


# ------------------------------------------------------------------------------------------------- lines and fields


def _lines(text: str) -> list[str]:
    """The lines of a text, without their ends."""
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, 1):
        if "\r" in line:
            raise ValueError(f"line {number} holds a carriage return without a line feed, which ends no line")
    return lines


def _txt(text: str) -> list[Row]:
    return [{"text": line} for line in _lines(text)] if text else []


def _delimited(separator: str) -> Callable[[str], list[Row]]:
    return lambda text: _table(_fields(text, separator), separator)


def _fields(text: str, separator: str) -> list[list[str]]:
    """The fields of every row of an RFC 4180 file."""
    quoted = re.compile(r'"((?:[^"]|"")*+)"')
    plain = re.compile(f"[^{re.escape(separator)}\n]*+")
    rows: list[list[str]] = [[]]
    at = 0
    while at < len(text) or rows[-1]:
        where = f"row {len(rows) - 1}" if len(rows) > 1 else "the header"
        if text.startswith('"', at):
            found = quoted.match(text, at)
            if not found:
                raise ValueError(f"{where}: a quote is opened and never closed")
            field = found[1].replace('""', '"')
            at = found.end()
            end = re.compile(r"\r?\n|\Z").match(text, at)
            if not end and not text.startswith(separator, at):
                raise ValueError(f"{where}: text stands behind a closing quote: {text[at : at + 20]!r}")
        else:
            found = plain.match(text, at)
            assert found is not None
            at = found.end()
            field = found[0] if text.startswith(separator, at) else found[0].removesuffix("\r")
            _check_plain(field, where)
            end = re.compile(r"\n|\Z").match(text, at)
        rows[-1].append(field)
        if not end:
            at += 1
            continue
        at = end.end()
        if at == len(text):
            break
        rows.append([])
    return rows


def _check_plain(field: str, where: str) -> None:
    """Refuse a field without quotes that a writer with other rules has written."""
    if "\r" in field:
        raise ValueError(f"{where}: a carriage return without a line feed stands outside quotes")
    if field.lstrip(" ").startswith('"'):
        raise ValueError(f"{where}: a blank stands before an opening quote")
    if '\\"' in field or field.endswith("\\"):
        raise ValueError(
            f"{where}: a backslash stands before a quote or the end of a field that has no quotes around it"
        )


def _table(rows: list[list[str]], separator: str) -> list[Row]:
    header, *body = rows
    other = [name for sign, name in SEPARATORS.items() if sign != separator and sign in "".join(header)]
    if len(header) == 1 and other:
        raise ValueError(
            f"the header is the one name {header[0]!r}: fields are separated by {SEPARATORS[separator]}, not by {other[0]}"
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"the header names {twice[0]!r} twice")
    found = []
    for number, fields in enumerate(body, 1):
        fields, surplus = fields[: len(header)], fields[len(header) :]
        if fields == [""] and len(header) > 1:
            continue  # a blank line
        if any(surplus) or len(fields) < len(header):
            what = f"the surplus is {next(filter(None, surplus))[:40]!r}" if surplus else f"it is {fields!r:.60}"
            raise ValueError(f"row {number} has {len(fields) + len(surplus)} fields, the header {len(header)}; {what}")
        found.append(dict(zip(header, fields, strict=True)))
    return found


# ------------------------------------------------------------------------------------------------------- JSON


def _decode(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object names {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _jsonl(text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(text), 1):
        if line.strip(" \t"):
            try:
                rows.append(_decode(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {first_line(error)}") from error
    return _rows(rows)


def _json(text: str) -> list[Row]:
    try:
        content = _decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _jsonl(text)
        raise
    if isinstance(content, list):
        return _rows(content)
    if not isinstance(content, dict):
        raise ValueError("it holds neither a list nor an object")
    return _object_rows(content)


def _rows(content: Any) -> list[Row]:
    """A list of objects, or of strings."""
    if not isinstance(content, list):
        raise ValueError(f"a list is needed where it holds {content!r:.60}")
    rows = [{"text": row} if isinstance(row, str) else row for row in content]
    for number, (row, given) in enumerate(zip(rows, content, strict=True), 1):
        if not isinstance(row, dict):
            raise ValueError(
                f"row {number}: every row must be an object with named columns or a string, it is {row!r:.60}"
            )
        if isinstance(given, str) != isinstance(content[0], str):
            raise ValueError(f"row {number}: objects and strings are mixed")
    return rows


def _object_rows(content: dict[str, Any]) -> list[Row]:
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    objects = {key: value for key, value in content.items() if isinstance(value, dict)}
    split = {"columns", "data"} <= set(content) <= {"columns", "index", "data"}
    if split and all(isinstance(row, list) for row in content["data"]):
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    if set(content) == {"schema", "data"} and objects:
        return _rows(content["data"])
    if lists and len(lists) == len(content):
        inner = {type(item) for value in lists.values() for item in value}
        if not inner & {dict, list} and len({len(value) for value in lists.values()}) == 1:
            return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        if inner in ({str}, {dict}):
            return [
                {"key": key} | row if "key" not in row else row for key, value in lists.items() for row in _rows(value)
            ]
    elif len(lists) == 1 and not objects:
        return _rows(next(iter(lists.values())))
    elif objects and len(objects) == len(content):
        outer, inner_keys = _labels(objects), _labels({key for value in objects.values() for key in value})
        if outer != inner_keys:
            return list(objects.values()) if outer else _columns(objects)
    elif _labels(content) and all(isinstance(value, str) for value in content.values()):
        return _rows(list(content.values()))
    raise ValueError(f"its layout is not known; its keys are {', '.join(map(repr, list(content)[:8]))}")


def _labels(keys: Iterable[str]) -> bool:
    """Whether keys are row numbers, as pandas writes them."""
    return all(key.isdecimal() for key in keys)


def _columns(columns: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    rows = next(iter(columns.values()))
    if any(value.keys() != rows.keys() for value in columns.values()):
        raise ValueError("its columns do not have the same rows")
    return [{name: column[row] for name, column in columns.items()} for row in rows]


# ------------------------------------------------------------------------------------------------------- Parquet


def _parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    table = parquet.ParquetFile(path).read()
    kept = [name for name in table.column_names if not re.fullmatch(r"__index_level_\d+__", name)]
    if len(set(kept)) < len(kept):
        raise ValueError("two of its columns have the same name")
    return table.select(kept).to_pylist()


_READERS: dict[str, Callable[[str], list[Row]]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".json": _json,
}
