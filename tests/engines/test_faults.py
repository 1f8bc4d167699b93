"""Whatever goes wrong on the ranks ends with one error, and the next run of the same model is right."""

import re

import pytest
import torch

from flexmagic import CellError, FlexError, Session
from flexmagic.client.watching import TimeLimits
from flexmagic.errors import StuckError, UserCodeError

from .conftest import PROMPT
from .fault_cases import (
    CASES,
    GENERATION_CASES,
    IDS,
    LOSS,
    MLP,
    MODEL,
    MODELS,
    STAGE_CASES,
    interrupted_when,
    output,
)

pytestmark = pytest.mark.engines

GRADIENT = "model.layers.0.mlp.up_proj.weight:grad"
LOADED = {}
"""What each session's model was made as: making it takes longer than most cases."""


def load(session, kind):
    if session._model is None or LOADED.get(session) != (kind, session._model):
        MODELS[kind](session)
        LOADED[session] = kind, session._model
    return session


def gradient_of(session, kind):
    """A parameter's gradient, where the model can be differentiated."""
    if kind in {"pp", "stages", "fsdp1"}:
        return torch.zeros(1)
    return session.run(IDS, capture=GRADIENT, backward=LOSS)[GRADIENT].torch()


def check(session, kind, case, folder):
    """Provoke a case; control is back with its error, and output and gradients are what they were."""
    load(session, kind)
    before, gradient = output(session), gradient_of(session, kind)
    error = case.provoke(session, folder)
    assert isinstance(error, case.error), error
    assert re.search(case.said, str(error)), error
    if isinstance(error, UserCodeError):
        assert {failure.rank for failure in error.failures} == set(case.ranks)
        assert type(error.cause) is case.cause
    assert torch.equal(output(session), before)
    assert torch.equal(gradient_of(session, kind), gradient)


@pytest.mark.parametrize("name", CASES)
def test_a_fault_under_tensor_parallelism_ends_and_the_next_run_is_right(session, tmp_path, name):
    case = CASES[name]
    check(session, case.model, case, tmp_path)


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_a_fault_in_the_middle_of_a_generation_ends_and_the_next_is_right(session, tmp_path, name):
    load(session, "tp")
    before = session.generate(IDS, 4).ids
    check(session, "tp", GENERATION_CASES[name], tmp_path)
    assert session.generate(IDS, 4).ids == before


@pytest.mark.parametrize("name", ["a collective on one rank", "interrupt: loop in the backward"])
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_a_fault_under_data_parallelism_ends_and_the_next_run_is_right(session, tmp_path, kind, name):
    check(session, kind, CASES[name], tmp_path)


@pytest.mark.parametrize("name", STAGE_CASES)
@pytest.mark.parametrize("kind", ["pp", pytest.param("stages", marks=pytest.mark.full)])
def test_a_fault_in_a_pipeline_ends_and_the_next_run_is_right(session, tmp_path, kind, name):
    check(session, kind, STAGE_CASES[name], tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.model == "tp"])
@pytest.mark.parametrize("kind", ["fsdp", "ddp", "fsdp1"])
def test_every_fault_under_data_parallelism_ends(session, tmp_path, kind, name):
    if kind == "fsdp1" and CASES[name].backward:
        pytest.skip("gradients through FSDP1 are refused")
    check(session, kind, CASES[name], tmp_path)


@pytest.mark.parametrize("name", ["different collectives", "interrupt: sleep on one rank"])
def test_the_same_fault_again_and_again_does_no_more_harm(session, tmp_path, name):
    for _ in range(3):
        check(session, "tp", CASES[name], tmp_path)


# --- four ranks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four():
    with Session.start(4, oversubscribe=True) as session:
        yield session


FOUR = [
    "all ranks fail differently",
    "a collective on one rank",
    "different collectives",
    "sleep on one rank",
]


@pytest.mark.full
@pytest.mark.parametrize("name", [*FOUR, "interrupt: endless loop on one rank"])
@pytest.mark.parametrize("kind", ["tp", "tp x dp", "tp x fsdp", "fsdp"])
def test_a_fault_on_four_ranks_ends_and_the_next_run_is_right(four, tmp_path, kind, name):
    load(four, kind)
    before, gradient = output(four), gradient_of(four, kind)
    error = CASES[name].provoke(four, tmp_path)
    assert isinstance(error, CASES[name].error), error
    assert torch.equal(output(four), before)
    assert torch.equal(gradient_of(four, kind), gradient)


