"""Modules called in hooks and trained through the distributed model, as in one process."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flexmagic.engine.adapter import LowRank
from flexmagic.errors import HookError, InputError

from .conftest import MODEL, relative

IDS = torch.randint(3, 1700, (4, 9), generator=torch.Generator().manual_seed(0))
LOSS = "logits[:, -1].log_softmax(-1)[:, 5].mean()"


def loss_of(logits):
    return logits[:, -1].log_softmax(-1)[:, 5].mean()


class Mix(nn.Module):
    """Mixes all features and uses the input twice."""

    def __init__(self, width):
        super().__init__()
        self.into, self.out = nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x):
        return x + self.out(self.into(x).tanh()) * x.sigmoid()


@pytest.fixture
def clean(session):
    """The shared session, without modules before and after."""
    for name in list(session.modules):
        del session.modules[name]
    yield session
    for name in list(session.modules):
        del session.modules[name]


def truth(model, module, path, *, port="output", probe=None):
    """Loss and gradients of a module in one process under a plain torch hook."""
    module = copy.deepcopy(module)
    target = model.get_submodule(path)
    seen = {}
    if port == "output":
        handle = target.register_forward_hook(lambda _m, _a, out: module(out))
    else:
        handle = target.register_forward_pre_hook(lambda _m, args: (module(args[0]), *args[1:]))
    last = None
    if probe is not None:
        probe = copy.deepcopy(probe)
        last = target.register_forward_hook(lambda _m, _a, out: seen.update(p=probe(out).mean()))
    loss = loss_of(model(IDS, use_cache=False).logits) + seen.get("p", 0)
    loss.backward()
    handle.remove()
    if last is not None:
        last.remove()
    model.zero_grad()
    found = {n: p.grad for n, p in module.named_parameters()}
    return (
        float(loss.detach()),
        found,
        {} if probe is None else {n: p.grad for n, p in probe.named_parameters()},
    )


SIZES = [{"tp": 2}, {"fsdp": 2}, {"dp": 2}]
PLACES = [
    ("model.layers.1.mlp", "output"),
    ("model.layers.1.mlp.up_proj", "output"),
    ("model.layers.2.mlp.down_proj", "input"),
    ("model.layers.0.self_attn.k_proj", "output"),
]


def check_gradients(session, one_process):
    """A module that mixes all features, and a probe beside it, at every kind of site."""
    plain = float(loss_of(one_process(IDS, use_cache=False).logits).detach())
    for path, port in PLACES:
        module = clean_module(one_process, path, port)
        probe = None if port == "input" else nn.Linear(module.out.out_features, 1)
        session.modules["mix"] = module
        h = session.hook(f"{path}:{port}", "x = modules.mix(x)", name="mix")
        loss = LOSS
        if probe is not None:
            session.modules["probe"] = probe
            session.hook(path, "ctx['p'] = modules['probe'](x).mean()", name="probe")
            loss += " + ctx['p']"
        run = session.run(IDS, backward=loss)
        value, want, want_probe = truth(one_process, module, path, port=port, probe=probe)
        assert abs(value - plain) > 1e-4 * abs(plain)
        assert run.loss == pytest.approx(value, rel=1e-5)
        got = session.modules["mix"].gradients()
        for name, gradient in want.items():
            assert relative(got[name], gradient) <= 1e-5, (path, name)
        if probe is not None:
            for name, gradient in session.modules["probe"].gradients().items():
                assert relative(gradient, want_probe[name]) <= 1e-5, (path, name)
            session.hooks["probe"].remove()
        h.remove()
        session.modules.zero_grad()


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_those_of_one_process_at_every_kind_of_site(clean, one_process, sizes):
    clean.load(MODEL, attn="eager", **sizes)
    check_gradients(clean, one_process)


def clean_module(model, path, port):
    torch.manual_seed(1)
    target = model.get_submodule(path)
    if isinstance(target, nn.Linear):
        return Mix(target.in_features if port == "input" else target.out_features)
    return Mix(model.config.hidden_size)


def test_a_gradient_is_the_measured_derivative(clean):
    clean.load(MODEL, attn="eager", tp=2)
    torch.manual_seed(0)
    clean.modules["mix"] = module = Mix(256)
    clean.hook("model.layers.1.mlp", "x = modules.mix(x)", name="mix")
    clean.run(IDS, backward=LOSS)
    gradient = clean.modules["mix"].gradients()["out.weight"].double()
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(module)
        with torch.no_grad():
            moved.out.weight += sign * 5e-2 * (gradient / gradient.norm()).float()
        clean.modules["mix"].load_state_dict(moved.state_dict())
        losses.append(clean.run(IDS, backward=LOSS).loss)
    assert (losses[0] - losses[1]) / 0.1 == pytest.approx(float(gradient.norm()), rel=1e-2)


def test_a_probe_is_trained_and_saved(clean, tmp_path):
    clean.load(MODEL, tp=2)
    clean.modules.build("probe", lambda: nn.Linear(256, 2), seed=3)
    first = clean.modules["probe"].state_dict()
    clean.hook("model.layers.2", "ctx['said'] = modules.probe(x[:, -1])", name="probe")
    loss = "torch.nn.functional.cross_entropy(ctx['said'], torch.tensor([0, 1, 0, 1]))"
    losses = []
    for _ in range(12):
        run = clean.run(IDS, backward=loss)
        losses.append(run.loss)
        clean.modules.step("adamw", lr=0.05)
    assert losses[-1] < losses[0] / 4
    assert tuple(run.context["said"].shape) == (4, 2)
    assert not run.context["said"].requires_grad
    path = clean.modules.save(tmp_path / "probe.safetensors")
    trained = clean.modules["probe"].state_dict()
    assert not torch.equal(trained["weight"], first["weight"])
    clean.modules.build("probe", lambda: nn.Linear(256, 2), seed=3)
    assert torch.equal(clean.modules["probe"].state_dict()["weight"], first["weight"])
    clean.modules.load(path)
    assert torch.equal(clean.modules["probe"].state_dict()["weight"], trained["weight"])


def check_adapter(session, one_process):
    """Twenty steps of an adapter on all layers: losses, states on all ranks, the model's own weights."""
    model = session.model
    weights = {n: model.parameter(n) for n in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight")}
    before = session.run(IDS).logits.torch()
    session.adapter("model.layers.*.mlp.down_proj", rank=4, name="lora", seed=5)
    assert torch.equal(session.run(IDS).logits.torch(), before)
    state = session.modules["lora"].state_dict()
    losses = []
    for _ in range(20):
        losses.append(session.run(IDS, backward=LOSS).loss)
        session.modules.step("adamw", lr=2e-3)
    want = trained_in_one_process(one_process, state)
    assert abs(want[-1] - want[0]) > 0.5
    assert losses == pytest.approx(want, rel=1e-3)
    sums = session._calls.all("module_sums", session._id)
    assert all(of_rank == sums[0] for of_rank in sums)
    for name, weight in weights.items():
        assert torch.equal(model.parameter(name), weight)
    del session.modules["lora"]
    assert not len(session.hooks)
    assert torch.equal(session.run(IDS).logits.torch(), before)


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"fsdp": 2}])
def test_an_adapter_trains_as_in_one_process(clean, one_process, sizes):
    clean.load(MODEL, attn="eager", **sizes)
    check_adapter(clean, one_process)


