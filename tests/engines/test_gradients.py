"""Gradients under every distribution are those of the same loss in one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexmagic.engine.gradients import observe_backward
from flexmagic.errors import FlexError, HookError, InputError
from flexmagic.layout.sites import Site

from .conftest import MODEL, relative

LOSS = "logits[:, -1].log_softmax(-1)[:, 5].sum() + logits.pow(2).mean()"
IDS = torch.randint(3, 1700, (5, 9), generator=torch.Generator().manual_seed(0))
MIDDLE = "model.layers.2.mlp"


def loss_of(model, ids=IDS):
    return eval(LOSS, {"logits": model(ids, use_cache=False).logits})  # noqa: S307 - the test's own expression


def gradients_of(model, prepare=None):
    """Every gradient of the loss in one process by site; ``prepare`` may attach hooks and return handles."""
    found = {}
    model.zero_grad()
    handles = prepare(model) if prepare else []
    try:
        observe_backward(model, lambda: loss_of(model), lambda s, g: found.__setitem__(s, g.detach().clone()))
    finally:
        for handle in handles:
            handle.remove()
    found |= {
        Site(name, "grad"): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    return found


@pytest.fixture(scope="module")
def truth(one_process):
    return gradients_of(one_process)


def compared(session, truth):
    """Run with the loss, compare every gradient that is not refused; returns how many were compared."""
    session.run(IDS, backward=LOSS)
    rules = {s: r for s, r in session.model.rules.items() if s.is_gradient}
    assert not [s for s in truth if s not in rules]
    assert not {str(s): r.refused for s, r in rules.items() if r.refused}
    run = session.run(IDS, capture=[str(s) for s in rules], backward=LOSS)
    for site in rules:
        assert relative(run[str(site)].torch(), truth[site]) <= 1e-5, site
    return len(rules), run


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"dp": 2}, {"fsdp": 2}])
def test_every_gradient_equals_one_process(session, one_process, truth, sizes):
    session.load(MODEL, attn="eager", **sizes)
    count, run = compared(session, truth)
    assert count > 150
    assert run.loss == pytest.approx(float(loss_of(one_process).detach()), rel=1e-5)
    assert run["model.embed_tokens:grad_output"].shape == (5, 9, 256)
    assert run["model.layers.1.mlp.up_proj.weight:grad"].shape == (768, 256)


def test_capturing_gradients_changes_none_and_leaves_none_behind(loaded):
    site = "model.layers.0.self_attn.q_proj.weight:grad"
    plain = loaded.run(IDS, capture=[site], backward=LOSS)
    watched = loaded.run(
        IDS, capture=[site, "model.layers.*.mlp:grad_output", "model.layers.*:grad_input"], backward=LOSS
    )
    assert len(watched.sites) > len(plain.sites)
    assert torch.equal(plain[site].torch(), watched[site].torch())
    assert torch.equal(plain.logits.torch(), watched.logits.torch())
    assert plain.loss == watched.loss
    assert loaded.model.unwrap() == 0


def test_a_hook_on_the_forward_takes_its_part_in_the_backward(loaded, one_process, truth):
    loaded.hook(f"{MIDDLE}.up_proj", "x[..., 3:400] *= 0.25", name="narrow")
    run = loaded.run(IDS, capture=["model.embed_tokens:grad_output", f"{MIDDLE}:grad_input"], backward=LOSS)

    def scaled(_module, _args, out):
        out = out.clone()
        out[..., 3:400] *= 0.25
        return out

    want = gradients_of(
        one_process, lambda m: [m.get_submodule(f"{MIDDLE}.up_proj").register_forward_hook(scaled)]
    )
    site = Site("model.embed_tokens", "grad_output")
    assert relative(want[site], truth[site]) > 1e-3
    assert relative(run[str(site)].torch(), want[site]) <= 1e-5
    assert relative(run[f"{MIDDLE}:grad_input[0]"].torch(), want[Site(MIDDLE, "grad_input", "[0]")]) <= 1e-5


def test_a_hook_that_mixes_pieces_of_all_ranks_is_differentiated(loaded, one_process, truth):
    loaded.hook(f"{MIDDLE}.up_proj", "x = x.flip(-1) * x.sigmoid()", name="mix")
    run = loaded.run(IDS, capture=["model.embed_tokens:grad_output"], backward=LOSS)
    want = gradients_of(
        one_process,
        lambda m: [
            m.get_submodule(f"{MIDDLE}.up_proj").register_forward_hook(
                lambda _m, _a, x: x.flip(-1) * x.sigmoid()
            )
        ],
    )
    site = Site("model.embed_tokens", "grad_output")
    assert relative(want[site], truth[site]) > 1e-3
    assert relative(run[str(site)].torch(), want[site]) <= 1e-5


@pytest.mark.parametrize("port", ["grad_output", "grad_input"])
def test_a_hook_on_a_gradient_edits_it(loaded, one_process, truth, port):
    name = f"{MIDDLE}:{port}" + ("[0]" if port == "grad_input" else "")
    loaded.run(IDS, backward=LOSS)
    loaded.hook(name, "x[..., 100:200] = 0", name="cut")
    run = loaded.run(IDS, capture=["model.embed_tokens:grad_output"], backward=LOSS)

    def cut(gradient):
        gradient = gradient.clone()
        gradient[..., 100:200] = 0
        return gradient

    def at_output(_module, _args, out):
        out.register_hook(cut)

    def at_input(_module, args):
        view = args[0].view_as(args[0])
        view.register_hook(cut)
        return (view,)

    def prepare(model):
        module = model.get_submodule(MIDDLE)
        if port == "grad_output":
            return [module.register_forward_hook(at_output)]
        return [module.register_forward_pre_hook(at_input)]

    want = gradients_of(one_process, prepare)
    site = Site("model.embed_tokens", "grad_output")
    assert relative(want[site], truth[site]) > 1e-4
    assert relative(run[str(site)].torch(), want[site]) <= 1e-5
    assert "cut v1" in loaded.run(IDS, backward=LOSS)[name].info.hook


EARLY = "model.layers.1"
EARLIER = ("model.embed_tokens.weight:grad", "model.layers.0.mlp.up_proj.weight:grad", f"{EARLY}:grad_output")


def measured(session, gradient, held=None):
    """The derivative of the loss along a gradient at the early site, by two runs on both sides of it.

    ``held``: what some features of the middle module's output stay at, as if no gradient went there.
    """
    direction, losses = gradient / gradient.norm(), []
    names = ("move",) if held is None else ("move", "hold")
    for amount in (0.5, -0.5):

        def move(x, _h, step=amount * direction):
            return x + step

        def hold(x, _h):
            x[..., 100:200] = held[..., 100:200]

        session.hook(EARLY, move, name="move")
        if held is not None:
            session.hook(MIDDLE, hold, name="hold")
        losses.append(session.run(IDS, backward=LOSS, only=names).loss)
    for name in names:
        session.hooks[name].remove()
    return losses[0] - losses[1]


def check_derivatives(session, one_process, truth):
    """A gradient, and what an edit of a later one makes of it, by finite differences and in one process."""
    plain = session.run(IDS, capture=[*EARLIER, MIDDLE], backward=LOSS)
    gradient = plain[f"{EARLY}:grad_output"].torch()
    assert measured(session, gradient) == pytest.approx(float(gradient.norm()), rel=1e-2)
    session.hook(f"{MIDDLE}:grad_output", "x[..., 100:200] = 0", name="cut")
    run = session.run(IDS, capture=EARLIER, backward=LOSS)
    edited = run[f"{EARLY}:grad_output"].torch()
    assert relative(edited, gradient) > 1e-3
    held = plain[MIDDLE].torch()
    assert measured(session, edited, held) == pytest.approx(float(edited.norm()), rel=1e-2)
    session.hooks["cut"].remove()

    def cut(gradient):
        gradient = gradient.clone()
        gradient[..., 100:200] = 0
        return gradient

    want = gradients_of(
        one_process,
        lambda m: [m.get_submodule(MIDDLE).register_forward_hook(lambda _m, _a, out: hooked(out, cut))],
    )
    for name in EARLIER:
        site = Site.parse(name)
        assert relative(want[site], truth[site]) > 1e-4
        assert relative(run[name].torch(), want[site]) <= 1e-5


def hooked(tensor, hook):
    tensor.register_hook(hook)


def check_parameters(session, truth):
    """Hooks at parameters' gradients get them whole, and change what is captured, not the model."""
    names = [f"model.layers.1.mlp.{part}_proj.weight:grad" for part in ("up", "down")]
    before = session.model.parameter("model.layers.1.mlp.up_proj.weight")
    session.hook(names, "ctx[site] = x.norm()\nx[:, -3:] = x.flip(0)[:, :3]", name="turn")
    run = session.run(IDS, capture=names, backward=LOSS)
    assert not run.warnings
    for name in names:
        want = truth[Site.parse(name)].clone()
        assert float(run.context[name]) == pytest.approx(float(want.norm()), rel=1e-5)
        plain = want.clone()
        want[:, -3:] = want.flip(0)[:, :3]
        assert relative(want, plain) > 1e-3
        assert relative(run[name].torch(), want) <= 1e-5
        assert run[name].after == ("turn v1",)
    session.hooks["turn"].remove()
    assert torch.equal(session.model.parameter("model.layers.1.mlp.up_proj.weight"), before)
    session.hook(names[0], "x += rank", name="split")
    with pytest.raises(HookError, match="left different values on the ranks"):
        session.run(IDS, backward=LOSS)
    session.hooks["split"].remove()


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"fsdp": 2}])
def test_a_gradient_and_an_edited_one_are_the_measured_derivatives(session, one_process, truth, sizes):
    session.load(MODEL, attn="eager", **sizes)
    check_derivatives(session, one_process, truth)
    check_parameters(session, truth)


