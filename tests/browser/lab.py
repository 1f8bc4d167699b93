"""A real JupyterLab and a real Chromium, driven from tests.

``LabServer`` runs on the loopback with directories of its own, ``Browser`` is headless Chromium
with its console and network on record, ``Notebook`` is one notebook open in the two. Everything is
waited for by a condition; everything started is ended by its own process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from selenium import webdriver
from selenium.common.exceptions import JavascriptException, StaleElementReferenceException

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from selenium.webdriver.remote.webelement import WebElement

ROOT = Path(__file__).resolve().parents[2]
ARTEFACTS = ROOT / "artefacts"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
MISSING = (
    "Chromium and its driver are needed: `apt-get install chromium chromium-driver`, or put "
    "chromium and chromedriver on PATH"
)


def find_browser() -> tuple[str, str] | None:
    """Return the paths of Chromium and of its driver, None if either is missing."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    return (chromium, driver) if chromium and driver else None


def wait_for(what: Callable[[], Any], timeout: float = 20, message: str = "") -> Any:
    """Return the first true value of ``what()``; raise ``TimeoutError`` with the last one."""
    deadline = time.monotonic() + timeout
    value: Any = None
    while time.monotonic() < deadline:
        with contextlib.suppress(StaleElementReferenceException, JavascriptException):
            value = what()
            if value:
                return value
        time.sleep(0.05)
    raise TimeoutError(f"waited {timeout} s for {message or what}; last value: {value!r}")


