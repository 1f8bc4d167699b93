"""The demo notebooks run from top to bottom with nbclient's defaults and read well without a kernel."""

import os
import shutil
from pathlib import Path

import nbclient
import nbformat
import psutil
import pytest
from nbconvert import HTMLExporter, MarkdownExporter

NOTEBOOKS = Path(__file__).parents[2] / "demo_notebooks"
MARK = "FLEXMAGIC_NOTEBOOK_TESTS"
"""A variable in the environment of all that the notebooks start."""
FIRST = "01_first_hook.ipynb"

pytestmark = pytest.mark.engines


class Executed(dict):
    """Notebooks by name, each executed on a copy of the folder when it is first asked for."""

    def __init__(self, folder):
        super().__init__()
        self._folder = folder

    def __missing__(self, name):
        notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
        client = nbclient.NotebookClient(
            notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(self._folder)}}
        )
        env = {**os.environ, MARK: str(self._folder)}
        client.execute(env=env)  # a failing cell fails the test with its own traceback
        left = engine_processes(str(self._folder))
        assert not psutil.wait_procs(left, 15)[1], f"{name} left engines behind"
        self[name] = notebook
        return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    shutil.copytree(NOTEBOOKS / "model", folder / "model")
    return Executed(folder)


def engine_processes(mark):
    """What the notebooks of this test run started, whoever else runs engines on this machine."""
    return [
        p
        for p in psutil.process_iter(["cmdline", "environ"])
        if any("ipyparallel" in a for a in p.info["cmdline"] or [])
        and (p.info["environ"] or {}).get(MARK) == mark
    ]


def texts(notebook):
    """Everything a reader of the saved notebook can read in its outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


def test_the_first_notebook_has_twelve_cells_and_tells_its_story(executed):
    notebook = executed[FIRST]
    assert len(notebook.cells) == 12
    said = texts(notebook)
    assert "2 engines are up" in said
    assert "' Mary'" in said
    assert "model.layers.2.mlp.up_proj:output" in said
    assert "tp: Shard(dim=2)" in said
    assert "rank 1: mlp[384:768]" in said


def test_the_saved_notebook_is_small_and_holds_picture_text_and_live_view(executed):
    notebook = executed[FIRST]
    kinds = [set(o.data) for c in notebook.cells for o in c.get("outputs", []) if "data" in o]
    assert any("image/png" in kind for kind in kinds)
    assert any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds)
    assert all("text/plain" in kind for kind in kinds)
    assert len(nbformat.writes(notebook)) < 1_000_000


def test_it_reads_well_as_html_and_markdown_with_default_settings(executed):
    notebook = executed[FIRST]
    html, _ = HTMLExporter().from_notebook_node(notebook)
    assert "data:image/png;base64," in html
    assert "rank 1: mlp[384:768]" in html
    markdown, resources = MarkdownExporter().from_notebook_node(notebook)
    assert "rank 1: mlp[384:768]" in markdown
    assert any(name.endswith(".png") for name in resources["outputs"])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", [path.name for path in sorted(NOTEBOOKS.glob("*.ipynb"))])
def test_each_notebook_is_short_has_pictures_and_asserts_what_it_says(executed, name):
    notebook = executed[name]
    assert len(notebook.cells) < 25
    assert "assert " in notebook.cells[-1].source
    html, _ = HTMLExporter().from_notebook_node(notebook)
    assert "data:image/png;base64," in html
    assert len(nbformat.writes(notebook)) < 1_000_000


def test_no_notebook_is_shipped_with_outputs():
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs"), path.name
