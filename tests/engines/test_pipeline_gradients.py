"""Gradients and training through pipeline stages are those of one process."""

import copy

import pytest
import torch
from torch import nn

from flexmagic import FlexError, HookError
from flexmagic.layout.sites import Site

from .conftest import MODEL, relative
from .stages import PRUNED, cell
from .test_gradients import IDS, LOSS, compared, gradients_of, loss_of, truth
from .test_modules import Mix, clean

pytestmark = pytest.mark.engines
__all__ = ["clean", "truth"]

EARLY, LATE = "model.layers.1.mlp", "model.layers.3.mlp"


def test_every_gradient_of_every_stage_equals_one_process(staged, one_process, truth):
    count, run = compared(staged, truth)
    assert count > 150
    assert run.loss == pytest.approx(float(loss_of(one_process).detach()), rel=1e-5)
    assert run["model.embed_tokens:grad_output"].layout.ranks == (0,)
    assert run[f"{LATE}:grad_output"].layout.ranks == (1,)
    site = "model.layers.0.self_attn.q_proj.weight:grad"
    plain = staged.run(IDS, capture=[site], backward=LOSS)
    watched = staged.run(IDS, capture=[site, "model.layers.*.mlp:grad_output"], backward=LOSS)
    assert torch.equal(plain[site].torch(), watched[site].torch())
    assert staged.run(IDS).loss is None


@pytest.mark.parametrize("port", ["output", "grad_output"])
def test_hooks_on_both_stages_take_their_part_in_the_backward(staged, one_process, truth, port):
    staged.run(IDS, backward=LOSS)
    staged.hook(f"{EARLY}:{port}", "x[..., 100:200] *= 0.25", name="early")
    staged.hook(f"{LATE}:{port}", "x[:, :4] *= 3", name="late")
    run = staged.run(IDS, capture=["model.embed_tokens:grad_output"], backward=LOSS)

    def early(x):
        x = x.clone()
        x[..., 100:200] *= 0.25
        return x

    def late(x):
        x = x.clone()
        x[:, :4] *= 3
        return x

    def hooked(edit):
        if port == "output":
            return lambda _m, _a, out: edit(out)
        return lambda _m, _a, out: out.register_hook(edit) and None

    want = gradients_of(
        one_process,
        lambda m: [
            m.get_submodule(path).register_forward_hook(hooked(edit))
            for path, edit in ((EARLY, early), (LATE, late))
        ],
    )
    site = Site("model.embed_tokens", "grad_output")
    assert relative(want[site], truth[site]) > 1e-3
    assert relative(run[str(site)].torch(), want[site]) <= 1e-5


@pytest.mark.parametrize("broken", [EARLY, LATE])
def test_an_error_in_a_gradient_hook_of_one_stage_ends_the_run_on_all(staged, truth, broken):
    staged.run(IDS, backward=LOSS)
    staged.hook(f"{broken}:grad_output", "1 / 0", name="broken")
    with pytest.raises(HookError, match="division by zero"):
        staged.run(IDS, backward=LOSS)
    staged.hooks.remove("broken")
    with pytest.raises(HookError, match="must be one number"):
        staged.run(IDS, backward="logits")
    run = staged.run(IDS, capture=["model.embed_tokens:grad_output"], backward=LOSS)
    site = Site("model.embed_tokens", "grad_output")
    assert relative(run[str(site)].torch(), truth[site]) <= 1e-5


def test_a_stages_own_code_that_fails_in_the_backward_ends_the_run_on_all(staged, truth):
    staged.run(IDS, backward=LOSS)
    view = staged._cluster.client[1]
    view.execute(
        "def _fail(_g): raise ValueError('broken backward')\n"
        "_layer = model.stage_module.get_submodule('model.layers.3')\n"
        "_handle = _layer.register_forward_hook(lambda m, a, out: out.register_hook(_fail) and None)",
        block=True,
    )
    with pytest.raises(FlexError, match="on rank 1: ValueError: broken backward"):
        staged.run(IDS, backward=LOSS)
    view.execute("_handle.remove()", block=True)
    run = staged.run(IDS, capture=["model.embed_tokens:grad_output"], backward=LOSS)
    site = Site("model.embed_tokens", "grad_output")
    assert relative(run[str(site)].torch(), truth[site]) <= 1e-5


@pytest.mark.parametrize("how", ["a user's subclass", pytest.param("a user's stage", marks=pytest.mark.full)])
def test_through_torchs_schedules_the_loss_is_of_the_whole_batch(session, one_process, truth, how):
    """Its gradient is not the mean of the micro-batches' gradients."""
    session.load_cell(cell(2) if how == "a user's stage" else PRUNED, pp=2)
    session.run(IDS)
    loss = LOSS.replace("logits", "output") if how == "a user's stage" else LOSS
    session.run(IDS, backward=loss)
    rules = {s: r for s, r in session.model.rules.items() if s.is_gradient and s in truth}
    assert len(rules) > 130
    assert not {str(s): r.refused for s, r in rules.items() if r.refused}
    run = session.run(IDS, capture=[str(s) for s in rules], backward=loss)
    for site in rules:
        assert relative(run[str(site)].torch(), truth[site]) <= 1e-5, site


