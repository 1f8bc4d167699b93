"""Headless Chromium with a profile of its own and its console and network on record."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selenium import webdriver
from selenium.common.exceptions import JavascriptException, StaleElementReferenceException

if TYPE_CHECKING:
    from collections.abc import Callable

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
        # without a window of its own a page may have no focus, and JupyterLab then no current widget
        self.driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
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
