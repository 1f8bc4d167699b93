"""The first demo notebook in a real JupyterLab over two real engines: what a newcomer sees is true."""

import shutil

import lab
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexmagic.view import scale as colors

MODEL = lab.ROOT / "demo_notebooks" / "model"
PROMPT = "When Mary and John went to the store, John gave a drink to"
WIDE = 6
"""Pixels a cell is to be wide before its colour is read: narrower ones run into their neighbours."""
VIEW = 7
"""The cell that shows the activation."""

pytestmark = [pytest.mark.slow, pytest.mark.engines, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def notebook(server, browser):
    """The notebook, run as far as the view: the engines are still there."""
    browser.forget()
    shutil.copytree(MODEL, server.notebooks / "model")
    shutil.copy(lab.ROOT / "demo_notebooks" / "01_first_hook.ipynb", server.notebooks)
    opened = lab.Notebook(server, browser)
    opened.open(server.notebooks / "01_first_hook.ipynb")
    for number in (1, 2, 4, 5, VIEW):
        opened.run(number, timeout=120)
    yield opened
    opened.shut_down()


@pytest.fixture(scope="module")
def truth():
    """What every layer's up projection gives in one process: ``[layers, seq, mlp]``."""
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    seen = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda _m, _a, out: seen.append(out[0].numpy()))
    ids = AutoTokenizer.from_pretrained(MODEL)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(ids, use_cache=False)
    return np.stack(seen)


@pytest.fixture
def view(notebook):
    return lab.TensorCanvas.within(notebook, VIEW)


def value_said(text):
    """The number in a read-out such as ``batch 0, seq 4 "and", mlp 30 = 0.5 — rank 0 at [0, 4, 30]``."""
    return float(text.partition(" = ")[2].partition(" —")[0])


def window(view):
    """The rows and the columns that are drawn, each as (start, stop)."""
    shown = view.data("window")
    return tuple(shown["rows"][:2]), tuple(shown["cols"][:2])


def zoomed_to(view, notebook):
    """Zoom in until every value is drawn by itself."""
    while "every value drawn" not in view.text("caption"):
        look = view.data("look")
        view.keys("+")
        view.wait_look(look)


def test_a_cell_reads_the_value_that_one_process_has(view, truth, notebook):
    zoomed_to(view, notebook)
    (top, _), (left, right) = window(view)
    rows, cols = view.data("cells")
    assert cols == right - left
    for row, col in ((0, 0), (rows // 2, cols // 2), (rows - 1, cols - 1)):
        said = view.hover(row, col)
        value = truth[2][top + row, left + col]
        assert value_said(said) == pytest.approx(float(value), rel=1e-4, abs=1e-5), said
        owner = 0 if left + col < truth.shape[2] // 2 else 1
        assert f"rank {owner} at [0, {top + row}, {(left + col) % (truth.shape[2] // 2)}]" in said
    notebook.browser.screenshot("first_notebook_zoomed")


def test_the_map_has_the_colours_of_the_values(view, truth, notebook):
    zoomed_to(view, notebook)
    while view.center(0, 1)[0] - view.center(0, 0)[0] < WIDE:
        look = view.data("look")
        view.keys("+")
        view.wait_look(look)
    (top, bottom), (left, right) = window(view)
    plane = truth[2][top:bottom, left:right].astype(float)
    fitted = colors.fit(plane, "linear")
    expected = colors.palette(fitted.kind)[colors.encode(plane, fitted)].astype(int)
    off = []
    _, at_row, at_col = view.data("read")  # around the cell that is read out runs an outline
    for row in range(0, plane.shape[0], 3):
        for col in range(0, plane.shape[1], max(plane.shape[1] // 9, 1)):
            if abs(row - at_row) <= 1 and abs(col - at_col) <= 1:
                continue
            seen = np.array(view.cell(row, col), int)
            # values differ by rounding from one process, so a colour may differ by one step
            off.append(int(np.abs(seen - expected[row, col]).max()))
    assert len(off) > 20
    assert max(off) <= 6, off
    assert len({view.cell(0, col) for col in range(0, plane.shape[1], 5)}) > 3  # it is no flat picture


def test_another_layer_is_fetched_when_it_is_chosen(view, truth, notebook):
    view.choose("layer", "model.layers.0.mlp.up_proj:output")
    zoomed_to(view, notebook)
    (top, _), (left, _) = window(view)
    said = view.hover(1, 1)
    assert value_said(said) == pytest.approx(float(truth[0][top + 1, left + 1]), rel=1e-4, abs=1e-5)
    view.choose("layer", "model.layers.2.mlp.up_proj:output")
    view.keys("0")


def test_the_rest_of_the_story_runs_and_the_page_is_clean(notebook):
    notebook.area(VIEW)
    notebook.browser.screenshot("first_notebook")
    for number in (9, 10, 11):
        notebook.run(number, timeout=60)
    assert "' Mary'" in str(notebook.outputs(5))
    assert "engines are stopped" in str(notebook.outputs(11))
    assert notebook.browser.failures() == []
    errors = [entry for entry in notebook.browser.console() if "fxm" in entry or "flexmagic" in entry]
    assert errors == []
