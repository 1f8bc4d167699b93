"""Modules called and parameters read in the middle of a forward: each as in one process."""

import pytest
import torch

from flexmagic import HookError, ModelError, Session
from flexmagic.errors import FlexError

from .conftest import MODEL, clear, relative

pytestmark = pytest.mark.engines

TEXTS = ["The capital of France is", "The capital of Italy is"]
WAYS = {"tp": {"tp": 2}, "fsdp": {"fsdp": 2}}

LENS = """
for n, layer in enumerate(model.layers):
    setattr(save, f"lens{n}", model.lm_head(model.norm(layer.output)))
    setattr(save, f"last{n}", model.lm_head(model.norm(layer.output[:, -1])))
"""
SWAPPED = "model.layers[2].mlp.output = model.layers[0].mlp(model.layers[2].mlp.input)"
TWICE = "model.layers[1].mlp.output = model.layers[1].mlp(model.layers[1].mlp.output)"
CUT = "up = model.layers[1].mlp.up_proj.output\nsave.down = model.layers[3].mlp.down_proj(up)"
BLOCK = """
name = "model.layers.2:input."
mask = model[f"{name}attention_mask"]
found = tuple(model[f"{name}position_embeddings[{n}]"] for n in range(2))
h = model.layers[2].output
save.again = model.layers[0](h, position_embeddings=found, attention_mask=mask)
"""
WEIGHTS = """
save.before = model.layers[3].mlp.down_proj.weight
h = model.layers[1].mlp.output
save.inside = model.layers[1].mlp.up_proj.weight
save.after = model.layers[0].self_attn.k_proj.weight
save.norm = model.norm.weight
save.tied = model.lm_head.weight
model.layers[2].mlp.output += h * model.layers[2].input_layernorm.weight
"""


@pytest.fixture(scope="module", params=WAYS)
def split(request, engines):
    """The shared engines with the shipped model split in one way."""
    clear(engines)
    engines.load(MODEL, attn="eager", **WAYS[request.param])
    yield engines
    clear(engines)