@pytest.mark.parametrize(
    ("loss", "kind", "said"),
    [
        ("logits[:, -1", InputError, "no expression"),
        ("logits[:, -1]", HookError, "must be one number"),
        ("nothing.sum()", HookError, "NameError"),
        ("logits.detach().sum()", HookError, "does not depend"),
        (lambda out: out.logits.argmax(), HookError, "must be one number"),
        (lambda out: out.logits.sum() if rank else 1 / 0, HookError, "NameError|ZeroDivisionError"),  # noqa: F821
    ],
)
def test_a_wrong_loss_is_said_and_harms_nothing(loaded, loss, kind, said):
    before = loaded.run(IDS).logits.torch()
    with pytest.raises(kind, match=said):
        loaded.run(IDS, backward=loss)
    assert torch.equal(loaded.run(IDS).logits.torch(), before)


def test_a_gradient_without_a_loss_is_explained(loaded):
    with pytest.raises(InputError, match="give the run a loss"):
        loaded.run(IDS, capture=[f"{MIDDLE}:grad_output"])


def test_a_function_may_be_the_loss(loaded, one_process):
    run = loaded.run(IDS, backward=lambda out: out.logits[:, -1, out.ids[0, 0]].sum())
    want = float(one_process(IDS, use_cache=False).logits[:, -1, IDS[0, 0]].sum().detach())
    assert run.loss == pytest.approx(want, rel=1e-5)


