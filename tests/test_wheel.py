"""The wheel holds what it needs and no more, and the README's first lines work from it."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "demo_notebooks" / "model"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT],
        check=True,
    )
    (made,) = folder.glob("*.whl")
    return made


def test_it_holds_the_two_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flexmagic", "flexmagic_kernel"}
    kinds = {Path(name).suffix for name in names if ".dist-info" not in name}
    assert kinds == {".py", ".js", ".css", ".png", ".svg", ".typed"}
    for source in (*ROOT.glob("flexmagic/**/*.py"), *ROOT.glob("flexmagic/view/static/*")):
        assert str(source.relative_to(ROOT)) in names
    assert wheel.stat().st_size < 1_000_000


@pytest.mark.engines
def test_the_readmes_first_lines_work_from_it(wheel, tmp_path):
    target = tmp_path / "site"
    install = ["install", "--quiet", "--no-deps", "--target", target]
    subprocess.run([sys.executable, "-m", "pip", *install, wheel], check=True)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[
        :3
    ]
    cells = [block.replace("demo_notebooks/model", str(MODEL)) for block in blocks]
    script = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "import flexmagic; print(flexmagic.__file__)\n"
        f"shell = InteractiveShell.instance()\nfor cell in {cells!r}:\n"
        "    shell.run_cell(cell).raise_error()\n"
        "print(shell.user_ns['run'].top(1).rows[0][0])\n"
        "shell.run_line_magic('flexcluster', 'stop')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target), "IPYTHONDIR": str(tmp_path / "ipython")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
    assert "Mary" in done.stdout