class Outputs:
    """What modules returned and took in a forward in this process, some of it edited."""

    def __init__(self, model, ids, edits=()):
        self.out, handles = {}, []
        for path, module in model.named_modules():

            def after(_m, args, kwargs, out, path=path):
                out = dict(edits)[path](out, (args, kwargs)) if path in dict(edits) else out
                self.out[path] = out, args, kwargs
                return out

            handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            with torch.no_grad():
                self.logits = model(torch.tensor(ids), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()


def check_calls(session, model):
    """Every kind of call against the same one in this process."""
    plain = session.run(TEXTS)
    truth = Outputs(model, plain.ids)
    inner, head = model.model, model.lm_head
    run = session.trace(TEXTS, LENS)
    assert torch.equal(run.logits.torch(), plain.logits.torch())
    with torch.no_grad():
        for n in range(4):
            want = head(inner.norm(truth.out[f"model.layers.{n}"][0]))
            assert relative(run.context[f"lens{n}"], want) <= 1e-5
            assert relative(run.context[f"last{n}"], want[:, -1]) <= 1e-5
    assert relative(run.context["lens0"], run.context["lens3"]) > 1e-2
    assert relative(run.context["lens3"], plain.logits.torch()) <= 1e-5

    for code, edits in (
        (SWAPPED, {"model.layers.2.mlp": lambda _out, given: free(inner.layers[0].mlp, given[0][0])}),
        (TWICE, {"model.layers.1.mlp": lambda out, _given: free(inner.layers[1].mlp, out)}),
    ):
        run = session.trace(TEXTS, code)
        want = Outputs(model, plain.ids, edits).logits
        assert relative(want, plain.logits.torch()) > 1e-3
        assert relative(run.logits.torch(), want) <= 1e-5
        assert torch.equal(session.run(TEXTS).logits.torch(), plain.logits.torch())

    with torch.no_grad():
        want = inner.layers[3].mlp.down_proj(truth.out["model.layers.1.mlp.up_proj"][0])
        assert relative(session.trace(TEXTS, CUT).context["down"], want) <= 1e-5
        h, _, kwargs = truth.out["model.layers.2"]
        kept = {name: kwargs[name] for name in ("position_embeddings", "attention_mask")}
        want = inner.layers[0](h, **kept)
    run = session.trace(TEXTS, BLOCK)
    assert relative(run.context["again"], want) <= 1e-5
    assert torch.equal(run.logits.torch(), plain.logits.torch())


def free(module, x):
    """What a module makes of a tensor without the hooks that are on it."""
    return module.forward(x)


def test_modules_are_called_on_whole_tensors(split, one_process):
    check_calls(split, one_process)


def test_parameters_are_whole_at_any_time(split, one_process):
    run = split.trace(TEXTS, WEIGHTS)
    of = dict(one_process.named_parameters())
    for name, path in {
        "before": "model.layers.3.mlp.down_proj.weight",
        "inside": "model.layers.1.mlp.up_proj.weight",
        "after": "model.layers.0.self_attn.k_proj.weight",
        "norm": "model.norm.weight",
    }.items():
        assert torch.equal(run.context[name], of[path].detach()), path
    assert torch.equal(run.context["tied"], one_process.lm_head.weight.detach())
    scale = of["model.layers.2.input_layernorm.weight"].detach()
    kept = {}
    edits = {
        "model.layers.1.mlp": lambda out, _given: kept.setdefault("h", out),
        "model.layers.2.mlp": lambda out, _given: out + kept["h"] * scale,
    }
    want = Outputs(one_process, run.ids, edits).logits
    plain = split.run(TEXTS).logits.torch()
    assert relative(want, plain) > 1e-3
    assert relative(run.logits.torch(), want) <= 1e-5


def test_no_hook_acts_in_a_call_and_nothing_is_captured_there(split):
    code = "save.normed = model.norm(model.layers[1].output)"
    plain = split.trace(TEXTS, code, capture="model.norm")
    split.hook("model.norm", "x *= 0\nctx['times'] = ctx.get('times', 0) + 1", name="zero")
    run = split.trace(TEXTS, code)
    assert torch.equal(run.context["normed"], plain.context["normed"])
    assert float(run["model.norm"].torch().abs().max()) == 0
    assert float(plain.context["normed"].abs().max()) > 0
    assert run.context["times"] == 1
    clear(split)


BAD = {
    "h = model.layers[1].output\nmodel.norm(h[..., :128])": (
        r"line 2.*model.norm takes \[batch, seq, 256\] and was given \[2, \d+, 128\]"
    ),
    "model.norm(model.layers[1])": "line 1.*Give it a tensor",
    "model.norm()": "line 1.*was given no tensor",
    "model(model.output.logits)": "line 1.*cannot be called in the middle of its own forward",
    "model.layers(model.layers[1].output)": "line 1.*did not run in the survey",
    "model.norm(model.layers[1].output, 3, 4, 5)": "line 1.*TypeError",
    "h = model.layers[1].output\nif rank:\n    model.norm(h)": (
        r"different sites: on rank 0 for nothing more, on rank 1 for model.norm\(float32\[2"
    ),
    "model.norm(model.layers[1].output + rank)": "gave model.norm.*different values on the ranks",
    "h = model.layers[1].output\nif rank == 1: 1 / 0\nmodel.norm(h)": "line 2, on rank 1.*ZeroDivisionError",
    "h = model.layers[1].output\nmodel.layers[1].mlp.nothing.weight": "line 2.*no module 'nothing'",
    "model.layers[1].mlp.down_proj.weight[:, 3] = 0\nmodel.layers[1].output": (
        "line 2.*is a copy: writing into it changes nothing.*flexweights"
    ),
    "model.norm.weight = torch.ones(256)": "line 1.*cannot be assigned in a trace.*flexweights",
}


@pytest.mark.parametrize("code", BAD)
def test_what_cannot_be_called_is_said_with_the_line(loaded, code):
    before = loaded.run(TEXTS).logits.torch()
    with pytest.raises(FlexError, match=f"(?s){BAD[code]}") as caught:
        loaded.trace(TEXTS, code)
    assert len(str(caught.value).splitlines()) <= 6
    assert torch.equal(loaded.run(TEXTS).logits.torch(), before)


def test_with_a_loss_neither_is_differentiated(loaded):
    for code in ("model.norm(model.layers[1].output)", "model.norm.weight"):
        with pytest.raises(HookError, match=r"(?s)line 1.*a run with gradients cannot use model.norm"):
            loaded.trace(TEXTS, code, backward="logits.sum()")


@pytest.mark.full
def test_on_four_ranks(one_process):
    with Session.start(4, oversubscribe=True) as four:
        four.load(MODEL, attn="eager", tp=2, dp=2)
        check_calls(four, one_process)
        run = four.trace(TEXTS, WEIGHTS)
        assert torch.equal(run.context["tied"], one_process.lm_head.weight.detach())
        steered = "for step in model.steps[1:3]:\n    model.layers[1].mlp.up_proj.output *= 3"
        plain = four.generate(TEXTS, 3)
        run = four.trace(TEXTS, steered, max_new_tokens=3)
        four.hook("model.layers.1.mlp.up_proj", "x *= 3", name="same", step="1:3")
        hooked = four.generate(TEXTS, 3)
        assert relative(run.step(1).logits.torch(), plain.step(1).logits.torch()) > 1e-3
        for n in range(3):
            assert torch.equal(run.step(n).logits.torch(), hooked.step(n).logits.torch())


TORCHS_PLAN = """
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.down(torch.relu(self.up(x))))

torch.manual_seed(0)
model = parallelize_module(Net(), mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
unsharded = Net
"""


def test_what_takes_dtensors_is_not_called(session):
    """A plain part would be taken for the whole, or for another part."""
    session.load_cell(TORCHS_PLAN, tp=2)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    run = session.trace(
        {"x": x}, "save.h = model.down.output\nsave.n = model.norm(2 * model.down.output + 1)"
    )
    want = torch.nn.functional.layer_norm(2 * run.context["h"] + 1, (6,))
    assert relative(run.context["n"], want) <= 1e-5
    for path in ("up", "down"):
        with pytest.raises(HookError, match=f"{path} cannot be called: "):
            session.trace({"x": x}, f"model.{path}(model.{path}.input)")


def test_over_pipeline_stages_there_are_none_and_no_steps(session):
    session.load(MODEL, pp=2)
    for code in ("h = model.layers[3].output\nmodel.norm(h)", "model.layers[1].output\nmodel.lm_head.weight"):
        with pytest.raises(HookError, match=r"(?s)line 2.*(no rank of a pipeline has|'weight')"):
            session.trace(TEXTS, code)
    with pytest.raises(ModelError, match="only where each rank has all layers"):
        session.trace(TEXTS, "for step in model.steps: pass", max_new_tokens=2)
    assert session.trace(TEXTS, "save.h = model.layers[3].output").context["h"].shape[0] == 2
