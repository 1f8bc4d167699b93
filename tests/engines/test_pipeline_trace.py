"""Traces over pipeline stages: one cell on every rank, values carried from stage to stage."""

import pytest
import torch

from flexmagic import HookError
from flexmagic.errors import FlexError

from .conftest import relative
from .stages import PRUNED
from .test_trace import TEXTS, changed, check, reference

pytestmark = pytest.mark.engines

UP, LATE = "model.layers.1.mlp.up_proj", "model.layers.3.mlp.up_proj"


def test_reads_on_every_stage_are_whole_and_change_nothing(staged, one_process):
    plain = staged.run(TEXTS)
    run = staged.trace(
        TEXTS,
        "save.ids = model.input\n"
        "save.up = model.layers[1].mlp.up_proj.output\n"
        "save.first = model.layers[-2].input\n"
        "save.pattern = model.layers[3].self_attn.output[1]\n"
        "save.names = [repr(layer) for layer in model.layers]\n"
        "save.logits = model.output.logits",
    )
    assert torch.equal(run.logits.torch(), plain.logits.torch())
    assert torch.equal(run.context["logits"], plain.logits.torch())
    assert run.context["ids"].tolist() == run.ids
    assert run.context["names"] == [f"<model.layers.{n} in a trace>" for n in range(4)]
    edits = {
        UP: lambda x, kept: kept.update(up=x),
        "model.layers.1": lambda x, kept: kept.update(first=x),
        "model.layers.3.self_attn": lambda x, kept: kept.update(pattern=x[1]),
    }
    _, kept = reference(one_process, run.ids, edits)
    for name, value in kept.items():
        assert relative(run.context[name], value) <= 1e-5


def test_values_of_an_early_stage_are_used_on_a_later_one_under_hooks(staged, one_process):
    staged.hook("model.layers.0", "x *= 2", name="h")
    code = (
        "early = model.layers[0].output\n"
        "noise = torch.randn(256)\n"
        "save.noise = noise\n"
        "model.layers[1].output[1, -1] = early[0, -1]\n"
        "late = model.layers[3].mlp.up_proj.output\n"
        "late[..., :256] += early * noise\n"
        "model.layers[3].output = model.layers[3].output + early"
    )
    plain = staged.run(TEXTS)
    run = staged.trace(TEXTS, code)
    noise = run.context["noise"]
    assert torch.equal(staged.trace(TEXTS, code).context["noise"], noise)
    edits = {
        "model.layers.0": lambda x, kept: kept.setdefault("early", x * 2),
        "model.layers.1": lambda x, kept: changed(x, (1, -1), kept["early"][0, -1]),
        LATE: lambda x, kept: torch.cat([x[..., :256] + kept["early"] * noise, x[..., 256:]], -1),
        "model.layers.3": lambda x, kept: x + kept["early"],
    }
    logits, _ = reference(one_process, run.ids, edits)
    assert relative(run.logits.torch(), plain.logits.torch()) > 1e-3
    assert relative(run.logits.torch(), logits) <= 1e-5
    assert torch.equal(staged.run(TEXTS).logits.torch(), plain.logits.torch())


ERRORS = {
    "model.layers[3].output\nmodel.layers[1].output": ("line 2", "was read after it had passed"),
    "model.layers[1].output\nmodel.layers[0].output = 1": ("line 2", "was assigned after it had passed"),
    "late = model.layers[2].output\nmodel.layers[0].output[:] = late": ("line 2", "cannot|had passed"),
    "model.layers[0].output\n1 / 0": ("line 2", "division by zero"),
    "model.layers[2].output\nsave.x = undefined": ("line 2", "undefined"),
    "model.layers[1].output = torch.ones(3)": ("line 1", "shape and dtype must stay"),
    "model.layers[3].output = torch.ones(3)": ("line 1", "shape and dtype must stay"),
    "x = model.layers[1].output\nmodel.layers[3].output\nx += 1\nmodel.norm.output": (
        "line 4",
        "after the site had passed",
    ),
    "model.rotary_emb.output[0]": ("line 1", "on several pipeline stages"),
    "if rank: model.layers[2].output\nelse: model.layers[3].output": ("different sites", "branch on `rank`"),
}


