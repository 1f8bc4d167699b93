"""Runs that leave parts of the model out: nothing of them runs on any rank, the rest is as in one process."""

import contextlib

import pytest
import torch

from flexmagic import FlexError, InputError, SiteError

from .conftest import MODEL, PROMPT, clear, relative

pytestmark = pytest.mark.engines

LAYERS = [f"model.layers.{n}" for n in range(4)]


@contextlib.contextmanager
def counted(session):
    """How often each module of layers is called on each rank, by hooks that are not flexmagic's."""
    view = session._cluster.client[:]
    view.execute(
        "_counts = {}\n"
        "def _count(name):\n    return lambda *_: _counts.__setitem__(name, _counts.get(name, 0) + 1)\n"
        "_handles = [m.register_forward_hook(_count(n)) for n, m in model.named_modules()"
        " if not list(m.children())]",
        block=True,
    )
    found = []
    try:
        yield found
        found += view["_counts"]
    finally:
        view.execute("[h.remove() for h in _handles]", block=True)


@contextlib.contextmanager
def skipped(model, path, make):
    """The one-process model with a module's forward replaced."""
    module = model.get_submodule(path)
    module.forward = make
    try:
        yield model
    finally:
        del module.forward


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    "site", ["model.layers.1.mlp", "model.layers.1.mlp:input", "model.layers.1.self_attn.o_proj"]
)
def test_after_the_stop_nothing_runs_on_any_rank(loaded, site):
    plain = loaded.run(PROMPT, capture=[site, "model.layers.*"])
    loaded.hook("model.layers.3", "x *= 0", name="later")
    with counted(loaded) as counts:
        run = loaded.run(PROMPT, capture=[site, "model.layers.*"], stop_at=site)
    for of_rank in counts:
        assert of_rank["model.layers.0.mlp.down_proj"] == 1
        assert not [
            name for name in of_rank if name.startswith(("model.layers.2", "model.layers.3", "lm_head"))
        ]
    assert [s for s in run.sites if s in {f"{path}:output" for path in LAYERS}] == ["model.layers.0:output"]
    captured = next(s for s in run.sites if s.startswith(site))
    assert torch.equal(run[captured].torch(), plain[captured].torch())
    assert torch.equal(run["model.layers.0"].torch(), plain["model.layers.0"].torch())
    assert run.warnings == ("hook 'later' did not act: the run never reached model.layers.3:output.",)
    with pytest.raises(SiteError, match="was to stop at"):
        _ = run.logits
    assert torch.equal(loaded.run(PROMPT, only=[]).logits.torch(), plain.logits.torch())


def test_hooks_act_at_the_site_where_a_run_stops(loaded):
    plain = loaded.run(PROMPT, capture="model.layers.1.mlp")["model.layers.1.mlp"].torch()
    loaded.hook("model.layers.1.mlp", "x *= 2", name="h")
    run = loaded.run(PROMPT, stop_at="model.layers.1.mlp")
    assert torch.equal(run["model.layers.1.mlp"].torch(), plain * 2)


def test_a_skipped_layer_passes_its_input_and_nothing_of_it_runs(loaded, one_process, ids):
    plain = loaded.run(PROMPT).logits.torch()
    loaded.hook("model.layers.2.mlp", "x *= 2", name="inside")
    with counted(loaded) as counts:
        run = loaded.run(PROMPT, skip="model.layers.2", capture="model.layers.*")
    for of_rank in counts:
        assert of_rank["model.layers.1.mlp.down_proj"] == of_rank["model.layers.3.mlp.down_proj"] == 1
        assert not [name for name in of_rank if name.startswith("model.layers.2")]
    assert "model.layers.2:output" not in run.sites
    assert run.warnings == ("hook 'inside' did not act: the run never reached model.layers.2.mlp:output.",)
    assert relative(run.logits.torch(), plain) > 1e-3
    with skipped(one_process, "model.layers.2", lambda hidden_states, *_a, **_k: hidden_states) as model:
        assert relative(run.logits.torch(), logits(model, ids)) <= 1e-5
    assert torch.equal(loaded.run(PROMPT, only=[]).logits.torch(), plain)


def test_skipped_attention_and_a_projection_that_lies_otherwise(loaded, one_process, ids):
    """Attention returns a tuple; o_proj takes columns of each rank and returns the whole."""
    plain = loaded.run(PROMPT).logits.torch()
    attention, projection = "model.layers.1.self_attn", "model.layers.1.self_attn.o_proj"
    with counted(loaded) as counts:
        run = loaded.run(PROMPT, skip=attention)
    assert not [name for of_rank in counts for name in of_rank if name.startswith(attention)]
    with skipped(one_process, attention, lambda hidden_states, **_k: (hidden_states, None)) as model:
        reference = logits(model, ids)
    assert relative(run.logits.torch(), plain) > 1e-3
    assert relative(run.logits.torch(), reference) <= 1e-5
    run = loaded.run(PROMPT, skip=projection)
    with skipped(one_process, projection, lambda x: x) as model:
        reference = logits(model, ids)
    assert relative(run.logits.torch(), plain) > 1e-3
    assert relative(run.logits.torch(), reference) <= 1e-5


