"""A session's JupyterLab and Chromium; tests are skipped with a reason where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package; this folder has a helper

lab = pytest.importorskip("lab", reason="needs selenium and nbformat: pip install 'flexmagic[test]'")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser():
    if lab.find_browser() is None:
        pytest.skip(lab.MISSING)
    started = lab.Browser()
    yield started
    started.close()


@pytest.fixture(scope="session")
def server(browser):
    pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install 'flexmagic[lab]'")
    started = lab.LabServer()
    yield started
    started.close()
