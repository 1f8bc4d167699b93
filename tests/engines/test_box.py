"""Hooks in boxes on real engines: the same numbers as without, and what goes wrong in one stays there."""

import contextlib

import psutil
import pytest
import torch

from flexmagic import HookError
from flexmagic.engine.box_walls import available
from flexmagic.workshop.guest import Guest
from flexmagic.workshop.opening import open_workshop

from .conftest import PROMPT, relative

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(bool(available()), reason=available() or "boxes can be made"),
]

EDIT = "x[:, -1] *= 0.5\nx += 0.1 * torch.rand(())\nctx['top'] = x[0, -1].abs().max()\nprint('at', site)"


@pytest.fixture
def boxed(loaded, monkeypatch):
    monkeypatch.setattr(loaded.hooks, "boxed", True)
    return loaded


def test_a_boxed_hook_gives_what_it_gives_in_the_engine(loaded, monkeypatch, capsys):
    plain = loaded.run(PROMPT).logits.torch()
    loaded.hook("model.layers.1.mlp", EDIT, name="edit")
    free = loaded.run(PROMPT, capture="model.layers.*.mlp", seed=4)
    monkeypatch.setattr(loaded.hooks, "boxed", True)
    loaded.hook("model.layers.1.mlp", EDIT, name="edit")
    run = loaded.run(PROMPT, capture="model.layers.*.mlp", seed=4)
    assert relative(free.logits.torch(), plain) > 1e-3
    assert torch.equal(run.logits.torch(), free.logits.torch())  # random numbers included
    assert torch.equal(run.context["top"], free.context["top"])
    assert capsys.readouterr().out.count("at model.layers.1.mlp") == 2


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("while True:\n    pass", "a loop without end"),
        ("import ctypes\nctypes.string_at(0)", "its process ended"),
        ("x *= 2\nopen('/etc/passwd')", r"(?s)line 2.*Operation not permitted"),
        ("x += model.lm_head.weight.sum()", "model"),
    ],
)
def test_what_goes_wrong_in_a_box_is_an_error_of_the_hook(boxed, code, said):
    before = boxed.run(PROMPT).logits.torch()
    boxed.hook("model.layers.2", code, name="bad")
    with pytest.raises(HookError, match=said):
        boxed.run(PROMPT)
    boxed.hooks.disable("bad")
    assert torch.equal(boxed.run(PROMPT).logits.torch(), before)
    boxed.hook("model.layers.2", "x *= 2", name="bad")
    assert relative(boxed.run(PROMPT).logits.torch(), before) > 1e-3


def test_what_has_no_walls_around_it_is_refused(boxed):
    with pytest.raises(HookError, match="not a function"):
        boxed.hook("model.layers.2", lambda x, h: x * 2, name="function")
    with pytest.raises(HookError, match="A condition is code"):
        boxed.hook("model.layers.2", "x *= 2", name="sometimes", when="index > 1")
    boxed.hook("model.layers.2", "", name="look")  # nothing runs
    boxed.hook("model.layers.2", "x *= 2", name="twice")
    with pytest.raises(HookError, match="gradients do not pass"):
        boxed.run(PROMPT, backward="-logits[0, -1].log_softmax(-1)[5]", capture="model.layers.1:grad_output")


def test_a_workshop_begins_with_its_boxes_before_anybody_needs_one(loaded, tmp_path):
    def begun():
        engines = [psutil.Process(seat.pid) for seat in loaded._calls.ranks.seats]
        return [[p.pid for p in e.children() if "box_start" in " ".join(p.cmdline())] for e in engines]

    loaded._calls.all("end_boxes")
    assert begun() == [[], []]
    server = open_workshop(loaded.cluster_name, journal=tmp_path / "log.jsonl")
    with contextlib.closing(server):
        server.workshop.check_weights()  # the engines have come to it, after what was asked of them before
        here = begun()
        assert [len(of_engine) for of_engine in here] == [1, 1]
        ann = Guest.join(server.lines[""].split()[-1], "ann")
        ann.hook("model.layers.1.mlp", EDIT, name="edit")
        assert ann.run(PROMPT).context
        assert begun() == here, "it is the one that the hook's box was made of"
    assert begun() == [[], []]
    server = open_workshop(loaded.cluster_name, trusted=True, journal=tmp_path / "log.jsonl")
    with contextlib.closing(server):
        server.workshop.check_weights()
        assert begun() == [[], []]