# --- beside runs -------------------------------------------------------------------------------------

WAITS = "import torch.distributed as dist\nif rank == 0:\n    dist.barrier()\nmodel = torch.nn.Linear(2, 2)"
RAISES = "import torch.distributed as dist\nif rank == 1:\n    raise OSError('mine')\ndist.barrier()"


def test_a_cell_whose_ranks_cannot_meet_changes_no_model(session):
    before = output(load(session, "tp"))
    with pytest.raises(StuckError, match=r"(?s)rank 0: waiting for.*in barrier.*rank 1: has ended"):
        session.load_cell(WAITS)
    assert torch.equal(output(session), before)


def test_a_cell_that_fails_on_one_rank_is_the_error_and_not_the_wait_of_the_other(session):
    before = output(load(session, "tp"))
    with pytest.raises(
        CellError, match=r"(?s)3, on rank 1.*OSError: mine.*rank 0: waiting.*barrier"
    ) as caught:
        session.load_cell(RAISES)
    assert type(caught.value.cause) is OSError
    assert torch.equal(output(session), before)


def test_a_cell_that_sleeps_on_one_rank_can_be_interrupted(session, tmp_path):
    before = output(load(session, "tp"))
    mark = tmp_path / "entered"
    cell = (
        f"import time\nopen({str(mark)!r} + str(rank), 'w').close()\n"
        "if rank == 1:\n    time.sleep(60)\nmodel = torch.nn.Linear(2, 2)"
    )
    with (
        pytest.raises(KeyboardInterrupt, match="ready"),
        interrupted_when([mark.with_name(f"entered{rank}") for rank in range(2)]),
    ):
        session.load_cell(cell)
    assert torch.equal(output(session), before)


def test_what_ranks_do_for_longer_than_the_limit_alone_is_left_to_them_if_none_waits(session):
    load(session, "tp")
    session.hook(MLP, "import time; time.sleep(1.5)", name="slow")
    limits, session._calls.waiting.limits = session._calls.waiting.limits, TimeLimits(alone=0.5)
    try:
        assert torch.equal(output(session), output(session))
    finally:
        session._calls.waiting.limits = limits


def test_a_run_that_takes_longer_than_its_limit_is_ended(session):
    before = output(load(session, "tp"))
    session.hook(MLP, "while True: pass", name="slow")
    limits, session._calls.waiting.limits = session._calls.waiting.limits, TimeLimits(run=1.0)
    try:
        with pytest.raises(StuckError, match="longer than its limit of 1 s"):
            session.run(IDS)
    finally:
        session._calls.waiting.limits = limits
    session.hooks.remove("slow")
    assert torch.equal(output(session), before)


# --- code that never lets go of the interpreter ------------------------------------------------------

HELD = "import ctypes\nif rank == 1: ctypes.PyDLL(None).sleep(SECONDS)"
"""A call into C that keeps the interpreter's lock, so that no other thread of the engine runs."""


def test_a_rank_that_is_silent_for_a_while_is_waited_for(session):
    before = output(load(session, "tp"))
    session.hook(MLP, HELD.replace("SECONDS", "2"), name="held")
    assert torch.equal(output(session), before)


@pytest.mark.slow
def test_a_rank_that_stays_silent_is_ended_and_comes_back_by_itself_unless_told_otherwise():
    with Session.start(2, oversubscribe=True) as session:
        session.load(MODEL, tp=2)
        plain = output(session)
        session.hook(MLP, "x *= 0.5", name="half")
        before = output(session)
        assert not torch.equal(before, plain)
        survivor = session._calls.ranks.seats[0].pid
        held = HELD.replace("SECONDS", "600")
        session.hook(MLP, held, name="held")
        with pytest.raises(
            StuckError,
            match=r"(?s)rank 1, which does not answer.*rank 1.*was ended.*Rank 1 was started again",
        ):
            session.run(PROMPT)
        session.hooks["held"].enabled = False
        assert torch.equal(output(session), before), "with its part of the model, and the hook"
        assert session._calls.ranks.seats[0].pid == survivor
        session.hooks["held"].enabled = True
        session.limit(recover=False)
        with pytest.raises(StuckError, match=r"(?s)rank 1.*was ended.*%flexcluster recover"):
            session.run(PROMPT)
        assert session.status().rows[0][-1] == "idle"
        with pytest.raises(FlexError, match="engine of rank 1 has ended"):
            session.run(PROMPT)
