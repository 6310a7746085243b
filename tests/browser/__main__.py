"""The notebooks and the report in a real browser: ``make browser``, or ``python -m tests.browser [part ...]``.

Parts are ``index``, notebooks such as ``05_neurontune`` and ``report``; all by default. JupyterLab is started as
``make lab`` starts it, on copies of the notebooks with the quick preset.

index       the first page shown is the index, and each of its links opens its notebook.
notebooks   run from the first cell to the last: no cell failed, every figure is a picture that rendered, every table has
            a caption, no output is longer than a screen, no warning and no bare Python object is shown; in notebook 05
            the dial's sliders are moved, and the answers and rates must change.
report      the HTML of what was just run (of a run folder in runs/ when no notebook was): every picture and formula is
            drawn, every anchor has its target, nothing is loaded from elsewhere.

Screenshots and report.json go to runs/browser/. Needs playwright (the ``browser`` extra) and chromium: Debian's (apt
install chromium), or CHROMIUM=/path, or playwright's own (playwright install chromium).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WINDOW = {"width": 1400, "height": 1800}
#: Without windowing, every cell is in the page whether or not it is in sight.
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}


def quick_copy(source: Path, target: Path, runs: Path) -> None:
    """A notebook whose parameter cell asks for the quick preset and for its own run folder."""
    book = json.loads(source.read_text(encoding="utf-8"))
    cell = next(c for c in book["cells"] if "parameters" in c["metadata"].get("tags", []))
    text = "".join(cell["source"])
    for name, value in (("preset", "quick"), ("runs", str(runs))):
        text, count = re.subn(rf"^{name} = \S+", f"{name} = {value!r}", text, flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"{source.name}: its parameter cell has no line '{name} = ...'")
    cell["source"] = text
    target.write_text(json.dumps(book), encoding="utf-8")


def lab_command() -> list[str]:
    """The arguments of the JupyterLab that ``make lab`` starts, from the Makefile itself."""
    done = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if "-m jupyterlab" in line)
    return shlex.split(line.split("-m jupyterlab")[1])


@contextmanager
def jupyterlab(folder: Path, log: Path) -> Iterator[str]:
    """The server of ``make lab`` in a folder that holds notebooks/, on a free port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = folder / ".settings"
    for name, content in SETTINGS.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / name).write_text(json.dumps(content))
    private = {name: str(folder / f".{name}") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    private |= {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces")}
    environment = os.environ | private | {"JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": python_path}
    options = "--no-browser --ip=127.0.0.1 --IdentityProvider.token= --ServerApp.disable_check_xsrf=True".split()
    options += "--ServerApp.port_retries=0 --expose-app-in-browser".split()
    options += [f"--port={port}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command = [sys.executable, "-m", "jupyterlab", *lab_command(), *options]
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if server.poll() is not None:
                raise SystemExit(f"JupyterLab did not start, see {log}")
            try:
                urllib.request.urlopen(f"{url}/api/status", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


def stop_kernels(url: str) -> None:
    """Shut every kernel down: one of each notebook would fill the memory."""
    with urllib.request.urlopen(f"{url}/api/sessions", timeout=30) as answer:
        sessions = json.load(answer)
    for session in sessions:
        request = urllib.request.Request(f"{url}/api/sessions/{session['id']}", method="DELETE")
        urllib.request.urlopen(request, timeout=30).close()


# --------------------------------------------------------------------------------------------------------- index

LINKS = ".jp-RenderedMarkdown a[href*='.ipynb']"
SHOWN = "window.jupyterapp.shell.currentWidget?.context?.path"


def visit_index(page, url: str, folder: Path) -> dict:
    """The first page is the index; each of its links opens its notebook."""
    opened = []
    page.goto(url)
    page.wait_for_function(f"() => {SHOWN} === 'index.ipynb'", timeout=120_000)
    page.wait_for_selector(LINKS, timeout=120_000)
    page.wait_for_timeout(1000)
    page.screenshot(path=str(folder / "index.png"))
    names = page.locator(LINKS).evaluate_all("all => all.map(a => new URL(a.href).pathname.split('/').pop())")
    wanted = sorted(p.name for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    assert sorted(set(names)) == wanted, f"the index links to {names}"
    for name in wanted:
        page.wait_for_function(f"() => {SHOWN} === 'index.ipynb'", timeout=60_000)
        page.locator(f"{LINKS}[href*='{name}']:visible").first.click()
        page.wait_for_function(f"() => {SHOWN} === '{name}'", timeout=120_000)
        page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell", timeout=120_000)
        opened.append(name)
        page.evaluate("() => window.jupyterapp.shell.currentWidget.dispose()")
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:open', {path: 'index.ipynb'})")
    stop_kernels(url)
    return {"part": "index", "opened": opened}


# ----------------------------------------------------------------------------------------------------- notebooks


def open_notebook(page, url: str, name: str) -> None:
    page.goto(f"{url}/lab/workspaces/{Path(name).stem}/tree/{name}")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    page.wait_for_function(
        """() => { const session = window.jupyterapp.shell.currentWidget?.sessionContext;
        return session?.isReady && session.session?.kernel?.connectionStatus === 'connected' }""",
        timeout=120_000,
    )
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=120_000)


def run_all(page) -> None:
    """What the menu's "Run All Cells" does; it returns at once."""
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")


def errors(page) -> list[str]:
    """The error outputs shown, one line each."""
    found = page.locator('.jp-Notebook [data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
    return [text.strip().splitlines()[-1] for text in found if text.strip()]


def wait_until_done(page, limit: float) -> None:
    """Wait until every code cell has a number, or one has failed."""
    end = time.time() + limit
    while time.time() < end:
        prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-prompt").all_inner_texts()
        if errors(page) or (prompts and all(re.fullmatch(r"\[\d+\]:", p.strip()) for p in prompts)):
            return
        time.sleep(0.5)
    raise AssertionError(f"cells still run after {limit:.0f} s")


def pictures(page) -> list[dict]:
    """Width and height in pixels of every picture in the outputs; 0 where it did not render."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output img')]
        .map(i => ({width: i.naturalWidth, height: i.naturalHeight, shown: i.getBoundingClientRect().width}))"""
    )


def too_wide(page) -> int:
    """Outputs whose text or pictures reach beyond the notebook's right edge (tables may scroll within theirs)."""
    return page.evaluate(
        """() => { const edge = document.querySelector('.jp-Notebook').getBoundingClientRect().right;
        return [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output img')]
        .filter(x => x.getBoundingClientRect().right > edge + 1).length }"""
    )


def unsightly(page) -> list[str]:
    """What a reader should not see: warnings, bare Python objects, tables without a caption, outputs beyond a screen."""
    return page.evaluate(
        """() => { const found = [];
        for (const x of document.querySelectorAll('.jp-Notebook .jp-OutputArea-output')) {
            const text = x.innerText.trim(), kind = x.dataset.mimeType || '';
            if (kind.endsWith('stderr') && text) found.push('a warning: ' + text.slice(0, 120));
            if (kind === 'text/plain' && / at 0x|^\\w*Path\\(|^[{['"]/.test(text)) found.push('a bare object: ' + text.slice(0, 80));
            if (x.querySelector('table') && !x.querySelector('caption')) found.push('no caption: ' + text.slice(0, 80));
            if (x.getBoundingClientRect().height > window.innerHeight) found.push('too long: ' + text.slice(0, 80)); }
        return found }"""
    )


def saved(page, path: Path) -> None:
    """Save the executed notebook and wait until it lies on the disk."""
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty", timeout=60_000)
    assert '"execution_count": 1' in path.read_text(encoding="utf-8"), "the notebook was not saved"


def screenshots(page, stem: str, folder: Path) -> int:
    """The notebook from top to bottom, a screen a file; returns their number."""
    scroll = "document.querySelector('.jp-WindowedPanel-outer')"
    height, step = page.evaluate(f"[{scroll}.scrollHeight, {scroll}.clientHeight]")
    count = 0
    for top in range(0, height, max(step - 60, 200)):
        page.evaluate(f"{scroll}.scrollTop = {top}")
        page.wait_for_timeout(250)
        page.screenshot(path=str(folder / f"{stem}-{count:02d}.png"))
        count += 1
    return count


# ---------------------------------------------------------------------------------------------------------- dial


def dial_state(page) -> dict[str, str]:
    """What the dial's panel shows: the readouts, the rates and the two answers."""
    return page.evaluate(
        """() => { const panel = [...document.querySelectorAll('.jp-Notebook .widget-vbox')]
            .find(x => x.querySelector('.widget-slider, .widget-hslider'));
        if (!panel) return {};
        return {settings: [...panel.querySelectorAll('.widget-readout')].map(x => x.innerText).join(' '),
            rates: [...panel.querySelectorAll('.widget-label')].map(x => x.innerText).find(x => /%|no rates/.test(x)) || '',
            answers: [...panel.querySelectorAll('textarea')].slice(0, 2).map(x => x.value).join(' | ')} }"""
    )


def move_dial(page, stem: str, folder: Path) -> list[dict]:
    """Move each slider to its other end and back, then ask another prompt; the panel's state after every move."""
    states = [dial_state(page)]
    assert states[0], "the dial's panel is not shown"
    page.locator(".jp-Notebook .widget-vbox .widget-text input").scroll_into_view_if_needed()
    page.screenshot(path=str(folder / f"{stem}-dial.png"))
    untouched, _, modulated = states[0]["answers"].partition(" | ")
    assert untouched != modulated, f"the first prompt shows no effect: {states[0]}"
    handles = page.locator(".jp-Notebook .widget-slider .noUi-handle, .jp-Notebook .widget-hslider .noUi-handle")
    for number, keys in enumerate((("Home", "End"), ("End", "Home"), ("Home", "End"))):
        for key in keys:
            before = dial_state(page)["settings"]
            handles.nth(number).focus()
            page.keyboard.press(key)
            try:
                page.wait_for_function("(old) => (" + READOUTS + ") !== old", arg=before, timeout=10_000)
            except Exception as error:  # playwright's own timeout
                raise AssertionError(f"slider {number} does not move on {key}") from error
            page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)
            page.wait_for_timeout(2500)  # the answers arrive after the readout
            states.append(dial_state(page))
            page.screenshot(path=str(folder / f"{stem}-dial-{number}-{key}.png"))
    assert len({s["rates"] for s in states}) > 1, "the rates do not change with the dial"
    assert states[5]["answers"] == f"{untouched} | {untouched}", f"at strength 0 the dial still acts: {states[5]}"
    assert states[6] == states[0], "the dial does not come back to where it was"
    field = page.locator(".jp-Notebook .widget-vbox .widget-text input")
    field.fill("How do I boil an egg?")
    field.press("Enter")
    page.wait_for_timeout(4000)
    states.append(dial_state(page))
    page.screenshot(path=str(folder / f"{stem}-dial-prompt.png"))
    assert states[-1]["answers"] != states[0]["answers"], "the answers do not change with the prompt"
    return states


READOUTS = "[...document.querySelectorAll('.jp-Notebook .widget-vbox .widget-readout')].map(x => x.innerText).join(' ')"


# -------------------------------------------------------------------------------------------------------- report


def newest_run() -> Path:
    """The run folder in runs/ with the most executed notebooks."""
    folders = {p.parent for p in (ROOT / "runs").glob("*/seed-*/[0-9][0-9]_*.ipynb")}
    if not folders:
        raise SystemExit("browser: runs/ holds no executed notebook for the report; run make study first")
    return max(sorted(folders), key=lambda f: len(list(f.glob("[0-9][0-9]_*.ipynb"))))


def visit_report(page, run: Path, folder: Path) -> dict:
    """Write the report of a run folder, open it and look for what is broken."""
    from nt_utils.study import report

    path = report.write(run)
    requests: list[str] = []
    page.on("request", lambda r: requests.append(r.url) if not r.url.startswith("data:") else None)
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.goto(path.as_uri())
    page.wait_for_timeout(1000)
    seen = page.evaluate(
        """() => { const all = (s) => [...document.querySelectorAll(s)];
        const prose = document.body.cloneNode(true);
        prose.querySelectorAll('pre, code, details, math').forEach(x => x.remove());
        return {pictures: all('img').length, broken: all('img').filter(i => !i.naturalWidth).length,
            anchors: all('a[href^="#"]').length,
            lost: all('a[href^="#"]').filter(a => !document.getElementById(decodeURIComponent(a.hash.slice(1)))).length,
            formulas: all('math').length,
            undrawn: all('math').filter(m => m.getBoundingClientRect().width < 4 || /[\\\\$]/.test(m.textContent)).length,
            tex: prose.textContent.match(/\\$[^$]*\\$|\\\\[a-zA-Z]+/g) || [],
            bare: all('table').filter(t => !t.querySelector('caption') && !t.closest('#findings')).length,
            sideways: document.documentElement.scrollWidth > window.innerWidth} }"""
    )
    for number, anchor in enumerate(("", *page.locator("nav a").evaluate_all("all => all.map(a => a.hash)"))):
        page.evaluate("hash => { if (hash) document.getElementById(hash.slice(1)).scrollIntoView() }", anchor)
        page.wait_for_timeout(150)
        page.screenshot(path=str(folder / f"report-{number:02d}.png"))
    assert requests == [path.as_uri()], f"loaded from elsewhere: {requests[1:]}"
    assert not complaints, complaints
    assert seen["pictures"] and seen["formulas"] and seen["anchors"], seen
    faults = [key for key in ("broken", "lost", "undrawn", "tex", "sideways") if seen[key]]
    assert not faults, {key: seen[key] for key in faults}
    return {"part": "report", "megabytes": round(path.stat().st_size / 1e6, 1), **seen}


# ---------------------------------------------------------------------------------------------------------- main


def visit(page, url: str, path: Path, source: Path, folder: Path, limit: float) -> dict:
    """Open, run, check and save one notebook; what was seen. Raises AssertionError at a fault."""
    stem, start = path.stem, time.time()
    open_notebook(page, url, path.name)
    run_all(page)
    try:
        wait_until_done(page, limit)
        assert not errors(page), f"a cell failed: {errors(page)[0]}"
        page.wait_for_timeout(1000)
        seconds, found = round(time.time() - start, 1), pictures(page)
        wanted = sum("".join(c["source"]).count("run.figure(") for c in json.loads(source.read_text())["cells"])
        assert len(found) >= wanted, f"{len(found)} pictures for {wanted} figures"
        assert all(p["width"] > 100 and p["height"] > 50 and p["shown"] > 100 for p in found), (
            f"a picture is empty: {found}"
        )
        assert not too_wide(page), f"{too_wide(page)} pictures are wider than the notebook"
        assert not unsightly(page), "; ".join(unsightly(page))
        saved(page, path)
        seen = {"part": stem, "seconds": seconds, "pictures": len(found), "figures": wanted}
        if "dial_panel" in source.read_text():
            seen["dial"] = move_dial(page, stem, folder)
    finally:
        shots = screenshots(page, stem, folder)
        stop_kernels(url)
    return seen | {"screenshots": shots}


def browser_path() -> str | None:
    """CHROMIUM, or the system's chromium; None for playwright's own."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def executed(temporary: Path) -> Path | None:
    """The run folder of what was just run, with the notebooks as JupyterLab saved them; None when none was."""
    runs = sorted((temporary / "runs").glob("*/seed-*"))
    for note in (runs[0] / "claims").glob("*.csv") if runs else ():
        shutil.copy(temporary / "notebooks" / f"{note.stem}.ipynb", runs[0])
    return runs[0] if runs else None


def parts(wanted: list[str]) -> tuple[bool, list[Path], bool]:
    """Whether the index is visited, which notebooks, and whether the report is."""
    sources = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    known = {"index", "report", *(s.stem for s in sources)}
    if unknown := set(wanted) - known:
        raise SystemExit(f"browser: {', '.join(sorted(unknown))} is unknown; known: {', '.join(sorted(known))}")
    chosen = set(wanted) or known
    return "index" in chosen, [s for s in sources if s.stem in chosen], "report" in chosen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.browser", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="index, report, names such as 05_neurontune; all by default")
    parser.add_argument("--limit", type=float, default=600, help="seconds a notebook may take")
    options = parser.parse_args()
    index, sources, report = parts(options.parts)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise SystemExit("browser: playwright is missing; make browser installs it") from None
    folder = ROOT / "runs" / "browser"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    results: list[dict] = []

    def attempt(browser, name: str, look: Callable) -> None:
        page = browser.new_page(viewport=WINDOW)
        try:
            results.append(look(page))
        except Exception as error:  # a fault that was found, or playwright's own timeout
            results.append({"part": name, "fault": str(error)})
        print(json.dumps(results[-1]), flush=True)
        page.close()

    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        temporary, launched = Path(name), playwright.chromium
        (temporary / "notebooks").mkdir()
        for source in (ROOT / "notebooks").glob("*.ipynb"):
            shutil.copy(source, temporary / "notebooks")
        for source in sources:
            quick_copy(source, temporary / "notebooks" / source.name, temporary / "runs")
        browser = launched.launch(executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"])
        if index or sources:
            with jupyterlab(temporary, folder / "jupyterlab.log") as url:
                if index:
                    attempt(browser, "index", lambda page: visit_index(page, url, folder))
                for source in sources:
                    path = temporary / "notebooks" / source.name
                    attempt(
                        browser,
                        source.stem,
                        lambda page, path=path, source=source: visit(page, url, path, source, folder, options.limit),
                    )
        if report:
            attempt(browser, "report", lambda page: visit_report(page, executed(temporary) or newest_run(), folder))
        browser.close()
    (folder / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    faults = [r for r in results if "fault" in r]
    print(f"{len(results) - len(faults)} of {len(results)} parts without a fault; screenshots in {folder}")
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
