"""Which layers of a model need not be computed again for forwards of one input."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flexmagic.engine import prefix as prefixes
from flexmagic.engine.prefix import Prefix, layers, prefix_of, repeated
from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Rule, Split
from flexmagic.layout.sites import Site

TOKENS = (Dim("batch"), Dim("seq"), Dim("feature", 4))


def rule(path, leaf="", dims=TOKENS, **more):
    return Rule(Site(path, "output", leaf), dims, "float32", Mesh(("tp",), (2,)), (0, 1), **more)


def rules_of(count=3, **more):
    made = [rule(f"layers.{n}", **more) for n in range(count)]
    return {r.site: r for r in made}


class Layer(nn.Module):
    def __init__(self, form=lambda y: y):
        super().__init__()
        self.linear, self.form = nn.Linear(4, 4), form

    def forward(self, x, scale=1.0):
        return self.form(self.linear(x) * scale)


class Model(nn.Module):
    def __init__(self, form=lambda y: y, between=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(form) for _ in range(3))
        self.between = between
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        for layer in self.layers:
            y = layer(x, scale=2.0)
            x = self.between(y[0] if isinstance(y, tuple) else y)
        return x


@pytest.fixture
def groups(monkeypatch):
    monkeypatch.setattr(prefixes, "numbers_of_all", lambda _groups, numbers: [list(numbers)])
    return SimpleNamespace()


@torch.no_grad()
def found(model, groups, rules=None, x=None, **known):
    x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(1)) if x is None else x
    asked = {"key": ("me", 1), "known": None, "overwritten": (), **known}
    return prefix_of(model, rules or rules_of(), groups, lambda: model(x), **asked)


def test_the_outermost_numbered_modules_are_layers():
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(1, 1)])})])}
    )
    assert layers(model) == ["layers.0"]


@torch.no_grad()
@pytest.mark.parametrize("form", [lambda y: y, lambda y: (y, None)], ids=["tensor", "tuple"])
def test_a_forward_may_begin_behind_what_is_known(groups, form):
    rules = {r.site: r for n in range(3) for leaf in ("", "[0]") for r in [rule(f"layers.{n}", leaf)]}
    model, x = Model(form), torch.randn(2, 5, 4)
    known = found(model, groups, rules, x)
    many, ran = x.repeat(3, 1, 1), []
    whole = model(many)
    for layer in model.layers:
        layer.linear.register_forward_hook(lambda *_: ran.append(1))
    with known.begun(model, ["layers.0", "layers.1"], rules, 3, lambda: False):
        assert torch.allclose(model(torch.zeros_like(many)), whole, atol=1e-6)  # nothing of its own rows
        assert len(ran) == 1
    with known.begun(model, ["layers.0"], rules, 3, lambda: True):
        model.layers[0](x)
        assert len(ran) == 2
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    assert not torch.allclose(model(torch.zeros_like(many)), whole)


@pytest.mark.parametrize(
    "broken",
    [
        {"between": lambda y: y + 1},  # the next layer takes something else
        {"between": lambda y: y.mul_(2)},  # the same tensor, but written into
        {"form": lambda y: (y, SimpleNamespace(cache=y))},  # what nobody can repeat
    ],
)
def test_layers_that_are_no_chain_are_computed(groups, broken):
    rules = {r.site: r for n in range(3) for leaf in ("", "[0]") for r in [rule(f"layers.{n}", leaf)]}
    assert len(found(Model(), groups, rules).outputs) == 3
    assert not found(Model(**broken), groups, rules).outputs


@pytest.mark.parametrize(
    "lies",
    [
        {"refused": "because"},
        {"together": True},
        {"dims": (Dim("one", 1), Dim("five", 5), Dim("feature", 4))},
        {"dims": (Dim("batch"), Dim("batch"), Dim("feature", 4))},
        {"splits": (Split(0, (0, 1)),)},
    ],
)
def test_layers_whose_rows_are_not_each_ranks_own_are_computed(groups, lies):
    assert not found(Model(), groups, rules_of(**lies)).outputs
    assert not found(Model(), groups, rules_of(2)).outputs  # of one, nothing is known
    assert len(found(Model(), groups, rules_of(splits=(Split(0, (0, 1), rows=True),))).outputs) == 3


def test_layers_whose_output_is_written_into_without_a_trace_are_computed(groups):
    assert not found(Model(), groups, overwritten={Site("layers.1")}).outputs
    assert found(Model(), groups, overwritten={Site("layers.1.linear")}).outputs


def test_no_more_is_kept_than_there_is_room_for(groups, monkeypatch):
    monkeypatch.setattr(prefixes, "MOST", 3 * 5 * 4 * 4 - 1)
    assert not found(Model(), groups).outputs
    monkeypatch.setattr(prefixes, "MOST", 3 * 5 * 4 * 4)
    assert found(Model(), groups).outputs


def test_it_is_of_one_sweep_and_of_the_parameters_as_they_were(groups):
    model = Model()
    known = found(model, groups)
    assert found(model, groups, known=known) is known
    assert model.runs == 1
    assert found(model, groups, known=known, key=("me", 2)) is not known
    with torch.no_grad():
        model.layers[0].linear.weight *= 2
    again = found(model, groups, known=known)
    assert again is not known
    assert not torch.equal(again.outputs["layers.2"], known.outputs["layers.2"])


def test_ranks_that_know_different_things_use_none(monkeypatch):
    monkeypatch.setattr(
        prefixes, "numbers_of_all", lambda _groups, numbers: [list(numbers), [0] * len(numbers)]
    )
    assert not found(Model(), SimpleNamespace()).outputs


def test_untouched_is_what_comes_before_all_sites():
    known = Prefix(("me", 1), {"layers.0": 0, "layers.1": 0, "layers.2": 0, "layers.10": 0}, {})

    def before(*sites):
        return len(known.untouched([Site.parse(site) for site in sites]))

    assert before("layers.2.mlp", "layers.1:input", "layers.10") == 1
    assert before("layers.10", "layers.10.attn") == 3
    assert before("layers.0") == 0
    assert before("embed") == 0
    assert before("layers.2", "encoder.layers.5") == 0
    assert len(known.untouched([Site(""), None])) == 4
    assert not known.untouched([Site("", "input")])


@pytest.mark.parametrize(("dims", "dim"), [(TOKENS, 0), ((Dim("feature", 4), Dim("batch·seq")), 1)])
def test_rows_are_repeated_along_their_dim(dims, dim):
    x = torch.arange(8.0).reshape(2, 4)
    rules = {Site("a"): rule("a", dims=dims)}
    assert torch.equal(repeated(x, "a", rules, 3), torch.cat([x] * 3, dim))
    one = x.narrow(dim, 1, 1)
    assert torch.equal(repeated(one, "a", rules, 3), torch.cat([one] * 3, dim))
