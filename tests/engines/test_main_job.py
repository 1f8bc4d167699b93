"""The main job on two real engines: whole, and the same as one process."""

import numpy as np
import pytest
import torch

from flexmagic import HookError
from flexmagic.engine.probe import observe
from flexmagic.layout.sites import Site

from .conftest import MODEL, PROMPT, relative

pytestmark = pytest.mark.engines
EVERY = ["model", "lm_head", "model.*", "model.layers.*", "model.layers.*.*", "model.layers.*.*.*"]


@pytest.fixture(scope="module")
def truth(one_process, ids):
    """Every tensor at every site of the model in one process."""
    seen = {}
    observe(
        one_process,
        lambda: one_process(input_ids=ids, use_cache=False),
        lambda s, t: seen.setdefault(s, t.clone()),
    )
    return seen


def capture_everything(session):
    paths = [p for p in session.model.paths if p and any(s.path == p for s in session.model.rules)]
    ports = {(s.path, s.port) for s in session.model.rules}
    return [f"{p}:{port}" for p in paths for port in ("input", "output") if (p, port) in ports] + [":input"]


def test_every_site_is_whole_and_equals_one_process(loaded, truth):
    run = loaded.run(PROMPT, capture=capture_everything(loaded))
    refused = [str(s) for s, rule in loaded.model.rules.items() if rule.refused]
    assert refused == []
    assert {str(s) for s in truth} == set(run.sites)
    split = 0
    for site, reference in truth.items():
        activation = run[str(site)]
        split += not activation.layout.replicated
        assert activation.shape == tuple(reference.shape), site
        assert activation.dtype == str(reference.dtype).removeprefix("torch."), site
        assert relative(activation.torch(), reference) <= 1e-5, site
    assert split > 30  # the test would show nothing on a model that is not split


def test_logits_equal_one_process(loaded, truth):
    run = loaded.run(PROMPT)
    reference = truth[Site("", "output", ".logits")]
    assert relative(run.logits.torch(), reference) <= 1e-5
    assert run.logits.torch()[0, -1].argmax() == reference[0, -1].argmax()
    assert run.logits.dims == ("batch", "seq", "vocab")


def test_attention_patterns_have_all_heads(loaded, truth):
    run = loaded.run(PROMPT, capture="model.layers.2.self_attn")
    pattern = run["model.layers.2.self_attn:output[1]"]
    assert pattern.dims == ("batch", "heads", "seq", "seq")
    assert pattern.shape[1] == 8
    assert torch.allclose(pattern.torch().sum(-1), torch.ones(pattern.shape[:3]), atol=1e-5)
    assert relative(pattern.torch(), truth[Site("model.layers.2.self_attn", "output", "[1]")]) <= 1e-5


