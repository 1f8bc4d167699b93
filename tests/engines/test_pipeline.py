"""Pipelines of torch.distributed.pipelining from a cell: every site whole, and the same as one process."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexmagic import HookError, ModelError
from flexmagic.engine.probe import observe

from .conftest import MODEL, relative
from .stages import cell

pytestmark = pytest.mark.engines

MIDDLE = "model.layers.1.mlp.up_proj"
LATE = "model.layers.3.mlp"
ROTARY = "model.rotary_emb:input[0]"
"""What the rotary embedding is called with: each stage has its own, on other values."""


def rows(batch, seq, seed=0):
    return torch.randint(3, 2000, (batch, seq), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def whole():
    return AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="sdpa").eval()


def truth_of(whole, ids, **options):
    """Every tensor at every site in one process."""
    seen = {}
    observe(
        whole,
        lambda: whole(input_ids=ids, use_cache=False, **options),
        lambda s, t: seen.setdefault(str(s), t.clone()),
    )
    return seen | {":output": seen[":output.logits"], ":input.input_ids": ids}


def logits_of(whole, ids, path=None, edit=None, *, before=False):
    """The logits of one process, ``edit`` applied to what a module returns or takes."""
    handle = None
    if path is not None and before:
        handle = whole.get_submodule(path).register_forward_pre_hook(lambda _m, a: (edit(a[0].clone()),))
    elif path is not None:
        handle = whole.get_submodule(path).register_forward_hook(
            lambda _m, _a, out: edit(out.clone() if isinstance(out, torch.Tensor) else out)
        )
    with torch.no_grad():
        out = whole(ids, use_cache=False).logits
    if handle is not None:
        handle.remove()
    return out


def places(session):
    return sorted({f"{s.path}:{s.port}" for s in session.model.rules})


def check_every_site(session, whole, ids, refused):
    """All sites but the refused equal one process; returns how many there are."""
    if not session.model.surveyed:
        session.run(ids)
    rules = session.model.rules
    assert {str(s) for s, rule in rules.items() if rule.refused} == refused
    run = session.run(ids, capture=places(session))
    truth = truth_of(whole, ids)
    assert {str(s) for s in rules} - set(truth) <= {":output", ":input.use_cache"}
    for site, rule in rules.items():
        if not rule.refused:
            activation = run[str(site)]
            assert relative(activation.torch(), truth[str(site)]) <= 1e-5, site
    return len(rules)


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [(1, "ScheduleGPipe"), (4, "Schedule1F1B"), pytest.param(4, "ScheduleGPipe", marks=pytest.mark.full)],
)
def test_every_site_of_every_stage_equals_one_process(session, whole, pieces, kind):
    session.load_cell(cell(pieces, kind), pp=2)
    assert check_every_site(session, whole, rows(4, 7), {ROTARY}) > 130
    assert session.model.name == "Stage"
    stages = {rule.ranks for rule in session.model.rules.values()}
    assert stages == {(0,), (1,), (0, 1)}


@pytest.fixture
def piped(session):
    """The session with a pipeline of four micro-batches, surveyed."""
    if getattr(session, "piped", None) is not session._model or not session.model.alive:
        session.load_cell(cell(4), pp=2)
        session.run(rows(4, 7))
        session.piped = session.model
    return session


@pytest.mark.parametrize(("batch", "seq"), [(4, 7), (5, 7), (7, 12), (2, 3), (1, 9)])
def test_uneven_batches_and_new_lengths_come_out_right(piped, whole, batch, seq):
    """Five rows make micro-batches of 2, 1, 1 and 1; two rows make two; lengths change from run to run."""
    ids = rows(batch, seq, seed=batch)
    run = piped.run(ids, capture=["model.layers.*", MIDDLE, "model.layers.2:input"])
    truth = truth_of(whole, ids)
    for site in run.sites:
        assert relative(run[site].torch(), truth[site]) <= 1e-5, site
    assert run[LATE.removesuffix(".mlp")].shape == (batch, seq, 256)


def test_micro_batches_are_cut_as_the_schedule_says(piped):
    view = piped._cluster.client[0]
    view.execute("_seen = []", block=True)
    piped.hook(MIDDLE, "_seen.append(tuple(x.shape))", name="shapes", local=True)
    run = piped.run(rows(5, 7), capture=MIDDLE)
    assert view["_seen"] == [(2, 7, 768), (1, 7, 768), (1, 7, 768), (1, 7, 768)]
    assert run[MIDDLE].shape == (5, 7, 768)
    assert run[MIDDLE]._origin.warnings == ()


EDITS = {
    "a column": (MIDDLE, "x[..., 400] += 3"),
    "a row of the batch": (LATE, "x[-1] *= 0"),
    "the mean over all rows": ("model.layers.2", "x -= x.mean(0, keepdim=True)"),
    "the model's embedding": ("model.embed_tokens", "x[:, 0] *= 2"),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_sees_the_whole_batch_and_equals_one_process(piped, whole, what):
    path, body = EDITS[what]
    ids = rows(5, 7)

    def edit(x):
        exec(body, {"x": x})  # noqa: S102 - the same text as the hook's
        return x

    plain = piped.run(ids)[":output"].torch()
    assert relative(plain, logits_of(whole, ids)) <= 1e-5
    piped.hook(path, body + "\nctx['shape'] = tuple(x.shape)", name="edit")
    run = piped.run(ids)
    assert run.context["shape"][0] == 5
    assert relative(run[":output"].torch(), plain) > 1e-4
    assert relative(run[":output"].torch(), logits_of(whole, ids, path, edit)) <= 1e-5


def test_one_head_and_the_models_own_output_can_be_edited(piped, whole):
    ids = rows(4, 7)
    plain = piped.run(ids)[":output"].torch()

    def silence(x):
        x[..., -32:] = 0
        return x

    head = piped.hook("model.layers.2.self_attn.o_proj:input", "x[..., -32:] = 0", name="head")
    logits = piped.run(ids)[":output"].torch()
    expected = logits_of(whole, ids, "model.layers.2.self_attn.o_proj", silence, before=True)
    assert relative(logits, plain) > 1e-4
    assert relative(logits, expected) <= 1e-5
    head.remove()
    piped.hook(":output", "x *= 2", name="twice")
    assert relative(piped.run(ids)[":output"].torch(), plain * 2) <= 1e-6


def test_a_local_edit_acts_on_each_micro_batch(piped, whole):
    ids = rows(5, 7)
    plain = piped.run(ids)[":output"].torch()
    piped.hook(LATE, "x *= 3", name="local", local=True)
    run = piped.run(ids, capture=LATE)
    assert relative(run[":output"].torch(), plain) > 1e-4
    assert relative(run[":output"].torch(), logits_of(whole, ids, LATE, lambda x: x * 3)) <= 1e-5
    assert relative(run[LATE].torch(), truth_of(whole, ids)[LATE + ":output"] * 3) <= 1e-5


def test_a_site_on_both_stages_is_edited_on_both_without_waiting(piped, whole):
    ids = rows(4, 7)
    plain = piped.run(ids)[":output"].torch()
    piped.hook("model.rotary_emb:output[0]", "x *= 0.5", name="turn")
    logits = piped.run(ids)[":output"].torch()
    expected = logits_of(whole, ids, "model.rotary_emb", lambda pair: (pair[0] * 0.5, pair[1]))
    assert relative(logits, plain) > 1e-4
    assert relative(logits, expected) <= 1e-5


def test_what_a_hook_saves_is_readable_on_a_later_stage(piped):
    ids = rows(4, 7)
    piped.hook("model.layers.0", "ctx['early'] = float(x.sum())", name="save")
    piped.hook("model.layers.3", "ctx['late'] = ctx['early'] + 1", name="use")
    run = piped.run(ids, capture="model.layers.0")
    assert run.context["late"] == run.context["early"] + 1
    assert run.context["early"] == pytest.approx(
        float(run["model.layers.0"].torch().sum()), rel=1e-3, abs=0.1
    )


@pytest.mark.parametrize("layer", [0, 3])
def test_an_exception_in_a_hook_of_one_stage_ends_the_run_with_one_error(piped, whole, layer):
    ids = rows(5, 7)
    piped.hook(f"model.layers.{layer}", "y = x + 1\nraise KeyError('mine')", name="broken")
    piped.hook("model.layers.*.mlp", "x *= 2", name="fine")
    with pytest.raises(HookError, match="'mine'") as caught:
        piped.run(ids)
    assert [(f.rank, f.line) for f in caught.value.failures] == [(layer // 2, 2)]
    for hook in list(piped.hooks):
        hook.remove()
    assert relative(piped.run(ids)[":output"].torch(), logits_of(whole, ids)) <= 1e-5


@pytest.mark.parametrize("layer", [0, 3])
def test_a_failure_of_a_stages_own_code_ends_the_run_and_the_next_is_right(piped, whole, layer):
    """With micro-batches under way, the other stage neither waits nor finds stale messages later."""
    ids = rows(5, 7)
    view = piped._cluster.client[layer // 2]
    view.execute(
        f"_layer = model.stage_module.model.layers['{layer}']\n_calls = []\n"
        "def _fail(m, a, o):\n    _calls.append(1)\n"
        "    if len(_calls) == 2: raise ValueError('broken stage')\n"
        "_handle = _layer.register_forward_hook(_fail)",
        block=True,
    )
    with pytest.raises(ModelError, match=rf"on rank {layer // 2}: ValueError: broken stage"):
        piped.run(ids)
    view.execute("_handle.remove()", block=True)
    for batch in (5, 3):
        ids = rows(batch, 6 + batch)
        assert relative(piped.run(ids)[":output"].torch(), logits_of(whole, ids)) <= 1e-5


def test_retrieval_changes_nothing(piped):
    ids = rows(5, 7)
    plain = piped.run(ids)[":output"].torch()
    assert torch.equal(piped.run(ids, capture=places(piped))[":output"].torch(), plain)
    view = piped._cluster.client[:]
    view.execute(
        "_left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())", block=True
    )
    assert view["_left"] == [0, 0]
