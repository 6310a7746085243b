"""The project's own files: one list of dependencies, exact pins, one direction of flow."""

import ast
import re
import tomllib

import pytest
import yaml

from nt_utils import studies

ROOT = studies.project_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(
    line.strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
)

#: A file may import what stands before it in this list (and its own room), never what stands after.
FLOW = [
    ("errors",), ("neurons",), ("units",), ("data",), ("models",), ("hooks",), ("scoring",), ("selection",), ("interventions",),
    ("evaluation",), ("testbed",), ("experiments",), ("parameters", "plots", "studies", "ledger", "batch", "plan", "seeds", "report"),
]  # fmt: skip


def requirement_name(text):
    return re.match(r"[A-Za-z0-9_.-]+", text).group().lower().replace("_", "-").replace(".", "-")


def test_every_dependency_is_pinned_exactly():
    pinned = {name.lower().replace("_", "-").replace(".", "-") for name in PINS}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(w for extra in extras.values() for w in extra)]
    assert {requirement_name(w) for w in wanted} <= pinned
    assert PINS["torch"] == "2.13.0"
    assert not [v for v in PINS.values() if "+" in v], "a local version like +cpu exists on one index only"


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
    level = next(i for i, rooms in enumerate(FLOW) if room in rooms)
    typing_only = {
        name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom) and inner.module
        for name in [inner.module.split(".")[1] if "." in inner.module else ""]
    }
    allowed = {r for rooms in FLOW[: level + 1] for r in rooms} | typing_only
    assert imported(path) <= allowed


def test_the_readmes_library_example_runs(tmp_path, monkeypatch, capsys):
    from tests.tiny import tiny_lm

    lm = tiny_lm()
    lm.model.config.max_position_embeddings = 512  # its byte-like tokenizer makes long prompts
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "path/or/hub-id" in code
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NT_CACHE", str(tmp_path / "cache"))
    code = code.replace("path/or/hub-id", str(tmp_path / "model")).replace("pairs(200)", "pairs(8)")
    exec(code, {})
    assert (tmp_path / "safety.safetensors").is_file()
    assert "asr" in capsys.readouterr().out


def test_the_readmes_papermill_commands_name_real_parameters():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"papermill (notebooks/\S+\.ipynb)(.*)", text)
    assert commands
    for notebook, arguments in commands:
        given = re.findall(r"-p (\w+)", arguments)
        assert given
        assert set(given) <= set(studies.notebook_parameters(ROOT / notebook))