@pytest.mark.parametrize("code", ERRORS)
def test_errors_end_the_run_on_all_stages_and_name_the_line(staged, code):
    plain = staged.run(TEXTS).logits.torch()
    where, what = ERRORS[code]
    with pytest.raises(FlexError, match=what) as caught:
        staged.trace(TEXTS, code)
    assert where in str(caught.value)
    assert torch.equal(staged.run(TEXTS).logits.torch(), plain)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_hook_or_a_stage_that_fails_ends_a_trace_too(staged, one_process, layer):
    code = "x = model.layers[1].output\nmodel.layers[2].output[1, -1] = x[0, -1]"
    edits = {
        "model.layers.1": lambda x, kept: kept.setdefault("x", x),
        "model.layers.2": lambda x, kept: changed(x, (1, -1), kept["x"][0, -1]),
    }
    staged.hook(f"model.layers.{layer}.mlp", "raise KeyError('mine')", name="broken")
    with pytest.raises(HookError, match="mine") as caught:
        staged.trace(TEXTS, code)
    assert {f.rank for f in caught.value.failures} == {layer // 2}
    staged.hooks.remove("broken")
    view = staged._cluster.client[layer // 2]
    view.execute(
        "def _fail(*_): raise ValueError('broken stage')\n"
        f"_handle = model.stage_module.get_submodule('model.layers.{layer}').register_forward_hook(_fail)",
        block=True,
    )
    with pytest.raises(FlexError, match=rf"on rank {layer // 2}: ValueError: broken stage"):
        staged.trace(TEXTS, code)
    view.execute("_handle.remove()", block=True)
    check(staged, one_process, code, edits)


@pytest.mark.parametrize("site", ["model.layers.1", "model.layers.2"])
def test_a_trace_in_a_run_that_stops(staged, site):
    plain = staged.run(TEXTS, capture="model.layers.0")["model.layers.0"].torch()
    run = staged.trace(TEXTS, "save.x = model.layers[0].output", stop_at=site)
    assert torch.equal(run.context["x"], plain)
    with pytest.raises(HookError, match="was never reached"):
        staged.trace(TEXTS, "save.x = model.layers[3].output", stop_at=site)


def test_a_trace_with_a_loss(staged, one_process):
    loss = "logits[:, -1].log_softmax(-1)[:, 5].sum()"
    site = "model.layers.0:grad_output"
    plain = staged.run(TEXTS, backward=loss, capture=site)[site].torch()
    code = "x = model.layers[1].output\nmodel.layers[3].output = model.layers[3].output + x.detach() * 3"
    run = staged.trace(TEXTS, code, backward=loss, capture=site)
    kept, handles = {}, []
    layers = one_process.model.layers
    handles += [
        layers[0].register_forward_hook(lambda _m, _a, out: out.retain_grad() or kept.update(x0=out)),
        layers[1].register_forward_hook(lambda _m, _a, out: kept.update(x1=out)),
        layers[3].register_forward_hook(lambda _m, _a, out: out + kept["x1"].detach() * 3),
    ]
    logits = one_process(torch.tensor(run.ids), use_cache=False).logits
    eval(loss, {"logits": logits}).backward()  # noqa: S307 - the test's own
    for handle in handles:
        handle.remove()
    one_process.zero_grad()
    assert relative(plain, kept["x0"].grad) > 1e-3
    assert relative(run[site].torch(), kept["x0"].grad) <= 1e-5
    with pytest.raises(FlexError, match="Cut it"):
        staged.trace(TEXTS, code.replace(".detach()", ""), backward=loss)


def test_over_torchs_schedules_where_a_stage_has_its_own_layers_only(session, one_process):
    session.load_cell(PRUNED, pp=2)
    code = "x = model.layers[1].output\nmodel.layers[2].mlp.output[1, -1] = x[0, -1]"
    edits = {
        "model.layers.1": lambda x, kept: kept.setdefault("x", x),
        "model.layers.2.mlp": lambda x, kept: changed(x, (1, -1), kept["x"][0, -1]),
    }
    check(session, one_process, code, edits)
