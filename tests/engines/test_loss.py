"""Named losses: the gradients of one process, and what is said of cells that give no number."""

import pytest
import torch

from flexmagic import CellError, FlexError, HookError, InputError

from .conftest import PROMPT, relative
from .test_magics import desk, failing, shell, typed  # noqa: F401 - fixtures

pytestmark = pytest.mark.engines

SITE = "model.layers.1:grad_output"
CELL = "last = logits[:, -1].log_softmax(-1)\n(last[:, 5] - last[:, 7]).sum()  # how much more likely"


def test_a_named_loss_has_the_gradients_of_one_process(loaded, one_process, ids):
    loaded.losses.register("gap", CELL)
    run = loaded.run(PROMPT, backward="gap", capture=SITE)
    traced = loaded.trace(PROMPT, "model.layers[0].output *= 2", backward="gap", capture=SITE)
    kept = []
    handle = one_process.model.layers[1].register_forward_hook(
        lambda _m, _a, out: (out.retain_grad(), kept.append(out))[0]
    )
    last = one_process(ids, use_cache=False).logits[:, -1].log_softmax(-1)
    loss = (last[:, 5] - last[:, 7]).sum()
    loss.backward()
    loss = float(loss.detach())
    handle.remove()
    one_process.zero_grad()
    assert float(kept[0].grad.abs().max()) > 0
    assert relative(run[SITE].torch(), kept[0].grad) <= 1e-5
    assert abs(run.loss - loss) <= 1e-5 * abs(loss)
    assert relative(traced[SITE].torch(), run[SITE].torch()) > 1e-3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "x = logits[:, -1]\nx * 2",
            r"line 2:\n    x \* 2\nTypeError: the loss must be one number, it is torch.float32",
        ),
        ("x = undefined\nlogits.sum()", r"line 1:\n    x = undefined\nNameError"),
        ("torch.ones(()).sum()", "line 1(?s:.)*does not depend on"),
    ],
)
def test_what_is_no_loss_is_said_with_its_line(loaded, text, said):
    loaded.losses.register("bad", text)
    with pytest.raises(HookError, match=said) as caught:
        loaded.run(PROMPT, backward="bad")
    assert len(str(caught.value).splitlines()) <= 6
    assert torch.equal(loaded.run(PROMPT).logits.torch(), loaded.run(PROMPT).logits.torch())


def test_cells_that_cannot_be_losses(loaded):
    for text, error in (("x = logits", InputError), ("", InputError), ("x = (", CellError)):
        with pytest.raises(error):
            loaded.losses.register("gap", text)
    with pytest.raises(InputError, match="no name for a loss"):
        loaded.losses.register("logits", CELL)


def test_as_a_magic(desk):  # noqa: F811
    assert typed(desk, f"%%flexloss gap\n{CELL}") is None
    assert typed(desk, "%flexloss").rows[0][0] == "gap"
    run = typed(desk, f'run = %flexrun "{PROMPT}" --backward gap\nrun')
    assert run.loss is not None
    assert "Give the loss a name" in failing(desk, "%%flexloss\n1")
    typed(desk, "%%flexloss bad\nlogits[:, -1]")
    assert "line 2:\n    logits[:, -1]\nTypeError" in failing(desk, f'%flexrun "{PROMPT}" --backward bad')


WRONG_INPUT = {
    '%flexrun --inputs "[99999]"': "Token id 99999 is outside the vocabulary of 2048: ids are 0 to 2047",
    '%flexrun --inputs "[-1]"': "Token id -1 is outside the vocabulary",
    '%flexrun "a" --stop-at model.layers.9': "Did you mean",
    '%flexrun "a" --backward "logits"': "must be one number",
    "%%flexhook model.layers.0.mlp --name none\nreturn None": (
        "line 2, on every rank:\n    return None\nTypeError: None was left in x, not a tensor: return the new"
    ),
    "%%flexhook model.layers.0.mlp --name none\nx = x.half()\ny = 1": (
        "line 2, on every rank:\n    x = x.half()\nValueError: x changed from float32[1, 15, 256] to float16"
    ),
    "%%flexhook model.layers.0.mlp --name none\nx = x.to('meta')": "x = x.to('meta')\nValueError: x moved",
}


@pytest.mark.parametrize("cell", WRONG_INPUT)
def test_bad_input_is_one_screen(desk, cell):  # noqa: F811
    if cell.startswith("%%flexhook"):
        typed(desk, cell)
        cell, said = f'%flexrun "{PROMPT}"', WRONG_INPUT[cell]
    else:
        said = WRONG_INPUT[cell]
    shown = failing(desk, cell)
    assert said in shown
    assert len(shown.splitlines()) < 12
    assert "Traceback" not in shown


def test_a_step_beyond_the_end_is_said_after_the_run(desk):  # noqa: F811
    typed(desk, "%%flexhook model.layers.0.mlp --name late --step 9\nx *= 2")
    typed(desk, f'run = %flexrun "{PROMPT}" --generate 3')
    assert "hook 'late' did not act: it is for step 9, and this run had steps 0 to 2" in typed.said
    with pytest.raises(FlexError, match="There is no step 9"):
        desk.user_ns["run"].step(9)
