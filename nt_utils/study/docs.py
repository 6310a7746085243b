"""The pages of docs/ that follow from the package: ``python -m nt_utils.study.docs`` writes docs/definitions.md.

Each definition's page is its file's docstring, so that a definition is described in one place alone.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from nt_utils.files import atomic, project_root

HEAD = """# The definitions

Generated from the files of `nt_utils/definitions/` by `make docs`. Each file is one definition of a safety neuron, seven published and one (contrast) of this project: a function from a
model and its prompts to a ranking of the model's neurons.
"""


def definitions_page(folder: Path) -> str:
    """The page of all definitions in a folder: a heading, the source file and its docstring for each."""
    parts = [HEAD]
    for path in sorted(folder.glob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        [(name, paper)] = re.findall(r'^@definition\(\s*"([^"]+)",\s*paper="([^"]+)"', text, re.M)
        described = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", ast.get_docstring(ast.parse(text)) or "")
        parts.append(f"## {name}\n\n*{paper}; `nt_utils/definitions/{path.name}`*\n\n{described}\n")
    return "\n".join(parts)


def main() -> None:
    """Write docs/definitions.md of the checkout."""
    root = project_root()
    with atomic(root / "docs" / "definitions.md") as tmp:
        tmp.write_text(definitions_page(root / "nt_utils" / "definitions"), encoding="utf-8")


if __name__ == "__main__":
    main()
