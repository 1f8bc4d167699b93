"""A workshop in a real JupyterLab: the owner's panel and a guest's board, over two engines, by keyboard."""

import shutil

import lab
import pytest
from selenium.webdriver.common.keys import Keys
from test_panels import button, press, put_caret, said, tour

MODEL = lab.ROOT / "demo_notebooks" / "model"
PROMPT = "When Mary and John went to the store, John gave a drink to"
JOIN = """
from flexmagic.workshop.guest import Guest
ann, ben = (Guest.join(address, name) for name in ("ann", "ben"))
done = ann.run(prompt, capture="model.layers.1")
try:
    ben.hook("model.<img src=x onerror=alert(1)>", "x *= 2")
except Exception as error:
    print(error)
"""
MINE_NOW = """
hooks = %flexhook
print("mine:", [row[0] for row in hooks.rows])
"""
LATE = """
def later():
    while not Path("now").exists():
        time.sleep(0.05)
    server.workshop.lesson.send("%flexhook model.layers.2.mlp --do zero --name late")

threading.Thread(target=later, daemon=True).start()
"""
MINE = f"""
%flexhook model.layers.1.mlp --do "scale 0.5" --name half
prompt = "{PROMPT}"
run = %flexrun "{{prompt}}" --capture model.layers.1
"""
START = """
import threading, time
from pathlib import Path
server = %flexworkshop open --guests 3 --log log.jsonl
address = server.lines[""].split()[-1]
Path("address").write_text(address)
"""
CELLS = [
    "%load_ext flexmagic\n%flexcluster start -n 2\n%flexmodel model --tp 2",
    START.strip(),
    MINE.strip(),
    "%flexworkshop",
    JOIN.strip(),
    'while not Path("enough").exists():\n    time.sleep(0.05)',
    LATE.strip(),
    "%flexworkshop close\n%flexcluster stop",
]
OPEN, HOOK, PANEL, GUESTS, BUSY, LATER, CLOSE = range(1, 8)

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def notebook(server, browser):
    browser.forget()
    if not (server.notebooks / "model").exists():
        shutil.copytree(MODEL, server.notebooks / "model")
    opened = lab.Notebook(server, browser)
    opened.open(server.write("workshop.ipynb", CELLS))
    for number in range(PANEL + 1):
        opened.run(number, timeout=240)
    yield opened
    opened.shut_down()


def board(notebook, cell):
    area = notebook.area(cell)
    return lab.wait_for(
        lambda: next(iter(notebook.browser.all(".fxm-workshop", area)), None), message=f"the board of {cell}"
    )


def put(browser, element, name, text):
    field = next(n for n in browser.all("input", element) if n.get_attribute("aria-label") == name)
    put_caret(browser, field, 0)
    browser.press(text)


def test_a_guest_who_joins_appears_and_every_control_is_reached_and_named(notebook, browser):
    panel = board(notebook, PANEL)
    lab.wait_for(lambda: "Nobody has joined yet." in panel.text, message="the empty workshop")
    assert "%flexcluster join 127.0.0.1:" in panel.text
    notebook.run(GUESTS)
    panel = board(notebook, PANEL)
    lab.wait_for(lambda: {"Drop ann", "Drop ben"} <= labels(browser, panel), message="the guests")
    lab.wait_for(lambda: browser.all("td", panel)[1].text == "1", message="ann's run")
    assert not browser.all("img", panel), "what a guest typed is text"
    names = [one["name"] for one in tour(browser, panel)]
    assert names == [
        "Pause", "Drop ann", "Drop ben", "Limits to change", "Change limits", "Hook to send",
        "Send to everyone", "Activation to show", "Show to everyone", "Site to collect", "Statistic",
        "Collect from all",
    ]  # fmt: skip
    assert [one for one in tour(browser, panel) if one["outline"].startswith("none")] == []


def labels(browser, element):
    return {n.get_attribute("aria-label") for n in browser.all("button", element)}


