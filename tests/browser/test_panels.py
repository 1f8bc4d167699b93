"""Panels, steps, masks and a lost engine in a real JupyterLab over two real engines, by keyboard."""

import shutil

import lab
import pytest
from selenium.webdriver.common.keys import Keys

from flexmagic.view import scale as colors

MODEL = lab.ROOT / "demo_notebooks" / "model"
PROMPT = "When Mary and John went to the store, John gave a drink to"
CELLS = [
    "%load_ext flexmagic\n%flexcluster start -n 2\n%flexmodel model --tp 2 --attn eager",
    "%%flexhook model.layers.1.mlp --name damp\nx[:, -1] *= 0.5",
    f'run = %flexrun "{PROMPT}" --capture model.layers.*.mlp.up_proj\nrun["model.layers.1.mlp.up_proj"]',
    "%flexpanel hooks",
    "%flexpanel model",
    "%flexpanel cluster",
    f'made = %flexrun "{PROMPT}" --generate 6 --stream --capture model.layers.*.mlp blocks.*.attn.pattern',
    'made["model.layers.1.mlp"]',
    'made.step(0)["blocks.1.attn.pattern"].masked("causal")',
    "%%flexrun --name who\nimport os\nos.getpid()",
    "import os, signal\nos.kill(who.value[1], signal.SIGKILL)",
    "%flexcluster stop",
]
VIEW, HOOKS, SITES, CLUSTER, STREAM, STEPS, PATTERN = range(2, 9)
KILL, STOP = 10, 11

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def notebook(server, browser):
    browser.forget()
    if not (server.notebooks / "model").exists():
        shutil.copytree(MODEL, server.notebooks / "model")
    opened = lab.Notebook(server, browser)
    opened.open(server.write("panels.ipynb", CELLS))
    for number in range(KILL):
        opened.run(number, timeout=120)
    yield opened
    opened.shut_down()


def panel(notebook, cell):
    area = notebook.area(cell)
    return lab.wait_for(
        lambda: next(iter(notebook.browser.all(".flexmagic-panel:has([role=status])", area)), None),
        message=f"the panel of cell {cell}",
    )


def tour(browser, element):
    """Press Tab from the first control of an element on to the last: what has the focus on the way."""
    controls = browser.js(
        "const all = [...arguments[0].querySelectorAll('input, select, textarea, button, summary, canvas')];"
        "const shown = all.filter((n) => n.getBoundingClientRect().height && !n.disabled && n.tabIndex >= 0);"
        "shown[0].focus({focusVisible: true}); return shown.length",
        element,
    )
    seen = [browser.focused()]
    for _ in range(controls - 1):
        browser.press(Keys.TAB)
        assert browser.js("return arguments[0].contains(document.activeElement)", element), seen
        seen.append(browser.focused())
    return seen


def button(browser, element, text):
    return next(b for b in browser.all("button", element) if b.text == text)


def press(browser, element, text):
    """Press a button by its key."""
    browser.js("arguments[0].focus()", button(browser, element, text))
    browser.press(Keys.SPACE)


def put_caret(browser, field, at):
    browser.js("arguments[0].focus(); arguments[0].setSelectionRange(arguments[1], arguments[1])", field, at)


def said(browser, element):
    return browser.js("return arguments[0].querySelector('[role=status][aria-live]').textContent", element)


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (HOOKS, ["Hooks", "acts", "Source", "Apply to all ranks", "Undo", "Remove", "Read again"]),
        (SITES, ["Search", "Sites", "Cell", "Insert this cell", "Register this hook", "Read again"]),
        (CLUSTER, ["Refresh", "Recover", "Cancel what runs"]),
    ],
)
def test_every_control_of_a_panel_is_reached_named_and_seen_by_keyboard(notebook, browser, cell, names):
    seen = tour(browser, panel(notebook, cell))
    assert [one["name"] for one in seen] == names
    assert [one for one in seen if one["outline"].startswith("none") or " 0px" in one["outline"]] == []


