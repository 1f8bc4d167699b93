"""Cells of any code on the engines: hooks act in their forwards, and a failure frees the other ranks."""

import pytest
import torch

from flexmagic import CellError, HookError, ModelError
from flexmagic.errors import StuckError

from .conftest import MODEL, PROMPT, clear, relative
from .test_magics import desk, failing, shell, typed  # noqa: F401 - fixtures

pytestmark = pytest.mark.engines

SHARDED = "model.layers.1.mlp.up_proj"
FORWARD = f"ids = tokenizer({PROMPT!r}, return_tensors='pt').input_ids\n"
WAYS = {"tp": {"tp": 2}, "fsdp": {"fsdp": 2}}


@pytest.fixture(scope="module", params=WAYS)
def split(request, engines):
    """The shared engines with the shipped model split in one way."""
    clear(engines)
    engines.load(MODEL, attn="eager", **WAYS[request.param])
    yield engines
    clear(engines)


def test_hooks_and_captures_act_in_every_forward(split, one_process, edited, ids):
    split.hook(SHARDED, "x[..., -3:] = 5", name="five")
    made = split.run_cell(f"{FORWARD}model(ids)\nmodel(ids[:, :-1])\nmodel(ids).logits[0]", capture=SHARDED)

    def five(x):
        return torch.cat([x[..., :-3], torch.full_like(x[..., -3:], 5)], -1)

    with edited({SHARDED: five}) as model, torch.no_grad():
        wanted = model(ids).logits[0]
    assert relative(made.value, wanted) <= 1e-5
    assert len(made.runs) == 3
    assert made.step(1)[SHARDED].shape[1] == ids.shape[1] - 1
    assert torch.equal(made.runs[0].logits.torch()[0], made.value)
    assert bool((made[SHARDED].torch()[..., -3:] == 5).all())
    clear(split)
    assert relative(split.run_cell("model(ids).logits[0]").value, wanted) > 1e-3


def test_the_models_own_generate(split, one_process, ids):
    split.hook(SHARDED, "x *= 0.5", name="half")
    made = split.run_cell(f"{FORWARD}model.generate(ids, max_new_tokens=4, do_sample=False)")
    handle = one_process.get_submodule(SHARDED).register_forward_hook(lambda _m, _a, out: out * 0.5)
    wanted = one_process.generate(ids, max_new_tokens=4, do_sample=False)
    handle.remove()
    assert torch.equal(made.value, wanted)
    assert len(made.runs) == 4
    clear(split)


def test_values_come_once_or_by_rank(split, capsys):
    assert split.run_cell("x = {'a': torch.ones(2), 'b': [1, 'two']}\nx['b']").value == [1, "two"]
    assert split.run_cell("x['b'] = torch.zeros(3)\nx").value["b"].shape == (3,)
    assert split.run_cell("[rank, 1]").value == {0: [0, 1], 1: [1, 1]}
    assert repr(split.run_cell("torch.tensor(rank)").value) == "rank 0: tensor(0)\nrank 1: tensor(1)"
    assert split.run_cell("x = 3").value is None
    assert "LlamaForCausalLM" in str(split.run_cell("model").value)
    split.run_cell("print('said')")
    split.run_cell("print('I am', rank)")
    assert capsys.readouterr().out == "said\n[rank 0] I am 0\n[rank 1] I am 1\n"


FAILING = {
    "y = 1\nx = 1 / 0": r"line 2, on every rank:\n    x = 1 / 0\n +\^{5}\nZeroDivisionError",
    "if rank == 1: 1 / 0\nmodel(ids).logits": "line 1, on rank 1(?s:.)*ZeroDivisionError",
    "import torch.distributed as dist\nif rank == 0: 1 / 0\ndist.barrier()": "line 2, on rank 0(?s:.)*Zero",
    "model(ids + rank)": "line 1, on every rank(?s:.)*another input",
    "raise SystemExit": "SystemExit",
    "x = (": "nothing was sent",
}


@pytest.mark.parametrize("code", FAILING)
def test_failures_free_every_rank_and_leave_model_and_hooks(split, code):
    split.hook(SHARDED, "x *= 0.5", name="half")
    before = split.run(PROMPT).logits.torch()
    split.run_cell(FORWARD)
    with pytest.raises(CellError, match=FAILING[code]) as caught:
        split.run_cell(code)
    assert len(str(caught.value).splitlines()) <= 6
    assert torch.equal(split.run(PROMPT).logits.torch(), before)
    assert torch.equal(split.run_cell("model(ids).logits").value, before)
    clear(split)
    assert not torch.equal(split.run(PROMPT).logits.torch(), before)


