"""The Cancel button in a real JupyterLab: its click arrives while the cell runs."""

import json

import lab
from selenium.webdriver.common.by import By

CELL = """
import threading
from flexmagic.client.waiting import Waited
from flexmagic.magics.status_line import waiting

cancelled = threading.Event()
with waiting(get_ipython(), "Working", quiet=0.5, cancel=cancelled.set) as line:
    while not cancelled.wait(0.05):
        line.tick(Waited(0.0, {}))
print("it was cancelled")
"""


def test_a_click_on_cancel_ends_what_a_cell_waits_for_and_the_button_goes(server, browser):
    browser.forget()
    notebook = lab.Notebook(server, browser)
    notebook.open(server.write("cancel.ipynb", [CELL]))
    notebook.start(0)

    def buttons():
        return notebook.area(0).find_elements(By.CSS_SELECTOR, "button.jupyter-button")

    lab.wait_for(buttons, 60, "the button")
    assert not notebook.executed(0)
    buttons()[0].click()
    lab.wait_for(lambda: notebook.executed(0), 30, "the cell to end")
    notebook.check(0)
    notebook.wait_output(0, "it was cancelled", 10)
    lab.wait_for(lambda: not buttons(), 10, "the button to go")
    assert "widget-view" not in json.dumps(notebook.outputs(0))
    notebook.shut_down()