class LabServer:
    """A JupyterLab server that knows nothing of the user's settings and opens no browser."""

    def __init__(self, *, env: dict[str, str] | None = None) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="flexmagic-lab-"))
        self.notebooks = self.home / "notebooks"
        self.token = secrets.token_hex(16)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = (self.home / "server.log").open("wb")
        self._process = subprocess.Popen(
            self._command(),
            env=self._environment(env or {}),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(self._answers, 60, "JupyterLab to answer")
        except TimeoutError:
            self.close()
            raise

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
            "--expose-app-in-browser",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={self.port}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={self.token}",
            f"--ServerApp.root_dir={self.notebooks}",
            "--LabApp.extension_manager=readonly",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ]

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        places = {
            "HOME": "home",
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "JUPYTERLAB_SETTINGS_DIR": "settings",
            "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
            "IPYTHONDIR": "ipython",
        }
        for folder in (*places.values(), "notebooks"):
            (self.home / folder).mkdir()
        quiet = self.home / "settings" / "@jupyterlab" / "apputils-extension"
        quiet.mkdir(parents=True)
        silent = {"fetchNews": "false", "checkForUpdates": False}
        (quiet / "notification.jupyterlab-settings").write_text(json.dumps(silent))
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return (
            {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            | {name: str(self.home / folder) for name, folder in places.items()}
            | extra
        )

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended:\n{self.log()}")
        with contextlib.suppress(OSError):
            address = f"{self.url}/api/status?token={self.token}"
            with urllib.request.urlopen(address, timeout=2) as reply:  # noqa: S310 - our own server
                return bool(reply.status == 200)
        return False

    def log(self) -> str:
        """Return what the server and its kernels wrote."""
        return (self.home / "server.log").read_text(errors="replace")

    def write(self, name: str, cells: Sequence[str], kernel: str = "python3") -> Path:
        """Write a notebook of code cells for this server and return its path."""
        notebook = nbformat.v4.new_notebook()
        notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
        notebook.metadata["kernelspec"] = {
            "name": kernel,
            "display_name": kernel,
            "language": "python",
        }
        path = self.notebooks / name
        nbformat.write(notebook, path)
        return path

    def close(self) -> None:
        """End the server (it ends its kernels) and remove its directories."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(5)
        self._log.close()
        shutil.rmtree(self.home, ignore_errors=True)


class Browser:
    """Headless Chromium with a profile of its own and its console and network on record."""

    def __init__(self, width: int = 1280, height: int = 1500) -> None:
        found = find_browser()
        if found is None:
            raise RuntimeError(MISSING)
        chromium, driver = found
        self.profile = tempfile.mkdtemp(prefix="flexmagic-chromium-")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            f"--user-data-dir={self.profile}",
            f"--window-size={width},{height}",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        self.driver.set_script_timeout(120)
        self._console: list[dict[str, Any]] = []
        self._network: list[dict[str, Any]] = []

    def js(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def js_async(self, script: str, *arguments: Any) -> Any:
        """Run the body of an async function in the page and return what it resolves to."""
        body = (
            "const done = arguments[arguments.length - 1];"
            f"(async function() {{ {script} }}).apply(null, arguments)"
            ".then((value) => done({value}), (error) => done({error: String(error)}));"
        )
        answer = self.driver.execute_async_script(body, *arguments)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer.get("value")

    def all(self, css: str, within: WebElement | None = None) -> list[WebElement]:
        """Return the elements that match, in the page or within one."""
        return list((within or self.driver).find_elements("css selector", css))

    def one(self, css: str, timeout: float = 20) -> WebElement:
        """Return the first element that matches, as soon as there is one."""
        element: WebElement = wait_for(lambda: next(iter(self.all(css)), None), timeout, css)
        return element

    def screenshot(self, name: str, element: WebElement | None = None) -> Path:
        """Write ``artefacts/<name>.png``, of the page or of one element, and return its path."""
        ARTEFACTS.mkdir(exist_ok=True)
        path = ARTEFACTS / f"{name}.png"
        if element is None:
            self.driver.save_screenshot(str(path))
        else:
            element.screenshot(str(path))
        return path

    def console(self) -> list[dict[str, Any]]:
        """Return everything the page's console has said so far (level, message, source)."""
        self._console += self.driver.get_log("browser")
        return self._console

    def requests(self) -> list[str]:
        """Return the addresses of all requests so far, failed ones too."""
        self._read_network()
        return [
            e["params"]["request"]["url"] for e in self._network if e["method"] == "Network.requestWillBeSent"
        ]

    def failures(self) -> list[str]:
        """Return the addresses of requests that failed or were answered with an error."""
        self._read_network()
        address = {
            e["params"]["requestId"]: e["params"]["request"]["url"]
            for e in self._network
            if e["method"] == "Network.requestWillBeSent"
        }
        failed = [
            address.get(e["params"]["requestId"], "?")
            for e in self._network
            if e["method"] == "Network.loadingFailed" and not e["params"].get("canceled")
        ]
        refused = [
            e["params"]["response"]["url"]
            for e in self._network
            if e["method"] == "Network.responseReceived" and e["params"]["response"]["status"] >= 400
        ]
        return failed + refused

    def _read_network(self) -> None:
        entries = (json.loads(e["message"])["message"] for e in self.driver.get_log("performance"))
        self._network += [e for e in entries if e["method"].startswith("Network.")]

    def forget(self) -> None:
        """Start the record of console and network afresh."""
        self.console()
        self._read_network()
        self._console, self._network = [], []

    def close(self) -> None:
        """End Chromium and its driver, and remove the profile."""
        self.driver.quit()
        shutil.rmtree(self.profile, ignore_errors=True)


_PANEL = "const panel = window.jupyterapp.shell.currentWidget;"


class Notebook:
    """One notebook, open in JupyterLab."""

    def __init__(self, server: LabServer, browser: Browser) -> None:
        self.server, self.browser = server, browser

    def open(self, path: Path | str, timeout: float = 60) -> Notebook:
        """Open a notebook under the server's folder and wait for its kernel to be idle.

        A notebook that names no kernel gets none.
        """
        name = Path(path).name
        address = f"{self.server.url}/lab/tree/{name}?reset&token={self.server.token}"
        self.browser.driver.get(address)
        ready = (
            f"{_PANEL} return Boolean(panel && panel.content && panel.context.isReady"
            f" && panel.context.path === {name!r})"
        )
        wait_for(
            lambda: self.browser.js(f"if (!window.jupyterapp) return false; {ready}"),
            timeout,
            f"{name} to open",
        )
        asks = wait_for(lambda: self.status() == "idle" or self.browser.all(".jp-Dialog select"), timeout)
        if asks is not True:
            script = (
                "const list = arguments[0];"
                "list.value = [...list.options].find((o) => o.text === 'No Kernel').value;"
                "list.dispatchEvent(new Event('change', {bubbles: true}))"
            )
            self.browser.js(script, asks[0])
            self.browser.one(".jp-Dialog .jp-mod-accept").click()
        return self

    def run_all(self, timeout: float = 60) -> None:
        """Run all cells; raise ``AssertionError`` with the output of the first that fails."""
        self.browser.driver.set_script_timeout(timeout)
        self.browser.js_async("await window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.wait_idle(timeout)
        for number in range(self.count()):
            self.check(number)

    def start(self, number: int) -> None:
        """Start one cell and return at once."""
        self.browser.js(
            f"{_PANEL} panel.content.activeCellIndex = arguments[0]; panel.content.deselectAll();"
            "panel.content.activeCell.model.executionCount = null;"
            "window.jupyterapp.commands.execute('notebook:run-cell')",
            number,
        )

    def run(self, number: int, timeout: float = 60) -> list[dict[str, Any]]:
        """Run one cell and return its outputs; raise ``AssertionError`` with its error."""
        self.start(number)
        wait_for(lambda: self.executed(number), timeout, f"cell {number}")
        self.check(number)
        return self.outputs(number)

    def check(self, number: int) -> None:
        """Raise ``AssertionError`` if a cell ended with an error."""
        for output in self.outputs(number):
            if output["output_type"] == "error":
                raise AssertionError(f"cell {number}: {output['ename']}: {output['evalue']}")

    def executed(self, number: int) -> bool:
        """Return whether a cell was run since it was opened, and to its end."""
        script = f"{_PANEL} const cell = panel.content.widgets[arguments[0]];"
        return bool(
            self.browser.js(
                f"{script} return cell.model.executionState !== 'running'"
                " && cell.model.executionCount !== null",
                number,
            )
        )

    def status(self) -> str:
        """Return the kernel's status: idle, busy, starting, dead …"""
        return str(
            self.browser.js(
                f"{_PANEL} const s = panel.sessionContext.session; return s && s.kernel && s.kernel.status"
            )
        )

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until the kernel has started and has run everything it was sent.

        Its status alone would not do: that also says idle when a view was answered beside a
        running cell.
        """
        wait_for(lambda: self.status() in ("idle", "busy"), timeout, "the kernel to start")
        self.browser.driver.set_script_timeout(timeout)
        empty = "kernel.requestExecute({code: '', silent: true, store_history: false}).done"
        self.browser.js_async(f"{_PANEL} const kernel = panel.sessionContext.session.kernel; await {empty}")

    def interrupt(self, timeout: float = 30) -> None:
        """Interrupt the running cell and wait until the kernel takes the next one."""
        kernel = "panel.sessionContext.session.kernel"
        self.browser.js_async(f"{_PANEL} await {kernel}.interrupt()")
        self.wait_idle(timeout)

    def wait_output(self, number: int, text: str, timeout: float = 60) -> None:
        """Wait until ``text`` stands in the outputs of a cell."""
        wait_for(lambda: text in json.dumps(self.outputs(number)), timeout, f"{text!r} in cell {number}")

    def count(self) -> int:
        """Return the number of cells."""
        return int(self.browser.js(f"{_PANEL} return panel.content.widgets.length"))

    def outputs(self, number: int) -> list[dict[str, Any]]:
        """Return the outputs of a cell as they would be saved."""
        script = "const o = panel.content.widgets[arguments[0]].model.outputs; return o ? o.toJSON() : []"
        return list(self.browser.js(_PANEL + script, number))

    def area(self, number: int) -> WebElement:
        """Return the element of a cell, scrolled into view."""
        cell: WebElement = self.browser.js(
            f"{_PANEL} const cell = panel.content.widgets[arguments[0]]; return cell.node", number
        )
        self.browser.js("arguments[0].scrollIntoView({block: 'start'})", cell)
        return cell

    def save(self) -> None:
        """Save the notebook to its file."""
        self.browser.js_async("await window.jupyterapp.commands.execute('docmanager:save')")

    def theme(self, name: str) -> None:
        """Switch to a theme: ``JupyterLab Light`` or ``JupyterLab Dark``."""
        self.browser.js_async(
            "await window.jupyterapp.commands.execute('apputils:change-theme', {theme: arguments[0]})",
            name,
        )
        dark = "false" if "Dark" in name else "true"
        wait_for(lambda: self.browser.js("return document.body.dataset.jpThemeLight") == dark, 20, name)

    def shut_down(self) -> None:
        """End the notebook's kernel."""
        self.browser.js_async(f"{_PANEL} await panel.sessionContext.shutdown()")


class TensorCanvas:
    """One live view of flexmagic on the page."""

    def __init__(self, browser: Browser, root: WebElement) -> None:
        self.browser, self.root = browser, root

    @classmethod
    def within(cls, notebook: Notebook, cell: int, which: int = 0, timeout: float = 30) -> TensorCanvas:
        """Return a view in the output of a cell, once it has live data."""
        browser, area = notebook.browser, notebook.area(cell)
        root: WebElement = wait_for(
            lambda: [r for r in browser.all(".fxm", area) if r.get_attribute("data-look")][which : which + 1],
            timeout,
            f"a live view in cell {cell}",
        )[0]
        return cls(browser, root)

    def data(self, name: str) -> Any:
        """Return one of the facts about the geometry: ``map``, ``window``, ``cells`` or ``look``."""
        return json.loads(self.root.get_attribute(f"data-{name}") or "null")

    @property
    def canvas(self) -> WebElement:
        """The canvas element."""
        return self.browser.all("canvas", self.root)[0]

    def text(self, part: str) -> str:
        """Return the text of a part: ``site``, ``facts``, ``read``, ``caption``, ``error`` …"""
        return str(
            self.browser.js("return arguments[0].textContent", self.browser.all(f".fxm-{part}", self.root)[0])
        )

    def center(self, row: int, col: int) -> tuple[float, float]:
        """Return the centre of a cell in CSS pixels of the canvas."""
        lay, (rows, cols) = self.data("map"), self.data("cells")
        return (
            lay["left"] + (col + 0.5) / cols * lay["map_width"],
            lay["top"] + (row + 0.5) / rows * lay["map_height"],
        )

    def pixel(self, x: float, y: float) -> tuple[int, ...]:
        """Return the RGBA of a pixel of the canvas, given in CSS pixels."""
        script = (
            "const [canvas, x, y] = arguments; const d = devicePixelRatio || 1;"
            "const copy = document.createElement('canvas'); copy.width = copy.height = 1;"
            "const context = copy.getContext('2d', {willReadFrequently: true});"
            "context.drawImage(canvas, -Math.floor(x * d), -Math.floor(y * d));"
            "return [...context.getImageData(0, 0, 1, 1).data]"
        )
        return tuple(self.browser.js(script, self.canvas, x, y))

    def cell(self, row: int, col: int) -> tuple[int, ...]:
        """Return the RGBA of the centre of a cell."""
        return self.pixel(*self.center(row, col))

    def hover(self, row: int, col: int) -> str:
        """Move the pointer to a cell and return the read-out once it is about that cell."""
        self.pointer(*self.center(row, col))
        wanted = [self.data("look"), row, col]
        wait_for(lambda: self.data("read") == wanted, 10, f"a read-out of {wanted}")
        return self.text("read")

    def pointer(self, x: float, y: float) -> None:
        """Move the pointer over the canvas, in its CSS pixels."""
        size = self.canvas.size
        actions = webdriver.ActionChains(self.browser.driver, duration=0)
        actions.move_to_element_with_offset(
            self.canvas, round(x - size["width"] / 2), round(y - size["height"] / 2)
        ).perform()

    def drag(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        """Drag the canvas from one point to another, in its CSS pixels."""
        self.pointer(*start)
        across, down = round(stop[0] - start[0]), round(stop[1] - start[1])
        actions = webdriver.ActionChains(self.browser.driver, duration=50)
        actions.click_and_hold().move_by_offset(across, down).release().perform()

    def choose(self, name: str, value: str) -> None:
        """Choose an option of a control (``layer``, ``rows``, ``cols``, ``reducer``, ``scale``)."""
        look = self.data("look")
        select = self.browser.all(f"select[data-name='{name}']", self.root)[0]
        script = (
            "const [s, text] = arguments; const o = [...s.options].find((o) => o.text === text);"
            "s.value = o.value; s.dispatchEvent(new Event('change', {bubbles: true}))"
        )
        self.browser.js(script, select, value)
        self.wait_look(look)

    def keys(self, *keys: str) -> None:
        """Press keys on the canvas."""
        self.canvas.send_keys(*keys)

    def wait_look(self, before: int, timeout: float = 15) -> None:
        """Wait for a picture later than ``before``."""
        wait_for(lambda: self.data("look") > before, timeout, "a new picture")
