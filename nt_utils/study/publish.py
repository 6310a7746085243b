"""What is published of finished runs: ledger, gallery, executed notebooks, and the README's table of the thirty claims.

``make publish`` (``python -m nt_utils.study.publish --studies testbed --seeds "0 1 2"``) writes

    figures/findings.csv     the ledger: one line a claim's row and model
    figures/measured.csv     what every seed handed in, part by part
    docs/claims.md           every row with all verdicts
    figures/<subject>/       figures of the study's first seed with their tables
    figures/README.md        the gallery: every figure with its question and its claims
    notebooks/executed/      the executed notebooks of that seed, to be read
    README.md                the front-page table, between its markers
"""

from __future__ import annotations

import base64
import inspect
import io
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nt_utils import plots
from nt_utils.errors import InputError, command
from nt_utils.files import atomic, escaped, project_root, read_json, run_folder, study_name
from nt_utils.study import claims, ledger, seeds
from nt_utils.study.provenance import devices

if TYPE_CHECKING:
    import nbformat
    import pandas as pd

ALL_CLAIMS, FIRST_CLAIMS, FINDINGS = "claims", "first claims", "findings"  # what stands between markers of the README
PUBLISHED = (".csv", ".png")  # of a figure; `make figures` draws the other forms from the table
WIDTH = 820  # pixels of a picture in an executed notebook
MOST_BYTES = 2_000_000  # of an executed notebook


def publish(studies: Mapping[str, Sequence[Path]], root: Path) -> None:
    """Write everything for these studies: name -> the run folders of its seeds, the first of which is shown.

    What was published of other models stays.
    """
    import pandas as pd

    readme = root / "README.md"
    for name in (ALL_CLAIMS, FIRST_CLAIMS):
        between(readme, name)
    for folders in studies.values():
        seeds.check_same(folders)
    lines = ledger.collect([folder for folders in studies.values() for folder in folders])
    target = root / "figures"
    if (target / "measured.csv").is_file():  # other models stay as they were published
        before = ledger.read(target / "measured.csv")
        order = list(dict.fromkeys([*before["model"], *lines["model"]]))  # as they stood, too
        lines = pd.concat([before[~before["model"].isin(lines["model"])], lines])
        lines = lines.sort_values("model", key=lambda names: names.map(order.index), kind="stable", ignore_index=True)
    table = ledger.frame(lines.to_dict("records"))
    for old in target.glob("[0-9][0-9]_*.*"):  # of versions that had one folder for all
        old.unlink()
    for name, frame in (("findings", table), ("measured", lines)):
        ledger.write_table(target / f"{name}.csv", frame)
    write_text(root / "docs" / "claims.md", claims_page(table))
    for study, folders in studies.items():
        publish_figures(folders[0], target / study)
        publish_notebooks(folders[0], root / "notebooks" / "executed" / study, root)
    write_text(target / "README.md", gallery(target, root))
    for name, text in ((ALL_CLAIMS, front(table)), (FIRST_CLAIMS, ledger.front_page(table, ledger.FRONT_CLAIMS))):
        head, _, tail = between(readme, name)
        write_text(readme, f"{head}\n{text}\n{tail}")
    print(f"published {len(table)} rows of {table['model'].nunique()} models to {target}")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic(path) as tmp:
        tmp.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def markers(name: str) -> tuple[str, str]:
    """What begins and ends a part of the README."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def between(path: Path, name: str) -> tuple[str, str, str]:
    """A text file up to a part's first marker, the part, and the file from its second marker on.

    Raises InputError where a marker is missing.
    """
    begin, end = markers(name)
    found = re.fullmatch(f"(.*?{begin})(.*?)({end}.*)", path.read_text(encoding="utf-8"), re.S)
    if not found:
        raise InputError(f"{path}: the markers {begin} and {end} are missing")
    return found[1], found[2], found[3]


def front(table: pd.DataFrame) -> str:
    """The README's table and what it counts."""
    return f"{ledger.front_page(table)}\n\n{ledger.counts(table)}".strip()


