"""Facets, comparisons, tables by rank, grids, coloured text and lines in a real JupyterLab."""

import json
import re

import lab
import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from flexmagic.view import scale as colors

SETUP = """
import numpy as np
import flexmagic
from types import SimpleNamespace
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.pieces import split
from flexmagic.view.source import Piece
from flexmagic.view.display import show
TOKENS = ["When", " Mary", "</script>", "<img src=x onerror=alert(1)>", "\\u202eevil", "a\\nb"]
def heads():
    return (np.arange(2 * 20 * 36, dtype="float32").reshape(2, 20, 6, 6) % 97) / 97
"""
CELLS = [
    SETUP,
    """
x = heads()
info = info_of(x, site="attn", dims=("batch", "heads", "seq", "seq"), pieces=split(x.shape, 1, (10, 10)))
show(ArraySource(x, info, {2: TOKENS, 3: TOKENS}));
""",
    """
y = np.linspace(-1, 1, 240, dtype="float32").reshape(1, 6, 40)
whole = tuple((0, n) for n in y.shape)
other = y.copy(); other[0, 2, 3] += 0.5
pieces = (Piece(0, whole), Piece(1, whole))
info = info_of(y, site="copies", dims=("batch", "seq", "hidden"), pieces=pieces)
show(ArraySource(y, info, {1: TOKENS}, held={1: other}));
""",
    """
z = y.copy(); z[0, 4, 5] = 3
flexmagic.compare(y, z)
""",
    """
flexmagic.grid(np.arange(12.0).reshape(2, 6), ["layer 0", "layer 1"], TOKENS, title="lens",
               texts=[TOKENS] * 2, notes=[[[("</script>", 0.5), (" b", 0.25)]] * 6] * 2)
""",
    'flexmagic.strip([1.0, 2, 3, np.nan, -2, 0], TOKENS, title="text")',
    'flexmagic.lines({"loss": [3, 2, np.nan, 1], "other": [1, 2, 3, 4]}, title="training")',
    """
from flexmagic.view.panels import ClusterPanel
asked = []
table = SimpleNamespace(_repr_html_=lambda: f"<table><tr><td>asked {len(asked)}</td></tr></table>")
status = lambda: asked.append(1) or table
ClusterPanel(SimpleNamespace(status=status, cancel=lambda: None, recover=lambda say: ""))
""",
    """
from flexmagic.view.panels import ModelPanel
rule = SimpleNamespace(refused="", describe=lambda: "[seq, 256] tp: Replicate", how="equal")
model = SimpleNamespace(surveyed=True, rules={"m.0.mlp:output": rule}, standing_for=lambda p: [(p, None)])
panel = ModelPanel(SimpleNamespace(hooks=[], model=model, world_size=2))
panel.sites.value = "m.0.mlp:output"
panel
""",
    "import time; print('started'); time.sleep(60)",
    """
import threading
from flexmagic.client.waiting import Waited
from flexmagic.magics.status_line import waiting
cancelled = threading.Event()
with waiting(get_ipython(), "Working", quiet=0.5, cancel=cancelled.set) as line:
    while not cancelled.wait(0.05):
        line.tick(Waited(0.0, {}))
print("it was cancelled")
""",
]
BUSY, CANCEL = 9, 10


@pytest.fixture(scope="module")
def notebook(server, browser):
    browser.forget()
    opened = lab.Notebook(server, browser)
    opened.open(server.write("side_by_side.ipynb", CELLS))
    for cell in range(BUSY):
        opened.run(cell)
    return opened


def figures(view):
    return view.browser.all("figure", view.root)


def test_heads_stand_side_by_side_and_turn_like_pages(notebook):
    view = lab.TensorCanvas.within(notebook, 1)
    titles = [figure.find_element("css selector", "figcaption").text for figure in figures(view)]
    assert titles == [f"heads {n}" for n in range(16)]
    x = (np.arange(2 * 20 * 36, dtype="float32").reshape(2, 20, 6, 6) % 97) / 97
    assert f'heads 0, seq 4 "\\u202eevil", seq 5 "a\\nb" = {x[0, 0, 4, 5]!s} \u2014 rank 0' in view.hover(
        4, 5
    )
    notebook.browser.screenshot("side_by_side_heads", view.root)
    look = view.data("look")
    next(b for b in view.browser.all("button", view.root) if b.text == "\u203a").click()
    view.wait_look(look)
    assert len(figures(view)) == 4
    assert f'heads 16, seq 1 " Mary", seq 2 "</script>" = {x[0, 16, 1, 2]!s} \u2014 rank 1' in view.hover(
        1, 2
    )
    view.choose("facet", "one picture")
    assert len(figures(view)) == 1
    assert "batch 0, heads 16, seq 3 " in view.hover(3, 3)  # where one stood
    assert f"= {x[0, 16, 3, 3]!s} " in view.text("read")


def test_from_picture_to_picture_by_keyboard(notebook):
    view = lab.TensorCanvas.within(notebook, 3)
    view.hover(2, 2)
    view.keys("]")
    focused = "return [...arguments[0].querySelectorAll('canvas')].indexOf(document.activeElement)"
    assert notebook.browser.js(focused, view.root) == 1
    stops = notebook.browser.js(
        "return [...arguments[0].querySelectorAll('canvas')].map((c) => c.tabIndex)", view.root
    )
    assert stops == [-1, 0, -1]


