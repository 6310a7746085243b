"""One self-contained HTML of an executed study: its claims, what they say in short, the notebooks, the provenance.

``make report`` (``python -m nt_utils.study.report --studies testbed --seeds 0``) writes ``runs/<study>/seed-<seed>/report.html``
by nbconvert's and Jinja's templates in ``report_template/``: pictures are embedded, formulas are MathML, and nothing is loaded
from elsewhere. What prompts and answers hold is shown as text. :func:`problems` finds broken links, anchors and pictures.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nt_utils.errors import InputError, command
from nt_utils.files import atomic, project_root, read_json, run_folder, study_name
from nt_utils.study import claims, ledger, provenance, publish

if TYPE_CHECKING:
    from nbconvert import HTMLExporter

TEMPLATES = Path(__file__).parent / "report_template"
LONG = 15  # rows beyond which a table is folded
#: Figures to open with, the first two that there are.
OPENING_FIGURES = ("01_dose", "06_frontier", "01_deactivation", "05_modulation_arms", "06_defences")
#: Markup that a table may have; everything else in it is shown as text.
TAGS = frozenset(
    "a b br caption code col colgroup div em h1 h2 h3 h4 i li ol p pre small span strong sub sup table tbody td tfoot th "
    "thead tr ul".split()
)
PROVENANCE = ("model", "seed", "preset", "time", "commit", "weights")
ATTRIBUTES = {"*": ["id", "class", "colspan", "rowspan", "scope"], "a": ["href", "title"]}


def build(folder: Path) -> str:
    """The report of one run folder as HTML. Raises InputError when it holds no executed notebook."""
    from jinja2 import Environment, FileSystemLoader

    notebooks = sorted(p for p in folder.glob("[0-9][0-9]_*.ipynb") if not p.stem.endswith(".failed"))
    if not notebooks:
        raise InputError(f"report: no executed notebook in {folder}; run the study first")
    notes = provenance.notes(folder)
    newest = max(notes.values(), key=lambda note: note.get("time", ""), default={})
    made = publish.made_with(newest) if "parameters" in newest else {"model": folder.parent.name, "seed": folder.name}
    said = publish.caption(made) if "preset" in made else folder.parent.name
    pictures = Pictures(said)
    opening = "".join(pictures.opening(folder))
    lines = _claims(folder)
    page = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True).get_template("page.html.j2")
    return page.render(
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        made=made,
        facts=[(name, made[name]) for name in PROVENANCE if made.get(name, "") != ""],
        control=claims.is_positive_control(str(made["model"])),
        claims=lines,
        short=_in_short(lines),
        pictures=opening,
        sections=[{"name": p.stem, "title": _title(p), "body": _notebook(p, notebooks, pictures)} for p in notebooks],
        notes=[(name, json.dumps(note, indent=1, sort_keys=True)) for name, note in notes.items()],
    )


def _title(path: Path) -> str:
    for cell in read_json(path)["cells"]:
        found = re.search(r"^# (.+)$", "".join(cell["source"]), re.M)
        if cell["cell_type"] == "markdown" and found:
            return found.group(1)
    return path.stem


def _claims(folder: Path) -> list[dict[str, Any]]:
    """The ledger of this run, with values as text."""
    files = sorted((folder / "claims").glob("*.csv"))
    found = ledger.verdicts([line for file in files for line in ledger.read(file).to_dict("records")])
    return [line | {"shown": ledger.shown_value(line)} for line in found]


def _in_short(lines: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """verdict -> how many rows have it, and which."""
    for verdict in claims.VERDICTS:
        own = [line for line in lines if line["verdict"] == verdict]
        if own:
            names = ", ".join(f"{line['claim']} {line['row']}".strip() for line in own)
            yield verdict, f"{len(own)} of {len(lines)} rows: {names}"


# ------------------------------------------------------------------------------------------------------ notebooks


class Pictures:
    """Numbers the report's figures and writes them with what a reader needs: alternative text, number and caption."""

    def __init__(self, said: str) -> None:
        self.said, self.count = said, 0
        self.asked: dict[str, tuple[str, str, list[str]]] = {}

    def __call__(self, content: str, source: str = "", name: str = "") -> str:
        """A base64 PNG as a numbered figure; ``source`` is the cell that drew it."""
        self.count += 1
        drawn = re.search(r"run\.figure\(\s*\"(\w+)\"", source)
        name = name or (drawn.group(1) if drawn else "")
        heading = self.asked.get(name, ("", "", []))[0]
        named = name.replace("_", " ")
        title = ": ".join(p for p in (heading, named if named != heading.lower() else "") if p) or "figure"
        text = html.escape(f"Figure {self.count}. {title}")
        picture = f'<img alt="{text}" src="data:image/png;base64,{"".join(content.split())}">'
        return f"<figure>{picture}<figcaption><b>{text}</b> ({html.escape(self.said)})</figcaption></figure>"

    def opening(self, folder: Path) -> Iterator[str]:
        """The first two of OPENING_FIGURES."""
        found = [p for n in OPENING_FIGURES if (p := folder / "figures" / f"{n}.png").is_file()]
        for path in found[:2]:
            notebook = next(iter((project_root() / "notebooks").glob(f"{path.stem[:2]}_*.ipynb")), None)
            self.asked = publish.questions(notebook) if notebook else {}
            yield self(base64.b64encode(path.read_bytes()).decode(), name=path.stem[3:])


