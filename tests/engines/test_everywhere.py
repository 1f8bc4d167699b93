"""The usual interventions under other distributions than tensor parallelism, which other tests are about."""

import contextlib

import pytest
import torch

from flexmagic import Session

from .conftest import MODEL, clear, relative

pytestmark = pytest.mark.engines

TEXTS = ["The capital of France is", "The capital of Italy is"]
PROMPTS = ["When Mary and John went to the store,", "When John and Mary went to the house,"]
UP = "model.layers.1.mlp.up_proj"
LOSS = "logits[:, -1, 5].sum()"
WAYS = [
    pytest.param({"fsdp": 2}, id="fsdp"),
    pytest.param({"tp": 2, "dp": 2}, id="tp×dp", marks=pytest.mark.full),
]


@pytest.fixture(scope="module", params=WAYS)
def shared_out(request, engines):
    """The shipped model with the rows of a batch, or the weights, on several ranks."""
    ranks = 2 if len(request.param) == 1 else 4
    with contextlib.nullcontext(engines) if ranks == 2 else Session.start(4, oversubscribe=True) as session:
        clear(session)
        session.load(MODEL, attn="eager", **request.param)
        yield session
        clear(session)


@pytest.fixture
def split(shared_out):
    clear(shared_out)
    yield shared_out
    clear(shared_out)


@contextlib.contextmanager
def edits(model, by_path):
    """Outputs of modules, or with ``:input`` what they take, edited by functions of it and the call."""
    handles = []

    def put(path, edit):
        module, calls = model.get_submodule(path.removesuffix(":input")), []

        def on(_module, args, *out):
            calls.append(None)
            if out:
                return edit(out[0].clone(), len(calls) - 1)
            return (edit(args[0].clone(), len(calls) - 1), *args[1:])

        place = module.register_forward_pre_hook if ":" in path else module.register_forward_hook
        handles.append(place(on))

    for path, edit in by_path.items():
        put(path, edit)
    try:
        with torch.no_grad():
            yield model
    finally:
        for handle in handles:
            handle.remove()


def truth(model, ids, by_path=()):
    with edits(model, dict(by_path)) as edited:
        return edited(torch.tensor(ids), use_cache=False).logits


def test_groups_in_turn(split, one_process):
    """A, its complement, all, A again, none: each as in one process."""
    of = {"model.layers.0.mlp": 2, "model.layers.1.mlp": 3, UP: 4}
    for n, (site, factor) in enumerate(of.items()):
        split.hook(site, f"x *= {factor}", name=f"h{n}", group="A" if n < 2 else None)

    def wanted(*sites):
        return truth(one_process, ids, {s: lambda x, _n, f=of[s]: x * f for s in sites})

    first = split.run(TEXTS, only="A")
    ids, (one, two, last) = first.ids, of
    cycle = []
    for switch, sites in (
        (lambda: split.hooks.disable("h2"), (one, two)),
        (lambda: split.hooks.complement("A"), (last,)),
        (split.hooks.enable, tuple(of)),
        (lambda: split.hooks.disable("h2"), (one, two)),
        (split.hooks.disable, ()),
    ):
        switch()
        cycle.append(split.run(TEXTS).logits.torch())
        assert relative(cycle[-1], wanted(*sites)) <= 1e-5
    assert torch.equal(cycle[0], cycle[3])
    assert torch.equal(cycle[0], first.logits.torch())
    assert all(relative(a, b) > 1e-3 for n, a in enumerate(cycle[1:3]) for b in (cycle[0], cycle[4]))


def test_ctx_of_layer_1_is_read_in_the_last_layer(split, one_process):
    split.hook("model.layers.1", "ctx['early'] = x.clone()", name="save")
    split.hook("model.layers.3", "x += ctx['early']", name="use")
    run = split.run(TEXTS)
    kept = {}
    want = truth(
        one_process,
        run.ids,
        {
            "model.layers.1": lambda x, _n: kept.setdefault("early", x),
            "model.layers.3": lambda x, _n: x + kept["early"],
        },
    )
    assert relative(want, truth(one_process, run.ids)) > 1e-3
    assert relative(run.logits.torch(), want) <= 1e-5
    assert relative(run.context["early"], kept["early"]) <= 1e-5