def test_the_buttons_do_what_they_say_also_while_a_cell_runs(notebook, browser):
    panel = board(notebook, PANEL)
    enough = notebook.server.notebooks / "enough"
    enough.unlink(missing_ok=True)
    notebook.start(BUSY)
    press(browser, panel, "Pause")
    lab.wait_for(lambda: "Paused: no more runs begin." in said(browser, panel), message="the pause")
    assert browser.all("[data-state=paused]", panel)
    assert not notebook.executed(BUSY), "the cell runs on"
    assert browser.js("return document.activeElement.textContent") == "Resume", "the focus is not lost"
    press(browser, panel, "Resume")
    lab.wait_for(lambda: browser.all("[data-state=open]", panel), message="going on")
    enough.touch()
    lab.wait_for(lambda: notebook.executed(BUSY), message="the cell's end")
    put(browser, panel, "Limits to change", "runs=7" + Keys.ENTER)
    lab.wait_for(lambda: "runs=7" in panel.text, message="the limit")
    press(browser, panel, "Send to everyone")
    lab.wait_for(lambda: said(browser, panel) == "The owner offers the hook half.", message="the offer")
    put(browser, panel, "Activation to show", 'run["model.layers.1"]' + Keys.ENTER)
    lab.wait_for(lambda: "The owner shows model.layers.1:output" in said(browser, panel), message="the view")
    put(browser, panel, "Activation to show", "+" + Keys.ENTER)
    lab.wait_for(lambda: said(browser, panel).startswith("InputError"), message="the refusal")
    put(browser, panel, "Site to collect", "model.layers.1" + Keys.ENTER)
    lab.wait_for(lambda: "1 of " in said(browser, panel), message="what was collected")
    assert "█" in panel.text


def test_all_text_is_readable_in_both_themes(notebook, browser):
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        notebook.theme(theme)
        panel = board(notebook, PANEL)
        found = browser.contrasts(panel)
        assert len(found) >= 10
        assert found[0][0] >= 4.5, (theme, found[:5])
        browser.screenshot(f"workshop_{theme.split()[1].lower()}", notebook.area(PANEL))


def test_dropping_a_guest_asks_once(notebook, browser):
    panel = board(notebook, PANEL)
    drop = next(b for b in browser.all("button", panel) if b.get_attribute("aria-label") == "Drop ben")
    browser.js("arguments[0].focus()", drop)
    browser.press(Keys.SPACE)
    lab.wait_for(lambda: drop.text == "Drop for good?", message="the question")
    browser.press(Keys.TAB)
    lab.wait_for(lambda: drop.text == "Drop", message="who goes on has said no")
    browser.js("arguments[0].focus()", drop)
    browser.press(Keys.SPACE, Keys.SPACE)
    lab.wait_for(lambda: "Drop ben" not in labels(browser, panel), message="ben to be out")
    lab.wait_for(lambda: "ben is out" in said(browser, panel), message="what became of him")


def test_what_is_sent_appears_in_a_guests_notebook_by_itself_and_is_taken_by_a_key(notebook, browser):
    notebook.run(LATER)
    address = (notebook.server.notebooks / "address").read_text()
    cells = [f"%load_ext flexmagic\n%flexcluster join {address} --as cleo", MINE_NOW.strip()]
    notebook.server.write("guest.ipynb", cells)
    browser.js_async("await window.jupyterapp.commands.execute('docmanager:open', {path: 'guest.ipynb'})")
    lab.wait_for(
        lambda: notebook.count() == 2 and notebook.status() == "idle", message="the guest's notebook"
    )
    notebook.run(0)
    mine = board(notebook, 0)
    lab.wait_for(lambda: "The owner offers the hook half." in mine.text, message="what was sent before")
    assert "late" not in mine.text
    (notebook.server.notebooks / "now").touch()
    lab.wait_for(lambda: "The owner offers the hook late." in mine.text, 30, "what is sent now")
    assert browser.contrasts(mine)[0][0] >= 4.5
    browser.screenshot("workshop_guest", notebook.area(0))
    take = [b for b in browser.all("button", mine) if b.text == "Take it as a cell"]
    browser.js("arguments[0].focus()", take[-1])
    browser.press(Keys.SPACE)
    lab.wait_for(lambda: notebook.count() == 3, message="the new cell")
    wanted = "%flexhook model.layers.2.mlp --do zero --name late"
    lab.wait_for(lambda: notebook.source(1) == wanted, message="its text")
    assert "mine: []" in str(notebook.run(2)), "nothing is registered before the guest runs it"
    notebook.run(1)
    assert "mine: ['late']" in str(notebook.run(2))
    notebook.shut_down()
    browser.js_async("await window.jupyterapp.commands.execute('docmanager:open', {path: 'workshop.ipynb'})")
    lab.wait_for(lambda: notebook.count() == len(CELLS), message="the owner's notebook again")


def test_a_workshop_that_is_closed_leaves_a_panel_that_says_so(notebook, browser):
    notebook.run(CLOSE)
    panel = board(notebook, PANEL)
    lab.wait_for(lambda: browser.all("[data-state=closed]", panel), message="the end")
    assert button(browser, panel, "Pause").get_attribute("disabled")
    saved = str(notebook.outputs(PANEL))
    assert "last error" in saved, "the saved notebook keeps a table"
