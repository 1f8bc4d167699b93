"""Pipelines crossed with tensor and data parallelism on four engines."""

import pytest
import torch

from flexmagic import FlexError, HookError, ModelError, Session
from flexmagic.engine.gradients import observe_backward
from flexmagic.layout.sites import Site

from .conftest import MODEL, relative
from .stages import SCHEDULE, SHARDED, cell
from .test_pipeline import LATE, MIDDLE, ROTARY, check_every_site, logits_of, rows, truth_of, whole

pytestmark = [pytest.mark.engines]
__all__ = ["whole"]


@pytest.fixture(scope="module")
def four():
    with Session.start(4, oversubscribe=True) as session:
        yield session


@pytest.fixture
def crossed(four):
    """Two stages of two tensor-parallel ranks each, four micro-batches."""
    for hook in list(four.hooks):
        hook.remove()
    if four._model is None or str(four.model.mesh) != "pp=2 × tp=2":
        four.load_cell(cell(4, before=SHARDED), pp=2, tp=2)
    return four


def test_every_site_of_a_pipeline_of_tensor_parallel_stages_is_whole(crossed, whole):
    assert check_every_site(crossed, whole, rows(5, 7), {ROTARY}) > 130
    rule = next(r for s, r in crossed.model.rules.items() if str(s) == f"{MIDDLE}:output")
    assert rule.ranks == (0, 1)
    assert not rule.replicated


@pytest.mark.parametrize(
    ("path", "body"),
    [(MIDDLE, "x[..., -1] += 30"), (LATE, "x[-1] *= 0"), ("model.layers.3.mlp.act_fn", "x *= 2")],
)
def test_an_edit_across_stages_and_shards_equals_one_process(crossed, whole, path, body):
    ids = rows(5, 7)

    def edit(x):
        exec(body, {"x": x})  # noqa: S102 - the same text as the hook's
        return x

    plain = crossed.run(ids)[":output"].torch()
    crossed.hook(path, body, name="edit")
    logits = crossed.run(ids)[":output"].torch()
    assert relative(logits, plain) > 1e-4
    assert relative(logits, logits_of(whole, ids, path, edit)) <= 1e-5


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_an_exception_on_one_rank_of_one_stage_ends_the_run_on_all(crossed, whole, failing):
    ids = rows(4, 6)
    crossed.hook("model.layers.*.mlp", f"if rank == {failing}: raise ValueError('mine')\nx *= 2", name="odd")
    with pytest.raises(HookError, match="mine") as caught:
        crossed.run(ids)
    assert {f.rank for f in caught.value.failures} == {failing}
    crossed.hooks.remove("odd")
    assert relative(crossed.run(ids)[":output"].torch(), logits_of(whole, ids)) <= 1e-5


def check_gradients(session, whole, ids):
    """All gradients that are not refused equal one process under an edit; returns those that are refused."""
    loss = "output[:, -1].log_softmax(-1)[:, 5].sum() + output.pow(2).mean()"
    session.run(ids)
    session.run(ids, backward=loss)
    rules = {s: r for s, r in session.model.rules.items() if s.is_gradient}
    session.hook(MIDDLE, "x[..., -1] += 3", name="edit")
    run = session.run(ids, capture=[str(s) for s, r in rules.items() if not r.refused], backward=loss)
    session.hooks.remove("edit")

    def edit(x):
        x = x.clone()
        x[..., -1] += 3
        return x

    truth, plain = {}, {}
    for found, change in ((plain, lambda x: x), (truth, edit)):
        handle = whole.get_submodule(MIDDLE).register_forward_hook(lambda _m, _a, x, change=change: change(x))
        whole.zero_grad()
        observe_backward(
            whole,
            lambda: eval(loss, {"output": whole(ids, use_cache=False).logits}),  # noqa: S307 - the test's own
            lambda s, g, found=found: found.__setitem__(s, g.detach().clone()),
        )
        found.update({Site(n, "grad"): p.grad.clone() for n, p in whole.named_parameters()})
        handle.remove()
    whole.zero_grad()
    compared = [site for site, rule in rules.items() if site in truth and not rule.refused]
    assert len(compared) > 100
    early = Site("model.embed_tokens", "grad_output")
    assert relative(truth[early], plain[early]) > 1e-4
    for site in compared:
        assert relative(run[str(site)].torch(), truth[site]) <= 1e-5, site
    return {str(s): r.refused for s, r in rules.items() if r.refused}


