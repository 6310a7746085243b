"""Prompts from a source: a known name, a local file or a hub data set.

A source is written
    advbench                        a set of the registry: from the folder NT_DATA if it has a file of the set (see
                                    `Entry.files`), from the hub or its cache, else from the original address
    multijail:th                    the same set, another column
    advbench@folder/behaviors.csv   the same set, from the file its project publishes
    file.csv:column                 a local file: .csv, .tsv, .json, .jsonl, .parquet, .txt (one prompt a line, no column)
                                    (`data.tables` says how each is read)
    file.csv                        a local file whose columns are those of a set of the registry
    python-prose                    running text: paragraphs of Python's own language reference
    hub:org/name:split:column       any hub data set; org/name/config names a configuration

Nothing here loads a model; a source that cannot be used is refused in one line.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import logging
import os
import re
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nt_utils.data.prose import passages
from nt_utils.data.records import PROMPT_KINDS, Prompt, PromptSet
from nt_utils.data.registry import REGISTRY, Columns, Entry, Place, entry
from nt_utils.data.tables import SUFFIXES, SURROGATE, Row, read_rows
from nt_utils.errors import InputError, check_choice, check_count, first_line
from nt_utils.files import atomic, cache_folder

HUB = ("datasets", "huggingface_hub", "huggingface_hub.utils._http")  # whose retries and cache notices are kept out
PROSE = "python-prose"
STREAMED = 1000  # rows taken from a set that is too large to download, where no limit is given


def load_prompts(
    source: str | PromptSet, *, limit: int | None = None, seed: int = 0, kind: str | None = None, name: str = ""
) -> PromptSet:
    """The prompts of a source, without empty and duplicate ones (`.dropped` counts them, a warning says so).

    limit   at most so many, drawn with `seed` after the dropping, in the order of the source
    kind    harmful, benign, borderline or general; by default the registry's, "general" for files and the hub
    Raises InputError, one line: unknown name, file that is missing, unreadable or empty, column that is not there (names
    the columns found), hub that cannot be reached for a set that is not cached.
    """
    if isinstance(source, PromptSet):
        return source.take(limit, seed)
    if kind is not None:
        check_choice("kind", kind, PROMPT_KINDS)
    if limit is not None:
        check_count("limit", limit)
    if not isinstance(source, str) or not source.strip():
        raise InputError(
            "a prompt source must be a name, a file with a column or hub:org/name:split:column; got nothing"
        )
    rows, columns, found = _read(source.strip(), limit, seed)
    prompts = _prompts(rows, columns, source, kind or (found.kind if found else "general"), found)
    return _cleaned(prompts, source, found, name).take(limit, seed)


def local_file(source: str) -> Path | None:
    """The file of this machine that a source is read from: one that is named, or one of NT_DATA; else None.

    Raises InputError: NT_DATA is no folder, or holds several files of the set.
    """
    known = REGISTRY.get(source.partition(":")[0])
    if known:
        found = _read_folder(known)
        return found[0] if found else None
    return next((path for path in named_paths(source) if os.path.isfile(path)), None)


def named_paths(text: str) -> Iterator[Path]:
    """The paths that a text may name, most likely first: "file", "file:column", "file:split:column" or "name@file".

    An @ and a colon may stand in a path, too, so only what is there tells which one is meant.
    """
    for part in (text, text.partition("@")[2]):
        pieces = part.split(":")
        for n in range(len(pieces), 0, -1):
            if pieces[0]:
                yield Path(os.path.expanduser(":".join(pieces[:n])))


def is_at_hand(source: str) -> bool:
    """Whether a source can be had: Python's prose, a file that is there, a cached set, or the hub answers.

    Raises InputError for a name that is no path and that nobody has registered: it can be had nowhere.
    """
    known = REGISTRY.get(source.partition(":")[0])
    if source == PROSE or local_file(source) is not None:
        return True
    if not known and not source.startswith("hub:"):
        if not re.search(r"[./\\]", source):
            entry(source.partition(":")[0])
        return False
    ids = [place.id for place in known.places if not place.is_file] if known else [source.split(":")[1]]
    files = [place for place in known.places if place.is_file] if known else []
    return hub_reachable() or any(_address_file(p).is_file() for p in files) or any(map(_snapshot, ids))


# ------------------------------------------------------------------------------------------------------- reading


def _read(source: str, limit: int | None, seed: int) -> tuple[Iterable[Row], Columns, Entry | None]:
    """Rows, column mapping and registry entry of a source."""
    if source == PROSE:
        return [{"text": text, "topic": topic} for topic, text in passages()], {"text": "text", "topic": "topic"}, None
    if source.startswith("hub:"):
        return _read_hub_source(source, limit, seed)
    known, at, path = source.partition("@")
    if at and known in REGISTRY:
        original = Path(path).expanduser()
        return *_as_original(entry(known), read_rows(original), original), entry(known)
    file, column = _split_file(source)
    if file is not None:
        content = read_rows(file)
        return (content, {"text": column}, None) if column else _recognised(file, content)
    set_name, _, column = source.partition(":")
    found = entry(set_name)
    if column and found.languages and column not in found.languages:
        raise InputError(f"{source}: {set_name} has no column {column!r}; it has {', '.join(found.languages)}")
    rows, columns = _read_entry(found, limit, seed)
    return rows, {**columns, "text": column} if column else columns, found


def _split_file(source: str) -> tuple[Path | None, str]:
    """The path and the column of `file.csv:column`; no path where the source is no file."""
    head, colon, tail = source.rpartition(":")
    for path, column in ((head, tail), (source, "")) if colon else ((source, ""),):
        if Path(path).suffix.lower() in SUFFIXES:
            return Path(path).expanduser(), column
    path = head if colon and Path(head).exists() else source
    if os.sep in path or Path(path).exists():
        raise InputError(f"{source}: prompts are read from {', '.join(SUFFIXES)} files")
    return None, ""


def _recognised(path: Path, rows: list[Row]) -> tuple[list[Row], Columns, None]:
    """A file without a column: one of a single column, or one with the columns of a known set."""
    columns = _column_names(rows)
    if (
        len(columns) == 1
        and path.suffix.lower() in (".csv", ".tsv")
        and not re.fullmatch(r"[^\W\d][\w.-]*", columns[0])
    ):
        raise InputError(
            f"{path}: its first line, {columns[0]!r:.60}, is no name of a column, which a {path.suffix[1:]} file begins "
            f"with; put one above it, or name it as {path.name}:column"
        )
    if len(columns) == 1 or columns == ["key", "text"]:
        return rows, {"text": columns[-1]}, None
    for known in REGISTRY.values():
        for place in known.places:
            if place.is_file and not place.where and len(place.columns) > 1 and _needed(place.columns) <= set(columns):
                return rows, place.columns, None
    raise InputError(f"{path}: say which column holds the prompts as {path.name}:column; it has {', '.join(columns)}")


def _as_original(found: Entry, rows: list[Row], path: Path) -> tuple[list[Row], Columns]:
    """The rows of a set in a file of it and what its columns mean; InputError where the columns are others."""
    columns = set(_column_names(rows))
    places = sorted(found.places, key=lambda place: not place.is_file)
    for place in places:
        if set(_as_tuple(place.columns["text"])) & columns and set(place.where) <= columns:
            return [row for row in rows if _kept(row, place)], place.columns
    needed = sorted(_needed(places[0].columns) | set(places[0].where))
    raise InputError(
        f"{path}: {found.name} needs the columns {', '.join(needed)}; the file has {', '.join(sorted(columns))}"
    )


def _read_folder(found: Entry) -> tuple[Path, Iterable[Row], Columns] | None:
    """A set of the registry from the folder NT_DATA: the one file that has a name and the columns of the set."""
    given = os.environ.get("NT_DATA")
    if not given:
        return None
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise InputError(f"NT_DATA: there is no folder {folder}")
    readable = []
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name.lower(), name) for name in found.files):
            rows = read_rows(path)
            with contextlib.suppress(InputError):  # another set's file whose name is alike
                readable.append((path, *_as_original(found, rows, path)))
    if len(readable) > 1:
        names = ", ".join(path.name for path, *_ in readable)
        raise InputError(f"{found.name}: NT_DATA holds several files of it: {names}; keep one")
    return readable[0] if readable else None


def _read_entry(found: Entry, limit: int | None, seed: int) -> tuple[Iterable[Row], Columns]:
    """A set of the registry from NT_DATA, else from the first of its places that can be read."""
    local = _read_folder(found)
    if local:
        return local[1:]
    failures = []
    for place in found.places:
        try:
            rows = _read_address(place) if place.is_file else _read_hub(place, found.stream, limit, seed)
        except InputError as error:
            failures.append(str(error))
            continue
        return [row for row in rows if _kept(row, place)] if place.where else rows, place.columns
    raise InputError(
        f"{found.name}: {failures[0]}; a local copy can be given as {found.name}@file or lie in the folder NT_DATA as "
        f"{' or '.join(found.files)} (source: {found.source})"
    )


def _read_hub_source(source: str, limit: int | None, seed: int) -> tuple[Iterable[Row], Columns, None]:
    parts = source.split(":")
    if len(parts) != 4 or not all(parts) or parts[1].count("/") not in (1, 2):
        raise InputError(f"{source}: a hub source is hub:org/name:split:column or hub:org/name/config:split:column")
    organisation, name, *config = parts[1].split("/")
    place = Place(f"{organisation}/{name}", {"text": parts[3]}, "".join(config), parts[2])
    return _read_hub(place, False, limit, seed), place.columns, None


# ------------------------------------------------------------------------------------------------------- the hub


def _read_hub(place: Place, stream: bool, limit: int | None, seed: int) -> Iterable[Row]:
    """Rows of a hub data set: online, else from the cache (prepared by datasets, or the files of a snapshot)."""
    import datasets

    where = f"{place.id}{f' ({place.config})' if place.config else ''}, split {place.split}"
    arguments = {"name": place.config or None, "split": place.split}
    if stream and hub_reachable():
        try:
            rows = datasets.load_dataset(place.id, **arguments, streaming=True)
            return list(rows.shuffle(seed=seed, buffer_size=STREAMED).take(4 * (limit or STREAMED)))
        except Exception as error:  # whatever the hub client raises, the cache is tried next
            first = error
    with quiet(*HUB), offline_unless_reachable():
        try:
            return datasets.load_dataset(place.id, **arguments)
        except Exception as error:
            first = error
        folder = _snapshot(place.id)
        if folder is not None:
            try:
                return datasets.load_dataset(str(folder), **arguments)
            except Exception as error:
                first = error
    raise InputError(f"{where}: {_hub_failure(first)}") from first


def _hub_failure(error: BaseException) -> str:
    """What went wrong, in one line."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    text = first_line(error)
    if "GatedRepoError" in kinds or "gated" in text.lower():
        return "the data set is gated: accept its licence on the hub and log in with `hf auth login`"
    if "split" in text.lower() or "BuilderConfig" in text:
        return text
    if hub_reachable():
        return f"it cannot be read from the hub ({text})"
    return "the hub cannot be reached and the data set is not cached"


