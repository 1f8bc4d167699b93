"""Weights edited whole and in place, whatever holds them in parts; undone bit for bit."""

from __future__ import annotations

import pytest
import torch

from flexmagic import Session
from flexmagic.client.tenant import Host
from flexmagic.errors import HookError, ModelError

from .conftest import MODEL, relative
from .test_parameters import FSDP1

IDS = torch.randint(3, 1700, (2, 9), generator=torch.Generator().manual_seed(0))
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("how", ["tp", "fsdp", "dp", "pp", "fsdp1"])
def test_an_edit_is_that_of_one_process_and_undone_bit_for_bit(session, one_process, how):
    model = session.load_cell(FSDP1, fsdp=2) if how == "fsdp1" else session.load(MODEL, **{how: 2})
    before = session.run(IDS).logits.torch()
    made = model.edit([DOWN, "model.layers.{2,3}.mlp.up_proj.weight"], "x[:100] *= 0.5\nx = x.flip(1)")
    whole = {n: p.detach().clone() for n, p in one_process.named_parameters()}
    assert len(made.names) == 3
    edited = {}
    for name in made.names:
        edited[name] = whole[name].clone()
        edited[name][:100] *= 0.5
        edited[name] = edited[name].flip(1)
        assert torch.equal(model.parameter(name), edited[name]), name
    with torch.no_grad():
        want = torch.func.functional_call(one_process, edited, (IDS,)).logits
        plain = one_process(IDS).logits
    assert relative(want, plain) > 1e-2
    assert relative(session.run(IDS).logits.torch(), want) <= 1e-5
    made.undo()
    assert torch.equal(model.parameter(DOWN), whole[DOWN])
    assert torch.equal(session.run(IDS).logits.torch(), before)


def test_noise_does_not_depend_on_the_number_of_ranks(loaded):
    name = "model.layers.0.self_attn.k_proj.weight"
    before = loaded.model.parameter(name)
    noise = "x += torch.randn_like(x) * 0.01"
    loaded.model.edit(name, noise, seed=3)
    first = loaded.model.parameter(name)
    assert not torch.equal(first, before)
    loaded.model.undo()
    loaded.model.edit(name, noise, seed=3)
    assert torch.equal(loaded.model.parameter(name), first)
    loaded.model.undo()
    loaded.model.edit(name, noise, seed=4)
    assert not torch.equal(loaded.model.parameter(name), first)
    loaded.model.restore()
    assert torch.equal(loaded.model.parameter(name), before)


def test_edits_are_undone_in_order_and_restored_together(loaded):
    model, before = loaded.model, loaded.model.parameter(DOWN)
    first = model.edit(DOWN, "x *= 2")
    second = model.edit(DOWN, lambda x, h: x + (1 if h.site == DOWN else 0))
    assert torch.equal(model.parameter(DOWN), before * 2 + 1)
    assert [row[0] for row in model.edits.rows] == [str(first.number), str(second.number)]
    with pytest.raises(ModelError, match="undo that one first"):
        first.undo()
    model.undo()
    assert torch.equal(model.parameter(DOWN), before * 2)
    model.edit("model.norm.weight", "x.zero_()")
    model.restore()
    assert torch.equal(model.parameter(DOWN), before)
    assert float(model.parameter("model.norm.weight").abs().sum()) > 0
    with pytest.raises(ModelError, match="no edit to undo"):
        model.undo()


def test_code_that_fails_changes_nothing_on_any_rank(loaded):
    model, before = loaded.model, loaded.model.parameter(DOWN)
    for code, says in (
        ("x[1000000] = 0", "line 1, on every rank"),
        ("x *= 0\nif rank == 1: raise ValueError('here')", "line 2, on rank 1"),
        ("x += rank", "different values"),
        ("x = x[:3]", "shape and dtype must stay"),
        ("x = None", "not a tensor"),
    ):
        with pytest.raises(HookError, match=says):
            model.edit(DOWN, code)
        assert torch.equal(model.parameter(DOWN), before), code
    with pytest.raises(HookError, match="syntax error"):
        model.edit(DOWN, "x *=")
    with pytest.raises(HookError, match="no code"):
        model.edit(DOWN, "# nothing")
    with pytest.raises(ModelError, match=r"Did you mean model.layers.1.mlp.down_proj.weight"):
        model.edit("model.layers.1.mlp.down_prj.weight", "x *= 2")
    assert not model.edits.rows


