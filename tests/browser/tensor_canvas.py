"""One live view of flexmagic on a page: its geometry, its pixels, its words, its controls."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from chromium import wait_for
from selenium import webdriver

if TYPE_CHECKING:
    from chromium import Browser
    from lab import Notebook
    from selenium.webdriver.remote.webelement import WebElement


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
        return self._read(x, y, 1, 1)[0]

    def pixels(self, x: float, y: float, width: float, height: float) -> list[tuple[int, ...]]:
        """Return the RGBA of all pixels in a box of the canvas, given in CSS pixels."""
        ratio = float(self.browser.js("return devicePixelRatio || 1"))
        return self._read(x, y, max(int(width * ratio), 1), max(int(height * ratio), 1))

    def _read(self, x: float, y: float, wide: int, tall: int) -> list[tuple[int, ...]]:
        script = (
            "const [canvas, x, y, wide, tall] = arguments; const d = devicePixelRatio || 1;"
            "const copy = document.createElement('canvas'); copy.width = wide; copy.height = tall;"
            "const context = copy.getContext('2d', {willReadFrequently: true});"
            "context.drawImage(canvas, -Math.floor(x * d), -Math.floor(y * d));"
            "return [...context.getImageData(0, 0, wide, tall).data]"
        )
        flat = self.browser.js(script, self.canvas, x, y, wide, tall)
        return [tuple(flat[i : i + 4]) for i in range(0, len(flat), 4)]

    def cell(self, row: int, col: int) -> tuple[int, ...]:
        """Return the RGBA of the centre of a cell."""
        return self.pixel(*self.center(row, col))

    def hover(self, row: int, col: int) -> str:
        """Move the pointer to a cell and return the read-out once it is about that cell."""
        self.pointer(*self.center(row, col))
        about = f"a read-out of cell {(row, col)}"
        wait_for(lambda: self.data("read") == [self.data("look"), row, col], 10, about)
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