def _read_address(place: Place) -> list[Row]:
    """The rows of a file at an address, fetched once into the cache."""
    path = _address_file(place)
    if not path.is_file():
        if not hub_reachable(place.id):
            raise InputError(f"{place.id}: cannot be reached and is not cached")
        try:
            with atomic(path) as unfinished, urllib.request.urlopen(place.id, timeout=60) as found:
                unfinished.write_bytes(found.read())
        except OSError as error:
            raise InputError(f"{place.id}: cannot be fetched ({first_line(error)})") from error
    return read_rows(path)


def _address_file(place: Place) -> Path:
    name = Path(urllib.parse.urlsplit(place.id).path).name
    return cache_folder() / "prompts" / f"{hashlib.sha256(place.id.encode()).hexdigest()[:16]}-{name}"


def _snapshot(dataset: str) -> Path | None:
    """The folder of a data set's files in the hub cache, if it is there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(dataset, repo_type="dataset", local_files_only=True))
    except Exception:
        return None


def hub_reachable(address: str = "") -> bool:
    """Whether the hub (or the server of an address) answers, found out once and quickly.

    The hub client itself tries for half a minute before it gives up. Behind a proxy the proxy is asked, and the answer
    is yes; HF_HUB_OFFLINE and HF_DATASETS_OFFLINE say no.
    """
    truth = {"1", "true", "yes", "on"}
    if any(os.environ.get(key, "").lower() in truth for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        return False
    if urllib.request.getproxies().get("https"):
        return True
    parts = urllib.parse.urlsplit(address or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    return _answers(parts.hostname or "", parts.port or 443)


@functools.cache
def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def offline_unless_reachable(address: str = "") -> Iterator[None]:
    """Where the server does not answer, the clients are told to look in their caches only."""
    if hub_reachable(address):
        yield
        return
    import datasets
    import huggingface_hub

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    holders = [module for module in modules if hasattr(module, "HF_HUB_OFFLINE")]
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        for holder in holders:
            holder.HF_HUB_OFFLINE = True
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """These loggers say errors only, and warnings are off."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# ------------------------------------------------------------------------------------------------------- prompts