def _notebook(path: Path, notebooks: Sequence[Path], pictures: Pictures) -> str:
    """Prose, figures and tables of a notebook; its code folded away. Identifiers carry the notebook's name."""
    import nbformat

    node = nbformat.read(path, as_version=4)
    publish.clean(node, project_root())
    pictures.asked = publish.questions(path)
    for cell in node.cells:  # the claims stand at the top, once
        if cell.cell_type == "code" and re.search(r"run\.claims_table\(", cell.source):
            cell.outputs = []
    names = {p.name for p in notebooks}
    exporter = _exporter()
    exporter.register_filter("picture", pictures)
    exporter.register_filter("prose", lambda text: _prose(markdown(text), path, names))
    exporter.register_filter("table", functools.partial(_table, path.stem))
    return exporter.from_notebook_node(node)[0]


@functools.cache
def _exporter() -> HTMLExporter:
    from nbconvert import HTMLExporter

    return HTMLExporter(template_name=TEMPLATES.name, extra_template_basedirs=[str(TEMPLATES.parent)])


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


def _table(name: str, content: str) -> str:
    """HTML that a cell showed: what pandas styles stays styled, and whatever is no plain markup is shown as text.

    Identifiers carry the notebook's name; a table of more than LONG rows is folded under its caption.
    """
    import bleach

    styles = [s for s in re.findall(r"<style[^>]*>(.*?)</style>", content, re.S) if _is_of_a_table(s)]
    rest = re.sub(r"<style[^>]*>.*?</style>", "", content, flags=re.S)
    cleaned = bleach.clean(rest, tags=TAGS, attributes=ATTRIBUTES, protocols={"http", "https"})
    style = "".join(styles).replace("#T_", f"#{name}-T_")
    cleaned = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', cleaned)
    block = f'<style>{style}</style><div class="table">{cleaned}</div>'
    if len(re.findall(r"<tr\b", cleaned)) - 1 <= LONG:
        return block
    title = re.search(r"<caption[^>]*>(.*?)</caption>", cleaned, re.S)
    return f"<details><summary>{title.group(1) if title else 'a long table'}</summary>{block}</details>"


def _is_of_a_table(style: str) -> bool:
    """Whether a style sheet is one of pandas' for its own table: every rule names the table, and none loads anything."""
    selectors = [s.strip() for rule in re.findall(r"([^{}]+)\{[^{}]*\}", style) for s in rule.split(",")]
    return bool(selectors) and all(s.startswith("#T_") for s in selectors) and not re.search(r"<|url\(|@|\\", style)


# ------------------------------------------------------------------------------------------------------- checks


class _Page(HTMLParser):
    """Identifiers, links and pictures of a page."""

    def __init__(self):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.unnamed = 0

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
        self.unnamed += tag == "img" and not given.get("alt")


def problems(page: str) -> list[str]:
    """What is broken in a self-contained page: anchors that lead nowhere, doubled ones, pictures that are none."""
    from PIL import Image

    read = _Page()
    read.feed(page)
    found = [f"doubled id {name!r}" for name in sorted({i for i in read.ids if read.ids.count(i) > 1})]
    found += ["a picture has no alternative text"] * bool(read.unnamed)
    for link in read.links:
        if link.startswith("#") and link[1:] not in read.ids:
            found.append(f"link {link!r} leads nowhere")
        elif not link.startswith(("#", "http://", "https://", "mailto:")):
            found.append(f"link {link!r} leaves the page")
    for source in read.sources:
        head, _, data = source.partition(";base64,")
        if not head.startswith("data:image/"):
            found.append(f"{source[:80]!r} is loaded from elsewhere")
        elif head == "data:image/png":
            try:
                Image.open(io.BytesIO(base64.b64decode(data, validate=True))).load()
            except (ValueError, OSError):
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
    from nt_utils.study import batch

    options = batch.parser("report", __doc__.splitlines()[0]).parse_args(arguments)
    for study in batch.parse_names(options.studies):
        name = study_name(study, study, options.preset)
        for seed in batch.parse_seeds(options.seeds):
            path = write(run_folder("", name, seed))
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
