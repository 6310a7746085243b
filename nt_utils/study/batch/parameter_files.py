"""Parameter files: what notebooks/params/<study>.yaml says, checked, and the jobs that follow from it.

A file gives parameters for every notebook that takes them and has these keys of its own:

    extends:    another file, by name, whose lines hold where this one says nothing; one that starts with "_" is no study
    notebooks:  parameters for single notebooks
    sweep:      parameter -> list of values; every combination becomes a run of the notebooks that take one of them
    otherwise:  parameters that are taken instead where a prompt source of the file is not at hand: neither in NT_DATA nor
                in a cache, and the hub does not answer
    facts:      what is known of the model without the hub (is it gated, its configuration), for ``make plan``
"""

from __future__ import annotations

import argparse
import difflib
import functools
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import nt_utils
from nt_utils.data.sources import is_at_hand, local_file, named_paths
from nt_utils.errors import InputError, first_line
from nt_utils.files import atomic, read_json, study_name
from nt_utils.study import parameters
from nt_utils.study.parameters import TESTBED, TESTBEDS, notebook_parameters
from nt_utils.study.provenance import code_fingerprint

OWN_KEYS = ("notebooks", "sweep", "otherwise", "facts")
#: Parameters that the command line sets: a file that named them would be ignored.
OF_THE_COMMAND = {"study": "STUDY=...", "seed": "SEEDS=...", "preset": "PRESET=...", "runs": "the workflow"}
FACTS = ("gated", "tokenizer", "config")
#: Notebooks that read what the others of their seed left: they come last.
LAST = ("06_comparison",)


@functools.cache
def shipped_seeds() -> frozenset[str]:
    """Seeds of the testbed whose weights come with the package, without loading torch."""
    index = Path(nt_utils.__file__).parent / "testbed" / "weights" / "index.json"
    return frozenset(read_json(index)["seeds"] if index.is_file() else ())


