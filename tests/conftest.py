"""The suite in two halves, which two processes can run at the same time: what has engines, and the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

ENGINES = Path(__file__).parent / "engines"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """One process has all tests that share engines: they are started once."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        half = "engines" if ENGINES in item.path.parents else "rest"
        item.add_marker(pytest.mark.xdist_group(half))
