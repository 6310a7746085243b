"""The notebooks in JupyterLab in a real browser: ``make browser``, or ``python -m tests.browser [notebook ...]``.

Copies of the notebooks with the quick preset are opened and run from the first cell to the last. Checked: no cell failed,
every figure is a picture that rendered, nothing scrolls sideways; in notebook 05 the dial's sliders are moved and the
answers and rates must change. Screenshots and a report go to runs/browser/. Needs playwright (the ``browser`` extra) and
chromium: Debian's (apt install chromium), or CHROMIUM=/path, or playwright's own (playwright install chromium).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
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


@contextmanager
def jupyterlab(folder: Path, log: Path) -> Iterator[str]:
    """A JupyterLab server on a free port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = folder / ".settings"
    for name, content in SETTINGS.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / name).write_text(json.dumps(content))
    private = {name: str(folder / f".{name}") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | private | {
        "JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces"),
        "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": python_path,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ip=127.0.0.1",
        "--IdentityProvider.token=", "--ServerApp.port_retries=0", "--expose-app-in-browser",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", *(["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
        f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
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
            answers: [...panel.querySelectorAll('textarea')].map(x => x.value).join(' | ')} }"""
    )


def move_dial(page, stem: str, folder: Path) -> list[dict]:
    """Move each slider to its other end and back; the panel's state after every move."""
    states = [dial_state(page)]
    assert states[0], "the dial's panel is not shown"
    handles = page.locator(".jp-Notebook .widget-slider .noUi-handle, .jp-Notebook .widget-hslider .noUi-handle")
    for number in range(handles.count()):
        for key in ("Home", "End"):
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
    assert len({s["settings"] for s in states}) > 2, "the sliders do not move"
    assert len({s["rates"] for s in states}) > 1, "the rates do not change with the dial"
    return states + ask_dial(page, stem, folder)


def ask_dial(page, stem: str, folder: Path) -> list[dict]:
    """Give the panel jailbreak prompts, the utility slider at 0, until the dial changes an answer."""
    from nt_utils.data import corpus

    handles = page.locator(".jp-Notebook .widget-slider .noUi-handle, .jp-Notebook .widget-hslider .noUi-handle")
    handles.nth(1).focus()
    page.keyboard.press("Home")
    field, states = page.locator(".jp-Notebook .widget-vbox .widget-text input"), []
    for prompt in corpus.corpus("harmful", "test", attack="all").take(ASKED, 0).texts:
        field.fill(prompt)
        field.press("Enter")
        page.wait_for_timeout(1500)
        states.append(dial_state(page) | {"prompt": prompt})
        untouched, _, modulated = states[-1]["answers"].partition(" | ")
        if untouched != modulated:
            break
    page.screenshot(path=str(folder / f"{stem}-dial-prompt.png"))
    assert len({s["answers"] for s in states}) > 1, "the answers do not change with the prompt"
    assert untouched != modulated, f"no answer of {len(states)} changes with the dial"
    return states


ASKED = 40  # prompts tried at most
READOUTS = "[...document.querySelectorAll('.jp-Notebook .widget-vbox .widget-readout')].map(x => x.innerText).join(' ')"


# ---------------------------------------------------------------------------------------------------------- main


def visit(page, url: str, name: str, source: Path, folder: Path, limit: float) -> dict:
    """Open, run and check one notebook; what was seen. Raises AssertionError at a fault."""
    stem, start = Path(name).stem, time.time()
    open_notebook(page, url, name)
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
        seen = {"notebook": stem, "seconds": seconds, "pictures": len(found), "figures": wanted}
        if "dial_panel" in source.read_text():
            seen["dial"] = move_dial(page, stem, folder)
    finally:
        shots = screenshots(page, stem, folder)
        page.keyboard.press("Escape")
    return seen | {"screenshots": shots}


def browser_path() -> str | None:
    """CHROMIUM, or the system's chromium; None for playwright's own."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.browser", description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", help="names such as 05_neurontune; all by default")
    parser.add_argument("--limit", type=float, default=600, help="seconds a notebook may take")
    options = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise SystemExit("browser: playwright is missing; make browser installs it") from None
    sources = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    sources = [s for s in sources if not options.notebooks or s.stem in options.notebooks]
    if not sources:
        raise SystemExit(f"browser: no notebook is called {', '.join(options.notebooks)}")
    folder = ROOT / "runs" / "browser"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    report = []
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        for source in sources:
            quick_copy(source, Path(temporary) / source.name, Path(temporary) / "runs")
        with jupyterlab(Path(temporary), folder / "jupyterlab.log") as url:
            browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
            for source in sources:
                page = browser.new_page(viewport=WINDOW)
                try:
                    report.append(visit(page, url, source.name, source, folder, options.limit))
                except AssertionError as error:
                    report.append({"notebook": source.stem, "fault": str(error)})
                print(json.dumps(report[-1]), flush=True)
                page.close()
            browser.close()
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    faults = [r for r in report if "fault" in r]
    print(f"{len(report) - len(faults)} of {len(report)} notebooks without a fault; screenshots in {folder}")
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
