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


_CONTRASTS = """
const pen = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
  .getContext('2d', {willReadFrequently: true});
const rgba = (color) => {
  pen.clearRect(0, 0, 1, 1); pen.fillStyle = color; pen.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
};
const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => a * c + (1 - a) * under[i]);
const paper = (node) => {
  if (!node) return [255, 255, 255];
  const own = rgba(getComputedStyle(node).backgroundColor);
  return own[3] === 1 ? own.slice(0, 3) : over(own, paper(node.parentElement));
};
const light = (rgb) => {
  const [r, g, b] = rgb.map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const found = [];
for (const node of [arguments[0], ...arguments[0].querySelectorAll('*')]) {
  const text = [...node.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join('').trim()
    || (node.matches('textarea, input:not([type=checkbox])') ? node.value || node.placeholder : '');
  const box = node.getBoundingClientRect();
  if (!text || !box.width || !box.height || ['STYLE', 'SCRIPT'].includes(node.tagName)) continue;
  const under = paper(node), style = getComputedStyle(node);
  const full = over(rgba(style.color), under);
  const ink = full.map((c, i) => style.opacity * c + (1 - style.opacity) * under[i]);
  const [low, high] = [light(ink), light(under)].sort((a, b) => a - b);
  found.push([(high + 0.05) / (low + 0.05), text.slice(0, 40)]);
}
return found;
"""


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

    def press(self, *keys: str) -> None:
        """Press keys where the focus is, as a person does."""
        webdriver.ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def focused(self) -> dict[str, Any]:
        """Return what has the focus: its ``tag``, its ``name`` as it is read out, and its ``outline``."""
        return dict(
            self.js(
                "const n = document.activeElement, style = getComputedStyle(n);"
                "const label = n.labels && n.labels[0] && n.labels[0].textContent;"
                "const outline = `${style.outlineStyle} ${style.outlineWidth}`;"
                "return {outline, tag: n.tagName.toLowerCase(),"
                " name: (n.getAttribute('aria-label') || label || n.textContent || n.title).trim()}"
            )
        )

    def contrasts(self, element: WebElement) -> list[tuple[float, str]]:
        """Return the contrast of each text within an element with what it stands on, the lowest first.

        As WCAG computes it, from 1 to 21, by the colours that the page has computed.
        """
        found = self.js(_CONTRASTS, element)
        return sorted((float(ratio), str(text)) for ratio, text in found)

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
