"""A real JupyterLab, or Notebook 7, driven from tests.

``LabServer`` runs on the loopback with directories of its own, ``Browser`` (module ``chromium``) is
headless Chromium, ``Notebook`` is one notebook open in the two, ``TensorCanvas`` (module
``tensor_canvas``) one live view in it. Everything is waited for by a condition; everything started
is ended by its own process id.
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
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from chromium import ARTEFACTS, MISSING, ROOT, Browser, find_browser, wait_for
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from tensor_canvas import TensorCanvas

if TYPE_CHECKING:
    from collections.abc import Sequence

    from selenium.webdriver.remote.webelement import WebElement

__all__ = [
    "ARTEFACTS",
    "MISSING",
    "ROOT",
    "Browser",
    "LabServer",
    "Notebook",
    "TensorCanvas",
    "find_browser",
    "wait_for",
]


class LabServer:
    """A JupyterLab server that knows nothing of the user's settings and opens no browser.

    ``program``: what serves, ``jupyterlab`` or ``notebook``, which is made of the same parts.
    """

    def __init__(self, *, program: str = "jupyterlab", env: dict[str, str] | None = None) -> None:
        self._program = program
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
            wait_for(self._answers, 60, f"{program} to answer")
        except TimeoutError:
            self.close()
            raise

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", self._program, "--no-browser", "--allow-root"),
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
            raise RuntimeError(f"{self._program} ended:\n{self.log()}")
        with contextlib.suppress(OSError):
            address = f"{self.url}/api/status?token={self.token}"
            with urllib.request.urlopen(address, timeout=2) as reply:  # noqa: S310 - our own server
                return bool(reply.status == 200)
        return False

    def page(self, name: str) -> str:
        """Return the address of a notebook's page."""
        place = f"lab/tree/{name}?reset&" if self._program == "jupyterlab" else f"notebooks/{name}?"
        return f"{self.url}/{place}token={self.token}"

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
        self.browser.driver.get(self.server.page(name))
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

    def edit(self, number: int, source: str, cursor: int | None = None) -> None:
        """Put text into a cell and the cursor into it, at its end or at an offset, as a click does."""
        at = len(source) if cursor is None else cursor
        line, column = source[:at].count("\n"), at - (source.rfind("\n", 0, at) + 1)
        self.area(number)
        self.browser.js(
            f"{_PANEL} panel.content.activeCellIndex = arguments[0]; panel.content.deselectAll();"
            "const cell = panel.content.activeCell; cell.model.sharedModel.setSource(arguments[1]);"
            "panel.content.mode = 'edit'; cell.editor.focus();"
            "cell.editor.setCursorPosition({line: arguments[2], column: arguments[3]})",
            number,
            source,
            line,
            column,
        )

    def press(self, *keys: str) -> None:
        """Press keys together, where the cursor is."""
        chain = ActionChains(self.browser.driver)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in keys[:-1]:
            chain.key_up(key)
        chain.perform()

    def offered(self) -> list[str]:
        """Return what the completer offers, once it does."""
        css = ".jp-Completer:not(.lm-mod-hidden) .jp-Completer-item"
        items = wait_for(lambda: self.browser.all(css), 20, "the completer")
        return [item.get_attribute("data-value") for item in items]

    def complete(self, number: int, before: str, after: str, picture: str) -> None:
        """Press Tab behind a text; where there is a choice, click at what makes the other text of it."""
        self.edit(number, before)
        self.press(Keys.TAB)

        def done() -> bool:
            if self.source(number) == after:
                return True
            for item in self.browser.all(".jp-Completer:not(.lm-mod-hidden) .jp-Completer-item"):
                if after.endswith(item.get_attribute("data-value")):
                    self.browser.screenshot(picture)
                    item.click()
            return False

        try:
            wait_for(done, 40, f"{after!r}")
        finally:
            self.browser.screenshot(f"{picture}_end")
            self.press(Keys.ESCAPE)

    def source(self, number: int) -> str:
        """Return the text of a cell."""
        return str(
            self.browser.js(
                f"{_PANEL} return panel.content.widgets[arguments[0]].model.sharedModel.source", number
            )
        )

    def tool(self, name: str) -> None:
        """Press a button of the notebook's toolbar: ``interrupt``, ``restart`` …"""
        self.browser.one(f"[data-jp-item-name='{name}'] jp-button").click()

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
