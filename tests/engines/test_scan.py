"""Shapes for an input that nobody computed: those of a run with it."""

import pytest

from flexmagic import InputError, SiteError

from .conftest import MODEL, PROMPT, clear
from .test_magics import desk, failing, shell, typed  # noqa: F401 - fixtures

pytestmark = pytest.mark.engines

TEXTS = ["The capital of France is", "The capital of Italy is"]


@pytest.mark.parametrize("way", [{"tp": 2}, {"fsdp": 2}, {"pp": 2}])
def test_shapes_are_those_of_a_run(session, way):
    session.load(MODEL, **way, **({} if "pp" in way else {"attn": "eager"}))
    view = session._cluster.client[:]
    view.execute("calls = []\nhandle = model.register_forward_hook(lambda *a: calls.append(1))", block=True)
    scan = session.scan(TEXTS)
    assert view["calls"] == [[], []]
    view.execute("handle.remove()", block=True)
    run = session.run(TEXTS, capture=["*", "model.*", "model.layers.*", "model.layers.*.{mlp,self_attn}.*"])
    assert len(run.sites) > 30
    for site in run.sites:
        assert (scan[site].shape, scan[site].dtype) == (run[site].shape, run[site].dtype), site
    clear(session)


def test_a_pattern_chooses_and_a_wrong_one_is_said(loaded):
    scan = loaded.scan([1, 2, 3], "model.layers.*.mlp")
    assert scan.sites == [f"model.layers.{n}.mlp:output" for n in range(4)]
    assert scan["model.layers.1.mlp"].shape == (1, 3, 256)
    assert "1 × 3 × 256" in repr(scan)
    with pytest.raises(SiteError, match="Did you mean"):
        loaded.scan([1], "model.layers.*.mpl")
    with pytest.raises(InputError, match="outside the vocabulary"):
        loaded.scan([10**6])


def test_as_a_magic(desk):  # noqa: F811
    scan = typed(desk, f'%flexscan "{PROMPT}" --sites model.layers.1.self_attn lm_head')
    assert "lm_head:output" in scan.sites
    assert "whole shape" in typed.said
    assert "Give a prompt" in failing(desk, "%flexscan")