def test_one_heads_pattern_is_replaced_and_the_others_keep_their_bits(split, one_process):
    """Head 7 shares the values of key-value head 3; the input of o_proj holds the heads side by side."""
    values, heads = "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj:input"
    plain = split.run(TEXTS, capture=heads)
    split.hook(values, "ctx['v'] = x[..., 96:].clone()", name="values")
    split.hook(
        heads,
        "mean = torch.ones(x.shape[1], x.shape[1]).tril()\n"
        "x[..., 7 * 32 :] = mean / mean.sum(-1, keepdim=True) @ ctx['v']",
        name="pattern",
    )
    run, kept = split.run(TEXTS), {}
    assert torch.equal(run[heads].torch()[..., : 7 * 32], plain[heads].torch()[..., : 7 * 32])
    assert relative(run.logits.torch(), plain.logits.torch()) > 1e-4

    def replace(x, _n):
        mean = torch.ones(x.shape[1], x.shape[1]).tril()
        x[..., 7 * 32 :] = mean / mean.sum(-1, keepdim=True) @ kept["v"]
        return x

    by_path = {values: lambda x, _n: [kept.update(v=x[..., 96:].clone()), x][1], heads: replace}
    assert relative(run.logits.torch(), truth(one_process, run.ids, by_path)) <= 1e-5


def test_a_grid_of_patches_is_one_command(split, one_process):
    code = (
        "h = model.layers[layer].output\n"
        "h[1, position] = h[0, position]\n"
        "save.p = model.output.logits[1, -1].softmax(-1)[5]"
    )
    positions = [3, 5]
    sweep = split.sweep(TEXTS, code, {"layer": range(4), "position": positions})
    grid = torch.zeros(4, 2)
    for layer in range(4):
        for n, position in enumerate(positions):

            def patch(x, _n, position=position):
                x[1, position] = x[0, position]
                return x

            logits = truth(one_process, sweep.runs[0].ids, {f"model.layers.{layer}": patch})
            grid[layer, n] = logits[1, -1].softmax(-1)[5]
    assert grid.std() > 0
    assert relative(sweep["p"], grid) <= 1e-4


def test_steps_of_a_generation_are_edited_and_no_others(split, one_process):
    """A neuron of the last rank's columns in step 3, steering in steps 1 and 2."""
    ids = split.run(PROMPTS).ids
    plain = split.generate(ids, 6, capture=UP)
    for hooks, first, site, edit in (
        (("x[..., -1] = 100", 3), 3, UP, lambda x, n: ablated(x) if n == 3 else x),
        (("x += 30 * torch.sin(torch.arange(256))", "1:3"), 1, "model.layers.2", steered),
    ):
        split.hook(site, hooks[0], name="h", step=hooks[1])
        run, logits = split.generate(ids, 6), []
        keep = one_process.register_forward_hook(lambda _m, _a, out, to=logits: to.append(out.logits))
        with edits(one_process, {site: edit}) as model:
            want = model.generate(
                torch.tensor(ids), attention_mask=torch.ones(2, len(ids[0])).long(), max_new_tokens=6,
                logits_to_keep=0,
            )  # fmt: skip
        keep.remove()
        assert run.ids == want.tolist()
        for n in range(run.steps):
            assert relative(run.step(n).logits.torch(), logits[n]) <= 1e-5
        for n in range(first):
            assert torch.equal(run.step(n).logits.torch(), plain.step(n).logits.torch())
        assert relative(run.step(first).logits.torch(), plain.step(first).logits.torch()) > 1e-4
        split.hooks["h"].remove()


def ablated(x):
    x[..., -1] = 100
    return x


def steered(x, step):
    return x + 30 * torch.sin(torch.arange(256)) if step in {1, 2} else x


def test_retrieval_changes_nothing_at_all(split):
    site = "model.layers.0.mlp.up_proj.weight:grad"
    plain = split.run(TEXTS, backward=LOSS, capture=site)
    split.hook("model.layers.*", name="look")
    split.hook("model.layers.*.mlp.up_proj", "ctx[site] = x.sum()", name="read")
    split.hook("model.layers.*:grad_output", "ctx[site] = x.sum()", name="read gradients")
    run = split.run(TEXTS, backward=LOSS, capture=site)
    assert torch.equal(run.logits.torch(), plain.logits.torch())
    assert torch.equal(run[site].torch(), plain[site].torch())
    assert run.loss == plain.loss
    assert len(run.context) == 8
    assert float(run[site].torch().abs().max()) > 0
