"""The name that a cursor stands in."""

import pytest

from flexmagic.magics.inspection import site_at


@pytest.mark.parametrize(
    ("code", "site"),
    [
        ("%%flexhook model.layers.3.m|lp --name damp\nx *= 2", "model.layers.3.mlp"),
        ("%%flexhook model.norm, model.layers.*.mlp:input|", "model.layers.*.mlp:input"),
        ("run = %flexrun 'text' --capture |model.norm", "model.norm"),
        ('1\nrun["model.no|rm"].shape', "model.norm"),
        ('run["model.layers.{2..3}.mlp|"]', "model.layers.{2..3}.mlp"),
        ("%%flexhook model.norm\nx.me|an()", ""),
        ("model.no|rm", ""),
        ("print(|", ""),
    ],
)
def test_sites_are_told_from_other_names(code, site):
    position = code.index("|")
    assert site_at(code.replace("|", ""), position) == site