def test_a_parameter_on_two_stages_has_the_sum_of_its_gradients(session, tmp_path):
    from transformers import AutoModelForCausalLM

    tied = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="eager").eval()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tied.save_pretrained(tmp_path)
    session.load(str(tmp_path), pp=2, attn="eager")
    name = "model.embed_tokens.weight:grad"
    session.run(IDS, backward=LOSS)
    found = session.run(IDS, capture=[name], backward=LOSS)[name]
    assert found.layout.ranks == (0, 1)
    loss_of(tied).backward()
    assert relative(found.torch(), tied.model.embed_tokens.weight.grad) <= 1e-5


def test_modules_on_several_stages_are_trained_as_in_one_process(clean, staged, one_process):
    """One module in two stages, its value carried to the loss, and one in the loss itself."""
    torch.manual_seed(1)
    mix, probe = Mix(256), nn.Linear(256, 1)
    clean.modules["mix"], clean.modules["probe"] = mix, probe
    clean.hook("model.layers.{0,1}.mlp", "x = modules.mix(x)", name="early")
    clean.hook(LATE, "x = modules.mix(x) + ctx['said']", name="late")
    clean.hook("model.layers.0", "ctx['said'] = modules.probe(x).tanh()", name="say")
    ends = "modules.probe(modules.mix(ctx['said'] + torch.ones(256))).mean()"
    loss = f"{LOSS} + ctx['said'].pow(2).mean() + {ends}"
    run = clean.run(IDS, backward=loss, capture=["model.embed_tokens:grad_output"])

    mix, probe, said = copy.deepcopy(mix), copy.deepcopy(probe), {}

    def after(path):
        if path == LATE:
            return lambda _m, _a, out: mix(out) + said["x"]
        if path == "model.layers.0":
            return lambda _m, _a, out: said.update(x=probe(out).tanh()) and None
        return lambda _m, _a, out: mix(out)

    paths = ["model.layers.0.mlp", EARLY, LATE, "model.layers.0"]
    handles = [one_process.get_submodule(path).register_forward_hook(after(path)) for path in paths]
    one_process.zero_grad()
    wanted = loss_of(one_process)
    wanted = wanted + said["x"].pow(2).mean() + probe(mix(said["x"] + torch.ones(256))).mean()
    wanted.backward()
    for handle in handles:
        handle.remove()
    one_process.zero_grad()
    assert run.loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, module in (("mix", mix), ("probe", probe)):
        got = clean.modules[name].gradients()
        for path, parameter in module.named_parameters():
            assert parameter.grad.abs().max() > 0
            assert relative(got[path], parameter.grad) <= 1e-5, (name, path)


def test_an_adapter_is_trained_through_the_stages(clean, staged, one_process):
    before = clean.run(IDS).logits.torch()
    paths = [f"model.layers.{n}.mlp.down_proj" for n in range(4)]
    clean.adapter("model.layers.*.mlp.down_proj", rank=4, name="lora", seed=3)
    start = clean.modules["lora"].state_dict()
    down = {p: nn.Parameter(start[f"down.{p.replace('.', '/')}"].clone()) for p in paths}
    up = {p: nn.Parameter(start[f"up.{p.replace('.', '/')}"].clone()) for p in paths}
    loss = "logits[:, -1].log_softmax(-1)[:, 5].mean()"
    optimizer = torch.optim.AdamW([*down.values(), *up.values()], lr=2e-3)

    def after(path):
        return lambda _m, args, out: out + (args[0] @ down[path].T) @ up[path].T

    handles = [one_process.get_submodule(p).register_forward_hook(after(p)) for p in paths]
    for parameter in one_process.parameters():
        parameter.requires_grad_(False)
    curve, wanted = [], []
    try:
        for _ in range(20):
            curve.append(clean.run(IDS, backward=loss).loss)
            clean.modules.step("adamw", lr=2e-3)
            value = eval(loss, {"logits": one_process(IDS, use_cache=False).logits})  # noqa: S307
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            wanted.append(float(value.detach()))
    finally:
        for parameter in one_process.parameters():
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    assert abs(wanted[-1] - wanted[0]) > 1
    assert max(abs(a - b) / abs(b) for a, b in zip(curve, wanted, strict=True)) <= 1e-3
    end = clean.modules["lora"].state_dict()  # refuses if the ranks' differ
    assert all(relative(end[f"up.{p.replace('.', '/')}"], up[p].detach()) <= 1e-3 for p in paths)
    del clean.modules["lora"]
    assert torch.equal(clean.run(IDS).logits.torch(), before)
