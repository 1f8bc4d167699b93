"""Hooks and captures of one run on one rank: plain torch hooks are the reference."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from flexmagic.engine.captures import Captures
from flexmagic.engine.code import HookSource, build
from flexmagic.engine.exchange import Exchange
from flexmagic.engine.instrument import ActiveHook, Instrument
from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site

FIRST, LAST, TUPLE, KEYWORD = (
    Site("first"),
    Site("last"),
    Site("pair", leaf="[1]"),
    Site("last", "input", ".x"),
)


class Pair(nn.Module):
    def forward(self, x):
        return x, x * 2


class Last(nn.Linear):
    def forward(self, *, x):
        return super().forward(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.pair, self.last = nn.Linear(3, 3), Pair(), Last(3, 2)

    def forward(self, x):
        return {"out": self.last(x=self.pair(self.first(x))[1])}


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def model():
    return Model().eval()


ONE, TWO = ("session", 1), ("session", 2)
X = torch.arange(6.0).reshape(2, 3)


def rule(site, width=3):
    return Rule(site, (Dim("batch"), Dim("feature", width)), "float32", Mesh(("tp",), (1,)), ranks=(0,))


SHARED = Site("pair", leaf="[0]")
RULES = {s: rule(s) for s in (FIRST, TUPLE, SHARED, KEYWORD)} | {LAST: rule(LAST, 2)}


def hooked(group, model, hooks=(), capture=(), *, seed=0, captures=None, run=ONE):
    """Run the model on X under hooks given as (site, body) or (site, body, local)."""
    active = []
    for at, (site, body, *local) in enumerate(hooks):
        source = HookSource(f"h{at}", 1, body, local=bool(local and local[0]))
        active.append(ActiveHook(source, build(source, {"torch": torch}), frozenset([site])))
    instrument = Instrument(
        model,
        RULES,
        Exchange(group, 0),
        captures if captures is not None else Captures(),
        run=run,
        seed=seed,
        hooks=active,
        capture=frozenset(capture),
    )
    with torch.no_grad(), instrument:
        out = model(X)["out"]
    return out, instrument


def reference(model, site, edit):
    def after(_m, _a, out):
        return edit(out.clone())

    handle = model.get_submodule(site.path).register_forward_hook(after)
    with torch.no_grad():
        out = model(X)["out"]
    handle.remove()
    return out


@pytest.mark.parametrize(
    ("body", "edit"),
    [
        ("x[:, -1] *= 0.5", lambda x: torch.cat([x[:, :-1], x[:, -1:] * 0.5], 1)),
        ("x = x + 1", lambda x: x + 1),
        ("return x.flip(0)", lambda x: x.flip(0)),
    ],
)
@pytest.mark.parametrize("local", [False, True])
def test_an_edit_equals_the_same_torch_hook(group, model, body, edit, local):
    plain = model(X)["out"]
    out, instrument = hooked(group, model, [(FIRST, body, local)])
    assert not torch.equal(out, plain)
    assert torch.equal(out, reference(model, FIRST, edit))
    assert [e.edited for e in instrument.outcome.edits] == [True]


def test_reading_changes_nothing_and_says_so(group, model):
    plain = model(X)["out"]
    out, instrument = hooked(group, model, [(FIRST, "ctx['mean'] = float(x.mean())")], [LAST])
    assert torch.equal(out, plain)
    assert [e.edited for e in instrument.outcome.edits] == [False]
    assert instrument.context["mean"] == pytest.approx(model.first(X).mean().item())


def test_hooks_of_a_site_act_in_order(group, model):
    one, _ = hooked(group, model, [(FIRST, "x += 1"), (FIRST, "x *= 10", True)])
    other, _ = hooked(group, model, [(FIRST, "x *= 10"), (FIRST, "x += 1", True)])
    assert torch.equal(one, reference(model, FIRST, lambda x: (x + 1) * 10))
    assert torch.equal(other, reference(model, FIRST, lambda x: x * 10 + 1))
    assert not torch.equal(one, other)


def test_an_element_of_a_tuple_and_a_keyword_input_can_be_edited(group, model):
    plain = model(X)["out"]
    by_tuple, _ = hooked(group, model, [(TUPLE, "x *= 0")])
    by_input, _ = hooked(group, model, [(KEYWORD, "x *= 0")])
    assert not torch.equal(by_tuple, plain)
    assert torch.equal(by_tuple, by_input)
    assert torch.equal(by_tuple, model.last.bias.expand(2, 2))


def test_captures_hold_the_value_after_all_hooks(group, model):
    captures = Captures()
    hooked(group, model, [(FIRST, "x += 1")], [FIRST, LAST], captures=captures)
    assert torch.equal(captures.get(ONE, FIRST), model.first(X) + 1)
    assert captures.get(ONE, LAST).shape == (2, 2)


def test_an_edit_in_place_does_not_reach_what_the_module_shares(group, model):
    """An identity hands out its own input: editing the copy must not change the other use of it."""
    captures = Captures()
    hooked(group, model, [(SHARED, "x *= 0", True)], [FIRST], captures=captures)
    assert torch.equal(captures.get(ONE, FIRST), model.first(X))


def test_an_error_is_recorded_the_value_passes_on_and_no_hook_stays(group, model):
    plain = model(X)["out"]
    out, instrument = hooked(group, model, [(FIRST, "x *= 0\nx += nope", True)])
    assert torch.equal(out, plain)
    (found,) = instrument.outcome.failures
    assert (found.kind, found.line, found.site) == ("NameError", 2, "first:output")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("x = x[:, :2]", "float32[2, 3] to float32[2, 2]"),
        ("x = x.double()", "float32[2, 3] to float64[2, 3]"),
        ("x = 'text'", "str"),
        ("return x.tolist()", "list"),
    ],
)
def test_a_changed_shape_or_dtype_names_both(group, model, body, said):
    _, instrument = hooked(group, model, [(FIRST, body)])
    assert said in instrument.outcome.failures[0].message


def test_draws_depend_on_the_seed_alone_and_leave_the_generators_as_they_were(group, model):
    body = "import random, numpy\nx += torch.randn_like(x) + numpy.random.rand() + random.random()"
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    one, _ = hooked(group, model, [(FIRST, body)], seed=1)
    assert (torch.rand(1), np.random.rand(), random.random()) == before  # noqa: NPY002
    again, _ = hooked(group, model, [(FIRST, body)], seed=1)
    other, _ = hooked(group, model, [(FIRST, body)], seed=2)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_what_hooks_print_is_kept_by_site(group, model, capsys):
    _, instrument = hooked(group, model, [(FIRST, "print('shape', tuple(x.shape))")])
    assert instrument.outcome.printed == [("first:output", "h0", "shape (2, 3)\n")]
    assert capsys.readouterr().out == ""


def test_a_module_called_twice_is_counted(group):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, x):
            return {"out": self.first(self.first(x))}

    _, instrument = hooked(group, Twice().eval(), [], [FIRST])
    assert instrument.outcome.calls[FIRST] == 2


def test_an_overwritten_tensor_is_dropped_once_and_copied_from_then_on(group):
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, x):
            h = self.first(x)
            kept = h.clone()
            h.mul_(0)
            return {"out": kept}

    captures, model = Captures(), Overwrites().eval()
    hooked(group, model, [], [FIRST], captures=captures)
    assert captures.finish(ONE) == {}
    with pytest.raises(Exception, match="no capture"):
        captures.get(ONE, FIRST)
    hooked(group, model, [], [FIRST], captures=captures, run=TWO)
    assert torch.equal(captures.finish(TWO)[FIRST].tensor, model.first(X))


def test_the_oldest_run_is_evicted_first_and_says_so():
    captures = Captures(budget=100)
    for run in (ONE, TWO):
        captures.keep(run, FIRST, torch.zeros(20))
        captures.finish(run)
    assert captures.get(TWO, FIRST).shape == (20,)
    with pytest.raises(Exception, match="evicted"):
        captures.get(ONE, FIRST)
    captures.drop(TWO)
    assert captures.nbytes == 0


def test_the_oldest_step_of_a_generation_is_evicted_first_and_all_go_together():
    captures = Captures(budget=200)
    for step in range(3):
        captures.keep((*ONE, step), FIRST, torch.zeros(20))
        captures.finish((*ONE, step))
    captures.remember(ONE, {"saved": 1})
    with pytest.raises(Exception, match="run 1, step 0, was evicted"):
        captures.get((*ONE, 0), FIRST)
    assert captures.get((*ONE, 2), FIRST).shape == (20,)
    captures.drop((*ONE, 1))
    assert captures.context(ONE) == {"saved": 1}
    captures.drop(ONE)
    assert captures.nbytes == 0
    with pytest.raises(Exception, match="no longer held"):
        captures.context(ONE)


def test_a_write_after_the_run_is_noticed():
    captures, tensor = Captures(), torch.zeros(3)
    captures.keep(ONE, FIRST, tensor)
    captures.finish(ONE)
    tensor += 1
    with pytest.raises(Exception, match="wrote into"):
        captures.get(ONE, FIRST)


def test_retrieval_shares_memory_with_what_the_model_computed(group, model):
    captures, seen = Captures(), []
    handle = model.first.register_forward_hook(lambda _m, _a, out: seen.append(out.data_ptr()))
    hooked(group, model, [], [FIRST], captures=captures)
    handle.remove()
    assert captures.get(ONE, FIRST).data_ptr() == seen[0]