def test_every_control_of_a_view_is_reached_named_and_seen_by_keyboard(notebook, browser):
    view = lab.TensorCanvas.within(notebook, VIEW)
    seen = tour(browser, view.root)
    assert [one for one in seen if not one["name"]] == []
    assert [one for one in seen if one["outline"].startswith("none") or " 0px" in one["outline"]] == []
    assert {"canvas", "select", "input", "button", "summary"} <= {one["tag"] for one in seen}
    # who chooses by keyboard keeps the focus, also where the choice makes new controls
    rows = browser.all("select[data-name='rows']", view.root)[0]
    browser.js("arguments[0].focus()", rows)
    look = view.data("look")
    browser.press(Keys.ARROW_DOWN)
    view.wait_look(look)
    assert browser.js("return document.activeElement.dataset.name") == "rows"
    look = view.data("look")
    browser.press(Keys.ARROW_UP)
    view.wait_look(look)
    assert not browser.all(".jp-Dialog")


def test_the_hooks_panel_edits_switches_and_goes_back_by_keyboard(notebook, browser):
    hooks = panel(notebook, HOOKS)
    source = browser.all("textarea", hooks)[0]
    assert source.get_attribute("value").strip() == "x[:, -1] *= 0.5"
    put_caret(browser, source, len("x[:, -1] *= 0.5"))
    browser.press(Keys.BACKSPACE * 3)
    lab.wait_for(lambda: "line 1: invalid syntax" in hooks.text, message="the check of the syntax")
    press(browser, hooks, "Apply to all ranks")
    lab.wait_for(lambda: said(browser, hooks).startswith("Nothing was sent. line 1"), message="the refusal")
    put_caret(browser, source, len("x[:, -1] *= "))
    browser.press("3")
    lab.wait_for(lambda: hooks.text.count("invalid syntax") == 1, message="only the last refusal to say so")
    press(browser, hooks, "Apply to all ranks")
    lab.wait_for(lambda: said(browser, hooks) == "damp v2 is on all 2 ranks.", message="the new version")
    notebook.browser.screenshot("panel_hooks", hooks)
    press(browser, hooks, "Undo")
    lab.wait_for(lambda: said(browser, hooks) == "damp is v1 again.", message="the version before")
    assert source.get_attribute("value").strip() == "x[:, -1] *= 0.5"
    acts = browser.all("input[type=checkbox]", hooks)[0]
    for state in ("disabled", "enabled"):
        browser.js("arguments[0].focus()", acts)
        browser.press(Keys.SPACE)
        which = browser.all("select", hooks)[0]
        lab.wait_for(lambda which=which, state=state: f"damp v1   {state}" in which.text, message=state)


def test_the_model_panel_finds_a_site_and_registers_a_hook_by_keyboard(notebook, browser):
    sites = panel(notebook, SITES)
    browser.js("arguments[0].focus()", browser.all("input[type=text]", sites)[0])
    browser.press("layers.2.mlp:output")
    listed = browser.all("select", sites)[0]
    lab.wait_for(lambda: len(browser.all("option", listed)) == 1, message="the one site")
    browser.press(Keys.TAB, Keys.ARROW_DOWN)
    cell = browser.all("textarea", sites)[0]
    lab.wait_for(lambda: cell.get_attribute("value").startswith("%%flexhook model.layers.2.mlp:output"))
    browser.press(Keys.TAB)
    assert browser.js("return document.activeElement === arguments[0]", cell)
    put_caret(browser, cell, len(cell.get_attribute("value")))
    browser.press("x *= 1")
    press(browser, sites, "Register this hook")
    lab.wait_for(lambda: said(browser, sites) == "look v1 is on all 2 ranks.", message="the hook")
    lab.wait_for(lambda: "look v1" in listed.text, message="the hook where it sits")
    notebook.browser.screenshot("panel_model", sites)


def test_a_generation_came_in_a_view_and_its_steps_are_chosen_and_stand_side_by_side(notebook, browser):
    stream = lab.TensorCanvas.within(notebook, STREAM)
    tokens = lab.wait_for(
        lambda: len(found := [t.text for t in browser.all(".fxm-token", stream.root)]) == 6 and found,
        message="six tokens",
    )
    assert tokens[0] == "\u2423Mary"
    assert "values 6" in stream.text("stats")
    notebook.browser.screenshot("generation", notebook.area(STREAM))
    view = lab.TensorCanvas.within(notebook, STEPS)
    view.choose("step", f'step 1 "{tokens[0]}"'.replace("\u2423", " "))
    assert f'seq 0 "{tokens[0]}"'.replace("\u2423", " ") in view.hover(0, 3)
    view.choose("facet", "step")
    titles = [figure.text for figure in browser.all("figcaption", view.root)]
    assert len(titles) == 6
    assert titles[0] == "step 0"
    notebook.browser.screenshot("generation_steps", view.root)
    view.choose("facet", "one picture")