def test_a_session_that_attaches_lists_the_edits_and_undoes_them(loaded):
    model, before = loaded.model, loaded.model.parameter(DOWN)
    model.edit(DOWN, "x *= 2")
    model.edit("model.norm.weight", lambda x, h: x * 3)
    with Session.attach(loaded.cluster_name) as other:
        assert other.model.edits.rows == model.edits.rows
        assert [row[1] for row in other.model.edits.rows] == [DOWN, "model.norm.weight"]
        other.model.undo()
        other.model.undo()
        assert torch.equal(other.model.parameter(DOWN), before)
        assert not other.model.edits.rows
    loaded.model.restore()


HAND_CUT = """
import torch, torch.distributed as dist
from torch import nn
torch.manual_seed(0)

class Net(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.late = False

    def forward(self, x):
        out = self.down(torch.relu(self.up(x)))
        if self.up.out_features < 8:
            dist.all_reduce(out)
        return out

unsharded = lambda: torch.manual_seed(0) and Net(6, 8)
whole, model = unsharded(), Net(6, 4)
with torch.no_grad():
    model.up.weight.copy_(whole.up.weight[rank * 4:rank * 4 + 4])
    model.down.weight.copy_(whole.down.weight[:, rank * 4:rank * 4 + 4])
"""


def test_after_an_edit_plain_parts_are_still_known(session):
    """A new survey looks up where the parts stand, which what they were loaded with tells."""
    model = session.load_cell(HAND_CUT, tp=2)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    plain = session.run({"x": x}, capture="up")
    assert plain["up"].shape == (3, 8)
    before = model.parameter("up.weight")
    edit = model.edit("up.weight", "x[1::2] *= 5")
    model.update(session._calls.all("survey_for", {"x": x}))
    run = session.run({"x": x}, capture="up")
    edited = before.clone()
    edited[1::2] *= 5
    assert torch.equal(model.parameter("up.weight"), edited)
    assert relative(run["up"].torch(), x @ edited.T) <= 1e-5
    assert relative(run["up"].torch(), plain["up"].torch()) > 1e-2
    edit.undo()
    assert torch.equal(model.parameter("up.weight"), before)


def test_letting_go_of_the_model_puts_its_weights_back(session, one_process):
    cell = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(MODEL)!r}).to(device)
kept = model
"""
    model = session.load_cell(cell)
    model.edit("model.norm.weight", "x *= 3")
    name = "model.norm.weight"
    want = one_process.get_parameter(name).detach()
    assert torch.equal(model.parameter(name), want * 3)
    model.unwrap()
    session.load_cell("model = kept")
    assert torch.equal(session.model.parameter(name), want)


WRITTEN = f"""
import torch
from flexmagic.engine.distributed import local_part
from flexmagic.engine.slot import Slot
from flexmagic.engine.tree import parameters_of
with torch.no_grad():
    for name, parameter in parameters_of(Slot.runtime.model).items():
        if name in ({DOWN!r}, "model.norm.weight"):
            local_part(parameter).fill_(7)
"""


@pytest.mark.parametrize("how", ["tp", "fsdp", "dp", "pp"])
def test_weights_are_put_back_with_their_edits_or_not_at_all(session, tmp_path, how):
    model, gone_wrong = session.load(MODEL, **{how: 2}), tmp_path / "wrong"
    norm = "model.norm.weight"
    model.edit([DOWN, norm], "x *= 3")
    model.edit(
        norm, f"import os\nif os.path.exists({str(gone_wrong)!r}): raise ValueError('not now')\nx += 1"
    )
    edited = {name: model.parameter(name) for name in (DOWN, norm)}
    session._cluster.client[:].execute(WRITTEN, block=True)
    host = Host(session.cluster_name)
    gone_wrong.touch()
    with pytest.raises(ModelError, match=f"edit of the owner's could not .*{norm}: ValueError: not now"):
        host.put_back([DOWN, norm])
    for name in edited:
        assert bool((model.parameter(name) == 7).all()), "as they were, if not as they should be"
    gone_wrong.unlink()
    host.put_back([DOWN])
    assert torch.equal(model.parameter(DOWN), edited[DOWN])
    assert bool((model.parameter(norm) == 7).all()), "what is not named stays"
    host.put_back([norm])
    assert torch.equal(model.parameter(norm), edited[norm])
    host.close()
