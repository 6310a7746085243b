"""One self-contained HTML of an executed study: contents, the notebooks with their figures, the ledger, the provenance.

``make report`` (``python -m nt_utils.study.report --studies testbed --seeds 0``) writes ``runs/<study>/seed-<seed>/report.html``:
pictures are embedded, formulas are MathML, and nothing is loaded from elsewhere. :func:`problems` finds broken links,
anchors and pictures.
"""

from __future__ import annotations

import argparse
import base64
import functools
import html
import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

from nt_utils.errors import InputError, command
from nt_utils.files import atomic, run_folder, study_name

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: #111; background: #fff }
nav { border: 1px solid #ccc; padding: .5rem 1.5rem; margin: 1rem 0 }
img { max-width: 100%; height: auto }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; font-size: .8rem }
details > summary { color: #555; cursor: pointer; font-size: .85rem }
table { border-collapse: collapse; font-size: .82rem; display: block; overflow-x: auto; margin: .6rem 0 }
caption { caption-side: top; text-align: left; font-style: italic; padding: .2rem 0 }
th, td { border-bottom: 1px solid #ddd; padding: .15rem .5rem; text-align: left; vertical-align: top }
math[display=block] { margin: .6rem 0 }
section { border-top: 3px solid #0072B2; margin-top: 2rem }
"""


def build(folder: Path) -> str:
    """The report of one run folder as HTML. Raises InputError when it holds no executed notebook."""
    notebooks = sorted(p for p in folder.glob("[0-9][0-9]_*.ipynb") if not p.stem.endswith(".failed"))
    if not notebooks:
        raise InputError(f"report: no executed notebook in {folder}; run the study first")
    names = {p.name for p in notebooks}
    parts = [(p.stem, _title(p), _notebook(p, names)) for p in notebooks]
    parts.append(("findings", "Findings", _findings(folder)))
    parts.append(("provenance", "Provenance", _provenance(folder)))
    contents = "".join(f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title, _ in parts)
    body = "".join(f'<section id="{name}">{text}</section>' for name, _, text in parts)
    title = html.escape(f"{folder.parent.name}, {folder.name}")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Safety neurons: {title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>Safety neurons: {title}</h1><nav><ol>{contents}</ol></nav>{body}</body></html>"
    )


def _title(path: Path) -> str:
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        found = re.search(r"^# (.+)$", "".join(cell["source"]), re.M)
        if cell["cell_type"] == "markdown" and found:
            return found.group(1)
    return path.stem


def _notebook(path: Path, names: set[str]) -> str:
    """Prose, figures and tables of a notebook; its code folded away. Identifiers carry the notebook's name."""
    import nbformat

    node = nbformat.read(path, as_version=4)
    parts = []
    for cell in node.cells:
        if cell.cell_type == "markdown":
            parts.append(_prose(markdown(cell.source), path, names))
        elif cell.cell_type == "code":
            parts.append(f"<details><summary>code</summary><pre>{html.escape(cell.source)}</pre></details>")
            parts += [_output(output) for output in cell.outputs]
    return "".join(parts)


def markdown(source: str) -> str:
    """Markdown to HTML as nbconvert renders it, with TeX formulas as MathML, which browsers draw without a script."""
    return _renderer()(source)


@functools.cache
def _renderer() -> Callable[[str], str]:
    from latex2mathml.converter import convert
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    def formula(body: str, display: str) -> str:
        # The converter's sign for \setminus is an identifier that few fonts have.
        return convert(body, display=display).replace("<mi>&#x029F5;</mi>", "<mo>&#x02216;</mo>")

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            return formula(body, "inline")

        def block_math(self, body: str) -> str:
            return formula(body, "block")

        def latex_environment(self, name: str, body: str) -> str:
            return formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    return MarkdownWithMath(renderer=Renderer(escape=False)).render


def _prose(text: str, path: Path, names: set[str]) -> str:
    """Headings' anchors made unique in the report; links to other notebooks lead to their sections."""
    text = re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', "", text)
    text = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{path.stem}-{m.group(1)}"', text)

    def link(match: re.Match) -> str:
        target = match.group(1)
        if target.startswith("#"):
            return f'href="#{path.stem}-{target[1:]}"'
        name = Path(target.split("#")[0]).name
        return f'href="#{Path(name).stem}"' if name in names else match.group(0)

    text = re.sub(r'href="([^"]+)"', link, text)
    # A link to a notebook that was not run leads nowhere: its words stay.
    return re.sub(r'<a href="(?!#|https?:)[^"]*">(.*?)</a>', r"\1", text)


def _output(output) -> str:
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return ""  # sliders and progress bars, which need a kernel
    if "image/png" in data:
        return f'<p><img alt="figure" src="data:image/png;base64,{"".join(data["image/png"].split())}"></p>'
    if "text/html" in data:
        return re.sub(r"<style.*?</style>|<script.*?</script>", "", data["text/html"], flags=re.S)
    if "text/plain" in data:
        return f"<pre>{html.escape(data['text/plain'])}</pre>"
    if output.get("output_type") == "stream" and output.get("name") == "stdout":
        return f"<pre>{html.escape(output['text'])}</pre>"
    return ""


def _findings(folder: Path) -> str:
    import pandas as pd

    from nt_utils.study import ledger

    files = sorted((folder / "claims").glob("*.csv"))
    if not files:
        return "<h2>Claims</h2><p>none</p>"
    table = ledger.frame(pd.concat([ledger.read(f) for f in files], ignore_index=True).to_dict("records"))
    shown = table[
        ["claim", "row", "statement", "figure", "verdict", "corrected", "part", "value", "low", "high", "n", "reason"]
    ]
    return "<h2>Claims</h2>" + shown.to_html(index=False, border=0, float_format="%.3g", na_rep="")


def _provenance(folder: Path) -> str:
    parts = ["<h2>Provenance</h2>"]
    for note in sorted((folder / "provenance").glob("*.json")):
        content = json.dumps(json.loads(note.read_text(encoding="utf-8")), indent=1, sort_keys=True)
        parts.append(f"<details><summary>{note.stem}</summary><pre>{html.escape(content)}</pre></details>")
    return "".join(parts)


# ------------------------------------------------------------------------------------------------------- checks


class _Page(HTMLParser):
    """Identifiers, links and pictures of a page."""

    def __init__(self):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and "src" in given:
            self.sources.append(given["src"])
        if tag == "link":
            self.sources.append(given.get("href", ""))


def problems(page: str) -> list[str]:
    """What is broken in a self-contained page: anchors that lead nowhere, doubled ones, pictures that are none."""
    read = _Page()
    read.feed(page)
    found = [f"doubled id {name!r}" for name in sorted({i for i in read.ids if read.ids.count(i) > 1})]
    for link in read.links:
        if link.startswith("#") and link[1:] not in read.ids:
            found.append(f"link {link!r} leads nowhere")
        elif not link.startswith(("#", "http://", "https://", "mailto:")):
            found.append(f"link {link!r} leaves the page")
    for source in read.sources:
        head, _, data = source.partition(";base64,")
        if not head.startswith("data:image/"):
            found.append(f"{source[:80]!r} is loaded from elsewhere")
            continue
        try:
            picture = base64.b64decode(data, validate=True)
        except ValueError:
            picture = b""
        if head == "data:image/png" and not (
            picture.startswith(b"\x89PNG\r\n") and picture.endswith(b"IEND\xaeB`\x82")
        ):
            found.append("a picture is damaged")
    return found


def write(folder: Path) -> Path:
    """Build, check and write ``report.html``. Raises InputError naming what is broken."""
    page = build(folder)
    broken = problems(page)
    if broken:
        raise InputError(f"report: {'; '.join(broken[:5])}")
    path = folder / "report.html"
    with atomic(path) as tmp:
        tmp.write_text(page, encoding="utf-8")
    return path


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of ``make report``."""
    from nt_utils.study import batch, parameters

    parser = argparse.ArgumentParser(prog="python -m nt_utils.study.report", description=__doc__.splitlines()[0])
    parser.add_argument("--studies", default="testbed")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--preset", default="default", choices=parameters.PRESETS)
    options = parser.parse_args(arguments)
    for study in options.studies.replace(",", " ").split():
        name = study_name(study, study, options.preset)
        for seed in batch.parse_seeds(options.seeds):
            path = write(run_folder("", name, seed))
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