def test_what_attention_may_not_see_is_masked(notebook, browser):
    view = lab.TensorCanvas.within(notebook, PATTERN)
    assert "masked" in view.text("stats")
    assert "masked (0)" in view.hover(0, 5)
    lay, (rows, cols) = view.data("map"), view.data("cells")
    x, y = view.center(1, cols - 2)
    half = lay["map_width"] / cols / 3
    seen = {view.pixel(x + dx * half, y + dy)[:3] for dx in (-1, 0, 1) for dy in range(-4, 5)}
    assert seen <= {colors.MARK_COLORS[colors.MASKED], (150, 150, 158)}
    assert seen & {colors.MARK_COLORS[colors.MASKED]}
    assert view.cell(rows - 1, 0)[:3] not in seen
    notebook.browser.screenshot("attention_masked", view.root)


def test_all_text_is_readable_in_both_themes(notebook, browser):
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        notebook.theme(theme)
        for cell in (VIEW, STREAM, PATTERN):
            root = lab.TensorCanvas.within(notebook, cell).root
            browser.js("for (const d of arguments[0].querySelectorAll('details')) d.open = true", root)
            lab.wait_for(lambda root=root: browser.all(".fxm-table td, .fxm-table p", root))
            found = browser.contrasts(root)
            assert len(found) > 20
            assert found[0][0] >= 4.5, (theme, cell, found[:5])
        for cell in (HOOKS, SITES, CLUSTER):
            found = browser.contrasts(panel(notebook, cell))
            assert len(found) >= 4
            assert found[0][0] >= 4.5, (theme, cell, found[:5])
            browser.screenshot(f"panel_{cell}_{theme.split()[1].lower()}", notebook.area(cell))


def killed(notebook):
    """End rank 1's engine, once, and leave the view alone until it shows the hole."""
    view = lab.TensorCanvas.within(notebook, VIEW)
    if not notebook.executed(KILL):
        assert "cannot answer" not in view.text("notes")
        notebook.run(KILL)
    lab.wait_for(lambda: "rank 1 cannot answer" in view.text("notes"), 30, "the hole")
    return view


def test_a_killed_engine_is_a_hole_in_a_view_that_nobody_touches(notebook, browser):
    root = lab.TensorCanvas.within(notebook, VIEW).root
    browser.js("for (const d of arguments[0].querySelectorAll('details')) d.open = true", root)
    ranks = "return [...arguments[0].querySelectorAll('.fxm-table th[scope=row]')].map((n) => n.textContent)"
    both = ["whole", "rank 0", "rank 1"]
    lab.wait_for(lambda: browser.js(ranks, root) == both, message="the table of both ranks")
    view = killed(notebook)
    rows, cols = view.data("cells")
    hole = {view.cell(r, cols - 3)[:3] for r in range(rows)}
    assert hole <= {(186, 186, 186), (110, 110, 110)}
    assert not {view.cell(r, 3)[:3] for r in range(rows)} & hole
    lab.wait_for(lambda: browser.js(ranks, view.root) == ["whole", "rank 0"], message="the table without it")
    notebook.browser.screenshot("killed_engine", view.root)


@pytest.mark.slow
def test_a_killed_engine_comes_back_from_the_panel_by_keyboard(notebook, browser):
    killed(notebook)
    cluster = panel(notebook, CLUSTER)
    press(browser, cluster, "Refresh")
    lab.wait_for(lambda: "ended" in cluster.text, message="the ended rank")
    press(browser, cluster, "Recover")
    lab.wait_for(lambda: "started again" in said(browser, cluster), 60, "the engine to come back")
    lab.wait_for(lambda: cluster.text.count("idle") == 2, message="both ranks to be idle")
    notebook.browser.screenshot("panel_cluster", cluster)


def test_a_cluster_that_is_gone_is_a_sentence_and_the_picture_stays(notebook, browser):
    view = lab.TensorCanvas.within(notebook, STEPS)
    notebook.run(STOP)
    browser.js("arguments[0].focus()", view.canvas)
    view.keys("+")
    lab.wait_for(lambda: "The cluster was stopped" in view.text("error"), message="the sentence")
    assert "Try again" in view.text("error")
    assert view.canvas.is_displayed()
    assert len({view.cell(0, col) for col in range(40)}) > 5  # it is the picture that was there
    notebook.browser.screenshot("gone_cluster", view.root)
