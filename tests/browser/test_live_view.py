"""The live view in a real JupyterLab, driven by pointer and keyboard, read from its pixels."""

import re

import lab
import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from flexmagic.view import scale as colors

SETUP = """
import time
import numpy as np
from flexmagic.errors import ClusterError
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.pieces import split
from flexmagic.view.display import show

DIMS = ("batch", "seq", "hidden")
TOKENS = ["When", " Mary", "</script>", "<img src=x onerror=alert(1)>", "\\u202eevil", "a\\nb"]

def activation(layer, hidden=40, missing=()):
    x = np.linspace(-1, 1, 2 * 6 * hidden, dtype="float32").reshape(2, 6, hidden) * (layer + 1)
    x[0, 1, 3], x[0, 2, 4], x[0, 3, 5], x[0, 0, 0] = np.nan, np.inf, -np.inf, 1000
    info = info_of(x, site=f"model.layers.{layer}.mlp:output", dims=DIMS, mesh="tp=4",
                   placements=("tp: Shard(dim=2)",), hook="after damp v2", run="run 3",
                   pieces=split(x.shape, 2, [12, 12, 12, 4]), missing_ranks=missing)
    return ArraySource(x, info, {1: TOKENS})

class Flaky(ArraySource):
    broken = True
    def read(self, index):
        if Flaky.broken:
            raise ClusterError("rank 1 died. Next: %flexcluster recover")
        return super().read(index)
"""
SHOW = """
show(activation(3), {f"layer {n}": (lambda n=n: activation(n)) for n in range(4)}, "layer 3");
"""
OVERVIEW = """
big = np.random.default_rng(0).normal(size=(1, 64, 4000)).astype("float32")
big[0, 40, 1234] = -1000
show(ArraySource(big, info_of(big, site="big", dims=DIMS, pieces=split(big.shape, 2, [1500, 1500, 1000]),
     missing_ranks=(1,))));
"""
OTHERS = """
show(Flaky(np.ones((3, 4))));
show(ArraySource(np.array(3.25)));
show(ArraySource(np.zeros((0, 3))));
"""
FAMILY = """
show(activation(0), {"full": lambda: activation(0), "empty": lambda: ArraySource(np.zeros((0, 3), "float32")),
     "number": lambda: ArraySource(np.array(3.25))}, "full");
"""
BUSY = "print('started'); time.sleep(60)"
LATE = "show(activation(1)); time.sleep(60)"


def values(layer, hidden=40):
    """Return what the notebook's ``activation`` holds."""
    x = np.linspace(-1, 1, 2 * 6 * hidden, dtype="float32").reshape(2, 6, hidden) * (layer + 1)
    x[0, 1, 3], x[0, 2, 4], x[0, 3, 5], x[0, 0, 0] = np.nan, np.inf, -np.inf, 1000
    return x


def colors_of(plane, mode="linear"):
    """Return the RGBA that a plane must be drawn in."""
    scale = colors.fit(plane.astype(float), mode)
    return colors.palette(scale.kind)[colors.encode(plane.astype(float), scale)]


@pytest.fixture(scope="module")
def notebook(server, browser):
    browser.forget()
    opened = lab.Notebook(server, browser)
    opened.open(server.write("live.ipynb", [SETUP, SHOW, SHOW, OVERVIEW, OTHERS, FAMILY, BUSY, LATE]))
    for cell in range(6):
        opened.run(cell)
    return opened


@pytest.fixture
def view(notebook):
    found = lab.TensorCanvas.within(notebook, 1)
    yield found
    found.keys("0", Keys.ESCAPE)


def test_known_cells_have_their_true_colours(view):
    expected = colors_of(values(3)[0])
    for row, col in ((0, 1), (2, 20), (4, 39), (5, 12), (0, 0)):
        assert view.cell(row, col) == tuple(expected[row, col]), (row, col)


