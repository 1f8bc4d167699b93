"""The layouts keep step with the model: what changes between runs is surveyed anew, or refused."""

from __future__ import annotations

import pytest
import torch

from flexmagic.errors import InputError

from .conftest import MODEL, relative

IDS = torch.randint(3, 1700, (2, 9), generator=torch.Generator().manual_seed(0))


def on_engines(session, code):
    """What a ``%%px`` cell does: run code in every engine's own namespace."""
    for view in [session._cluster.client[engine] for engine in session._calls.ranks.engines]:
        view.execute(code, block=True)


def test_another_kind_of_attention_is_found_at_the_next_run(session, one_process):
    session.load(MODEL, tp=2, attn="sdpa")
    pattern = "model.layers.0.self_attn:output[1]"
    assert pattern not in {str(site) for site in session.model.rules}
    before = session.run(IDS).logits.torch()
    on_engines(session, "model.set_attn_implementation('eager')")
    session.run(IDS)
    run = session.run(IDS, capture=[pattern])
    assert run[pattern].shape == (2, 8, 9, 9)
    want = one_process(IDS, output_attentions=True).attentions[0].detach()
    assert relative(run[pattern].torch(), want) <= 1e-5
    assert relative(run.logits.torch(), before) <= 1e-5


def test_a_module_put_into_another_place_is_found_at_the_next_run(session):
    session.load(MODEL, tp=2)
    before = session.run(IDS).logits.torch()
    on_engines(
        session,
        "import torch\nlayer = model.model.layers[1]\n"
        "layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Identity())",
    )
    run = session.run(IDS, capture=["model.layers.1.mlp.0"])
    assert torch.equal(run.logits.torch(), before)
    on_engines(session, "layer.mlp = layer.mlp[0]")
    assert "model.layers.1.mlp.0:output" not in session.run(IDS).sites


def test_compiled_modules_run_under_hooks_as_written(session):
    session.load(MODEL, tp=2)
    before = session.run(IDS).logits.torch()
    on_engines(session, "model.model.layers[2].mlp.compile()")
    session.hook("model.layers.2.mlp.up_proj", "x *= 0.5", name="half")
    changed = session.run(IDS).logits.torch()
    assert relative(changed, before) > 1e-3
    session.hooks["half"].remove()
    assert torch.equal(session.run(IDS).logits.torch(), before)


def test_another_length_of_a_made_up_models_input_is_surveyed_again(session):
    def build(**_):
        import torch
        from torch import nn

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.inner = nn.Linear(4, 6)

            def forward(self, x):
                return self.inner(x).transpose(0, 1)

        return Model()

    session.load(build)
    for length in (3, 5):
        x = torch.randn(2, length, 4)
        run = session.run({"x": x}, capture=["inner"])
        assert run["inner"].shape == (2, length, 6)
        assert run[":output"].shape == (length, 2, 6)
    assert session.run({"x": torch.randn(7, 5, 4)})[":output"].dims[1] == "batch"


def test_a_model_that_grows_with_every_forward_is_surveyed_each_time(session):
    def build(**_):
        import torch
        from torch import nn

        class Growing(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.parts = nn.ModuleList([nn.Linear(2, 2)])

            def forward(self, x):
                self.parts.append(nn.Linear(2, 2))
                return self.parts[0](x)

        return Growing()

    session.load(build)
    x = torch.randn(3, 2)
    torch.manual_seed(0)
    want = torch.nn.Linear(2, 2)(x).detach()
    for _ in range(3):
        assert relative(session.run({"x": x})[":output"].torch(), want) <= 1e-6


def test_a_model_that_changes_on_one_rank_only_is_surveyed_on_all(session):
    session.load(MODEL, tp=2)
    before = session.run(IDS).logits.torch()
    on_engines(session, "import torch\nif rank == 1: model.lonely = torch.nn.Identity()")
    assert torch.equal(session.run(IDS).logits.torch(), before)


def test_ranks_with_different_inputs_are_named_before_anything_runs(session):
    session.load(MODEL, tp=2)
    before = session.run(IDS).logits.torch()
    on_engines(
        session,
        "import torch\nclass Odd:\n    pad_token = None\n"
        "    def __call__(self, *args, **kw): return {'input_ids': torch.tensor([[1, 2, 3 + rank]]),"
        " 'attention_mask': torch.ones(1, 3)}\n"
        "    def decode(self, ids): return str(ids)\n"
        "import dataclasses\nfrom flexmagic.engine import slot\n"
        "runtime = slot.Slot.runtime\nkept = runtime.loaded\n"
        "runtime.loaded = dataclasses.replace(kept, tokenizer=Odd())",
    )
    with pytest.raises(InputError, match="Rank 1 was given another input"):
        session.run("text")
    on_engines(session, "runtime.loaded = kept")
    assert torch.equal(session.run(IDS).logits.torch(), before)
