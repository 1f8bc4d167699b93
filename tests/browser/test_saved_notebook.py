"""A saved notebook: converted and opened offline, or opened in JupyterLab without a kernel."""

import os
import subprocess
import sys

import lab
import nbclient
import nbformat
import pytest

CELL = """
import numpy as np
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.display import show
x = np.random.default_rng(0).normal(size=(1, 8, 64)).astype("float32")
show(ArraySource(x, info_of(x, site="model.layers.3.mlp:output", dims=("batch", "seq", "hidden"))));
"""


@pytest.fixture(scope="module")
def saved(server):
    """A notebook executed by nbclient with its default settings."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    env = {**os.environ, "PYTHONPATH": str(lab.ROOT), "IPYTHONDIR": str(server.home / "ipython")}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=60).execute(env=env)
    notebook.metadata.pop("kernelspec", None)  # so that it opens without a kernel
    path = server.notebooks / "saved.ipynb"
    nbformat.write(notebook, path)
    return path


def picture(browser):
    """Return (natural width, drawn width, distance to what stands above) of the picture shown."""
    return browser.js(
        "const i = [...document.querySelectorAll('img')].filter((i) => i.src.startsWith('data:image/png')"
        "  && i.getBoundingClientRect().width > 0);"
        "if (i.length !== 1 || !i[0].complete) return null;"
        "const r = i[0].getBoundingClientRect();"
        "return [i[0].naturalWidth, r.width, r.height]"
    )


@pytest.mark.slow
def test_the_converted_page_shows_picture_and_header_offline(saved, browser, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "html", "--output-dir", str(tmp_path), str(saved)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    browser.driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        browser.driver.get((tmp_path / "saved.html").as_uri())
        natural, drawn, height = lab.wait_for(lambda: picture(browser), 20, "the picture")
        assert natural == 1648
        assert drawn > 500
        header = browser.js(
            "const all = [...document.querySelectorAll('pre')];"
            "const pre = all.find((p) => p.textContent.startsWith('model.layers.3'));"
            "return pre && [pre.textContent, pre.getBoundingClientRect().bottom]"
        )
        assert "(batch 1, seq 8, hidden 64) | float32" in header[0]
        top = browser.js("return [...document.querySelectorAll('img')].pop().getBoundingClientRect().top")
        assert 0 <= top - header[1] < 60
        browser.screenshot("saved_html")
        assert height > 200
    finally:
        offline["offline"] = False
        browser.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)


def test_the_notebook_without_a_kernel_shows_the_picture(saved, server, browser):
    notebook = lab.Notebook(server, browser)
    notebook.open(saved)
    assert lab.wait_for(lambda: picture(browser), 20, "the picture")[0] == 1648
    assert "model.layers.3.mlp:output" in notebook.area(0).text
    browser.screenshot("saved_lab")