def test_marks_are_drawn_as_patterns_of_two_colours(view):
    x0, y0 = view.center(1, 3)
    seen = {view.pixel(x0 + dx, y0 + dy)[:3] for dx in range(-4, 5) for dy in range(-4, 5)}
    assert seen == {(0, 0, 0), (255, 221, 51)}
    posinf = {view.pixel(view.center(2, 4)[0] + d, view.center(2, 4)[1])[:3] for d in range(-4, 5)}
    neginf = {view.pixel(view.center(3, 5)[0], view.center(3, 5)[1] + d)[:3] for d in range(-4, 5)}
    assert posinf == {(214, 0, 140), (255, 255, 255)}
    assert neginf == {(0, 140, 110), (255, 255, 255)}
    assert "clipped: 1 above, 0 below; NaN 1, +Inf 1, -Inf 1" in view.text("caption")


def test_header_says_what_is_known(view):
    assert view.text("site") == "model.layers.3.mlp:output"
    facts = [item.text for item in view.browser.all(".fxm-facts li", view.root)]
    assert facts[:6] == [
        "(batch 2, seq 6, hidden 40)", "float32", "tp=4", "tp: Shard(dim=2)", "after damp v2", "run 3",
    ]  # fmt: skip


@pytest.mark.slow
def test_everything_is_painted_however_the_first_answers_fall(notebook):
    for turn in range(6):
        notebook.run(2)
        fresh = lab.TensorCanvas.within(notebook, 2)
        fresh.hover(turn % 6, turn)
        lay = fresh.data("map")
        assert fresh.pixel(lay["left"] + 4, lay["top"] - 16)[:3] == (0, 114, 178)
        labels = [fresh.pixel(x, fresh.center(0, 0)[1]) for x in range(30)]
        assert any(pixel[3] > 100 for pixel in labels)


def test_hover_reads_the_true_value_and_its_owner(view):
    said = view.hover(4, 30)
    value = values(3)[0, 4, 30]
    assert said == f'batch 0, seq 4 "\\u202eevil", hidden 30 = {value!s} \u2014 rank 2 at [0, 4, 6]'
    assert "= NaN" in view.hover(1, 3)
    assert "= 1000 \u2014 rank 0 at [0, 0, 0]" in view.hover(0, 0)


def test_ribbon_is_proportional_and_coloured(view):
    lay = view.data("map")
    y = lay["top"] - 16
    at = [view.pixel(lay["left"] + (c + 0.1) / 40 * lay["map_width"] + 3, y)[:3] for c in (0, 12, 24, 36)]
    assert at == [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)]


def test_everything_works_by_keyboard(view, notebook):
    view.keys(Keys.HOME)
    lab.wait_for(lambda: "hidden 0 =" in view.text("read"), message="the first column")
    assert "seq" in view.text("read")
    view.keys(Keys.ARROW_UP * 9, Keys.ARROW_DOWN * 5, Keys.ARROW_RIGHT * 2)
    lab.wait_for(lambda: 'seq 5 "a\\nb", hidden 2 =' in view.text("read"), message="two to the right")
    focused = notebook.browser.js("return document.activeElement === arguments[0]", view.canvas)
    assert focused
    assert notebook.browser.js("return getComputedStyle(arguments[0]).outlineStyle", view.canvas) != "none"
    before = view.data("window")
    look = view.data("look")
    view.keys("+")
    view.wait_look(look)
    zoomed = view.data("window")
    assert zoomed["cols"][1] - zoomed["cols"][0] < before["cols"][1] - before["cols"][0]
    look = view.data("look")
    view.keys(Keys.SHIFT + Keys.ARROW_RIGHT + Keys.NULL)
    view.wait_look(look)
    assert view.data("window")["cols"][0] > zoomed["cols"][0]
    look = view.data("look")
    view.keys("0")
    view.wait_look(look)
    assert view.data("window") == before
    # The notebook's own shortcuts did not fire: no dialog, no other cell selected.
    assert not notebook.browser.all(".jp-Dialog")
    assert view.browser.all("[aria-live='polite']", view.root)