@pytest.mark.slow
def test_gradients_traces_and_stops_over_stages_of_shards_equal_one_process(crossed, whole):
    ids = rows(5, 7)
    assert not check_gradients(crossed, whole, ids)
    code = f"x = model['{MIDDLE}']\nmodel['{LATE}.up_proj'] = 2 * model['{LATE}.up_proj'] + x"
    kept = {}
    handles = [
        whole.get_submodule(MIDDLE).register_forward_hook(lambda _m, _a, x: kept.update(x=x)),
        whole.get_submodule(f"{LATE}.up_proj").register_forward_hook(lambda _m, _a, x: 2 * x + kept["x"]),
    ]
    expected = logits_of(whole, ids)
    for handle in handles:
        handle.remove()
    before = crossed.run(ids)[":output"].torch()
    logits = crossed.trace(ids, code)[":output"].torch()
    assert relative(logits, before) > 1e-4
    assert relative(logits, expected) <= 1e-5
    stopped = crossed.run(ids, capture=MIDDLE, stop_at="model.layers.2")
    assert relative(stopped["model.layers.2"].torch(), truth_of(whole, ids)["model.layers.2:output"]) <= 1e-5


@pytest.fixture
def four_stages(four):
    """A layer on each of four ranks: two stages are neither the first nor the last."""
    for hook in list(four.hooks):
        hook.remove()
    if four._model is None or str(four.model.mesh) != "pp=4":
        four.load(MODEL, pp=4)
    return four


SECOND, THIRD = "model.layers.1.mlp", "model.layers.2.mlp"


def test_stages_in_the_middle_take_their_part_in_everything(four_stages, whole):
    ids, loss = rows(3, 7), "logits[:, -1].log_softmax(-1)[:, 5].sum() + ctx['said'].sum()"
    early = Site("model.embed_tokens", "grad_output")
    four_stages.hook(SECOND, "ctx['said'] = x[:, -1] ** 2\nx = x * 3", name="save")
    four_stages.hook(THIRD, "x += ctx['said'][:, None]", name="use")
    run = four_stages.run(ids, backward=loss, capture=str(early))
    kept, found = {}, {}

    def save(_m, _a, x):
        kept["said"] = x[:, -1] ** 2
        return x * 3

    handles = [
        whole.get_submodule(SECOND).register_forward_hook(save),
        whole.get_submodule(THIRD).register_forward_hook(lambda _m, _a, x: x + kept["said"][:, None]),
    ]
    observe_backward(
        whole,
        lambda: eval(loss, {"logits": whole(ids, use_cache=False).logits, "ctx": kept}),  # noqa: S307
        lambda s, g: found.__setitem__(s, g.detach().clone()),
    )
    generated = four_stages.generate(ids, max_new_tokens=4)
    assert generated.ids == whole.generate(ids, max_new_tokens=4).tolist()
    for handle in handles:
        handle.remove()
    whole.zero_grad()
    four_stages.hooks.remove("save")
    four_stages.hooks.remove("use")
    plain = four_stages.run(ids, backward=LOGIT, capture=str(early))[str(early)].torch()
    assert relative(plain, found[early]) > 1e-3
    assert relative(run[str(early)].torch(), found[early]) <= 1e-5
    assert generated.ids != four_stages.generate(ids, max_new_tokens=4).ids
    code = f"x = model['{SECOND}']\nmodel['{THIRD}'] = model['{THIRD}'] * 2 + x\nsave.y = model['{LATE}']"
    handles = [
        whole.get_submodule(SECOND).register_forward_hook(lambda _m, _a, x: kept.update(x=x)),
        whole.get_submodule(THIRD).register_forward_hook(lambda _m, _a, x: 2 * x + kept["x"]),
        whole.get_submodule(LATE).register_forward_hook(lambda _m, _a, x: kept.update(y=x)),
    ]
    expected = logits_of(whole, ids)
    for handle in handles:
        handle.remove()
    traced = four_stages.trace(ids, code)
    assert relative(traced.logits.torch(), four_stages.run(ids).logits.torch()) > 1e-4
    assert relative(traced.logits.torch(), expected) <= 1e-5
    assert relative(traced.context["y"], kept["y"]) <= 1e-5
    stopped = four_stages.trace(ids, f"save.x = model['{SECOND}']", stop_at=SECOND)
    assert torch.equal(stopped.context["x"], traced.context.get("x", stopped[SECOND].torch()))
    assert not [site for site in stopped.sites if "layers.2" in site or "layers.3" in site]


LOGIT = "logits[:, -1].log_softmax(-1)[:, 5].sum()"


