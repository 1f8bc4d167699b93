"""Wrong input: one clear sentence, the next thing to type, and everything usable at once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import flexmagic
from flexmagic import (
    CellError,
    ClusterError,
    FlexError,
    HookError,
    InputError,
    LayoutError,
    ModelError,
    Session,
    SiteError,
)

from .conftest import MODEL, PROMPT, relative

pytestmark = pytest.mark.engines


@pytest.fixture
def unharmed(loaded):
    """The model gives the same logits after the mistake as before."""
    before = loaded.run(PROMPT).logits.torch()
    yield loaded
    for hook in list(loaded.hooks):
        hook.remove()
    assert torch.equal(loaded.run(PROMPT).logits.torch(), before)


@pytest.mark.parametrize(
    ("site", "error", "said"),
    [
        ("model.layers.0.mpl", SiteError, r"Did you mean model\.layers\.0\.mlp"),
        ("model.layers.*.mpl", SiteError, r"Did you mean model\.layers\.\*\.mlp"),
        ("model.layers.0.mlp:weights", SiteError, "Ports are input, output"),
        ("model.layers", SiteError, "No tensor was seen"),
        ("model.layers.0.self_attn", SiteError, r"Name one, e\.g\. model\.layers\.0\.self_attn:output\[0\]"),
        ("", SiteError, "is no site"),
    ],
)
def test_a_wrong_site_is_named_and_nothing_registered(unharmed, site, error, said):
    with pytest.raises(error, match=said):
        unharmed.hook(site, "x *= 2", name="h")
    assert len(unharmed.hooks) == 0


def test_a_syntax_error_sends_nothing_and_the_old_version_stays(unharmed):
    unharmed.hook("model.layers.0.mlp", "x *= 2", name="h")
    doubled = unharmed.run(PROMPT).logits.torch()
    with pytest.raises(HookError, match=r"line 1; nothing was sent") as caught:
        unharmed.hook("model.layers.0.mlp", "x *=", name="h")
    assert "^" in str(caught.value)
    assert unharmed.hooks["h"].version == 1
    assert torch.equal(unharmed.run(PROMPT).logits.torch(), doubled)


@pytest.mark.parametrize("site", ["model.layers.1.mlp", "model.layers.1.mlp.up_proj"])
@pytest.mark.parametrize(
    ("body", "ranks", "said"),
    [
        ("y = 1\nx += undefined", [0, 1], r"line 2, on every rank:\n    x \+= undefined\n +\^{9}\nNameError"),
        ("if rank == 0:\n    raise ValueError('mine')", [0], "line 2, on rank 0"),
        ("if rank == 1:\n    1 / 0", [1], "line 2, on rank 1"),
        ("x = x[..., :3]", [0, 1], r"to float32\[1, 15, 3\]; shape and dtype must stay"),
        ("x = x.double()", [0, 1], "to float64"),
        ("raise SystemExit", [0, 1], "SystemExit"),
    ],
)
def test_a_body_that_raises_ends_the_run_on_all_ranks_together(unharmed, site, body, ranks, said):
    unharmed.hook(site, body, name="bad")
    unharmed.hook("model.layers.2.mlp.up_proj", "x *= 1", name="later")
    with pytest.raises(HookError, match=said) as caught:
        unharmed.run(PROMPT)
    assert sorted(f.rank for f in caught.value.failures) == ranks
    assert f"{site}:output" in str(caught.value)
    assert "ready" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 6


def test_the_original_exception_can_be_caught_by_type(unharmed):
    unharmed.hook("model.layers.0.mlp", "{}['missing']", name="bad")
    with pytest.raises(HookError) as caught:
        unharmed.run(PROMPT)
    assert isinstance(caught.value.cause, KeyError)


def test_ranks_that_fail_differently_are_both_listed(unharmed):
    unharmed.hook("model.layers.0.mlp.up_proj", "[][rank] if rank else 1 / 0", name="bad")
    with pytest.raises(HookError, match=r"(?s)on rank 0:.*ZeroDivisionError.*on rank 1:.*IndexError"):
        unharmed.run(PROMPT)


@pytest.mark.parametrize("site", ["model.layers.0.mlp", "model.layers.0.mlp.up_proj"])
def test_an_edit_on_one_rank_only_is_refused_not_shown(unharmed, site):
    unharmed.hook(site, "if rank == 1:\n    x *= 2", name="split")
    with pytest.raises(HookError, match="left different values on the ranks"):
        unharmed.run(PROMPT)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ("", "empty"),
        (" word" * 400, r"tokens; the model's context is \d+\. Shorten it"),
        ([10**6], "outside the vocabulary"),
        (3.5, "Token ids are whole numbers"),
    ],
)
def test_a_wrong_prompt_reaches_no_forward(unharmed, inputs, said):
    with pytest.raises(InputError, match=said):
        unharmed.run(inputs)


def test_arguments_the_model_does_not_take_are_its_own_error(unharmed):
    with pytest.raises(ModelError, match="forward failed on every rank: RuntimeError"):
        unharmed.run({"inputs_embeds": np.ones((1, 2, 3), np.float32)})


def test_what_a_run_did_not_capture_is_said_with_the_way_to_get_it(loaded):
    run = loaded.run(PROMPT)
    with pytest.raises(SiteError, match=r'did not capture.*--capture "model\.layers\.0\.mlp"'):
        run["model.layers.0.mlp"]
    with pytest.raises(SiteError, match="no site"):
        run["model.layers.99.mlp"]
    run.release()
    with pytest.raises(SiteError, match="no capture"):
        run.logits.numpy()


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (str(Path(__file__).parent), {}, r"is no model: there is no config\.json"),
        ("/nowhere/at/all", {}, "neither a folder with a model nor a model id"),
        (MODEL, {"dtype": "float33"}, "no dtype of torch"),
        (MODEL, {"tp": 4}, r"--tp 4 is for 4 ranks, but there are 2 engines"),
        (MODEL, {"attn": "nonsense"}, "could not be loaded"),
    ],
)
def test_a_wrong_model_leaves_the_one_that_is_there(unharmed, source, options, said):
    with pytest.raises(ModelError, match=said):
        unharmed.load(source, **options)


def test_tp_that_does_not_divide_the_heads_is_refused_before_loading(unharmed, tmp_path):
    config = json.loads((MODEL / "config.json").read_text())
    config.update(hidden_size=288, num_attention_heads=9, num_key_value_heads=3, head_dim=32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"--tp 2 does not divide the model's 9 attention heads\. Use one of 1, 3, 9"
    ):
        unharmed.load(tmp_path)


def test_a_checkpoint_without_weights_is_refused(unharmed, tmp_path):
    shutil.copy(MODEL / "config.json", tmp_path)
    with pytest.raises(ModelError, match="could not be loaded"):
        unharmed.load(tmp_path)


@pytest.mark.parametrize(
    ("cell", "error", "said"),
    [
        ("model = (", CellError, "syntax error on line 1; nothing was sent"),
        ("x = 1\nmodel = undefined", CellError, "(?s)line 2, on every rank:.*model = undefined.*NameError"),
        ("model = 3", ModelError, r"torch\.nn\.Module to `model`; it is int"),
        ("pass", ModelError, "it is NoneType"),
    ],
)
def test_a_wrong_model_cell_leaves_the_model_that_is_there(unharmed, cell, error, said):
    with pytest.raises(error, match=said):
        unharmed.load_cell(cell)


def test_a_builder_that_fails_shows_its_own_line(unharmed):
    def build(rank, world_size, device, mesh):
        return undefined_name  # noqa: F821

    with pytest.raises(CellError, match=r"(?s)on every rank:.*return undefined_name.*NameError"):
        unharmed.load(build)


def test_a_function_hook_that_fails_shows_its_own_line(unharmed):
    def hook(x, h):
        x += undefined_name  # noqa: F821

    unharmed.hook("model.layers.0.mlp", hook, name="bad")
    with pytest.raises(HookError, match=r"(?s)on every rank:.*x \+= undefined_name.*NameError"):
        unharmed.run(PROMPT)


def test_one_rank_that_cannot_load_keeps_all_on_the_old_model(unharmed):
    def build(rank, world_size, device, mesh):
        if rank == 1:
            raise MemoryError("too big for rank 1")
        return torch.nn.Linear(1, 1)

    with pytest.raises(CellError, match=r"(?s)on rank 1:.*MemoryError: too big"):
        unharmed.load(build)
    assert unharmed.model.name == "LlamaForCausalLM"


def test_a_second_notebooks_hooks_need_a_model(session):
    if session._model is not None and session._model.alive:
        session.model.unwrap()
    for act in (lambda: session.run("x"), lambda: session.hook("a", ""), lambda: session.model):
        with pytest.raises(ModelError, match=r"No model is loaded\. Type %flexmodel"):
            act()


@pytest.mark.parametrize(("n", "said"), [(0, "at least one"), (-1, "at least one"), (500, "--oversubscribe")])
def test_a_number_of_engines_that_the_machine_does_not_carry(n, said):
    with pytest.raises(ClusterError, match=said):
        Session.start(n)


def test_a_first_input_that_the_model_cannot_take_is_its_own_error(session):
    session.load_cell("import torch\ntorch.manual_seed(0)\nmodel = torch.nn.Linear(4, 2)")
    with pytest.raises(ModelError, match="own forward failed on rank 0: RuntimeError"):
        session.run({"input": np.ones((1, 3), np.float32)})
    assert session.run({"input": np.ones((1, 4), np.float32)})[":output"].shape == (1, 2)


def test_unknown_hooks_are_named_with_those_there_are(loaded):
    loaded.hook("model.layers.0.mlp", "", name="here")
    with pytest.raises(HookError, match=r"no hook 'there'\. Hooks: here"):
        loaded.hooks["there"]


def test_a_model_without_a_plain_form_is_refused_where_its_pieces_differ(session):
    session.load_cell(
        "import torch\n"
        "class Split(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.piece = torch.nn.Identity()\n"
        "    def forward(self, x):\n"
        "        return self.piece(x.chunk(world_size, -1)[rank]).sum(-1) * 0 + x.sum(-1)\n"
        "model = Split()"
    )
    run = session.run({"x": np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)}, capture="piece")
    assert run[":output"].shape == (2,)
    with pytest.raises(LayoutError, match="piece:output is refused: the ranks hold different values"):
        run["piece"]
    with pytest.raises(LayoutError, match="--local"):
        session.hook("piece", "x *= 2", name="whole")
    session.hook("piece", "x *= 2", name="own", local=True)
    session.run({"x": np.ones((2, 4), np.float32)})


def test_every_error_is_a_flex_error():
    named = [getattr(flexmagic, n) for n in flexmagic.__all__ if n.endswith("Error")]
    assert len(named) >= 7
    assert all(issubclass(e, FlexError) for e in named)


def test_a_forward_that_differs_between_ranks_is_named(session):
    def build(rank, **_):
        import torch
        from torch import nn

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.first, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                x = self.first(x)
                return {"a": x, "b": self.other(x)} if rank else {"a": x}

        return Model()

    session.load(build)
    x = torch.randn(3, 4)
    run = session.run({"x": x}, capture=["first"])
    assert run["first"].shape == (3, 4)
    refused = {str(s): r.refused for s, r in session.model.rules.items() if r.refused}
    assert set(refused) == {"other:input[0]", "other:output", ":output.b"}
    assert all("forwards differ" in reason for reason in refused.values())
    with pytest.raises(LayoutError, match="rank 0 has no such tensor"):
        session.hook("other", "x *= 2")


def test_a_builder_may_say_what_its_model_is_undistributed(session):
    def build(rank, world_size, **_):
        import torch
        import torch.distributed as dist
        from torch import nn

        class Parallel(nn.Module):
            def __init__(self, whole):
                super().__init__()
                self.weight = nn.Parameter(whole.weight.chunk(world_size, 1)[rank].clone())
                self.bias = whole.bias

            def forward(self, x):
                y = nn.functional.linear(x.chunk(world_size, -1)[rank], self.weight)
                dist.all_reduce(y)
                return y + self.bias

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        model[1] = Parallel(model[1])
        return model

    def unsharded():
        import torch
        from torch import nn

        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))

    session.load(build, unsharded=unsharded)
    x = torch.randn(3, 4)
    run = session.run({"input": x}, capture=["0", "1"])
    with torch.no_grad():
        assert relative(run[":output"].torch(), unsharded()(x)) <= 1e-5
    assert relative(session.model.parameter("1.weight"), unsharded()[1].weight.detach()) == 0
