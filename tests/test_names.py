"""Completing names of modules."""

import pytest

from flexmagic.layout.names import Names

LAYERS = [f"model.layers.{n}{rest}" for n in range(12) for rest in ("", ".mlp", ".mlp.up_proj", ".self_attn")]
NAMES = Names(["", "model", "model.embed_tokens", "model.layers", *LAYERS, "model.norm", "lm_head"])


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("", ["model", "lm_head"]),
        ("mo", ["model"]),
        ("model.", ["model.embed_tokens", "model.layers", "model.norm"]),
        ("model.la", ["model.layers"]),
        ("model.layers.3.m", ["model.layers.3.mlp"]),
        ("model.layers.3.mlp", ["model.layers.3.mlp", "model.layers.3.mlp.up_proj"]),
        ("model.layers.*.m", ["model.layers.*.mlp"]),
        ("model.layers.{2..5}.s", ["model.layers.{2..5}.self_attn"]),
        ("model.layers.{2", []),
        ("model.layers.{2..5,.m", []),
        ("model.nowhere.x", []),
    ],
)
def test_the_next_part_is_offered(typed, offered):
    assert NAMES.below(typed) == offered


def test_numbers_come_in_their_order_after_a_star_for_all_of_them():
    offered = NAMES.below("model.layers.")
    assert offered == [f"model.layers.{part}" for part in ("*", *range(12))]
    assert NAMES.below("model.layers.1")[:3] == [f"model.layers.{n}" for n in (1, 10, 11)]


def test_a_name_is_there_or_not():
    assert "model.layers.*.mlp" in NAMES
    assert "model.layers.12.mlp" not in NAMES