def claims_page(table: pd.DataFrame) -> str:
    """The page of all claims with all verdicts."""
    head = (
        "# The thirty claims\n\nThis page is written by `make publish`. A claim holds when the 95% intervals of all its parts lie on"
        " the claimed side of their margins; it does not hold when one part's interval lies on the other side. *After Holm* is the"
        " verdict after Holm's correction over the rows of one model, by Student's t with as many degrees of freedom as the"
        " interval's draws, trainings, prompts or texts leave, of a sum's parts the fewest. (The runs of Qwen and of"
        " SmolLM2 had not recorded theirs, and have the fewest that their design allows.) Over seeds the interval is Student's t. Points and shares"
        " are shown times 100 (a margin of 0.1 is 10 points); ratios, nats and indices as they are. Where there is one seed, n"
        " counts prompts (S1's, S7's, S9's and N4's perplexity: texts; A7: halves of the prompts; X2: pairs of halves), else"
        " seeds. A row shows the part that decides it, and so does each seed: in brackets where a claim has several.\n\n"
    )
    return head + ledger.front_page(table) + "\n\n" + ledger.counts(table) + "\n\n" + ledger.details(table)


# ------------------------------------------------------------------------------------------------------- figures


def publish_figures(folder: Path, target: Path) -> None:
    """Copy a run's figures into ``target``/<notebook>/, with a note of what made them; older ones there go.

    A run that is older than the code has its pictures drawn anew first: what is published looks as its tables do today.
    """
    plots.redraw(folder / "figures")
    if target.is_dir():
        shutil.rmtree(target)
    for note in sorted((folder / "provenance").glob("[0-9][0-9]_*.json")):
        known = read_json(note)
        tables = sorted((folder / "figures").glob(f"{note.stem[:2]}_*.csv"))
        for table in tables:
            for suffix in PUBLISHED:
                source = table.with_suffix(suffix)
                if source.is_file():
                    path = target / note.stem / source.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, path)
        if tables:
            write_text(target / note.stem / "made_with.json", json.dumps(made_with(known), indent=1, sort_keys=True))


def made_with(note: Mapping[str, Any]) -> dict[str, Any]:
    """What a caption says of a run: model, seed, preset, prompts, commit and weights, from its provenance."""
    p, facts = note["parameters"], note.get("facts", {})
    path = Path(p["model"]).expanduser()
    return {
        "model": path.name if path.is_dir() else p["model"],
        "seed": p["seed"],
        "preset": p.get("preset", ""),
        "n": p.get("n_test"),
        "commit": note.get("git", "")[:12],
        "weights": facts.get("model weights", "")[:16],
        "testbed": facts.get("testbed", {}).get("fingerprint", ""),
        "time": note.get("time", ""),
        "device": devices(note),
    }


def caption(made: Mapping[str, Any]) -> str:
    """ "testbed, seed 0, preset full, at most 200 prompts of each kind, commit 0123456789ab"."""
    told = [made["model"], f"seed {made['seed']}", f"preset {made['preset']}"]
    told += [f"at most {made['n']} prompts of each kind"] if made.get("n") else []
    told += [f"commit {made['commit']}"] if made.get("commit") else []
    told += [f"computed on {made['device']}"] if made.get("device", "CPU") != "CPU" else []
    return ", ".join(map(str, told))


def questions(notebook: Path) -> dict[str, tuple[str, str, list[str]]]:
    """Figure name -> the heading it stands under, the first sentences there, and the claims that this part of the notebook names.

    Where a part names none, the figure has all claims of its notebook.
    """
    found: dict[str, tuple[str, str, list[str]]] = {}
    drawn: list[str] = []
    heading, words, named = notebook.stem, "", ""

    def close() -> None:
        ids = [c.id for c, _ in claims.rows(notebook.stem)]
        here = [i for i in dict.fromkeys(ids) if re.search(rf"\b{i}\b", named)]
        for name in drawn:
            found[name] = (heading, words, here or list(dict.fromkeys(ids)))

    for cell in read_json(notebook)["cells"]:
        source = "".join(cell["source"])
        title = re.search(r"^#+ +(.+)$", source, re.M) if cell["cell_type"] == "markdown" else None
        if title:
            close()
            heading, drawn, named = title.group(1).strip(), [], ""
            plain = re.sub(r"^#.*$", "", source[title.end() :], flags=re.M).strip().split("\n\n")[0]
            words = " ".join(re.split(r"(?<=[.!?])\s+", " ".join(plain.split()))[:2])
        named += source
        if cell["cell_type"] == "code":
            drawn += re.findall(r"run\.figure\(\s*\"(\w+)\"", source)
    close()
    return found