def test_a_forward_on_one_rank_only_is_ended(split):
    split.run_cell(FORWARD)
    with pytest.raises(StuckError, match="rank 0: has ended its part"):
        split.run_cell("if rank: model(ids)")


def test_a_failing_hook_ends_the_cell_on_all_ranks(split):
    split.run_cell(FORWARD)
    split.hook(SHARDED, "if rank == 1: 1 / 0", name="bad")
    with pytest.raises(HookError, match=r"'bad' failed at .*up_proj:output, step 0, line 1, on rank 1"):
        split.run_cell("model(ids)\nmodel(ids)")
    clear(split)


def test_a_model_assigned_in_a_cell_stays_a_cells(split):
    before = split.run(PROMPT).logits.torch()
    split.run_cell("model = tokenizer = None")
    assert torch.equal(split.run(PROMPT).logits.torch(), before)


def test_as_a_magic(desk):  # noqa: F811
    value = typed(desk, f"%%flexrun --name made --capture {SHARDED}\n{FORWARD}model(ids).logits.shape")
    assert value == (1, len(desk.user_ns["made"].step(0).ids[0]), 2048)
    assert desk.user_ns["made"][SHARDED].shape[1] == value[1]
    assert "takes no prompt" in failing(desk, '%%flexrun "a text"\n1')
    assert "takes no --backward" in failing(desk, "%%flexrun --backward x\n1")
    said = failing(desk, "%%flexrun\ny = 1\n1 / 0")
    assert "line 3, on every rank:\n    1 / 0" in said


def test_over_pipeline_stages_the_cells_model_is_the_whole_one(staged, one_process, ids):
    late = "model.layers.3.mlp"
    staged.hook(late, "x *= 0.5", name="half")
    calls = "model(ids).logits, model.generate(ids, max_new_tokens=4), model(ids[:, :3])"
    code = f"{FORWARD}[{calls}]"
    made = staged.run_cell(code, capture=[late, SHARDED])
    handle = one_process.get_submodule(late).register_forward_hook(lambda _m, _a, out: out * 0.5)
    with torch.no_grad():
        wanted = eval(f"[{calls}]", {"model": one_process, "ids": ids})  # noqa: S307 - the test's own
    handle.remove()
    logits, text, last = made.value
    assert relative(logits, wanted[0]) <= 1e-5
    assert torch.equal(text, wanted[1])
    assert relative(last.logits, wanted[2].logits) <= 1e-5
    assert len(made.runs) == 6
    assert made.step(2)[SHARDED].shape[1] == made.step(2)[late].shape[1] == 1
    clear(staged)
    assert relative(staged.run_cell("model(ids).logits").value, wanted[0]) > 1e-3


@pytest.mark.parametrize("layer", [0, pytest.param(3, marks=pytest.mark.full)])
def test_what_fails_in_a_cell_over_pipeline_stages_frees_every_rank(staged, layer):
    staged.run_cell(FORWARD)
    before = staged.run_cell("model(ids).logits").value
    staged.hook(f"model.layers.{layer}", "1 / 0", name="bad")
    with pytest.raises(HookError, match=rf"'bad' failed at model.layers.{layer}:output.*rank {layer // 2}"):
        staged.run_cell("model(ids)\nmodel(ids)")
    clear(staged)
    with pytest.raises(CellError, match=r"line 1, on rank 1(?s:.)*ZeroDivisionError"):
        staged.run_cell("if rank == 1: 1 / 0\nmodel(ids).logits")
    with pytest.raises(ModelError, match="no gradients cross pipeline stages"):
        staged.run_cell("model(ids).logits.sum().backward()", grad=True)
    with pytest.raises(CellError, match="capture the layers instead"):
        staged.run_cell("model(ids, output_hidden_states=True).hidden_states")
    with pytest.raises(CellError, match="does not require grad"):
        staged.run_cell("with torch.enable_grad(): model(ids).logits.sum().backward()")
    assert torch.equal(staged.run_cell("model(ids).logits").value, before)