SITES = ["model.layers.1.mlp", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.act_fn", "model.layers.0"]


@pytest.mark.parametrize("path", SITES)
@pytest.mark.parametrize(
    ("body", "edit"),
    [
        ("x[:, -1] *= 0.5", lambda x: torch.cat([x[:, :-1], x[:, -1:] * 0.5], 1)),
        ("x[..., x.shape[-1] // 2 - 3 : x.shape[-1] // 2 + 3] = 0", None),
        ("x = x - x.mean(-1, keepdim=True)", lambda x: x - x.mean(-1, keepdim=True)),
    ],
)
def test_an_edit_has_an_effect_and_equals_one_process(loaded, edited, ids, path, body, edit):  # noqa: PLR0917
    def middle(x):
        x = x.clone()
        m = x.shape[-1] // 2
        x[..., m - 3 : m + 3] = 0
        return x

    plain = loaded.run(PROMPT).logits.torch()
    loaded.hook(path, body, name="edit")
    run = loaded.run(PROMPT)
    logits = run.logits.torch()
    assert relative(logits, plain) > 1e-4
    with edited({path: edit or middle}) as model, torch.no_grad():
        reference = model(ids, use_cache=False).logits
    assert relative(logits, reference) <= 1e-5


def test_one_head_on_the_last_rank_can_be_silenced(loaded, edited, ids):
    """Head 7 lives on rank 1 alone; the input of o_proj holds the heads side by side."""
    plain = loaded.run(PROMPT).logits.torch()
    loaded.hook("model.layers.1.self_attn.o_proj:input", "x[..., -(x.shape[-1] // 8):] = 0", name="head")
    logits = loaded.run(PROMPT).logits.torch()
    assert relative(logits, plain) > 1e-4

    def silence(_module, args):
        x = args[0].clone()
        x[..., -(x.shape[-1] // 8) :] = 0
        return (x,)

    with edited({}) as model, torch.no_grad():
        handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(silence)
        reference = model(ids, use_cache=False).logits
        handle.remove()
    assert relative(logits, reference) <= 1e-5


def test_a_local_edit_acts_on_each_ranks_own_piece(loaded, edited, ids):
    loaded.hook("model.layers.1.mlp.up_proj", "x *= 2; print(tuple(x.shape))", name="local", local=True)
    logits = loaded.run(PROMPT).logits.torch()
    with edited({"model.layers.1.mlp.up_proj": lambda x: x * 2}) as model, torch.no_grad():
        reference = model(ids, use_cache=False).logits
    assert relative(logits, reference) <= 1e-5


def test_a_patch_from_another_run_equals_one_process(loaded, edited, one_process, ids):
    """A whole tensor read in the notebook goes back in through a function hook."""
    donor = loaded.run("The capital of France is", capture="model.layers.2")["model.layers.2"].torch()[:, -1]
    plain = loaded.run(PROMPT).logits.torch()

    def patch(x, h):
        x[:, -1] = donor

    loaded.hook("model.layers.2", patch, name="patch")
    logits = loaded.run(PROMPT).logits.torch()
    assert relative(logits, plain) > 1e-4
    with (
        edited({"model.layers.2": lambda x: torch.cat([x[:, :-1], donor[:, None]], 1)}) as model,
        torch.no_grad(),
    ):
        reference = model(ids, use_cache=False).logits
    assert relative(logits, reference) <= 1e-5


def test_random_edits_are_the_same_for_the_same_seed_and_on_every_rank(loaded):
    loaded.hook("model.layers.0.mlp.up_proj", "x += torch.randn_like(x)", name="noise")
    one, same = loaded.run(PROMPT, seed=3), loaded.run(PROMPT, seed=3)
    other = loaded.run(PROMPT, seed=4)
    assert torch.equal(one.logits.torch(), same.logits.torch())
    assert not torch.equal(one.logits.torch(), other.logits.torch())


def test_a_batch_of_texts_is_one_activation(loaded, one_process):
    texts = ["The capital of France is", "The capital of Italy is"]
    run = loaded.run(texts, capture="model.layers.3.mlp")
    assert run["model.layers.3.mlp"].shape[0] == 2
    reference = one_process(torch.tensor(run.ids), use_cache=False).logits
    assert relative(run.logits.torch(), reference.detach()) <= 1e-5


def test_without_hooks_the_model_is_untouched_bit_for_bit(loaded, engines):
    raw = engines_raw_logits(loaded)
    loaded.run(PROMPT, capture=["model.layers.*", "model.layers.*.mlp.*"])
    assert torch.equal(loaded.run(PROMPT).logits.torch(), raw)
    loaded.hook("model.layers.*.mlp.*", "ctx[site] = float(x.mean())", name="reads")
    hooked = loaded.run(PROMPT)
    assert torch.equal(hooked.logits.torch(), raw)
    assert len(hooked.context) == 4 * len({p for p in loaded.model.paths if p.endswith("up_proj")})


def engines_raw_logits(session):
    """The distributed model's own logits, called on the engines without any of our hooks."""
    run = session.run(PROMPT)
    code = (
        "import torch\n"
        f"_ids = torch.tensor({run.ids})\n"
        "with torch.no_grad():\n    _raw = model(_ids, use_cache=False).logits.tolist()\n"
        "_attached = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())"
    )
    view = session._cluster.client[:]
    view.execute(code, block=True)
    assert view["_attached"] == [0, 0]
    return torch.tensor(view["_raw"][0])


def test_retrieval_adds_no_collective_to_the_forward(loaded):
    counter = (
        "import torch.distributed as dist\n"
        "_counts = {}\n"
        "def _counted(name, original):\n"
        "    def call(*a, **k):\n"
        "        _counts[name] = _counts.get(name, 0) + 1\n"
        "        return original(*a, **k)\n"
        "    return call\n"
        "_names = [n for n in ('all_reduce all_gather all_gather_into_tensor all_gather_object barrier "
        "broadcast isend irecv send recv reduce_scatter_tensor all_to_all batch_isend_irecv').split()]\n"
        "_originals = {n: getattr(dist, n) for n in _names}\n"
        "for n, f in _originals.items(): setattr(dist, n, _counted(n, f))\n"
    )
    view = loaded._cluster.client[:]
    view.execute(counter, block=True)
    try:
        counts = []
        layers = ("model.layers.*.mlp.*", "model.layers.*")
        for capture, body in [((), None), (layers, None), ((), "x *= 2"), ((), "x -= x.mean()")]:
            view.execute("_counts.clear()", block=True)
            if body:
                loaded.hook("model.layers.0.mlp.up_proj", body, name="edit")
            loaded.run(PROMPT, capture=capture)
            counts.append(view["_counts"])
    finally:
        view.execute("for n, f in _originals.items(): setattr(dist, n, f)", block=True)
    plain, retrieving, apart, editing = counts
    assert plain[0]["all_reduce"] > 0  # the counter sees the model's own collectives
    assert retrieving == plain
    assert apart == plain  # each element by itself, as its text shows
    assert editing != plain  # and it would see ours


def test_unwrapping_leaves_nothing_and_the_same_parameters(session):
    view = session._cluster.client[:]
    session.load(MODEL, tp=2)
    view.execute(
        "_kept = model\n"
        "_attributes = {n: sorted(vars(m)) for n, m in model.named_modules()}\n"
        "_before = {n: p.detach().clone() for n, p in model.named_parameters()}",
        block=True,
    )
    session.hook("model.layers.*.mlp", "x *= 0.5", name="damp")
    session.run(PROMPT, capture="model.layers.*")
    assert session.model.unwrap() == 0
    view.execute(
        "import torch\n"
        "_same = all(torch.equal(getattr(_before[n], 'to_local', lambda: _before[n])(), "
        "getattr(p, 'to_local', lambda: p)()) for n, p in _kept.named_parameters())\n"
        "_hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in _kept.modules())\n"
        "_clean = _attributes == {n: sorted(vars(m)) for n, m in _kept.named_modules()}\n"
        "_gone = 'model' not in globals()",
        block=True,
    )
    assert view["_same"] == view["_clean"] == view["_gone"] == [True, True]
    assert view["_hooks"] == [0, 0]
    view.execute("del _kept, _before", block=True)


def test_running_a_hook_again_replaces_it_and_undo_brings_the_last_one_back(loaded):
    plain = loaded.run(PROMPT).logits.torch()
    loaded.hook("model.layers.0.mlp", "x *= 2", name="h")
    twice = loaded.run(PROMPT).logits.torch()
    hook = loaded.hook("model.layers.0.mlp", "x *= 1", name="h")
    assert len(loaded.hooks) == 1
    assert hook.version == 2
    assert torch.equal(loaded.run(PROMPT).logits.torch(), plain)
    hook.undo()
    assert hook.version == 1
    assert torch.equal(loaded.run(PROMPT).logits.torch(), twice)
    assert not torch.equal(twice, plain)
    with pytest.raises(HookError, match="no earlier version"):
        hook.undo()
    assert loaded.hook("model.layers.0.mlp", "x *= 3", name="h").version == 3
    hook.enabled = False
    assert torch.equal(loaded.run(PROMPT).logits.torch(), plain)


def test_what_hooks_save_in_ctx_is_readable_later_in_the_run_and_after_it(loaded):
    loaded.hook("model.layers.0.mlp", "ctx['early'] = x.clone()", name="save")
    loaded.hook("model.layers.3.mlp", "ctx['same'] = bool((ctx['early'] == ctx['early']).all())", name="use")
    run = loaded.run(PROMPT, capture="model.layers.0.mlp")
    assert run.context["same"] is True
    assert torch.equal(run.context["early"], run["model.layers.0.mlp"].torch())
    later = loaded.run(PROMPT)
    assert later.context is not run.context
    run.release()


def test_running_leaves_the_engines_random_state_alone(loaded):
    view = loaded._cluster.client[:]
    view.execute("torch.manual_seed(7); _a = torch.rand(1).item(); torch.manual_seed(7)", block=True)
    loaded.hook("model.layers.0.mlp", "x += torch.randn_like(x)", name="noise")
    loaded.run(PROMPT, seed=1)
    view.execute("_b = torch.rand(1).item()", block=True)
    assert view["_a"] == view["_b"]


def test_parameters_are_whole(loaded, one_process):
    for name in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight",
                 "model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"):  # fmt: skip
        assert torch.equal(loaded.model.parameter(name), one_process.get_parameter(name)), name


def test_each_rank_holds_only_its_own_part(loaded, one_process):
    whole = sum(p.nbytes for p in one_process.parameters())
    for part in loaded.model.parameter_bytes:
        assert part <= 0.6 * whole


def test_a_long_1_d_activation_has_an_overview(session):
    session.load_cell(
        "import torch\n"
        "class Flat(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x * 2\n"
        "model = Flat()"
    )
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    activation = session.run({"x": x})[":output"]
    seen = activation.overview(-1, 0, {}, np.array([0, 1]), np.array([0, 2500, 5000]))
    np.testing.assert_allclose(seen.mean[0], (2 * x).reshape(2, -1).mean(1), rtol=1e-4)


def test_a_look_moves_only_what_is_looked_at(loaded):
    run = loaded.run(PROMPT, capture="model.layers.1.mlp.up_proj")
    activation = run["model.layers.1.mlp.up_proj"]
    whole = activation.numpy()
    fresh = run["model.layers.1.mlp.up_proj"]
    row = fresh[0, -1]
    assert fresh.bytes_moved == whole.shape[-1] * 4
    assert (row == whole[0, -1]).all()
    assert (fresh[0, 2, ::2] == whole[0, 2, ::2]).all()
    assert (fresh[..., -1] == whole[..., -1]).all()
    assert (fresh[0, ::-1, 3:1:-1] == whole[0, ::-1, 3:1:-1]).all()
    stats = activation.stats()
    assert stats.n == whole.size
    assert stats.mean == pytest.approx(whole.mean(dtype="float64"))
    assert "Shard(dim=2)" in repr(activation)
