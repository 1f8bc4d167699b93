"""Notebook 7 over two real engines: what is done in JupyterLab's tests works in its plainer sister too."""

import lab
import pytest

PROMPT = "The capital of France is"
LOAD, START, MODEL_CELL, HOOK, RUN, VIEW, STOP = range(7)
CELLS = [
    "%load_ext flexmagic",
    "%flexcluster start -n 2 --oversubscribe",
    f"%flexmodel {lab.ROOT / 'demo_notebooks' / 'model'} --tp 2",
    "%%flexhook model.layers.3.mlp --name damp\nx[:, -1] *= 0.5",
    f"run = %flexrun '{PROMPT}'",
    'run["model.layers.3.mlp"]',
    "%flexcluster stop",
]

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def notebook(browser):
    """A notebook in Notebook 7 whose engines hold the model, run as far as the view."""
    pytest.importorskip("notebook", reason="needs Notebook 7: pip install 'notebook>=7'")
    server = lab.LabServer(program="notebook")
    browser.forget()
    opened = lab.Notebook(server, browser).open(server.write("seven.ipynb", CELLS))
    for number in range(STOP):
        opened.run(number, timeout=120)
    yield opened
    opened.run(STOP)
    opened.shut_down()
    server.close()


def test_the_view_is_alive(notebook):
    view = lab.TensorCanvas.within(notebook, VIEW)
    said = view.hover(0, 0)
    notebook.browser.screenshot("notebook_7_view")
    assert 'seq 0 "<bos>", hidden 0 =' in said
    assert "rank 1 at [0, 0, 0]" in said
    look = view.data("look")
    view.keys("+")
    view.wait_look(look)
    assert notebook.browser.failures() == []


def test_tab_completes_a_site(notebook):
    notebook.complete(HOOK, "%%flexhook model.layers.3.ml", "%%flexhook model.layers.3.mlp", "notebook_7_tab")


def test_the_stop_button_ends_a_run_on_all_ranks(notebook):
    notebook.edit(HOOK, "%%flexhook lm_head --name loop\nwhile True: pass")
    notebook.run(HOOK)
    notebook.start(RUN)
    notebook.wait_output(RUN, "Running")
    notebook.tool("interrupt")
    lab.wait_for(lambda: notebook.executed(RUN), 60, "the cell to end")
    (error,) = [output for output in notebook.outputs(RUN) if output["output_type"] == "error"]
    assert error["ename"] == "KeyboardInterrupt"
    assert "The engines are ready." in error["evalue"]
    notebook.area(RUN)
    notebook.browser.screenshot("notebook_7_interrupted")