def test_layers_dims_and_scales_are_chosen(view):
    view.choose("layer", "layer 1")
    assert view.text("site") == "model.layers.1.mlp:output"
    assert f"= {values(1)[0, 5, 20]!s} " in view.hover(5, 20)
    view.choose("scale", "symlog")
    assert "symlog" in view.text("caption")
    expected = colors_of(values(1)[0], "symlog")
    assert view.cell(5, 20)[:3] != tuple(colors_of(values(1)[0])[5, 20, :3])
    view.keys(Keys.ESCAPE)
    view.pointer(2, 2)
    assert view.cell(3, 20) == tuple(expected[3, 20])
    view.choose("scale", "linear")
    view.choose("rows", "hidden (40)")
    assert view.data("cells") == [40, 6]
    assert "rows hidden[0:40], columns seq[0:6]" in view.text("caption")
    view.choose("rows", "seq (6)")
    look = view.data("look")
    batch = view.browser.all("input[data-dim='0']", view.root)[0]
    batch.send_keys(Keys.ARROW_UP, Keys.ENTER)
    view.wait_look(look)
    assert f'batch 1, seq 5 "a\\nb", hidden 7 = {values(1)[1, 5, 7]!s} ' in view.hover(5, 7)
    look = view.data("look")
    batch.send_keys(Keys.ARROW_DOWN, Keys.ENTER)
    view.wait_look(look)
    view.choose("layer", "layer 3")


def test_two_views_are_independent(view, notebook):
    other = lab.TensorCanvas.within(notebook, 2)
    untouched = other.data("look")
    view.choose("layer", "layer 0")
    assert other.text("site") == "model.layers.3.mlp:output"
    assert other.data("look") == untouched
    assert f"= {values(3)[0, 4, 9]!s} " in other.hover(4, 9)
    view.choose("layer", "layer 3")


def test_only_one_of_live_view_and_picture_is_seen(view, notebook):
    area = notebook.area(1)
    images = notebook.browser.all("img", area)
    assert len(images) == 1
    assert not images[0].is_displayed()
    assert "statistics" not in area.text
    assert [sorted(o["data"]) for o in notebook.outputs(1)][2] == ["image/png", "text/plain"]