def _prompts(rows: Iterable[Row], columns: Columns, source: str, kind: str, found: Entry | None) -> list[Prompt]:
    names = _column_names(rows)
    text = columns["text"]
    if not set(_as_tuple(text)) & set(names):
        raise InputError(f"{source}: there is no column {_as_tuple(text)[0]!r}; the columns are {', '.join(names)}")
    fields = {f: tuple(n for n in _as_tuple(c) if n in names) for f, c in columns.items()}
    label = found.name if found else source
    language = text if found and isinstance(text, str) and text in found.languages else "en"
    prompts = []
    for number, row in enumerate(rows, 1):
        cells = {f: [_cell(row, name, source, number) for name in columns] for f, columns in fields.items()}
        known = {f: "\n\n".join(filter(None, texts)) for f, texts in cells.items()}
        if found and found.words:
            known["text"] = _first_words(known["text"], found.words)
        prompts.append(Prompt(**known, kind=kind, language=language, source=label))
    return prompts


def _first_words(text: str, count: int) -> str:
    """The first words of a text, with the space between them as it is."""
    found = re.match(rf"(?:\s*\S+){{0,{count}}}", text)
    return found[0] if found else text


def _cell(row: Row, column: str, source: str, number: int) -> str:
    """A cell's text; missing values are empty. Raises InputError for anything that is no text."""
    value = row.get(column)
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if column in ("tags", "category") and not isinstance(value, str):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{source}: row {number}: column {column!r} holds {value!r:.40}, which is no text")
    half = SURROGATE.search(value)
    if half:
        raise InputError(
            f"{source}: row {number}: column {column!r} holds half of a surrogate pair, \\u{ord(half[0]):04x}, after "
            f"{value[max(0, half.start() - 20) : half.start()]!r}"
        )
    return value.strip()