@pytest.mark.parametrize("stage", [1, *(pytest.param(n, marks=pytest.mark.full) for n in (0, 2, 3))])
def test_whatever_fails_on_whichever_stage_ends_on_all_and_the_next_run_is_right(four_stages, whole, stage):
    ids = rows(3, 7)
    four_stages.run(ids, backward=LOGIT)
    layer, code = f"model.layers.{stage}", f"x = model['{SECOND}']\nmodel['{THIRD}'] = x"
    four_stages.hook(layer, "1 / 0", name="broken")
    four_stages.hook(f"{layer}:grad_output", "1 / 0", name="back")
    for broken, more in (
        ("broken", lambda: four_stages.run(ids, backward=LOGIT, without="back")),
        ("back", lambda: four_stages.run(ids, backward=LOGIT, without="broken")),
        ("broken", lambda: four_stages.trace(ids, code)),
        ("broken", lambda: four_stages.generate(ids, max_new_tokens=3)),
    ):
        with pytest.raises(HookError, match=rf"hook '{broken}' failed.*on rank {stage}") as caught:
            more()
        assert {f.rank for f in caught.value.failures} == {stage}
    for hook in list(four_stages.hooks):
        hook.remove()
    view = four_stages._cluster.client[stage]
    view.execute(
        "def _fail(*_): raise ValueError('broken stage')\n"
        f"_handle = model.stage_module.get_submodule('{layer}').register_forward_hook(_fail)",
        block=True,
    )
    for more in (
        lambda: four_stages.run(ids, backward=LOGIT),
        lambda: four_stages.trace(ids, code),
        lambda: four_stages.generate(ids, max_new_tokens=3),
    ):
        with pytest.raises(FlexError, match=rf"on rank {stage}: ValueError: broken stage"):
            more()
    view.execute("_handle.remove()", block=True)
    assert relative(four_stages.run(ids).logits.torch(), logits_of(whole, ids)) <= 1e-5
    assert four_stages.generate(ids, max_new_tokens=3).ids == whole.generate(ids, max_new_tokens=3).tolist()


@pytest.mark.full
def test_pipelines_over_data_groups_join_micro_batches_and_then_rows(four, whole):
    four.load_cell(cell(2), pp=2, dp=2)
    ids = rows(7, 6)
    assert check_every_site(four, whole, ids, {ROTARY}) > 130
    plain = four.run(ids)[":output"].torch()
    four.hook(LATE, "x -= x.mean(0, keepdim=True)", name="edit")
    logits = four.run(ids)[":output"].torch()
    assert relative(logits, plain) > 1e-4
    expected = logits_of(whole, ids, LATE, lambda x: x - x.mean(0, keepdim=True))
    assert relative(logits, expected) <= 1e-5
    four.hooks.remove("edit")
    assert not check_gradients(four, whole, ids)


WRAPPED = {
    "fsdp": "from torch.distributed.fsdp import fully_shard\n"
    "[fully_shard(m, mesh=mesh['fsdp']) for m in [*part.model.layers.values(), part]]\n",
    "dp": "part = nn.parallel.DistributedDataParallel(part, process_group=mesh['dp'].get_group())\n",
}


@pytest.mark.full
@pytest.mark.parametrize("axis", WRAPPED)
def test_stages_may_be_wrapped_for_data_parallelism(four, whole, axis):
    again = WRAPPED[axis] + SCHEDULE.partition("\n")[2].partition("\n")[2]
    four.load_cell(
        cell(2, after=again.replace("KIND", "ScheduleGPipe").replace("PIECES", "2")), pp=2, **{axis: 2}
    )
    ids = rows(7, 6)
    assert check_every_site(four, whole, ids, {ROTARY}) > 130
    four.hook(LATE, "x -= x.mean(0, keepdim=True)", name="edit")
    expected = logits_of(whole, ids, LATE, lambda x: x - x.mean(0, keepdim=True))
    assert relative(four.run(ids)[":output"].torch(), expected) <= 1e-5
    four.hooks.remove("edit")
    assert not check_gradients(four, whole, ids)


def test_what_transformers_cannot_load_is_refused_with_the_way_out(four):
    with pytest.raises(ModelError, match=r"cannot load.*%%flexmodel cell"):
        four.load(MODEL, pp=2, tp=2)


def test_what_a_newer_loader_fails_at_is_a_model_error_too(four):
    view = four._cluster.client[:]
    view.execute(
        "import flexmagic.engine.distributed as _d; _known = _d.LAST_WITHOUT_STAGES_OF_SHARDS", block=True
    )
    view.execute("_d.LAST_WITHOUT_STAGES_OF_SHARDS = (0, 0)", block=True)
    try:
        with pytest.raises(ModelError, match=r"could not be loaded: KeyError.*\n.*pp=2 × tp=2"):
            four.load(MODEL, pp=2, tp=2)
    finally:
        view.execute("_d.LAST_WITHOUT_STAGES_OF_SHARDS = _known", block=True)
