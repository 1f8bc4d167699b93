"""What cells may assign to make a pipeline, and what is refused with the reason."""

import pytest
import torch
from transformers import AutoTokenizer

from flexmagic import LayoutError, ModelError
from flexmagic.layout.sites import Site

from .conftest import MODEL, PROMPT, relative
from .stages import PRUNED, cell
from .test_pipeline import ROTARY, check_every_site, logits_of, rows, truth_of, whole

pytestmark = pytest.mark.engines
__all__ = ["whole"]


def test_a_stage_alone_is_a_pipeline_of_one_micro_batch(session, whole):
    session.load_cell(cell(1, after="model = stage\n"), pp=2)
    assert relative(session.run(rows(3, 5))[":output"].torch(), logits_of(whole, rows(3, 5))) <= 1e-5


def test_a_builder_may_return_a_schedule(session):
    def builder(rank, world_size, device, mesh):
        from torch import nn
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

        torch.manual_seed(rank)
        return ScheduleGPipe(PipelineStage(nn.Linear(3, 3), rank, world_size, device), n_microbatches=2)

    session.load(builder, pp=2)
    x = torch.randn(4, 3)
    run = session.run({"input": x})
    expected = x
    for rank in range(2):
        torch.manual_seed(rank)
        expected = torch.nn.Linear(3, 3)(expected)
    with pytest.raises(LayoutError, match="no unsharded form of this model tells whether it is whole"):
        run[":output"]
    assert session.model.rules[
        next(s for s in session.model.rules if s.path == "" and s.port == "input")
    ].ranks


def test_without_an_unsharded_form_what_one_stage_has_is_refused(session):
    session.load_cell(cell(4, after="del unsharded\n"), pp=2)
    run = session.run(rows(4, 7))
    refused = {s.path for s, rule in session.model.rules.items() if rule.refused}
    assert {"model.layers.0", "model.layers.3.mlp.up_proj", "lm_head"} <= refused
    with pytest.raises(LayoutError, match="only rank 1 has it, and no unsharded form"):
        run[":output"]


def test_stages_with_a_configuration_need_no_word_of_it(session, whole):
    """A container that reaches over both stages has the first one's input and the last one's output."""
    session.load_cell(PRUNED, pp=2)
    assert session.model.surveyed
    check_every_site(session, whole, rows(5, 7), {ROTARY})
    run = session.run(rows(5, 7), capture=["model", "model:input"])
    truth = truth_of(whole, rows(5, 7))
    found = run["model:output.last_hidden_state"]
    assert found.layout.ranks == (1,)
    assert relative(found.torch(), truth["model:output.last_hidden_state"]) <= 1e-5


def test_texts_of_different_length_take_their_mask_to_every_stage(session, whole):
    session.load_cell(PRUNED, pp=2)
    texts = [PROMPT, "The capital of France is", "When", "John"]
    encoded = AutoTokenizer.from_pretrained(MODEL)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = whole(**encoded, use_cache=False).logits
        unmasked = whole(encoded["input_ids"], use_cache=False).logits
    assert relative(unmasked, expected) > 1e-4
    assert relative(session.run(texts).logits.torch(), expected) <= 1e-5


SMALL = """
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.distributed.pipelining.microbatch import TensorChunkSpec

def traced():
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    return pipeline(two, (torch.randn(2, 3),), split_spec={"1": SplitPoint.BEGINNING})

class Scale(nn.Module):
    def forward(self, x):
        return x * 2

class Mean(nn.Module):
    def forward(self, x):
        return x.mean(0)

class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale = nn.Linear(3, 3), Scale()
    def forward(self, x, mask):
        return self.scale(self.scale(self.a(x)) + 1)

class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.b, self.mean = nn.Linear(3, 2), Mean()
    def forward(self, x, mask):
        return self.b(x) * mask[:, None] + self.mean(x).sum() * 0

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale, self.b, self.mean = nn.Linear(3, 3), Scale(), nn.Linear(3, 2), Mean()
    def forward(self, x, mask):
        x = self.scale(self.scale(self.a(x)) + 1)
        return self.b(x) * mask[:, None] + self.mean(x).sum() * 0

torch.manual_seed(0)
both = Both()
part = First() if rank == 0 else Second()
for name, child in part.named_children():
    child.load_state_dict(both.get_submodule(name).state_dict())
weights = both.state_dict()
unsharded = Both
stage = PipelineStage(part, rank, 2, device)
"""