def notebooks(root: Path) -> list[str]:
    """Names of the study's notebooks, in order."""
    return sorted(p.stem for p in (root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def takes(root: Path, notebook: str) -> list[str]:
    """Parameters of a notebook."""
    return list(notebook_parameters(root / "notebooks" / f"{notebook}.ipynb"))


@dataclass(frozen=True)
class StudyFile:
    """A checked parameter file.

    shared  for every notebook that takes them; own: notebook -> its own; sweep: parameter -> values; facts: see above
    """

    name: str
    shared: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    has_model: bool = True  # whether any notebook takes a model

    def parameters(self, notebook: str, root: Path, preset: str = "") -> dict[str, Any]:
        """The parameters this file gives to a notebook; with preset "quick" none is larger than quick's own value, since a
        file's sizes are meant for results."""
        known = takes(root, notebook)
        given = {k: v for k, v in self.shared.items() if k in known} | dict(self.own.get(notebook) or {})
        return {k: _quick(k, v) for k, v in given.items()} if preset == "quick" else given

    @property
    def model(self) -> str:
        """The model under study."""
        return self.shared.get("model", TESTBED)

    def trains(self, seed: int) -> bool:
        """Whether a testbed of this seed has to be trained before its notebooks start: its weights are not shipped."""
        return self.has_model and self.is_small and not (self.model == TESTBED and str(seed) in shipped_seeds())

    @property
    def is_small(self) -> bool:
        """Whether a notebook is served best by one thread: a testbed, or no model at all."""
        return self.model in TESTBEDS


@functools.cache
def _say_otherwise(study: str, missing: str, taken: str) -> None:
    """Said once a process: results on other prompts must not look like those on the file's own."""
    print(f"{study}: {missing} is not at hand (NT_DATA, cache, hub); the study takes {taken} instead", file=sys.stderr)


def read(study: str, root: Path) -> StudyFile:
    """The parameter file of a study. Raises InputError: no such file, not YAML, an unknown key or a refused value."""
    file = root / "notebooks" / "params" / f"{study}.yaml"
    if not file.is_file() or study.startswith("_"):
        known = sorted(p.stem for p in file.parent.glob("[!_]*.yaml"))
        raise InputError(f"study: {study!r} has no parameter file; known: {', '.join(known)} (notebooks/params/*.yaml)")
    content = _content(file)
    own, sweep, otherwise, facts = (_mapping(file, key, content.pop(key, None)) for key in OWN_KEYS)
    table = {name: takes(root, name) for name in notebooks(root)}
    anywhere = sorted({name for names in table.values() for name in names})
    for name, value in [*content.items(), *otherwise.items()]:
        _check(file, name, value, anywhere, OWN_KEYS)
    sections = [content, *(_mapping(file, notebook, values) for notebook, values in own.items())]
    named = {(str(s[role]), role) for s in sections for role in parameters.SOURCES if s.get(role)}
    missing = sorted(pair for pair in named if otherwise and not _is_at_hand(file, *pair))
    if missing:
        roles = {role for _, role in missing}
        # A set that is only left out leaves the others alone; prompts that are taken instead go together.
        dropped = {role: "" for role in roles if otherwise.get(role) == ""}
        taken = dropped if len(dropped) == len(roles) else otherwise
        said = (
            ", ".join(sorted({source for source, _ in missing})),
            ", ".join(f"{k}: {v or 'none'}" for k, v in taken.items()),
        )
        _say_otherwise(study, *said)
        for section in sections:  # what is left out stays out
            section |= {k: v for k, v in taken.items() if section.get(k, section is content)}
    for notebook, values in own.items():
        if notebook not in table:
            raise InputError(f"{file}: notebooks: {notebook!r} is no notebook; known: {', '.join(table)}")
        for name, value in _mapping(file, notebook, values).items():
            _check(file, name, value, table[notebook])
    _check_sweep(file, sweep, anywhere)
    for name in facts:
        if name not in FACTS:
            raise InputError(f"{file}: facts: {name}: unknown; allowed: {', '.join(FACTS)}")
    return StudyFile(study, content, own, sweep, facts, "model" in anywhere)


def _is_at_hand(file: Path, source: str, role: str) -> bool:
    try:
        return source == parameters.EMBEDDED or is_at_hand(source)
    except InputError as error:
        raise InputError(f"{file}: {role}: {error}") from error


def _quick(name: str, value: Any) -> Any:
    """A number no larger than the quick preset's, a list no longer than its (whole numbers no larger either), its text where
    it has one, else the value."""
    rule = parameters.PARAMETERS.get(name)
    most = rule.presets[0] if rule and rule.presets else None
    if rule and isinstance(most, list) and isinstance(value, list):
        found = value[: len(most)]
        return [min(v, max(most)) for v in found] if rule.items is int else found
    if isinstance(most, str) and isinstance(value, str):
        return most
    return min(value, most) if isinstance(most, (int, float)) and isinstance(value, (int, float)) else value


class _Loader(yaml.SafeLoader):
    """YAML in which a name stands once in a mapping; PyYAML takes the last of several without a word."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]!r} stands twice, line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep)


def _content(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file says, on top of what the file that it ``extends`` says; mappings are merged, one level deep."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader) or {}
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, OSError) as error:
        raise InputError(f"{file}: not valid YAML ({getattr(error, 'problem', None) or first_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: must hold lines of the form parameter: value")
    extended = content.pop("extends", None)
    if extended is None:
        return content
    base = file.with_name(f"{extended}.yaml")
    if not base.is_file() or base in (file, *above):
        raise InputError(f"{file}: extends: got {extended!r}; allowed: the name of another file in {file.parent}")
    for name, value in (below := _content(base, (file, *above))).items():
        own = content.get(name)
        content[name] = value | own if isinstance(value, dict) and isinstance(own, dict) else content.get(name, value)
    return {name: content[name] for name in [*below, *(n for n in content if n not in below)]}


def _mapping(file: Path, name: str, value) -> dict:
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{file}: {name}: got {value!r}; allowed: lines of the form key: value")
    return value or {}


def _check(file: Path, name: str, value, allowed: Sequence[str], more: Sequence[str] = ()) -> None:
    if name in OF_THE_COMMAND:
        raise InputError(f"{file}: {name}: set by {OF_THE_COMMAND[name]}, not by a parameter file")
    if name not in allowed:
        near = difflib.get_close_matches(str(name), [*allowed, *more], n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        known = [a for a in allowed if a not in OF_THE_COMMAND]
        raise InputError(f"{file}: {name}: unknown parameter{meant} allowed: {', '.join([*known, *more])}")
    if value is not None and name in parameters.PARAMETERS:
        try:
            parameters.PARAMETERS[name].check(name, value)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error


def _check_sweep(file: Path, sweep: Mapping, allowed: Sequence[str]) -> None:
    for name, values in sweep.items():
        if not isinstance(values, list) or not values or len(set(map(str, values))) != len(values):
            raise InputError(f"{file}: sweep: {name}: got {values!r}; allowed: a list of different values")
        for value in values:
            if name == "seed":
                parse_seeds(str(value))
            else:
                _check(file, name, value, allowed, ("seed",))


def study_parameters(study: str, notebook: str, root: Path, preset: str = "") -> dict[str, Any]:
    """The parameters notebooks/params/<study>.yaml gives to a notebook, checked."""
    return read(study, root).parameters(notebook, root, preset)


def parse_seeds(text: str) -> list[int]:
    """ "0 1 2" or "0,1,2" -> [0, 1, 2]."""
    words = text.replace(",", " ").split()
    if not words or not all(re.fullmatch("[0-9]{1,10}", w) for w in words):
        raise InputError(f"seeds: got {text!r}; allowed: whole numbers, 0 or more, separated by blanks or commas")
    return list(dict.fromkeys(int(w) for w in words))


def parse_names(text: str) -> list[str]:
    """ "testbed,mine" or "testbed mine" -> ["testbed", "mine"]."""
    return text.replace(",", " ").split()


def parser(module: str, description: str, preset: str = "default") -> argparse.ArgumentParser:
    """The command line of ``nt_utils.study.<module>``: studies, seeds and a preset."""
    made = argparse.ArgumentParser(prog=f"python -m nt_utils.study.{module}", description=description)
    made.add_argument("--studies", default="testbed")
    made.add_argument("--seeds", default="0")
    made.add_argument("--preset", default=preset, choices=parameters.PRESETS)
    return made


# ------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Variant:
    """One run folder a seed: a study, or one point of its sweep.

    name: what the notebooks get as ``study``; folder: below runs/; changes: the point's parameters
    """

    study: str
    name: str
    folder: str
    changes: Mapping[str, Any]
    notebooks: tuple[str, ...]
    seeds: tuple[int, ...]

    def outputs(self) -> list[str]:
        """Its executed notebooks, one for each seed and notebook."""
        return [f"runs/{self.folder}/seed-{seed}/{name}.ipynb" for seed in self.seeds for name in self.notebooks]


def variants(study: str, seeds: Sequence[int], preset: str, root: Path) -> list[Variant]:
    """The runs of a study: itself, or every combination of its sweep.

    Raises InputError when no notebook takes a swept parameter.
    """
    file, every = read(study, root), tuple(notebooks(root))
    if not file.sweep:
        return [Variant(study, study, study_name(study, study, preset), {}, every, tuple(seeds))]
    swept = [name for name in file.sweep if name != "seed"]
    chosen = tuple(n for n in every if n not in LAST and (not swept or set(swept) & set(takes(root, n))))
    seeds = tuple(parse_seeds(" ".join(map(str, file.sweep.get("seed", seeds)))))
    found = []
    for values in itertools.product(*(file.sweep[name] for name in swept)):
        changes = dict(zip(swept, values, strict=True))
        point = "_".join(f"{k}-{re.sub(r'[^A-Za-z0-9.]+', '-', str(v)).strip('-')}" for k, v in changes.items())
        name = ".".join(filter(None, (study, point)))
        found.append(Variant(study, name, study_name(name, name, preset), changes, chosen, seeds))
    if len({v.folder for v in found}) < len(found):
        raise InputError(f"study {study}: sweep: two of its values give the same folder name")
    return found


def settings(variant: Variant, notebook: str, seed: int, preset: str, root: Path) -> dict[str, Any]:
    """Everything the workflow passes to a notebook: the file's parameters, the sweep's point, and what it sets itself."""
    known = takes(root, notebook)
    given = study_parameters(variant.study, notebook, root, preset) | dict(variant.changes)
    given |= {"study": variant.name, "seed": seed, "preset": preset}
    return {k: v for k, v in given.items() if k in known}


def contents(given: Mapping[str, Any], root: Path) -> dict[str, str]:
    """Parameter -> digest of the local file or folder that its value names (prompts, a model, a template).

    Large files, such as weights, are told by size and time of change.
    """
    found = {}
    for name, value in given.items():
        path = _named_file(value, root) if isinstance(value, str) else None
        if path is not None:
            digest = hashlib.sha256()
            for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
                state = file.stat()
                body = file.read_bytes() if state.st_size < 2**24 else f"{state.st_size} {state.st_mtime_ns}".encode()
                digest.update(f"{file.relative_to(path)}\n".encode() + hashlib.sha256(body).digest())
            found[name] = digest.hexdigest()
    return found


def _named_file(value: str, root: Path) -> Path | None:
    """The file or folder in "file", "file:column", "file:split:column", "name@file" or "phrases+folder", or a set's in
    NT_DATA; else None."""
    for named in named_paths(value.removeprefix("phrases+")):
        path = root / named
        if os.path.exists(path) and path.resolve() != root.resolve():
            return path
    return local_file(value)


def note_settings(variant: Variant, preset: str, root: Path) -> None:
    """Write what every step's result follows from, beside its inputs: its parameters, the
    contents of the files that they name, and the package's code.

    Each step has a file of its own, in ``.settings`` of its run folder, written only when its content changes; a result
    is out of date when this file is newer. So nothing depends on what Snakemake recorded: a step that finished while
    Snakemake was dead (a job of a cluster goes on) counts as finished, and still notices a change.
    """
    code = code_fingerprint()
    for seed, notebook in itertools.product(variant.seeds, variant.notebooks):
        path = root / "runs" / variant.folder / f"seed-{seed}" / ".settings" / f"{notebook}.json"
        given = settings(variant, notebook, seed, preset, root)
        content = {"parameters": given, "files": contents(given, root), "code": code}
        text = json.dumps(content, sort_keys=True, indent=1) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with atomic(path) as tmp:
                tmp.write_text(text, encoding="utf-8")


def noted_parameters(path: Path) -> dict[str, Any]:
    """The parameters of a step as :func:`note_settings` wrote them. Raises InputError where the file holds none.

    A step that decided anew whether the hub answers could take other prompts than the steps before it.
    """
    try:
        return dict(read_json(path)["parameters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"settings: {path} holds no parameters of a step ({first_line(error)})") from error


def changes_of(texts: Sequence[str]) -> dict[str, Any]:
    """["share=0.01"] -> {"share": 0.01}; values are JSON."""
    return {name: json.loads(value) for name, _, value in (text.partition("=") for text in texts)}
