"""Layers and steps to choose from: opened when chosen, side by side, and asked for in messages."""

import numpy as np
import pytest

from flexmagic.errors import InputError
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.family import Family
from flexmagic.view.growing import GrowingText
from flexmagic.view.picture import LAYERS, STEPS
from flexmagic.view.scale import MASKED
from flexmagic.view.widget import TensorView


def made(step, layer):
    x = np.full((1, 5 if step == 0 else 1, 4), 10.0 * step + layer, dtype=np.float32)
    info = info_of(x, site=f"m.{layer}", dims=("batch", "seq", "hidden"), step=step)
    return ArraySource(x, info)


def opener(step, layer, opened):
    def open_one():
        opened.append((step, layer))
        return made(step, layer)

    return open_one


def generation(opened, at=2):
    """Layers 0 and 1 in steps 0 to 2, of which step 1 has no layer 1."""
    steps = {
        f"step {n}": lambda n=n: {f"m.{k}": opener(n, k, opened) for k in (0, 1) if (n, k) != (1, 1)}
        for n in range(3)
    }
    return {
        "source": made(at, 0), "siblings": steps[f"step {at}"](), "selected": "m.0",
        "steps": steps, "step": f"step {at}",
    }  # fmt: skip


def asked(view, **question):
    answers = []
    view.send = lambda content, buffers=None: answers.append((content, buffers or []))
    view._answer(view, {"view": "v", "id": 1, "kind": "look", "width": 900, **question}, [])
    return answers[-1]


def test_a_family_opens_what_is_chosen_once():
    opened = []
    family = Family(**generation(opened))
    assert (family.layers, family.steps) == (["m.0", "m.1"], ["step 0", "step 1", "step 2"])
    assert (family.layer, family.step) == (0, 2)
    assert opened == []
    for _ in range(2):
        assert family.at(1, 0).read((0, 0, 0)) == 1
    assert opened == [(0, 1)]
    with pytest.raises(InputError, match=r"m\.1 was not captured in step 1"):
        family.at(1, 1)


def test_steps_are_chosen_in_a_view():
    view = TensorView(**generation([]))
    content, _ = asked(view)
    assert content["steps"] == ["step 0", "step 1", "step 2"]
    assert (content["step"], content["layer"]) == (2, 0)
    assert [LAYERS, "layer"] in content["facets"]
    assert [STEPS, "step"] in content["facets"]
    content, _ = asked(view, step=0, layer=1)
    assert content["panes"][0]["extent"] == [5, 4]
    assert dict(content["stats"])["max"] == "1"
    content, _ = asked(view, step=1, layer=1)
    assert content["text"] == "m.1 was not captured in step 1."
    assert asked(view, step=77)[0]["step"] == 2


def test_steps_stand_side_by_side_whatever_their_size():
    content, buffers = asked(TensorView(**generation([])), facet=STEPS)
    assert [pane["title"] for pane in content["panes"]] == ["step 0", "step 1", "step 2"]
    assert [pane["extent"] for pane in content["panes"]] == [[5, 4], [1, 4], [1, 4]]
    assert [len(codes) for codes in buffers[::2]] == [20, 4, 4]
    assert content["caption"][0].startswith("Side by side along the steps: all 3.")
    assert len(set(buffers[0])) == 1
    assert len({buffers[0][0], buffers[2][0], buffers[4][0]}) == 3  # one scale for all: 0, 10, 20


def test_a_growing_text_is_looked_at_as_it_is_by_now():
    text = GrowingText("generated")
    view = TensorView(text, selected="generated")
    content, _ = asked(view)
    assert content["empty"] == "Waiting for the first token."
    assert content["growing"]
    text.grow([(" Mary", 0.5)])
    assert dict(asked(view)[0]["stats"])["max"] == "0.5"
    text.grow([(" Mary", 0.5), ("</script>", None), (".", 0.25)])
    content, (codes, _) = asked(view)
    assert content["panes"][0]["labels"]["cols"] == ["\u2423Mary", "</script>", "."]
    assert dict(content["stats"])["mean"] == "0.375"
    assert codes[1] == MASKED
    assert content["growing"]
    text.end()
    assert not asked(view)[0]["growing"]