@pytest.mark.parametrize("value", [0, 0.5, torch.linspace(-1, 1, 256), torch.randn(1, 15, 256)])
def test_a_given_value_passes_instead(loaded, one_process, ids, value):
    run = loaded.run(PROMPT, skip={"model.layers.1.mlp": value, "model.layers.2.self_attn.o_proj": 0})
    whole = torch.as_tensor(value).expand(1, 15, 256).float()
    with (
        skipped(one_process, "model.layers.1.mlp", lambda _x: whole),
        skipped(one_process, "model.layers.2.self_attn.o_proj", torch.zeros_like) as model,
    ):
        assert relative(run.logits.torch(), logits(model, ids)) <= 1e-5


def test_what_cannot_be_left_out_is_refused(loaded):
    plain = loaded.run(PROMPT).logits.torch()
    for skip, said in (
        (
            "model.layers.1.mlp.up_proj",
            r"it takes \[batch, seq, hidden 256\] and returns \[batch, seq, mlp 768\]",
        ),
        ({"model.layers.1": torch.ones(3)}, r"\[3\] does not fit \[1, 15, 256\]"),
    ):
        with pytest.raises(FlexError, match=said):
            loaded.run(PROMPT, skip=skip)
    with pytest.raises(SiteError, match=r"Did you mean model\.layers\.1"):
        loaded.run(PROMPT, skip="model.layer.1")
    with pytest.raises(InputError, match="name what is skipped without a port"):
        loaded.run(PROMPT, skip="model.layers.1:input")
    with pytest.raises(InputError, match="names 4 sites"):
        loaded.run(PROMPT, stop_at="model.layers.*")
    with pytest.raises(InputError, match="has no gradients"):
        loaded.run(PROMPT, stop_at="model.layers.1", backward="logits.sum()")
    assert torch.equal(loaded.run(PROMPT).logits.torch(), plain)


def test_nothing_is_left_on_the_model(loaded):
    code = (
        "_left = [(n, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks),"
        " id(m.__dict__.get('forward'))) for n, m in model.named_modules()]"
    )
    view = loaded._cluster.client[:]
    view.execute(code, block=True)
    before = view["_left"]
    loaded.hook("model.layers.*.mlp", "x *= 1.1", name="h", step="1:", token=-1)
    loaded.generate(PROMPT, 3, skip="model.layers.0.self_attn,model.layers.{1..2}.mlp")
    loaded.run(PROMPT, stop_at="model.layers.2", skip={"model.layers.0.mlp": 0})
    with pytest.raises(FlexError):
        loaded.run(PROMPT, skip="model.layers.1.mlp.up_proj")
    view.execute(code, block=True)
    assert view["_left"] == before


def test_every_step_of_a_generation_skips(loaded, one_process, ids):
    run = loaded.generate(PROMPT, 4, skip="model.layers.2", capture="model.layers.3")
    with skipped(one_process, "model.layers.2.mlp", torch.zeros_like) as model:
        other = model.generate(ids, max_new_tokens=4)
    assert run.steps == 4
    assert run.step(3)["model.layers.3"].shape == (1, 1, 256)
    assert len(other[0]) == len(run.ids[0])


def test_shared_out_weights_and_rows_are_as_before_afterwards(session, one_process):
    clear(session)
    texts = ["The capital of France is", "The capital of Italy is"]
    for axes in ({"fsdp": 2}, {"dp": 2}):
        session.load(MODEL, attn="eager", **axes)
        plain = session.run(texts, capture="model.layers.1")
        batch = torch.tensor(plain.ids)
        stopped = session.run(texts, stop_at="model.layers.1")
        assert torch.equal(stopped["model.layers.1"].torch(), plain["model.layers.1"].torch())
        assert torch.equal(session.run(texts).logits.torch(), plain.logits.torch())
        run = session.run(texts, skip=["model.layers.{1..2}", "model.layers.3.self_attn"])
        with contextlib.ExitStack() as stack:
            for n in (1, 2):
                stack.enter_context(skipped(one_process, f"model.layers.{n}", lambda x, *_a, **_k: x))
            stack.enter_context(
                skipped(
                    one_process, "model.layers.3.self_attn", lambda hidden_states, **_k: (hidden_states, None)
                )
            )
            reference = logits(one_process, batch)
        assert relative(run.logits.torch(), reference) <= 1e-5
        assert relative(run.logits.torch(), plain.logits.torch()) > 1e-3
        assert torch.equal(session.run(texts).logits.torch(), plain.logits.torch())