def test_collectives_that_pass_no_gradients_are_found_out(session):
    def build(rank, world_size, **_):
        import torch
        import torch.distributed as dist
        from torch import nn

        class Parallel(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                up, down = torch.randn(8, 4), torch.randn(4, 8)
                self.up = nn.Parameter(up.chunk(world_size, 0)[rank].clone())
                self.down = nn.Parameter(down.chunk(world_size, 1)[rank].clone())

            def forward(self, x):
                y = nn.functional.linear((x @ self.up.T).tanh(), self.down)
                y = y.clone()
                dist.all_reduce(y)
                return y

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(1)
                self.first, self.mlp, self.last = nn.Linear(4, 4), Parallel(), nn.Linear(4, 4)

            def forward(self, x):
                x = self.first(x)
                return self.last(x + self.mlp(x))

        return Model()

    session.load(build)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    assert session.run({"x": x}, capture=["mlp"])["mlp"].shape == (3, 4)
    loss = "output.pow(2).sum()"
    session.run({"x": x}, backward=loss)
    refused = {str(s) for s, r in session.model.rules.items() if s.is_gradient and r.refused}
    assert "first:grad_output" in refused
    assert "first.weight:grad" in refused
    given = session.run({"x": x}, capture=["last:grad_output"], backward=loss)
    one = torch.as_tensor(given[":output"].numpy())
    assert relative(given["last:grad_output"].torch(), 2 * one) <= 1e-5


def test_plain_replicas_wrapped_for_data_parallelism(session):
    def build(**_):
        import torch
        from torch import nn

        torch.manual_seed(0)
        return nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))

    session.load(build, fsdp=2)
    assert "DistributedDataParallel" in str(session.model)  # what it is, not what the mesh was called
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    loss = "output.pow(2).mean()"
    session.run({"input": x}, backward=loss)
    run = session.run({"input": x}, capture=["0:grad_output", "0.weight:grad", "2.bias:grad"], backward=loss)
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    one(x).pow(2).mean().backward()
    assert relative(run["0.weight:grad"].torch(), one[0].weight.grad) <= 1e-5
    assert relative(run["2.bias:grad"].torch(), one[2].bias.grad) <= 1e-5
    assert run["0:grad_output"].shape == (5, 6)
    with pytest.raises(FlexError):
        run["2.weight:grad"]


def test_a_loss_never_sees_a_piece(session):
    def build(rank, **_):
        import torch
        from torch import nn

        torch.manual_seed(rank)
        return nn.Linear(4, 3)

    session.load(build)
    x = {"input": torch.randn(5, 4, generator=torch.Generator().manual_seed(3))}
    session.run(x)
    assert all(r.refused for s, r in session.model.rules.items() if (s.path, s.port) == ("", "output"))
    with pytest.raises(FlexError, match="nothing of which the whole is known"):
        session.run(x, backward="output.sum()")


def test_nothing_of_an_earlier_model_is_known_of_a_later_one(loaded):
    loaded.run(IDS, backward=LOSS)

    def build(**_):
        import torch

        torch.manual_seed(0)
        return torch.nn.ModuleDict({"norm": torch.nn.Linear(4, 3)})

    model = loaded.load(build)
    assert not model.surveyed
    assert not model.knows_gradients
    assert not model._first.whole
    assert not model._first.weights
    torch.manual_seed(0)
    assert torch.equal(model.parameter("norm.weight"), nn.Linear(4, 3).weight)
