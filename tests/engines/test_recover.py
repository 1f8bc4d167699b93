"""Engines that end: named with their last words, replaced under their rank, and the same model after."""

import os
import shutil
import signal

import psutil
import pytest
import torch

from flexmagic import ClusterError, EngineError, FlexError, Session
from flexmagic.client.reaper import family_of

from .conftest import MODEL, PROMPT

pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]


@pytest.fixture
def cluster():
    with Session.start(2, oversubscribe=True) as session:
        yield session


def again_and_again(session, inputs):
    """Run until something is wrong: a first run may be over before a death is noticed."""
    while True:
        session.run(inputs)


def kill(session, rank):
    """End a rank, and run until that is heard of; the error that names it."""
    os.kill(session._calls.ranks.seats[rank].pid, signal.SIGKILL)
    with pytest.raises(EngineError) as caught:
        again_and_again(session, PROMPT)
    assert caught.value.ranks == (rank,)
    return str(caught.value)


def pids_but(session, rank):
    return [seat.pid for seat in session._calls.ranks.seats if seat.rank != rank]


@pytest.mark.parametrize(
    ("axis", "rank"),
    [("tp", 1), *(pytest.param(axis, 0, marks=pytest.mark.full) for axis in ("tp", "fsdp")), ("pp", 1)],
)
def test_an_ended_engine_comes_back_with_its_part_of_the_model(cluster, axis, rank):
    cluster.load(MODEL, **{axis: 2})
    plain = cluster.run(PROMPT).logits.torch()
    cluster.hook("model.layers.1.mlp", "x *= 0.5", name="half")
    edited = cluster.run(PROMPT).logits.torch()
    assert not torch.equal(edited, plain)
    survivors = pids_but(cluster, rank)
    said = kill(cluster, rank)
    assert "%flexcluster recover" in said
    assert "SIGKILL" in said
    assert "ended" in str(cluster.status())
    done = str(cluster.recover())
    assert "started again" in done
    assert str(MODEL) in done
    assert pids_but(cluster, rank) == survivors
    assert torch.equal(cluster.run(PROMPT).logits.torch(), edited)
    cluster.hooks.remove("half")
    assert torch.equal(cluster.run(PROMPT).logits.torch(), plain)
    assert "Nothing to recover" in str(cluster.recover())


def test_survivors_keep_their_captures_and_lost_parts_are_named(cluster):
    cluster.load(MODEL, tp=2)
    run = cluster.run(PROMPT, capture=["model.layers.1.mlp.act_fn", "model.layers.1"])
    residual, gates = run["model.layers.1"], run["model.layers.1.mlp.act_fn"]
    before = residual.torch()
    assert torch.isfinite(gates.torch()).all()
    kill(cluster, 1)
    cluster.recover()
    assert torch.equal(residual.torch(), before), "rank 0 has all of it"
    with pytest.raises(FlexError, match="rank 1 held was lost"):
        gates.torch()
    assert gates.info.missing_ranks == (1,)


@pytest.mark.slow
def test_a_new_rank_0_knows_what_the_session_left_with_the_old_one(cluster):
    cluster.load(MODEL, tp=2)
    cluster.hook("model.layers.1.mlp", "x *= 0.5", name="half")
    kill(cluster, 0)
    assert cluster.recover().replaced == (0,)
    assert cluster._world.names("hook/") == ["half"]
    assert cluster.recover().replaced == ()


@pytest.mark.slow
def test_edits_of_parameters_are_named_as_lost(cluster):
    cluster.load(MODEL, tp=2)
    view = cluster._cluster.client[:]
    view.execute("model.model.norm.weight.data.mul_(1); model.model.norm.weight.detach().mul_(1)", block=True)
    kill(cluster, 1)
    done = str(cluster.recover())
    assert "Lost" in done
    assert "model.norm.weight" in done