def _cleaned(prompts: Sequence[Prompt], source: str, found: Entry | None, name: str) -> PromptSet:
    """Without empty prompts, duplicates and, for running text, rows that are too short."""
    kept: dict[tuple[str, str], Prompt] = {}
    dropped = {"empty": 0, "duplicate": 0, "short": 0}
    for prompt in prompts:
        if not prompt.text:
            dropped["empty"] += 1
        elif found is not None and len(prompt.text) < found.shortest:
            dropped["short"] += 1
        elif (prompt.text, prompt.prefill) in kept:
            dropped["duplicate"] += 1
        else:
            kept[prompt.text, prompt.prefill] = prompt
    dropped = {reason: count for reason, count in dropped.items() if count}
    if not kept:
        raise InputError(f"{source}: no prompts are left ({_counts(dropped) or 'the source holds no rows'})")
    noticed = {r: c for r, c in dropped.items() if r != "short" and not (found and found.shortest)}
    if noticed:
        warnings.warn(f"{source}: dropped {_counts(noticed)} prompts, {len(kept)} are left", stacklevel=3)
    return PromptSet(kept.values(), name or (found.name if found else source), dropped)


def _counts(dropped: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {reason}" for reason, count in dropped.items())


def _column_names(rows: Iterable[Row]) -> list[str]:
    known = getattr(rows, "column_names", None)
    if known is not None:
        return list(known)
    return list(dict.fromkeys(str(name) for row in rows for name in row))


def _needed(columns: Columns) -> set[str]:
    return {name for column in columns.values() for name in _as_tuple(column)}


def _as_tuple(column: str | Sequence[str]) -> tuple[str, ...]:
    return (column,) if isinstance(column, str) else tuple(column)


def _kept(row: Row, place: Place) -> bool:
    return all(str(row.get(column, "")).strip().lower() == value.lower() for column, value in place.where.items())
