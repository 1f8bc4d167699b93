"""The scripts that measure run, and say what they are there to say."""

from __future__ import annotations

import pytest

from . import loading


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["tp", "fsdp", "pp"])
def test_no_rank_holds_more_than_its_part(tmp_path, strategy):
    size = loading.make_model(tmp_path, 0.25)
    own, _ = loading.measure(strategy, tmp_path)
    assert all(parameters <= 0.6 * size for parameters in own)
    assert sum(own) >= size