def what_it_shows(table: Path) -> str:
    """What a figure shows, in one line: the first sentence of the docstring of the function that draws it."""
    from nt_utils import plots

    told = inspect.getdoc(plots.FIGURES[plots.figure_name(table)]) or ""
    text = re.sub(r"^Notebook \d+[^:]*: ", "", " ".join(told.split("\n\n")[0].split()))
    text = re.split(r"[.;] (?:Columns|columns)", text)[0].rstrip(".")
    return escaped(text[:1].upper() + text[1:])


def gallery(figures: Path, root: Path) -> str:
    """figures/README.md: every figure with its question, the picture, what it shows, its claims, its table and its notebook."""
    lines = ["# Gallery", "", "Every published figure, by model and notebook. Written by `make publish`.", ""]
    for made in sorted(figures.glob("*/*/made_with.json")):
        folder, study = made.parent, made.parent.parent.name
        notebook = root / "notebooks" / f"{folder.name}.ipynb"
        asked = questions(notebook) if notebook.is_file() else {}
        told = caption(read_json(made))
        executed = f"../notebooks/executed/{study}/{folder.name}.ipynb"
        lines += [f"## {study}: [{folder.name}]({executed})", ""]
        for table in sorted(folder.glob("*.csv")):
            name = table.stem.split("_", 1)[1]
            heading, words, ids = asked.get(name, (name.replace("_", " "), "", []))
            where = f"{study}/{folder.name}/{table.stem}"
            said = ", ".join(f"[{i}](../docs/claims.md)" for i in ids) or "none"
            shows = what_it_shows(table)
            lines += [f"### {shows}", "", f"![{escaped(f'{study}: {shows}')}]({where}.png)", ""]
            lines += [f"*{escaped(told)}.* **{heading}** {words}", ""]
            lines += [f"Claims: {said}. [Table]({where}.csv), [notebook]({executed}).", ""]
    return "\n".join(lines)


def links(page: str) -> list[str]:
    """Targets of a Markdown page's links and pictures that lie in the checkout."""
    return [t for t in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page) if "://" not in t]


# ------------------------------------------------------------------------------------------------ executed notebooks


def publish_notebooks(folder: Path, target: Path, root: Path) -> None:
    """Write a run's executed notebooks to be read: cleaned, with what made them and what to change in front.

    Raises InputError naming a notebook that stays larger than MOST_BYTES.
    """
    import nbformat

    target.mkdir(parents=True, exist_ok=True)
    sources = [p for p in sorted(folder.glob("[0-9][0-9]_*.ipynb")) if not p.stem.endswith(".failed")]
    here = {source.name for source in sources}
    for source in sources:
        note = folder / "provenance" / f"{source.stem}.json"
        node = nbformat.read(source, as_version=4)
        clean(node, root, folder.parents[2])
        for cell in node.cells:
            if cell.cell_type == "markdown":  # what has no executed copy is linked as its source
                cell.source = re.sub(
                    r"\]\((\w+\.ipynb)\)", lambda m: m[0] if m[1] in here else f"](../../{m[1]})", cell.source
                )
        if note.is_file():
            node.cells.insert(0, _front_cell(source.stem, folder, read_json(note)))
        text = nbformat.writes(node)
        if len(text.encode()) > MOST_BYTES:
            raise InputError(
                f"{source}: {len(text.encode()) / 1e6:.1f} MB executed; at most {MOST_BYTES / 1e6:g} MB are published"
            )
        write_text(target / source.name, text)


