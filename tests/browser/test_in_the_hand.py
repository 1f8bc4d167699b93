"""A session at a real JupyterLab over two real engines, with keys and buttons: what a user's hands do."""

import json
import re

import lab
import pytest
from selenium.webdriver.common.keys import Keys

MODEL = lab.ROOT / "demo_notebooks" / "model"
PROMPT = "The capital of France is"
LOAD, START, MODEL_CELL, HOOK, RUN, LOOP, SPARE = range(7)
CELLS = [
    "%load_ext flexmagic",
    "%flexcluster start -n 2 --oversubscribe",
    f"%flexmodel {MODEL} --tp 2",
    "%%flexhook model.layers.*.mlp --name damp\nx *= 0.5",
    f"run = %flexrun '{PROMPT}'\nprint(float(run.logits.numpy().sum()))",
    "%%flexhook lm_head --name loop\nwhile True: pass",
    "",
]

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def notebook(server, browser):
    """A notebook whose engines hold the model; the tests go on where the one before ended."""
    browser.forget()
    opened = lab.Notebook(server, browser).open(server.write("hand.ipynb", CELLS))
    for number in (LOAD, START, MODEL_CELL):
        opened.run(number, timeout=120)
    yield opened
    opened.edit(SPARE, "%flexcluster stop --force")
    opened.run(SPARE)
    opened.shut_down()


def text_of(notebook, number):
    """What stands in a cell's outputs, as text."""
    outputs = json.dumps([[o.get("text", ""), o.get("data", "")] for o in notebook.outputs(number)])
    return outputs.encode().decode("unicode_escape")


def total(notebook, number=RUN):
    """The sum that the cell prints."""
    notebook.run(number)
    return float(re.search(r"-?\d+\.\d+(?:e[+-]\d+)?(?=\\?n|\n)", text_of(notebook, number))[0])


def test_tab_completes_a_site(notebook):
    notebook.complete(HOOK, "%%flexhook model.la", "%%flexhook model.layers", "hand_tab")
    notebook.edit(HOOK, "%%flexhook model.layers.")
    notebook.press(Keys.TAB)
    assert {"model.layers.*", "model.layers.0", "model.layers.3"} <= set(notebook.offered())
    notebook.browser.screenshot("hand_tab_layers")
    notebook.press(Keys.ESCAPE)
    line = "%%flexhook model.layers.0.mlp"
    notebook.complete(HOOK, f"{line} --na", f"{line} --name", "hand_tab_option")


def test_tab_completes_what_a_tensor_on_the_engines_has(notebook):
    line = "%%flexhook model.layers.0.mlp\n"
    notebook.complete(HOOK, f"{line}x.cumpro", f"{line}x.cumprod", "hand_tab_tensor")


def test_shift_tab_tells_of_a_site(notebook):
    notebook.edit(HOOK, CELLS[HOOK], len("%%flexhook model.layers.*.m"))
    notebook.press(Keys.SHIFT, Keys.TAB)
    said = notebook.browser.one(".jp-Tooltip").text
    assert "LlamaMLP" in said
    assert ":output [batch, seq, hidden" in said
    notebook.browser.screenshot("hand_shift_tab")
    notebook.press(Keys.ESCAPE)


def test_the_stop_button_ends_a_run_on_all_ranks(notebook):
    notebook.run(LOOP)
    notebook.start(RUN)
    lab.wait_for(lambda: "Running" in text_of(notebook, RUN), 30, "the line that says it runs")
    notebook.browser.screenshot("hand_running")
    notebook.tool("interrupt")
    lab.wait_for(lambda: notebook.executed(RUN), 60, "the cell to end")
    (error,) = [output for output in notebook.outputs(RUN) if output["output_type"] == "error"]
    assert error["ename"] == "KeyboardInterrupt"
    assert "hook 'loop'" in error["evalue"]
    assert "The engines are ready." in error["evalue"]
    assert not any("flexmagic/" in line for line in error["traceback"])
    notebook.browser.screenshot("hand_interrupted")
    notebook.edit(SPARE, "%flexhook --remove loop")
    notebook.run(SPARE)


def test_a_hook_acts(notebook):
    plain = total(notebook)
    notebook.edit(HOOK, CELLS[HOOK])
    notebook.run(HOOK)
    assert abs(total(notebook) - plain) > 1e-3 * abs(plain)


PIDS = "print([row[3] for row in get_ipython()._flexmagic_desk.session.status().rows])"


def test_a_kernel_that_restarts_finds_engines_model_and_hooks(notebook):
    damped = total(notebook)
    notebook.edit(SPARE, PIDS)
    before = notebook.run(SPARE)
    notebook.tool("restart")
    notebook.browser.one(".jp-Dialog .jp-mod-accept").click()
    lab.wait_for(lambda: "is still there" in text_of(notebook, LOAD) if restarted(notebook) else False, 90)
    assert "LlamaForCausalLM" in text_of(notebook, LOAD)
    notebook.browser.screenshot("hand_restarted")
    notebook.edit(SPARE, "%flexcluster attach")
    notebook.run(SPARE)
    notebook.edit(SPARE, PIDS)
    assert notebook.run(SPARE) == before, "the engines are those of before"
    assert total(notebook) == damped, "model and hook are there"


def restarted(notebook):
    """Whether a new kernel has taken the first cell."""
    if not restarted.by and notebook.status() == "idle":
        notebook.start(LOAD)
        restarted.by = True
    return restarted.by and notebook.executed(LOAD)


restarted.by = False


def test_two_notebooks_share_a_cluster_and_its_model_not_their_hooks(notebook, server, browser):
    damped = total(notebook)
    cells = [CELLS[LOAD], "%flexcluster attach", CELLS[RUN], CELLS[HOOK].replace("0.5", "0.25")]
    other = lab.Notebook(server, browser).open(server.write("other.ipynb", cells))
    for number in (0, 1):
        other.run(number)
    plain = total(other, 2)
    assert abs(plain - damped) > 1e-3 * abs(plain), "the first notebook's hook does not act here"
    other.run(3)
    assert total(other, 2) not in {plain, damped}
    browser.screenshot("hand_other")
    other.shut_down()
    notebook.open("hand.ipynb")
    assert total(notebook) == damped, "nor the other's there"
    assert browser.failures() == []