def both():
    names = {}
    exec(SMALL.partition("torch.manual_seed")[0], names)  # noqa: S102 - the same classes as the cell's
    torch.manual_seed(0)
    return names["Both"]().eval()


def masked(batch):
    x = torch.randn(batch, 3, generator=torch.Generator().manual_seed(batch))
    return {"x": x, "mask": torch.arange(batch).float()}


@pytest.fixture
def small(session):
    session.load_cell(SMALL + "model = ScheduleGPipe(stage, n_microbatches=2)\n", pp=2)
    return session


def test_later_stages_get_the_arguments_that_they_name(small):
    inputs = masked(5)
    run = small.run(inputs)
    with torch.no_grad():
        assert relative(run[":output"].torch(), both()(**inputs)) <= 1e-5


def test_a_module_called_twice_shows_its_last_call_and_says_so(small):
    inputs = masked(5)
    run = small.run(inputs, capture=["scale", "a"])
    with torch.no_grad():
        model = both()
        expected = model.scale(model.scale(model.a(inputs["x"])) + 1)
    assert relative(run["scale"].torch(), expected) <= 1e-5
    assert run["scale"]._origin.warnings == ("called 2 times in this run: the last call is shown",)
    assert run["a"]._origin.warnings == ()


def test_what_depends_on_all_rows_is_the_whole_batch_s(small):
    """Each micro-batch has a mean of its own, which is none of the batch; it goes in one piece then."""
    inputs = masked(5)
    with torch.no_grad():
        model = both()
        expected = model.scale(model.scale(model.a(inputs["x"])) + 1)
    assert relative(small.run(inputs, capture="mean")["mean"].torch(), expected.mean(0)) <= 1e-5
    assert [site for site, rule in small.model.rules.items() if rule.together] == [Site.parse("mean:output")]


def test_what_counts_rows_is_not_taken_from_one_micro_batch(session):
    """As many rows in every micro-batch, so that the count is the same in all and still not the batch's."""
    counting = SMALL.replace("return x.mean(0)", "return torch.tensor(float(len(x)))")
    session.load_cell(counting + "model = ScheduleGPipe(stage, n_microbatches=2)\n", pp=2)
    assert session.run(masked(4), capture="mean")["mean"].torch() == 4


REFUSED = {
    "model = ScheduleGPipe(stage, n_microbatches=2 + rank)": "different numbers of micro-batches: .2, 3.",
    "model = ScheduleGPipe(stage, 2) if rank == 0 else part": "Rank 1 assigned a module",
    "model = 3": "must assign a torch.nn.Module to `model`; it is int",
    "model = ScheduleInterleaved1F1B([stage], 2)": "several pipeline stages per rank",
    "model = ScheduleGPipe(stage, 2, args_chunk_spec=(TensorChunkSpec(1),))": "chunk specs of its own",
    "model = PipelineStage(part, 0, 2, device)": "not all of them say so",
    "model = PipelineStage(part, rank, 3, device)": "3 stages over 2 ranks",
    "model = ScheduleGPipe(traced().build_stage(rank, device), 2)": "tracing front end",
}


@pytest.mark.parametrize(("assigned", "reason"), REFUSED.items())
def test_what_cannot_be_right_is_refused_before_anything_runs(session, assigned, reason):
    with pytest.raises(ModelError, match=reason):
        session.load_cell(SMALL + assigned, pp=2)