def test_a_comparison_reads_all_three_and_draws_the_difference(notebook):
    view = lab.TensorCanvas.within(notebook, 3)
    a, b, delta = view.hover(4, 5).split("\n")
    value = np.linspace(-1, 1, 240, dtype="float32").reshape(6, 40)[4, 5]
    assert f"= {value!s}" in a
    assert "= 3 " in b
    assert f"= {np.float32(3) - value!s}" in delta
    assert "1 of 240 differ" in view.text("facts")
    canvas = view.browser.all("canvas", view.root)[2]
    scale = colors.fit(np.array([3 - value]), "linear")
    lay = view.data("map")
    at = lay["left"] + 5.5 / 40 * lay["map_width"], lay["top"] + 4.5 / 6 * lay["map_height"]
    script = "return [...arguments[0].getContext('2d').getImageData(arguments[1], arguments[2], 1, 1).data]"
    ratio = view.browser.js("return devicePixelRatio")
    seen = view.browser.js(script, canvas, *(int(p * ratio) for p in at))
    assert seen[:3] == colors.palette(scale.kind)[colors.LAST, :3].tolist()
    assert notebook.area(3).text.count("different: 1 of 240 differ") == 2  # the table, and the header
    notebook.browser.screenshot("side_by_side_compare", view.root)


def test_replicas_that_differ_are_a_warning_and_each_can_be_seen(notebook):
    view = lab.TensorCanvas.within(notebook, 2)
    lab.wait_for(lambda: "differ: ranks 0, 1 by up to 0.5" in view.text("notes"), message="the warning")
    view.choose("part", "own part of rank 1")
    value = np.linspace(-1, 1, 240, dtype="float32").reshape(6, 40)[2, 3] + np.float32(0.5)
    assert f"= {value!s} " in view.hover(2, 3)
    view.browser.js("arguments[0].querySelectorAll('details')[1].open = true", view.root)
    cells = lab.wait_for(lambda: [c.text for c in view.browser.all(".fxm-table th[scope=row]", view.root)])
    assert cells == ["whole", "rank 0", "rank 1"]
    assert len(view.browser.all(".fxm-bars", view.root)) == 3
    notebook.browser.screenshot("side_by_side_table", view.root)


def test_a_grid_reads_out_what_was_noted(notebook):
    view = lab.TensorCanvas.within(notebook, 4)
    assert view.hover(1, 2).endswith("= 8 \u2014 '</script>' 0.5, ' b' 0.25")
    notebook.browser.screenshot("side_by_side_grid", view.root)


def test_coloured_text_is_text_and_is_read_by_keyboard(notebook):
    view = lab.TensorCanvas.within(notebook, 5)
    tokens = [t.text for t in view.browser.all(".fxm-token", view.root)]
    assert tokens == [
        "When",
        "\u2423Mary",
        "</script>",
        "<img src=x onerror=alert(1)>NaN",
        "\\u202eevil",
        "a\\nb",
    ]
    strip = view.browser.all(".fxm-strip", view.root)[0]
    strip.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    lab.wait_for(lambda: view.text("read") == 'seq 2 "</script>" = 3', message="the third token")
    notebook.browser.screenshot("side_by_side_strip", view.root)


def test_lines_are_read_by_pointer_and_keyboard(notebook):
    view = lab.TensorCanvas.within(notebook, 6)
    lay = view.data("map")
    view.pointer(lay["left"] + 0.99 * lay["map_width"], lay["top"] + 4)
    lab.wait_for(lambda: view.text("read") == 'series 1 "other", step 3 = 4', message="the nearest line")
    view.keys(Keys.ARROW_UP, Keys.ARROW_LEFT)
    lab.wait_for(lambda: view.text("read") == 'series 0 "loss", step 2 = NaN', message="the gap")
    notebook.browser.screenshot("side_by_side_lines", view.root)


def test_a_panel_answers_while_a_cell_runs(notebook):
    notebook.start(BUSY)
    notebook.wait_output(BUSY, "started")
    area = notebook.area(7)
    assert "asked 1" in area.text
    next(b for b in notebook.browser.all("button", area) if b.text == "Refresh").click()
    lab.wait_for(lambda: "asked 2" in notebook.area(7).text, message="the panel's answer")
    assert not notebook.executed(BUSY)
    notebook.interrupt()


def test_a_click_on_cancel_ends_what_a_cell_waits_for_and_the_button_goes(notebook, browser):
    notebook.start(CANCEL)

    def buttons():
        return browser.all("button.jupyter-button", notebook.area(CANCEL))

    lab.wait_for(buttons, 60, "the button")
    assert not notebook.executed(CANCEL)
    buttons()[0].click()
    lab.wait_for(lambda: notebook.executed(CANCEL), 30, "the cell to end")
    notebook.check(CANCEL)
    notebook.wait_output(CANCEL, "it was cancelled", 10)
    lab.wait_for(lambda: not buttons(), 10, "the button to go")
    assert "widget-view" not in json.dumps(notebook.outputs(CANCEL))


def test_a_panel_puts_a_hooks_cell_below_itself(notebook):
    area = notebook.area(8)
    count = notebook.count()
    next(b for b in notebook.browser.all("button", area) if b.text == "Insert this cell").click()
    lab.wait_for(lambda: notebook.count() == count + 1, message="a new cell")
    source = "return window.jupyterapp.shell.currentWidget.content.widgets[9].model.sharedModel.source"
    lab.wait_for(
        lambda: notebook.browser.js(source) == "%%flexhook m.0.mlp:output --name look\n", message="its text"
    )


def test_nothing_was_fetched_nothing_ran_and_nothing_complained(notebook, browser, server):
    outside = [
        u for u in browser.requests() if re.match(r"(https?|wss?)://", u) and not u.startswith(server.url)
    ]
    assert outside == []
    said = [m for m in browser.console() if m["source"] != "intervention"]  # of leaving the page before
    assert [m for m in said if m["level"] in ("SEVERE", "WARNING")] == []
    assert not browser.all("[onerror]")
