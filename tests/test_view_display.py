"""Showing a tensor: in a terminal, in an executed notebook, and in what it is converted to."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexmagic.errors import ClusterError
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.display import show

ROOT = str(Path(__file__).resolve().parents[1])
CELL = """
import numpy as np
from flexmagic.errors import ClusterError
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.display import show
x = np.arange(48, dtype="float32").reshape(1, 6, 8)
tokens = ["</script>", "<img src=x onerror=alert(1)>", "\\u202eevil", " a", "b", "c"]
info = info_of(x, site="model.layers.3.mlp:output", dims=("batch", "seq", "hidden"))
show(ArraySource(x, info, {1: tokens}));
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after nbclient with its default settings, which store widget state."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    folder = tmp_path_factory.mktemp("executed")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    env = {**os.environ, "PYTHONPATH": ROOT, "IPYTHONDIR": str(folder / "ipython")}
    client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=60)
    client.execute(env=env, cwd=str(folder))
    path = folder / "executed.ipynb"
    nbformat.write(notebook, path)
    return path, notebook


def test_a_terminal_gets_text(capsys):
    x = np.zeros((2, 3))
    assert show(ArraySource(x, info_of(x, site="mlp"))) is None
    assert capsys.readouterr().out.startswith("mlp\n  (dim0 2, dim1 3) | float64")


def test_a_failed_read_is_a_sentence(capsys):
    class Dead(ArraySource):
        def stats(self):
            raise ClusterError("rank 1 died. Next: %flexcluster recover")

    show(Dead(np.zeros((2, 3))))
    assert "ClusterError: rank 1 died. Next: %flexcluster recover" in capsys.readouterr().out


def test_statistics_are_asked_for_once(capsys):
    class Counting(ArraySource):
        asked = 0

        def stats(self):
            self.asked += 1
            return super().stats()

    one = Counting(np.zeros((2, 3)))
    show(one)
    assert one.asked == 1


def test_three_outputs_in_a_row_each_with_text(executed):
    _, notebook = executed
    live, header, still = (o["data"] for o in notebook.cells[0].outputs)
    assert set(live) == {"application/vnd.jupyter.widget-view+json", "text/plain"}
    assert live["text/plain"] == ""
    assert set(header) == {"text/plain"}
    assert header["text/plain"].startswith("model.layers.3.mlp:output")
    assert set(still) == {"image/png", "text/plain"}
    assert base64.b64decode(still["image/png"]).startswith(b"\x89PNG")
    assert "NaN 0" in still["text/plain"]
    assert notebook.cells[0].outputs[2]["metadata"]["image/png"]["width"] == 824


def test_the_stored_widget_state_holds_no_data(executed):
    _, notebook = executed
    states = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    (view,) = (s for s in states.values() if s["model_module"] == "anywidget")
    assert "buffers" not in view or not view["buffers"]
    assert len(str(view)) < 80_000


@pytest.mark.parametrize("form", ["html", "markdown"])
def test_converted_notebooks_show_picture_and_header(executed, form, tmp_path):
    pytest.importorskip("nbconvert")
    path, _ = executed
    subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", form, "--output-dir", str(tmp_path), str(path)],
        check=True,
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    (page,) = tmp_path.glob("executed.*[lm][ld]" if form == "html" else "executed.md")
    text = page.read_text("utf-8")
    assert "model.layers.3.mlp:output" in text
    if form == "html":
        assert 'src="data:image/png;base64,' in text
        body = text[text.index("<body") :]
        assert "<img src=x" not in body
    else:
        (picture,) = re.findall(r"!\[png\]\((.*?)\)", text)
        assert (tmp_path / picture).stat().st_size > 5000