def _front_cell(name: str, folder: Path, note: Mapping[str, Any]) -> nbformat.NotebookNode:
    from nbformat.v4 import new_markdown_cell

    made = made_with(note)
    study = note["parameters"].get("study") or folder.parent.name
    text = (
        f"**Executed copy, to be read**: {escaped(caption(made))}. The source without outputs is"
        f" [{name}](../../{name}.ipynb). For another model or preset change the parameters in its first code cell, or run"
        f" `make study STUDY={study} SEEDS={made['seed']} PRESET={made['preset']}`."
    )
    return new_markdown_cell(text, id="executed-copy")


def clean(node: nbformat.NotebookNode, root: Path, *others: Path) -> None:
    """Make an executed notebook fit to be read by anybody: no progress bars, no widgets, no paths or machine names, figures at
    screen size, no times of execution. others: further folders that hold run folders, besides where papermill made it."""
    made = Path(node.metadata.get("papermill", {}).get("output_path") or "")
    if (
        made.is_absolute() and len(made.parents) > 4
    ):  # <root>/runs/<study>/seed-<seed>/<notebook>: it may have been copied since
        others = (*others, made.parents[3])
    hidden = secrets_of_machine(root, *others)
    for cell in node.cells:
        cell.metadata.pop("execution", None)
        cell.metadata.pop("papermill", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if _is_read(output)]
        for output in cell.outputs:
            if "png" in "".join(output.get("data", {})):
                output.data["image/png"] = at_screen_size(output.data["image/png"])
            if output.output_type == "stream":
                output.text = _without(output.text, hidden)
            for kind, text in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = _without(text, hidden)
        cell.source = _without(cell.source, hidden)
    for name in ("papermill", "widgets"):
        node.metadata.pop(name, None)


def _is_read(output: Mapping[str, Any]) -> bool:
    """Whether an output is there to be read: no progress on standard error, no widget that needs a kernel."""
    data = output.get("data", {})
    bar = re.search(r"\d+%\|", output.get("text", "") if isinstance(output.get("text"), str) else "")
    return output.get("name") != "stderr" and not bar and "application/vnd.jupyter.widget-view+json" not in data


def secrets_of_machine(*roots: Path) -> list[tuple[str, str]]:
    """What names this machine -> what stands in its place."""
    found = [(str(place), ".") for root in (*roots, Path.cwd()) for place in (root.resolve(), root)]
    found += [(str(Path("~").expanduser()), "~")]
    cache = os.environ.get("NT_CACHE")
    found += [(cache, "$NT_CACHE")] if cache else []
    found += [(name, "this machine") for name in {platform.node()} if len(name) > 3]
    return sorted({pair for pair in found if len(pair[0]) > 1}, key=lambda pair: -len(pair[0]))


def _without(text: str, hidden: Sequence[tuple[str, str]]) -> str:
    for name, instead in hidden:
        text = text.replace(name, instead)
    return text


def at_screen_size(picture: str) -> str:
    """A base64 PNG, at most WIDTH pixels wide, in few colours where that is smaller."""
    from PIL import Image

    content = base64.b64decode(picture)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.quantize(128).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


# ----------------------------------------------------------------------------------------------------- command line


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m nt_utils.study.publish --studies testbed --seeds "0 1 2" --preset full``."""
    from nt_utils.study import batch

    options = batch.parser("publish", __doc__.splitlines()[0], preset="full").parse_args(arguments)
    wanted = batch.parse_seeds(options.seeds)
    found = {}
    for study in batch.parse_names(options.studies):
        folders = [run_folder("", study_name(study, study, options.preset), seed) for seed in wanted]
        there = [folder for folder in folders if (folder / "claims").is_dir()]
        found[study] = there or folders
        if there and len(there) < len(folders):
            print(f"{study}: {len(there)} of {len(folders)} seeds were run: {', '.join(f.name for f in there)}")
    publish(found, project_root())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
