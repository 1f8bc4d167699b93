"""The `flexmagic` command, as a user calls it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest

from flexmagic.cli.main import main

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "demo_notebooks" / "model"


def flexmagic(
    *arguments: object, cwd: Path | None = None, seconds: float = 170
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flexmagic.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
    )


# --- options and mistakes ----------------------------------------------------------------------------


def test_the_version_is_the_packages_and_comes_without_heavy_imports(capsys):
    expected = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flexmagic {expected}\n"
    code = "import sys; from flexmagic.cli.main import main; main(['--version']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "IPython", "ipyparallel", "jupyter_client"} & set(done.stdout.split())


def test_without_a_command_it_says_which_there_are(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "demo" in said
    assert "kernel" in said


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--nonsense"], "--nonsense"),
        (["dmo"], "dmo"),
        (["demo", "--engines", "two"], "two"),
        (["demo", "--engines", "0"], "at least 1"),
        (["demo", "--engine", "2"], "--engine"),
        (["demo", "--model", "no/such/place"], "no/such/place"),
        (["kernel"], "action"),
        (["kernel", "install", "--user", "--sys-prefix"], "not allowed with"),
        (["kernel", "install", "--name", "a/b"], "a/b"),
        (["kernel", "uninstall", "--name", "never-installed"], "never-installed"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(arguments, word):
    done = flexmagic(*arguments)
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("flexmagic")
    assert "Traceback" not in done.stderr + done.stdout


def test_outside_a_checkout_the_demo_says_what_it_misses(tmp_path, monkeypatch):
    import flexmagic as package
    from flexmagic.cli import demo
    from flexmagic.errors import InputError

    monkeypatch.setattr(package, "__file__", str(tmp_path / "site-packages" / "flexmagic" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"demo_notebooks/model is not here.*--model"):
        demo.run_demo()


def test_a_failure_that_is_not_the_users_is_one_sentence_too(monkeypatch, capsys):
    from flexmagic.cli import demo
    from flexmagic.errors import ClusterError

    def fail(**_):
        msg = "The engines could not be started."
        raise ClusterError(msg)

    monkeypatch.setattr(demo, "run_demo", fail)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "flexmagic: The engines could not be started.\n"


def test_the_kernel_is_installed_and_removed(tmp_path, capsys):
    where = tmp_path / "share" / "jupyter" / "kernels" / "mine"
    assert main(["kernel", "install", "--prefix", str(tmp_path), "--name", "mine"]) == 0
    assert str(where) in capsys.readouterr().out
    assert (where / "kernel.json").is_file()
    assert main(["kernel", "uninstall", "--prefix", str(tmp_path), "--name", "mine"]) == 0
    assert not where.exists()


# --- the demo ----------------------------------------------------------------------------------------


def percentages(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


@pytest.mark.engines
def test_the_demo_tells_its_story():
    done = flexmagic("demo", "--no-notebook")
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "2 engines" in said
    assert "When Mary and John went to the store" in said
    words = [percentages(line) for line in said.splitlines() if line.count("%") == 2]
    assert words[0][0] == max(before for before, _ in words)
    assert max(abs(before - after) for before, after in words) > 10, "the edit must be seen"
    assert "Shard(dim=2)" in said
    assert "Replicate" in said
    [largest] = re.findall(r"largest difference is ([\d.e+-]+) ", said)
    assert 0 < float(largest) < 1e-5
    assert done.stderr == ""


def test_the_demo_notices_a_difference(monkeypatch, capsys):
    import numpy as np

    from flexmagic.cli.one_process import largest_difference

    whole = np.linspace(-2, 4, 30).reshape(1, 5, 6)
    shard = whole.copy()
    shard[..., 3:] = 0
    assert largest_difference(whole, whole) == 0
    assert largest_difference(shard, whole) == 1
    assert np.isnan(largest_difference(whole * np.nan, whole))


@pytest.mark.engines
def test_the_readmes_script_runs():
    [script] = re.findall(
        r"```python\n(from flexmagic import Session.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\(1, \d+, 256\) \(1, \d+, \d+\)\n", done.stdout)


# --- the page ----------------------------------------------------------------------------------------

PIXEL = (
    "import base64\nfrom IPython.display import Image, display\n"
    "display(Image(base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg==')))"
)
WIDGET = """
from IPython.display import display
view = {"model_id": "0", "version_major": 2, "version_minor": 0}
still = {"text/html": "<b>the still picture</b>", "text/plain": "x"}
display({"application/vnd.jupyter.widget-view+json": view, **still}, raw=True)
"""


@pytest.fixture
def write_notebook(tmp_path):
    import nbformat

    def write(*cells: str) -> Path:
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        book.cells.insert(0, nbformat.v4.new_markdown_cell("# A title with $x^2$"))
        path = tmp_path / "book.ipynb"
        nbformat.write(book, path)
        return path

    return write


def test_the_page_needs_nothing_from_elsewhere(write_notebook, tmp_path):
    from bs4 import BeautifulSoup

    from flexmagic.cli.page import write_page

    notebook = write_notebook(
        "import os, sys\nprint(sys.executable, os.getcwd(), os.getpid())", PIXEL, WIDGET
    )
    before = notebook.read_bytes()
    page = tmp_path / "new" / "page.html"
    write_page(notebook, page)
    assert notebook.read_bytes() == before

    soup = BeautifulSoup(page.read_text(), "html.parser")
    said = soup.get_text()
    ran = re.search(rf"{re.escape(f'{sys.executable} {tmp_path}')} (\d+)", said)
    assert ran
    assert not psutil.pid_exists(int(ran[1])), "the notebook's kernel must end with it"
    assert "the still picture" in said
    assert soup.find("img", src=re.compile("^data:image/png;base64,"))
    fetched = [
        tag for tag in soup.find_all(["script", "link", "img", "iframe"]) if tag.get("src") or tag.get("href")
    ]
    assert all((tag.get("src") or tag.get("href")).startswith("data:") for tag in fetched)
    styles = "".join(tag.get_text() for tag in soup.find_all("style"))
    assert "@import" not in styles
    assert not re.search(r"url\(\s*['\"]?(?!data:|#)[a-z./]", styles)
    assert not re.search(
        r"import\s*\(|fetch\(|require\(", "".join(t.get_text() for t in soup.find_all("script"))
    )


def test_a_failing_cell_is_shown_with_its_error(write_notebook, tmp_path):
    from flexmagic.cli.page import write_page
    from flexmagic.errors import FlexError

    with pytest.raises(FlexError, match=r"(?s)book.ipynb failed in a cell.*ZeroDivisionError"):
        write_page(write_notebook("1 / 0"), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
