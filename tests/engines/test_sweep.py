"""Traces that share a forward give what each gives alone; where they may not, each has its own forward."""

import pytest
import torch

from flexmagic import HookError, Session

from .conftest import MODEL, PROMPT, relative

pytestmark = pytest.mark.engines

TEXTS = ["The capital of France is", "The capital of Italy is"]
PATCH = """
h = model.layers[layer].output
h[1, position] = h[0, position] * 2
save.noise = torch.rand(3)
model.layers[3].mlp.up_proj.output[:, -1, :300] *= layer + torch.rand(())
save.p = model.output.logits[1, -1].softmax(-1)[5]
"""
OVER = {"layer": range(3), "position": [0, -1]}


@pytest.fixture
def forwards(loaded, monkeypatch):
    """How many traces each forward had since the last question."""
    seen, was = [], loaded._calls.all

    def counting(verb, *args, **kwargs):
        if verb in ("run", "run_sweep"):
            seen.append(len(args[2].sources) if verb == "run_sweep" else 1)
        return was(verb, *args, **kwargs)

    monkeypatch.setattr(loaded._calls, "all", counting)

    def asked():
        found = list(seen)
        seen.clear()
        return found

    return asked


def check_same(session, inputs, code=PATCH, over=OVER):
    alone = session.sweep(inputs, code, over, memory=0)
    together = session.sweep(inputs, code, over)
    for name in alone.runs[0].context:
        assert alone[name].std() > 0, name  # the cells differ
        assert relative(together[name], alone[name]) < 1e-5
    for one, other in zip(alone.runs, together.runs, strict=True):
        assert relative(other.logits.torch(), one.logits.torch()) < 1e-5
        assert other.ids == one.ids
        assert other.tokens == one.tokens
        assert other.logits.layout == one.logits.layout
    assert relative(alone.runs[0].logits.torch(), alone.runs[-1].logits.torch()) > 1e-2
    return alone, together


def test_traces_of_one_forward_are_as_each_alone(loaded, forwards):
    _, together = check_same(loaded, TEXTS)
    assert forwards() == [1] * 6 + [1, 6]
    assert (together["noise"][:, 0] == together["noise"][:, 1]).all()  # as of traces alone
    assert len({run.number for run in together.runs}) == 6
    small = loaded.sweep(TEXTS, PATCH, OVER, memory=2_500_000)
    counts = forwards()
    assert counts[0] == 1
    assert sum(counts) == 8  # one of those that begin later is beside them run alone
    assert 1 < max(counts) < 6
    assert relative(small["p"], together["p"]) < 1e-5


def test_what_is_not_of_rows_alone_has_a_forward_of_its_own(loaded, forwards):
    code = "angles = model.rotary_emb.output[0]\nangles *= k\nsave.p = model.output.logits[0, -1, :9]"
    found = loaded.sweep(TEXTS, code, {"k": [1.0, 0.5, 2.0]}, seed=3)
    assert forwards() == [1, 3, 1, 1]
    assert found["p"].std(0).max() > 1e-3
    one = loaded.trace(TEXTS, code, given={"k": 2.0})
    assert relative(found["p"][2], one.context["p"]) < 1e-5
    loaded.hook("model.layers.2", "x[0] *= 3", name="first row")
    forwards()
    loaded.sweep(TEXTS, PATCH, OVER)
    assert forwards() == [1] * 6


def test_a_trace_that_fails_says_so_as_alone(loaded, forwards):
    before = loaded.run(PROMPT).logits.torch()
    code = "h = model.layers[1].output\nif k == 2:\n    h[0, 0] = undefined\nh *= k"
    with pytest.raises(HookError, match=r"line 3(?s:.)*undefined") as caught:
        loaded.sweep(TEXTS, code, {"k": [1, 3, 2, 4]})
    assert "row" not in str(caught.value)
    assert torch.equal(loaded.run(PROMPT).logits.torch(), before)


@pytest.mark.parametrize("dims", [{"dp": 2}, {"fsdp": 2}])
def test_rows_that_ranks_share_out_are_each_traces_own(session: Session, dims):
    session.load(MODEL, attn="eager", **dims)
    code = "h = model.layers[layer].output\nh[2, -1] = h[0, -1] * 2\nsave.p = model.output.logits[2, -1, :9]"
    check_same(session, [*TEXTS, "Paris is"], code, {"layer": range(4)})


@pytest.fixture
def reused(loaded, monkeypatch):
    """How many layers did not run in each forward that traces shared."""
    seen, was = [], loaded._running.sweep

    def noting(*args, **kwargs):
        found = was(*args, **kwargs)
        seen.append(found and found[1])
        return found

    monkeypatch.setattr(loaded._running, "sweep", noting)
    return seen


def test_layers_before_the_first_edit_are_computed_once(loaded, forwards, reused):
    over = {"layer": [1, 2, 3], "position": range(5)}
    code = "h = model.layers[layer].output\nh[1, position] = h[0, position] * 2\n"
    code += "save.p = model.output.logits[1, -1].softmax(-1)[5]"
    check_same(loaded, TEXTS, code, over)
    assert reused == [1]
    assert forwards() == [1] * 15 + [1, 15]
    reused.clear()
    loaded.sweep(TEXTS, code, over, memory=2_500_000)
    assert reused[0] >= 1
    assert reused[-1] == 3
    assert sorted(reused) == reused
    loaded.sweep(
        TEXTS, "h = model.layers[0].input\nh *= k\nsave.p = model.output.logits.sum()", {"k": [1, 2, 3]}
    )
    assert reused[-1] == 0
    loaded.sweep(
        TEXTS, f"model.layers[k].output *= 2\n{code}", {"k": [2, 1], "layer": [3], "position": [0, 1]}
    )
    assert reused[-1] == 1  # of what one of them touches


def test_a_module_that_is_called_is_computed_also_where_the_forward_passes_it_by(loaded, reused):
    code = (
        "h = model.layers[2].output\nsave.called = model.layers[0].mlp(h * k)\n"
        "h += save.called\nsave.p = model.output.logits[:, -1]"
    )
    over = {"k": [1.0, 2.0, 3.0]}
    check_same(loaded, TEXTS, code, over)
    assert reused == [2]


IN_PRIVATE = """
class Layer(torch.nn.Module):
    known = False

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, x):
        y = self.linear(x).tanh() * (1 + Layer.known)
        Layer.known = self.number == 0
        return y

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 6)
        self.layers = torch.nn.ModuleList(Layer(n) for n in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x

torch.manual_seed(3)
model = Model()
"""


def test_layers_that_know_of_each_other_by_other_ways_are_found_out(session: Session, monkeypatch):
    session.load_cell(IN_PRIVATE)
    ids = torch.tensor([[1, 2, 3]])
    session.run(ids)
    code = "model.layers[1].linear.output *= k\nsave.p = model.output[0]"
    asked, was = [], session._running.sweep

    def noting(*args, reuse, **kwargs):
        asked.append(reuse)
        return was(*args, reuse=reuse, **kwargs)

    monkeypatch.setattr(session._running, "sweep", noting)
    over = {"k": [1.0, 2.0, 3.0]}
    alone = session.sweep(ids, code, over, memory=0)["p"]
    assert abs(alone[1] - alone[0]).max() > 1e-2
    assert relative(session.sweep(ids, code, over)["p"], alone) < 1e-6
    assert asked == [True, False]  # with the first layer passed by, the second gave something else