def test_an_argument_no_stage_knows_is_named(small):
    with pytest.raises(ModelError, match="first pipeline stage does not take nonsense; it takes mask, x"):
        small.run(masked(4) | {"nonsense": torch.zeros(4)})
    assert small.run(masked(4))[":output"].shape == (4, 2)


MIXED = """
class Known(nn.Module):
    main_input_name = "input_ids"
    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"vocab_size": 50})()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 3)
    def forward(self, input_ids):
        return self.embed(input_ids)

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(3, 50)
    def forward(self, x):
        return self.head(x)

class All(Known):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 50)
    def forward(self, input_ids):
        return self.head(self.embed(input_ids))

del unsharded
if rank == 0:
    unsharded = All
model = ScheduleGPipe(PipelineStage(Known() if rank == 0 else Head(), rank, 2, device), n_microbatches=2)
"""


def test_stages_that_know_less_than_others_survey_and_refuse_together(session):
    """Only the first one's class says what it takes, and only its rank has the unsharded form."""
    session.load_cell(SMALL + MIXED)
    assert not session.model.surveyed
    assert str(session.model.mesh) == "pp=2"
    ids = torch.arange(15).reshape(3, 5)
    torch.manual_seed(0)
    embed = torch.nn.Embedding(50, 3)
    torch.manual_seed(1)
    head = torch.nn.Linear(3, 50)
    run = session.run(ids, capture=["embed", "head"])
    assert not any(rule.refused for rule in session.model.rules.values())
    with torch.no_grad():
        assert relative(run["embed"].torch(), embed(ids)) <= 1e-5
        assert relative(run[":output"].torch(), head(embed(ids))) <= 1e-5
    with pytest.raises(ModelError, match="on rank 0: IndexError"):
        session.run(ids + 60)
    assert session.run(ids)[":output"].shape == (3, 5, 50)
    session.hook(":input.input_ids", "x[:, 0] = 7", name="other")
    changed = session.run(ids)[":output"].torch()
    ids[:, 0] = 7
    with torch.no_grad():
        assert relative(changed, head(embed(ids))) <= 1e-5


def test_a_stage_that_hands_on_no_tensors_is_named(session):
    session.load_cell(
        SMALL + "if rank == 0:\n    part.forward = lambda x, mask: {'x': x}\n"
        "model = ScheduleGPipe(PipelineStage(part, rank, 2, device), n_microbatches=2)"
    )
    with pytest.raises(ModelError, match="stage 0 returns dict; a stage before the last must return"):
        session.run(masked(4))


def test_a_local_hook_may_act_on_one_stage_only(small):
    plain = small.run(masked(4))[":output"].torch()
    small.hook(["a", "b"], "if rank == 1: x *= 2", name="own", local=True)
    assert relative(small.run(masked(4))[":output"].torch(), plain * 2) <= 1e-5 < relative(plain, plain * 2)


LEFTOVERS = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
    def forward(self, x):
        x = self.first(x) if "first" in use else x
        return self.second(x) if "second" in use else x

class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
    def forward(self, x):
        return self.block(x) if rank == 0 else self.block.second(x)

class Undivided(Outer):
    def forward(self, x):
        return self.block.second(self.block.first(x)) + 0 * self.block(x)

use = ["first"] if rank == 0 else ["second"]
unsharded = Undivided
model = ScheduleGPipe(PipelineStage(Outer(), rank, 2, device), n_microbatches=2)
"""


def test_what_a_module_returns_halfway_is_not_taken_for_its_output(session):
    """Both ranks hold all weights; the first calls half of the block, the second its other half alone."""
    session.load_cell(SMALL + LEFTOVERS)
    run = session.run({"x": torch.randn(4, 3)}, capture=["block.first", "block.second"])
    sites = {str(s) for s in session.model.rules}
    assert "block:input[0]" in sites
    assert "block:output" not in sites
    assert run["block.second"].layout.ranks == (1,)
