"""What the viewer sends and how soon it shows something, beside plotly and treescope on the same arrays.

    python tests/benchmarks/viewer.py --ranks 4 --peers DIRECTORY

``DIRECTORY`` is a virtual environment with ``plotly`` and ``treescope`` (``python -m venv DIRECTORY``,
``DIRECTORY/bin/pip install plotly treescope numpy``); without it they are named as not run. Printed are

* of a large sharded activation: bytes from the engines and bytes to the browser when it is opened,
  when it is zoomed, and what a saved notebook gets;
* of a smaller array, in turn within one run: seconds to make the view in Python, and from there to the
  first paint in headless Chromium, and the bytes of the page, of each tool; and the ratio of the sums;
* how long the page takes from the arrival of a zoomed tile until it is painted;
* in a real JupyterLab: seconds from the end of an engine until an open view that nobody touches shows
  the hole, and until the session knew of the end.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from selenium.common.exceptions import TimeoutException

sys.path.insert(0, str(Path(__file__).parents[1] / "browser"))

from flexmagic import Session
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.display import picture
from flexmagic.view.pieces import split
from flexmagic.view.widget import TensorView

CELL = """
import torch
from torch.distributed.tensor import DTensor, Shard
class Large(torch.nn.Module):
    def forward(self, x):
        draws = torch.Generator().manual_seed(rank)
        part = torch.randn({rows}, {cols} // world_size, generator=draws)
        return DTensor.from_local(part + 0 * x.sum(), mesh, [Shard(1)])
model = Large()
"""
LOST = [
    """import torch
from flexmagic import Session
session = Session.start(2, oversubscribe=True)
session.load_cell('''CELL''')
run = session.run({"x": torch.zeros(2)})""",
    'run[":output"]',
    """import os, signal, threading, time
class Heard:
    def ranks_ended(self, ranks):
        self.at = time.time()
heard, pid = Heard(), session._calls.ranks.seats[1].pid
session._calls.ranks.endings.tell(heard)
os.kill(pid, signal.SIGKILL)
killed = time.time()""",
    "print(killed, heard.at)",
    "session.stop()",
]
"""A notebook whose second engine is killed: the view is in its second cell, the times in its fourth."""
NOTICED = 3.0
"""Seconds from an engine's end within which an open view is to show the hole."""
ZOOMED = 100
"""Milliseconds from a tile's arrival within which it is to be painted."""
LIMIT = 180
"""Seconds that a page gets to be painted."""
DRAWN = """(function drawn(root) {
  return [...root.querySelectorAll('*')].some((n) =>
    (n.tagName === 'CANVAS' && n.width > 0) || (n.shadowRoot && drawn(n.shadowRoot)));
})(document)"""
PEERS = {
    "plotly": (
        "import plotly.graph_objects as go, plotly.io as pio; import plotly.express",
        "text = pio.to_html(go.Figure(go.Heatmap(z=x)), include_plotlyjs=True)",
        "document.querySelector('.plotly .main-svg image, .plotly .heatmaplayer image')",
    ),
    "treescope": (
        "import treescope",
        "figure = treescope.render_array(x, truncate=False)\ntext = '<!doctype html>' + figure._repr_html_()",
        DRAWN,
    ),
}
PAGE = """<!doctype html><meta charset="utf-8"><style>{css}</style>
<body><div id="here" style="width:900px"></div>
<script type="module">
{esm}
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const answers = {answers}, heard = [];
window.took = [];
const model = {{
  get: () => "", on: (_, f) => heard.push(f), off: () => {{}},
  send: (question) => setTimeout(() => {{
    const answer = question.kind === "look" ? answers[question.row_window ? 1 : 0] : undefined;
    if (!answer) return;
    const began = performance.now();
    const content = {{ ...answer.content, view: question.view, id: question.id }};
    for (const f of heard) f(content, answer.buffers.map(bytes));
    window.took.push(performance.now() - began);
  }}, 0),
}};
render({{ model, el: document.getElementById("here") }});
</script>"""


class Asked:
    """A live view without a browser: what it would send is kept."""

    def __init__(self, source: Any) -> None:
        self.view = TensorView(source)
        self.sent: list[tuple[dict[str, Any], list[bytes]]] = []
        self.view.send = lambda content, buffers=None: self.sent.append((content, buffers or []))

    def look(self, **question: Any) -> int:
        """Ask, and return the bytes of the answer."""
        number = len(self.sent) + 1
        self.view._answer(
            self.view, {"kind": "look", "view": "v", "id": number, "width": 860, **question}, []
        )
        content, buffers = self.sent[-1]
        assert content["kind"] == "picture", content
        return len(json.dumps(content)) + sum(map(len, buffers))


def large(ranks: int, rows: int, cols: int) -> None:
    """Print what opening and zooming a sharded activation moves."""
    with Session.start(ranks, oversubscribe=True) as session:
        session.load_cell(CELL.format(rows=rows, cols=cols))
        site = session.run({"x": np.zeros(2, np.float32)})[":output"]
        print(f"{rows} x {cols} float32 on {ranks} engines, {rows * cols * 4 / 1e6:.0f} MB")
        asked = Asked(site)
        for name, question in (
            ("opened", {}),
            ("zoomed to 1:1", {"row_window": [1000, 1300], "col_window": [5000, 5700]}),
        ):
            before, began = site.bytes_moved, time.perf_counter()
            sent = asked.look(**question)
            took = time.perf_counter() - began
            moved = site.bytes_moved - before
            print(
                f"  {name}: {sent:,} bytes to the browser, {moved:,} from the engines, {took:.2f} s in Python"
            )
        saved, _ = picture(site)
        print(f"  saved: {sum(map(len, saved.values())):,} bytes in the notebook")


def ours(array: Any, folder: Path) -> tuple[float, Path]:
    """Make our page of an array: seconds in Python, and the page."""
    began = time.perf_counter()
    asked = Asked(ArraySource(array, info_of(array, pieces=split(array.shape, 1, [array.shape[1] // 4] * 4))))
    asked.look()
    took = time.perf_counter() - began
    asked.look(row_window=[100, 300], col_window=[1000, 1600])
    answers = [
        {"content": content, "buffers": [base64.b64encode(part).decode() for part in buffers]}
        for content, buffers in asked.sent
    ]
    page = folder / "ours.html"
    page.write_text(
        PAGE.format(css=asked.view._css, esm=asked.view._esm, answers=json.dumps(answers)), "utf-8"
    )
    return took, page


def peer(name: str, python: Path, folder: Path) -> tuple[float, Path] | str:
    """Make a peer's page of the same array in its own environment; or say why not."""
    imports, make, _ = PEERS[name]
    page = folder / f"{name}.html"
    script = "\n".join(
        [
            f"import time, numpy as np; {imports}",
            f"x = np.load({str(folder / 'x.npy')!r})",
            "began = time.perf_counter()",
            make,
            "took = time.perf_counter() - began",
            f"open({str(page)!r}, 'w', encoding='utf-8').write(text)",
            "print(took)",
        ]
    )
    done = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=False)
    return (
        (float(done.stdout.split()[-1]), page)
        if done.returncode == 0
        else done.stderr.strip().splitlines()[-1]
    )


def painted(browser: Any, page: Path, ready: str) -> float | None:
    """Seconds from asking for a page until its picture has been painted; None if it never is."""
    began = time.perf_counter()
    browser.driver.get(page.as_uri())
    script = (
        "const done = arguments[arguments.length - 1]; const look = () => { let found = false;"
        f"try {{ found = Boolean({ready}); }} catch {{}}"
        "if (found) requestAnimationFrame(() => requestAnimationFrame(() => done(true)));"
        "else setTimeout(look, 5); }; look();"
    )
    try:
        browser.driver.execute_async_script(script)
    except TimeoutException:
        return None
    return time.perf_counter() - began


def beside(rows: int, cols: int, repeat: int, peers: Path | None) -> None:
    """Print our view of an array beside those of the peers."""
    import lab

    array = np.random.default_rng(0).normal(size=(rows, cols)).astype(np.float32)
    browser = lab.Browser()
    browser.driver.set_script_timeout(LIMIT)
    print(f"{rows} x {cols} float32, medians of {repeat}")
    totals: dict[str, list[float]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder) / "x.npy", array)
            for _ in range(repeat):
                for name in ("flexmagic", *PEERS):
                    if name != "flexmagic" and peers is None:
                        continue
                    made = (
                        ours(array, Path(folder))
                        if name == "flexmagic"
                        else peer(name, peers / "bin" / "python", Path(folder))
                    )
                    if isinstance(made, str):
                        print(f"  {name}: not run ({made})")
                        continue
                    took, page = made
                    ready = PEERS[name][2] if name in PEERS else "document.querySelector('.fxm[data-look]')"
                    shown = painted(browser, page, ready)
                    if shown is None:
                        print(f"  {name}: not measured, nothing was painted within the limit")
                        continue
                    totals.setdefault(name, []).append(took + shown)
                    print(f"  {name}: {took:.2f} s in Python, {shown:.2f} s to the first paint, "
                          f"{page.stat().st_size / 1e6:.2f} MB")  # fmt: skip
                    if name == "flexmagic":
                        zoom(browser)
    finally:
        browser.close()
    for name in PEERS:
        if name not in totals:
            print(f"  {name}: not run (no environment given with --peers, or it failed)")
    rivals = {name: statistics.median(each) for name, each in totals.items() if name != "flexmagic"}
    if rivals:
        best = min(rivals, key=rivals.__getitem__)
        print(f"  flexmagic / {best}: {statistics.median(totals['flexmagic']) / rivals[best]:.2f}")


def zoom(browser: Any) -> None:
    """Print how long the page takes from a zoomed tile's arrival until it is painted."""
    canvas = browser.all("canvas")[0]
    browser.js("arguments[0].focus()", canvas)
    canvas.send_keys("+")
    browser.js_async("while (window.took.length < 2) await new Promise((f) => setTimeout(f, 5));")
    took = browser.js("return window.took.at(-1)")
    print(
        f"    zoomed: {took:.0f} ms from a tile's arrival to its paint: {held(took, ZOOMED)} (limit {ZOOMED})"
    )


def held(figure: float, limit: float) -> str:
    """Say whether a figure is within its limit."""
    return "pass" if figure <= limit else "FAIL"


def lost(repeat: int) -> None:
    """Print how soon an open view shows that an engine was killed."""
    import lab

    browser, server = lab.Browser(), lab.LabServer()
    watch = (
        "window.holed = null; const root = arguments[0]; const look = () => {"
        "const text = root.querySelector('.fxm-notes').textContent;"
        "if (text.includes('cannot answer')) window.holed = Date.now(); else requestAnimationFrame(look);"
        "}; look();"
    )
    print(f"an engine is killed under an open view, {repeat} times")
    try:
        for _ in range(repeat):
            cells = [cell.replace("CELL", CELL.format(rows=64, cols=512)) for cell in LOST]
            notebook = lab.Notebook(server, browser).open(server.write("lost.ipynb", cells))
            for cell in range(2):
                notebook.run(cell, timeout=LIMIT)
            view = lab.TensorCanvas.within(notebook, 1)
            browser.js(watch, view.root)
            notebook.run(2)
            seen = lab.wait_for(lambda: browser.js("return window.holed"), LIMIT, "the hole") / 1000
            killed, known = map(float, notebook.run(3)[0]["text"].split())
            print(
                f"  seen {seen - killed:.2f} s after the end, {seen - known:.2f} s after the session knew: "
                f"{held(seen - killed, NOTICED)} (limit {NOTICED:g} s)"
            )
            notebook.run(4)
            notebook.shut_down()
    finally:
        server.close()
        browser.close()


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--large", type=int, nargs=2, default=(4096, 16384), metavar=("ROWS", "COLS"))
    parser.add_argument("--small", type=int, nargs=2, default=(1024, 4096), metavar=("ROWS", "COLS"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--lost", type=int, default=3, metavar="TIMES", help="how often an engine is killed")
    parser.add_argument("--peers", type=Path, help="a virtual environment that has plotly and treescope")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    large(options.ranks, *options.large)
    beside(*options.small, options.repeat, options.peers)
    lost(options.lost)


if __name__ == "__main__":
    main()
