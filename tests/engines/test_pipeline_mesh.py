"""Pipelines crossed with tensor and data parallelism on four engines."""

import pytest

from flexmagic import HookError, ModelError, Session

from .conftest import MODEL, relative
from .stages import SCHEDULE, SHARDED, cell
from .test_pipeline import LATE, MIDDLE, ROTARY, check_every_site, logits_of, rows, whole

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