def trained_in_one_process(model, state):
    """The losses of the same adapter under plain torch hooks."""
    layers = [f"model.layers.{n}.mlp.down_proj" for n in range(model.config.num_hidden_layers)]
    sizes = {p: (model.get_submodule(p).in_features, model.get_submodule(p).out_features) for p in layers}
    adapter = LowRank(sizes, 4, 1.0)
    adapter.load_state_dict(state)
    handles = []
    for path in layers:

        def add(_m, args, out, path=path):
            adapter.see(path, args[0])
            return adapter(path, out)

        handles.append(model.get_submodule(path).register_forward_hook(add))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model(IDS, use_cache=False).logits)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return losses


def test_values_persist_from_run_to_run(clean):
    clean.load(MODEL, tp=2)
    clean.persistent["count"] = 0
    clean.hook("model.norm", "persistent['count'] += 1\npersistent['last'] = x[:, -1].clone()", name="count")
    runs = [clean.run(IDS, capture=["model.norm"]) for _ in range(3)]
    assert clean.persistent["count"] == 3
    assert torch.equal(clean.persistent["last"], runs[-1]["model.norm"].torch()[:, -1])
    assert set(clean.persistent) == {"count", "last"}
    clean.persistent.clear()
    with pytest.raises(KeyError):
        clean.persistent["count"]


def test_mistakes_with_modules_say_what_to_do(clean):
    clean.load(MODEL, tp=2)
    with pytest.raises(InputError, match=r"must be a torch\.nn\.Module"):
        clean.modules["probe"] = 3
    with pytest.raises(InputError, match="Choose a name"):
        clean.modules["a b"] = nn.Linear(2, 2)
    with pytest.raises(InputError, match="call it once"):
        clean.modules["lazy"] = nn.LazyLinear(2)
    with pytest.raises(InputError, match="Modules: none yet"):
        clean.modules["probe"]
    with pytest.raises(InputError, match="No module has gradients"):
        clean.modules.step()
    clean.modules["probe"] = nn.Linear(256, 2)
    with pytest.raises(InputError, match="no optimizer 'adamx'"):
        clean.modules.step("adamx")
    clean.hook("model.norm", "ctx['p'] = modules.prob(x)", name="probe")
    with pytest.raises(HookError, match=r"Modules: probe"):
        clean.run(IDS)
    clean.hook("model.norm", "ctx['p'] = modules.probe(x)", name="probe", local=True)
    with pytest.raises(HookError, match="leave --local away"):
        clean.run(IDS, backward=LOSS)
    clean.hook("model.norm", "ctx['p'] = modules.probe(x)", name="probe")
    clean.run(IDS, backward="ctx['p'].sum()")
    with pytest.raises(InputError, match="cannot be made like this"):
        clean.modules.step("sgd", speed=3)
    with pytest.raises(InputError, match="is no module"):
        clean.adapter("model.norm:input")
    with pytest.raises(InputError, match="1 or more"):
        clean.adapter("model.norm", rank=0)


def test_a_notebook_that_starts_again_finds_its_modules(clean):
    clean.load(MODEL, tp=2)
    clean.adapter("model.layers.1.mlp.down_proj", rank=2, name="lora")
    kind = repr(clean.modules["lora"])
    clean.modules.receive()
    assert repr(clean.modules["lora"]) == kind
    clean._calls.one(1, "drop_module", clean._id, "lora")
    clean.modules.restore()
    sums = clean._calls.all("module_sums", clean._id)
    assert sums[0] == sums[1] != {}
    del clean.modules["lora"]
    assert not len(clean.hooks)
