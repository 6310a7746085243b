"""The project's own files: one list of dependencies, exact pins, one direction of flow."""

import ast
import importlib.metadata
import importlib.util
import json
import re
import sys
import tomllib

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from nt_utils.files import project_root
from nt_utils.study import batch
from nt_utils.study.parameters import notebook_parameters
from tests import newcomer
from tests.common import saved
from tests.tiny import tiny_lm

ROOT = project_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(
    line.strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
)

#: The rooms in the order in which data flows: a file may import from rooms above its own in this list, never from one below.
ROOMS = (
    "errors files work neurons units data plots models hooks evaluation scoring selection interventions definitions "
    "testbed aligned experiments study bench".split()
)


def requirement_name(text):
    return canonicalize_name(re.match(r"[A-Za-z0-9_.-]+", text).group())


def test_every_dependency_is_pinned_exactly():
    pinned = set(map(canonicalize_name, PINS))
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(w for extra in extras.values() for w in extra)]
    assert {requirement_name(w) for w in wanted} <= pinned
    assert PINS["torch"] == "2.13.0"
    assert not [v for v in PINS.values() if "+" in v], "a local version like +cpu exists on one index only"


def test_every_pin_installs_on_the_oldest_python():
    """Debian's 3.11.2 was refused by a pin that asked for 3.11.5."""
    oldest = PROJECT["project"]["requires-python"].split(",")[0].removeprefix(">=") + ".0"
    pins = {requirement_name(name): version for name, version in PINS.items()}
    for found in importlib.metadata.distributions():
        wanted = found.metadata["Requires-Python"]
        if wanted and pins.get(requirement_name(found.name)) == found.version:
            assert SpecifierSet(wanted).contains(oldest), f"{found.name} {found.version} wants Python {wanted}"


#: Import names that differ from their package's, and packages that come with a dependency.
PACKAGES = {
    "yaml": "pyyaml",
    "IPython": "ipykernel",
    "huggingface_hub": "transformers",
    "nbformat": "nbconvert",
    "jinja2": "nbconvert",
    "bleach": "nbconvert",
    "PIL": "matplotlib",
}
#: Imported only where somebody asks for them, with a clear line when they are missing.
OPTIONAL = {"lm_eval": "benchmarks"}


def test_what_the_package_imports_is_installed_with_it():
    """A notebook that needs a package of the test extra fails in a fresh `make study` only."""
    found = set()
    for path in (ROOT / "nt_utils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    foreign = found - set(sys.stdlib_module_names) - {"nt_utils"}
    main = {requirement_name(w) for w in PROJECT["project"]["dependencies"]}
    assert "peft" in foreign
    assert {PACKAGES.get(name, name) for name in foreign - set(OPTIONAL)} <= main


def test_environment_yml_follows_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert conda == [f"python{PROJECT['project']['requires-python']}", "pip"]
    assert pip["pip"] == ["--constraint constraints.txt", "--editable .[test]"]


def test_ci_runs_the_readmes_test_command():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"
    assert "make test" in (ROOT / "README.md").read_text()


def imported(path):
    """Rooms of nt_utils that a file imports, inside functions too (a late import is still a dependency)."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nt_utils":
            parts = node.module.split(".")[1:]
            rooms |= {parts[0]} if parts else {alias.name for alias in node.names}
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", sorted((ROOT / "nt_utils").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    room = path.relative_to(ROOT / "nt_utils").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert imported(path) <= set(ROOMS[: ROOMS.index(room) + 1])


def test_every_room_is_listed():
    found = {p.name.removesuffix(".py") for p in (ROOT / "nt_utils").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert found - {"__init__", "__pycache__"} <= set(ROOMS)


def test_the_readmes_library_example_runs(tmp_path, monkeypatch, capsys):
    lm = tiny_lm()
    lm.model.config.max_position_embeddings = 512  # its byte-like tokenizer makes long prompts
    saved(lm, tmp_path / "model")
    code, shown = newcomer.example((ROOT / "README.md").read_text())
    assert "path/or/hub-id" in code
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NT_CACHE", str(tmp_path / "cache"))
    code = code.replace("path/or/hub-id", str(tmp_path / "model")).replace("pairs(200)", "pairs(8)")
    exec(code, {})
    assert (tmp_path / "safety.safetensors").is_file()
    assert newcomer.same_output(re.sub(r"\d+(?=%)", "0", shown), re.sub(r"\d+(?=%)", "0", capsys.readouterr().out))


def test_an_output_may_differ_by_rounding_alone():
    shown = "as it is: 39% [35%, 44%] of 480\n"
    assert newcomer.same_output(shown, "as it is: 41% [36%, 45%] of 480")
    assert not newcomer.same_output(shown, "as it is: 49% [35%, 44%] of 480")
    assert not newcomer.same_output(shown, "as it is: 39% [35%, 44%] of 48")


def test_every_command_of_the_readme_is_run_somewhere():
    found = newcomer.readme_commands((ROOT / "README.md").read_text())
    assert {"make study", "make test", "make lab"} <= set(found)
    assert [c for c in found if newcomer.instead(c) is None] == []
    assert set(newcomer.COMMANDS) <= set(found), "a command that README no longer has"
    for line in map(newcomer.instead, found):
        for path in re.findall(r"(?:tests|tools)/[\w./]+\w", line or ""):
            assert (ROOT / path).exists(), path


def test_the_readmes_papermill_commands_name_real_parameters():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"papermill (notebooks/\S+\.ipynb)(.*)", text)
    assert commands
    for notebook, arguments in commands:
        given = re.findall(r"-p (\w+)", arguments)
        assert given
        assert set(given) <= set(notebook_parameters(ROOT / notebook))


def test_the_index_links_to_every_notebook_and_is_no_step_of_the_study():
    text = (ROOT / "notebooks" / "index.ipynb").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+)\.ipynb\)", text)) == set(batch.notebooks(ROOT))
    assert "index" not in batch.notebooks(ROOT)
    assert "/lab/tree/index.ipynb" in (ROOT / "Makefile").read_text()


def test_every_notebook_links_to_the_index_and_to_its_neighbours():
    names = sorted(batch.notebooks(ROOT))
    for before, name, after in zip(["", *names], names, [*names[1:], ""], strict=False):
        first = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][0]
        links = re.findall(r"\]\((\w+)\.ipynb\)", "".join(first["source"]).splitlines()[-1])
        assert links == [n for n in ("index", before, after) if n], name


def test_one_version_everywhere():
    version = PROJECT["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readmes_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / page).read_text(), flags=re.MULTILINE))
        assert named
        assert named <= targets


def test_the_readmes_modules_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"-m (nt_utils[\w.]*\w)", page.read_text(encoding="utf-8"))}
    assert named
    assert all(importlib.util.find_spec(name) for name in named)


def public(tree, where):
    """Public functions, classes and methods of a file: (name, node); what the intervention protocols describe apart."""
    for node in tree.body:
        known = node.name in ("key", "active", "start") if isinstance(node, ast.FunctionDef) else False
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not known:
            yield f"{where}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{where}.{node.name}")


@pytest.mark.parametrize("path", sorted((ROOT / "nt_utils").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_and_public_name_is_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert path.name == "__main__.py" or ast.get_docstring(tree), "the module says what it is for"
    missing = [name for name, node in public(tree, path.stem) if not ast.get_docstring(node)]
    assert not missing, missing