def test_an_overview_shows_its_needle_its_reducer_and_the_missing_rank(notebook):
    view = lab.TensorCanvas.within(notebook, 3)
    rows, cols = view.data("cells")
    assert rows * cols < 64 * 4000
    assert "signed extremum" in view.text("caption")
    below = tuple(colors.palette("signed")[colors.UNDER])
    row, col = int(40 * rows / 64), int(1234 * cols / 4000)
    assert view.cell(row, col) == below
    assert "extremum -1000" in view.hover(row, col)
    hole = {view.cell(r, cols // 2)[:3] for r in range(rows // 3)}
    assert hole <= {(186, 186, 186), (110, 110, 110)}
    assert "rank 1 missing" in view.hover(1, cols // 2)
    view.choose("reducer", "mean")
    assert "is the mean of" in view.text("caption")
    view.hover(row, col)
    look = view.data("look")
    view.keys("")  # focus, so that the wheel belongs to the map
    view.browser.js(
        "arguments[0].focus(); const r = arguments[0].getBoundingClientRect();"
        "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -100, bubbles: true, cancelable: true,"
        "clientX: r.left + arguments[1], clientY: r.top + arguments[2]}))",
        view.canvas,
        *view.center(row, col),
    )
    view.wait_look(look)
    start, stop = view.data("window")["cols"]
    assert start <= 1234 < stop
    assert stop - start < 4000
    notebook.browser.screenshot("overview_light")
    look, y = view.data("look"), view.center(rows // 2, 0)[1]
    view.drag((view.center(0, cols // 2)[0], y), (view.center(0, cols // 4)[0], y))
    view.wait_look(look)
    lab.wait_for(lambda: view.data("window")["cols"][0] > start, message="the window to move along")
    assert view.data("window")["cols"][1] <= 4000


def test_a_failed_read_is_a_sentence_and_the_view_lives_on(notebook):
    area = notebook.area(4)
    root = lab.wait_for(lambda: [r for r in notebook.browser.all(".fxm", area) if r.is_displayed()])[0]
    view = lab.TensorCanvas(notebook.browser, root)
    lab.wait_for(lambda: view.text("error") == "rank 1 died. Next: %flexcluster recoverTry again")
    panel = "const panel = window.jupyterapp.shell.currentWidget;"
    code = "panel.sessionContext.session.kernel.requestExecute({code: 'Flaky.broken = False'}).done"
    notebook.browser.js_async(f"{panel} await {code}")
    again = next(b for b in view.browser.all("button", root) if b.text == "Try again")
    again.click()
    lab.wait_for(lambda: root.get_attribute("data-look"), message="the repaired view")
    assert view.text("error") == ""
    assert "= 1 " in view.hover(1, 1)


def test_a_number_and_an_empty_tensor_have_no_map(notebook):
    area = notebook.area(4)
    shown = lab.wait_for(lambda: (t := area.text) and "empty" in t and t)
    assert "3.25" in shown
    assert "This tensor is empty (dim0 has size 0)" in shown


def test_from_what_cannot_be_drawn_one_comes_back_by_keyboard(notebook, browser):
    view = lab.TensorCanvas.within(notebook, 5)
    layers = "select[data-name='layer']"
    browser.js("arguments[0].focus()", browser.all(layers, view.root)[0])
    for key, shown in (
        (Keys.ARROW_DOWN, lambda: "This tensor is empty (dim0 has size 0)" in view.text("status")),
        (Keys.ARROW_DOWN, lambda: view.text("number").startswith("3.25")),
        (Keys.ARROW_UP, lambda: "This tensor is empty" in view.text("status")),
        (Keys.ARROW_UP, view.canvas.is_displayed),
    ):
        browser.press(key)
        lab.wait_for(shown, message="the next one")
        assert browser.all(layers, view.root)[0].is_displayed()
        assert browser.js("return document.activeElement.dataset.name") == "layer"
        if key == Keys.ARROW_DOWN:
            assert not view.canvas.is_displayed()
    assert view.text("site") == "model.layers.0.mlp:output"
    assert f"= {values(0)[0, 4, 9]!s} " in view.hover(4, 9)


def test_dark_theme_is_readable(notebook, view):
    def contrast(element):
        script = (
            "const rgb = (t) => { const canvas = document.createElement('canvas');"
            "const c = canvas.getContext('2d', {willReadFrequently: true});"
            "c.fillStyle = t; c.fillRect(0, 0, 1, 1);"
            "return [...c.getImageData(0, 0, 1, 1).data]; };"
            "const root = arguments[0].closest('.fxm');"
            "return [rgb(getComputedStyle(root).backgroundColor), rgb(getComputedStyle(arguments[0]).color)]"
        )
        paper, ink = notebook.browser.js(script, element)
        share = ink[3] / 255
        ink = [share * i + (1 - share) * p for i, p in zip(ink[:3], paper[:3], strict=True)]

        def light(rgb):
            c = [v / 255 for v in rgb[:3]]
            c = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in c]
            return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]

        low, high = sorted((light(paper), light(ink)))
        return (high + 0.05) / (low + 0.05), light(paper)

    for theme, dark in (("JupyterLab Dark", True), ("JupyterLab Light", False)):
        notebook.theme(theme)
        for part in (".fxm-site", ".fxm-facts li", ".fxm-caption p", ".fxm-help", ".fxm select", ".fxm-read"):
            element = view.browser.all(part.replace(".fxm ", ""), view.root)[0]
            ratio, paper = contrast(element)
            assert ratio >= 4.5, (theme, part, ratio)
            assert (paper < 0.2) == dark
        notebook.area(1)
        notebook.browser.screenshot(f"view_{'dark' if dark else 'light'}")


def test_a_view_answers_while_a_cell_runs_even_the_one_that_made_it(notebook, view):
    notebook.start(6)
    notebook.wait_output(6, "started")
    view.choose("layer", "layer 2")
    assert view.text("site") == "model.layers.2.mlp:output"
    assert not notebook.executed(6)
    view.choose("layer", "layer 3")
    notebook.interrupt()
    notebook.start(7)
    late = lab.TensorCanvas.within(notebook, 7)
    assert late.text("site") == "model.layers.1.mlp:output"
    assert not notebook.executed(7)
    notebook.interrupt()


def test_nothing_was_fetched_and_nothing_complained(notebook, browser, server):
    outside = [
        url
        for url in browser.requests()
        if re.match(r"(https?|wss?)://", url) and not url.startswith(server.url)
    ]
    assert outside == []
    assert [url for url in browser.failures() if "api/me" not in url and url != "?"] == []
    loud = [m for m in browser.console() if m["level"] in ("SEVERE", "WARNING")]
    assert loud == []
    assert not browser.all("[onerror]")
