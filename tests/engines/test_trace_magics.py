"""``%%flextrace`` as typed: what it returns, what it may see, and what it says when it fails."""

import pytest
import torch

from flexmagic import Run

from .conftest import PROMPT
from .test_magics import desk, failing, shell, typed  # noqa: F401 - fixtures

pytestmark = pytest.mark.engines

LINE = '%%flextrace "The capital of France is" "The capital of Italy is"'


def test_a_one_line_body_returns_the_run(desk):  # noqa: F811
    run = typed(desk, f"{LINE}\nsave.h = model.layers[1].output")
    assert isinstance(run, Run)
    assert run.context["h"].shape == (2, len(run.ids[0]), 256)


def test_a_run_gets_a_name_and_a_grid_is_one_command(desk):  # noqa: F811
    body = "h = model.layers[layer].output\nh[1, at] = h[0, at]\nsave.top = model.output.logits[1, -1].max()"
    assert typed(desk, f"{LINE} --name grid --over layer=range(4) at=[0,-1]\n{body}") is None
    assert typed(desk, 'grid["top"].shape') == (4, 2)
    typed(desk, "where = 2")
    typed(desk, f"{LINE} --name one --given layer=where at=-1\n{body}")
    assert typed(desk, 'float(one.context["top"] - grid["top"][2, 1])') == 0


def test_a_generation_is_gone_through_and_modules_are_called(desk, loaded):  # noqa: F811
    line = f'%%flextrace "{PROMPT}" --generate 4 --name run'
    body = "for step in model.steps[1:3]:\n    model.layers[2].output *= 0\nsave.lens = step"
    assert typed(desk, f"{line}\n{body}") is None
    run = desk.user_ns["run"]
    loaded.hook("model.layers.2", "x *= 0", name="h", step="1:3")
    assert run.ids == loaded.generate(PROMPT, 4).ids
    loaded.hooks["h"].remove()
    assert run.ids != loaded.generate(PROMPT, 4).ids
    typed(desk, f"{line} --temperature 5 --top-k 0 --seed 3\nsave.x = 1")
    sampled = desk.user_ns["run"].ids
    assert sampled == loaded.generate(PROMPT, 4, do_sample=True, temperature=5.0, top_k=0, seed=3).ids
    lens = typed(desk, f"{LINE}\nsave.lens = model.lm_head(model.norm(model.layers[3].output))")
    assert float((lens.context["lens"] - lens.logits.torch()).abs().max()) == 0
    said = failing(desk, f"{line}\nfor step in model.steps[2:9]:\n    pass")
    assert "the trace failed, step 3, line 2, on every rank" in said
    assert "step 4 was never reached" in said
    assert len(said.splitlines()) < 12
    assert "mean something with --generate" in failing(desk, f"{LINE} --top-k 3\nx = 1")
    assert "needs one forward" in failing(desk, f"{line} --backward logits.sum()\nx = 1")


def test_in_loops_functions_exec_and_under_time(desk, loaded):  # noqa: F811
    cell = f"{LINE} --name run\nmodel.layers[1].mlp.output *= 2"
    typed(desk, cell)
    wanted = desk.user_ns["run"].logits.torch()
    typed(desk, f"%%time\n{cell}")
    assert torch.equal(desk.user_ns["run"].logits.torch(), wanted)
    typed(desk, "def go(n):\n    for _ in range(n):\n        get_ipython().run_cell_magic('flextrace', "
                "'\"The capital of France is\" \"The capital of Italy is\" --name run', "
                "'model.layers[1].mlp.output *= 2')\ngo(2)\nexec('go(1)')")  # fmt: skip
    assert torch.equal(desk.user_ns["run"].logits.torch(), wanted)
    assert not torch.equal(
        loaded.run(["The capital of France is", "The capital of Italy is"]).logits.torch(), wanted
    )


def test_errors_start_with_the_users_line(desk):  # noqa: F811
    typed(desk, "leftover = 3")
    for body, line in (
        ("x = leftover", 2),
        ("x = 1\nmodel.layers[7].output", 3),
        ("h = model.norm.output\n1 / 0", 3),
    ):
        said = failing(desk, f"{LINE}\n{body}")
        assert f"line {line}, on every rank" in said
        assert body.splitlines()[-1] in said
        assert "Traceback" not in said
        assert len(said.splitlines()) < 12
    assert "nothing was sent" in failing(desk, f"{LINE}\nx +=")
    assert "Give a prompt" in failing(desk, "%%flextrace\nx = 1")
    assert "write a name and an expression" in failing(desk, f"{LINE} --over 3\nx = 1")
    assert "needs a list of one value or more" in failing(desk, f"{LINE} --over n=3\nx = 1")