def test_what_a_cell_made_is_made_again_on_every_rank(cluster):
    cell = (
        "import torch\n"
        "from torch.distributed.tensor.parallel import parallelize_module, ColwiseParallel, RowwiseParallel\n"
        "torch.manual_seed(0)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))\n"
        'parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})\n'
    )
    cluster.load_cell(cell)
    inputs = {"input": torch.arange(32.0).reshape(4, 8)}
    before = cluster.run(inputs)[":output"].torch()
    os.kill(cluster._calls.ranks.seats[0].pid, signal.SIGKILL)
    with pytest.raises(EngineError):
        again_and_again(cluster, inputs)
    assert "run again on every rank" in str(cluster.recover())
    assert torch.equal(cluster.run(inputs)[":output"].torch(), before)


def test_a_recovery_that_cannot_succeed_leaves_the_survivors(cluster, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    cluster.load(folder, tp=2)
    run = cluster.run(PROMPT, capture="model.layers.1")
    before = run["model.layers.1"].torch()
    survivors = pids_but(cluster, 1)
    folder.rename(tmp_path / "elsewhere")
    kill(cluster, 1)
    with pytest.raises(ClusterError, match="cannot be loaded again"):
        cluster.recover()
    assert torch.equal(run["model.layers.1"].torch(), before)
    assert pids_but(cluster, 1) == survivors
    (tmp_path / "elsewhere").rename(folder)
    cluster.recover()
    assert torch.equal(cluster.run(PROMPT, capture="model.layers.1")["model.layers.1"].torch(), before)


def test_an_engine_that_was_stopped_is_replaced(cluster):
    cluster.load(MODEL, tp=2)
    before = cluster.run(PROMPT).logits.torch()
    os.kill(cluster._calls.ranks.seats[1].pid, signal.SIGSTOP)
    with pytest.raises(FlexError, match=r"(?s)rank 1.*(its process is stopped|Rank 1 was started again)"):
        cluster.run(PROMPT)
    cluster.recover()  # not needed if the run was ended before the controller missed the engine
    assert torch.equal(cluster.run(PROMPT).logits.torch(), before)


def nanny_of(session, rank):
    """The process that relays signals and control messages to an engine and tells of its end."""
    engine = psutil.Process(session._calls.ranks.seats[rank].pid)
    return next(child for child in engine.children() if "ipyparallel.engine.nanny" in child.cmdline())


@pytest.mark.slow
def test_an_engine_whose_nanny_is_dead_too_is_noticed_and_replaced(cluster):
    cluster.load(MODEL, tp=2)
    before = cluster.run(PROMPT).logits.torch()
    nanny_of(cluster, 1).kill()
    kill(cluster, 1)
    assert cluster.recover().replaced == (1,)
    assert torch.equal(cluster.run(PROMPT).logits.torch(), before)


@pytest.mark.slow
def test_an_engine_without_a_nanny_that_does_not_come_back_is_ended_and_replaced(cluster):
    cluster.load(MODEL, tp=2)
    before = cluster.run(PROMPT).logits.torch()
    nanny_of(cluster, 1).kill()
    cluster.hook("model.layers.1.mlp", "import time\nif rank == 1: time.sleep(600)", name="sleeps")
    with pytest.raises(FlexError, match=r"(?s)rank 1.*was ended.*Rank 1 was started again"):
        cluster.run(PROMPT)
    cluster.hooks.remove("sleeps")
    assert torch.equal(cluster.run(PROMPT).logits.torch(), before)


def test_a_dead_controller_is_named_and_nothing_is_left(cluster):
    cluster.load(MODEL, tp=2)
    pids = [seat.pid for seat in cluster._calls.ranks.seats]
    controller = cluster._cluster._cluster.controller.process.pid
    pids += [process.pid for process in family_of({controller})]
    assert len(pids) > 3, "the controller has processes of its own"
    os.kill(controller, signal.SIGKILL)
    with pytest.raises(ClusterError, match="controller has ended"):
        again_and_again(cluster, PROMPT)
    cluster.stop()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)  # noqa: PTH110 - a process, not a file
