"""Pipelines without engines: what is cut, sent, joined and refused; one stage is a whole pipeline."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.microbatch import TensorChunkSpec

from flexmagic.engine.captures import Captures
from flexmagic.engine.exchange import Exchange
from flexmagic.engine.instrument import Instrument
from flexmagic.engine.messages import MOST_TENSORS, Instead, check, empty, header, packed, unpacked
from flexmagic.engine.micro_batches import batch_dim, joined
from flexmagic.engine.pipeline import Pipeline
from flexmagic.engine.private import schedule_plan
from flexmagic.engine.stage_making import as_model
from flexmagic.engine.stage_standing import Standing, check_standings, stage_mates
from flexmagic.engine.tree import kind_of, modules_of, parameters_of
from flexmagic.errors import LayoutError, ModelError
from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Rule, Split
from flexmagic.layout.sites import Site

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.seen = []

    def forward(self, x, mask=None):
        self.seen.append((tuple(x.shape), None if mask is None else tuple(mask.shape)))
        return self.last(self.first(x * self.scale))


def made(pieces, kind=ScheduleGPipe, part=None):
    return as_model(kind(PipelineStage(part or Part(), 0, 1, CPU), n_microbatches=pieces))


def test_torchs_schedules_still_say_what_they_were_made_with(group):
    """This fails when torch renames what the one function in ``private`` reads."""
    stage = PipelineStage(Part(), 0, 1, CPU)
    plan = schedule_plan(Schedule1F1B(stage, n_microbatches=3))
    assert (plan.stage, plan.micro_batches, plan.own_chunks, plan.merge) == (stage, 3, False, None)
    own = ScheduleGPipe(
        stage, 2, kwargs_chunk_spec={"x": TensorChunkSpec(1)}, output_merge_spec=TensorChunkSpec(1)
    )
    assert schedule_plan(own).own_chunks
    assert schedule_plan(own).merge is own._output_merge_spec is not None
    assert stage.stage_index_to_group_rank == {0: 0}
    assert (stage.num_stages, stage.group_size, stage.stage_index) == (1, 1, 0)


def test_the_stages_modules_have_their_own_paths(group):
    model = made(2)
    assert list(modules_of(model)) == ["", "first", "last"]
    assert modules_of(model)[""] is model
    assert list(parameters_of(model)) == ["scale", "first.weight", "first.bias", "last.weight", "last.bias"]
    assert kind_of(model) is Part


@pytest.mark.parametrize(("batch", "sizes"), [(8, [2, 2, 2, 2]), (5, [2, 1, 1, 1]), (3, [1, 1, 1]), (1, [1])])
def test_rows_are_cut_as_tensor_split_does_and_none_twice(group, batch, sizes):
    part = Part()
    model = made(4, part=part)
    x, mask = torch.randn(batch, 3), torch.ones(batch)
    with torch.no_grad():
        out = model(x=x, mask=mask)
        assert part.seen == [((n, 3), (n,)) for n in sizes]  # no pass more, to infer shapes
        assert torch.allclose(out, part(x), atol=1e-6)
    assert not out.requires_grad


def test_the_first_tensor_goes_by_position_where_its_name_is_unknown(group):
    part = Part()
    made(2, part=part)(input_ids=torch.ones(4, 3), mask=torch.ones(4), use_cache=False)
    assert part.seen == [((2, 3), (2,))] * 2


def test_a_failure_leaves_no_mark(group):
    model = made(2)
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(x=torch.ones(4, 5))
    assert model.running is None
    assert model(x=torch.ones(4, 3)).shape == (4, 2)


ROWS = (Dim("batch"), Dim("feature", 3))


def rule(path="first", dims=ROWS, **more):
    return Rule(Site(path), dims, "float32", Mesh(("pp",), (1,)), (0,), **more)


def run(group, model, x, captures):
    rules = {Site("first"): rule()}
    instrument = Instrument(
        model, rules, Exchange(group, 0), captures,
        run=("s", 1), seed=0, hooks=[], capture=frozenset(rules),
    )  # fmt: skip
    with torch.no_grad(), instrument:
        model(x=x)
    return instrument


def test_micro_batches_are_joined_in_order(group):
    part, captures, x = Part(), Captures(), torch.randn(5, 3)
    instrument = run(group, made(4, part=part), x, captures)
    kept = captures.finish(("s", 1))
    assert torch.allclose(kept[Site("first")].tensor, part.first(x * 2), atol=1e-6)
    assert instrument.outcome.calls[Site("first")] == 1
    assert instrument.outcome.refused == {}


def test_a_piece_that_is_written_into_later_is_not_shown_but_copied_the_next_time(group):
    class Writes(Part):
        def forward(self, x):
            y = self.first(x)
            out = self.last(y)
            y.zero_()
            return out

    captures, model, x = Captures(), made(2, part=Writes()), torch.randn(4, 3)
    assert "wrote into it" in run(group, model, x, captures).outcome.refused[Site("first")]
    assert Site("first") not in captures.finish(("s", 1))
    assert run(group, model, x, captures).outcome.refused == {}
    kept = captures.finish(("s", 1))[Site("first")].tensor
    assert torch.allclose(kept, model.stage_module.first(x), atol=1e-6)


HALVES = Split(0, (0, 1))
JOINS = [
    (rule(), 0),
    (rule(dims=(Dim("heads", 2), Dim("batch"))), 1),
    (rule(dims=(Dim("feature", 3),)), None),
    (rule(dims=(Dim("batch·seq"), Dim("feature", 3))), -1),
    (rule(dims=(Dim("batch"), Dim("batch"))), -1),
    (rule(splits=(HALVES,)), -1),
    (rule(splits=(Split(0, (0, 1), rows=True),)), 0),
]


@pytest.mark.parametrize(("its", "dim"), JOINS)
def test_rows_are_joined_along_the_batch_or_not_at_all(its, dim):
    assert batch_dim(its) == dim


def test_joining_says_why_it_cannot():
    parts = list(torch.arange(12.0).reshape(4, 3).tensor_split(3))
    assert torch.equal(joined(rule(), parts), torch.cat(parts))
    same = rule(dims=(Dim("feature", 3),))
    assert torch.equal(joined(same, [parts[1][0], parts[1][0].clone()]), parts[1][0])
    assert "different values" in joined(same, [parts[1][0], parts[2][0]])
    assert "shapes differ" in joined(rule(), [parts[0], parts[1][:, :2]])
    assert "one after the other" in joined(rule(dims=(Dim("batch·seq"), Dim("feature", 3))), parts)


def test_a_message_says_its_shapes_first():
    tensors = [
        torch.zeros(2, 0, 5, dtype=torch.bfloat16),
        torch.tensor(True),
        torch.zeros(7, dtype=torch.int8),
    ]
    room = empty(header(tensors), CPU)
    assert [(t.dtype, t.shape) for t in room] == [(t.dtype, t.shape) for t in tensors]
    assert empty(header([]), CPU) == []
    for instead in Instead:
        assert empty(header(instead), CPU) is instead
        assert header(instead).shape == header(tensors).shape
    with pytest.raises(ModelError, match="16 tensors"):
        check([torch.zeros(1)] * (MOST_TENSORS + 1))
    with pytest.raises(ModelError, match="8 dims"):
        check([torch.zeros([1] * 9)])


def test_what_hooks_saved_travels_unless_it_cannot():
    values = {"a": torch.arange(3), "b": [1, "x"], "c": lambda: 1}
    arrived, rest = unpacked([torch.ones(1), packed(values)])
    assert rest == [torch.ones(1)]
    assert set(arrived) == {"a", "b"}
    assert torch.equal(arrived["a"], values["a"])
    assert unpacked([packed({})]) == ({}, [])


def test_what_is_part_of_a_graph_travels_beside_it():
    """So that its gradient finds the way back, wherever in a value it is."""
    one, two = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True) * 2
    values = {"lost": (one, lambda: 1), "a": {"deep": [one, torch.zeros(1)]}, "b": (two, one)}
    attached = []
    message = packed(values, attached)
    sent = [tensor.detach() for tensor in attached]
    assert [len(t) for t in sent] == [2, 3, 2]
    arrived, rest = unpacked([torch.zeros(4), *sent, message])
    assert [len(t) for t in rest] == [4]
    assert arrived["a"]["deep"][0] is sent[0]
    assert arrived["b"][0] is sent[1]
    assert torch.equal(arrived["a"]["deep"][1], torch.zeros(1))


def test_only_whole_stages_meet():
    split = Rule(
        Site("a"), (Dim("batch"), Dim("feature", 4)), "float32", Mesh(("pp", "tp"), (2, 2)), (0, 1, 2, 3),
        splits=(Split(1, (0, 1, 0, 1)),),
    )  # fmt: skip
    assert split.among({2, 3}).ranks == (2, 3)
    layout = split.among({0, 1}).local_layout([(5, 2), (5, 2), None, None])
    assert layout.shape == (5, 4)
    with pytest.raises(LayoutError, match="only a part"):
        split.among({0, 2})


def test_ranks_that_are_no_pipeline_together_are_named():
    good = [Standing(0, 2, (0, 1)), Standing(1, 2, (0, 1))]
    check_standings(good)
    check_standings([None, None])
    assert stage_mates(good, 1) == {1}
    assert stage_mates([None, None], 0) is None
    crossed = [Standing(n // 2, 2, (n % 2, n % 2 + 2)) for n in range(4)]
    check_standings(crossed)
    assert stage_mates(crossed, 3) == {2, 3}
    with pytest.raises(ModelError, match="Rank 1 assigned a module"):
        check_standings([good[0], None])
    with pytest.raises(ModelError, match="different numbers of micro-batches"):
        check_standings([good[0], Standing(1, 3, (0, 1))])
    with pytest.raises(ModelError, match="not all of them say so"):
        check_standings([good[0], Standing(0, 2, (0, 1))])
    with pytest.raises(ModelError, match="not all of them say so"):
        check_standings([good[0], Standing(1, 2, (1, 0))])


def test_a_module_is_taken_as_it_is():
    part = Part()
    assert as_model(part) is part
    assert not isinstance(as_model(part), Pipeline)
