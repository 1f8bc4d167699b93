"""Checkpoints that are not those of the model that their configuration describes, and those that are."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from flexmagic import LayoutError, ModelError
from flexmagic.engine.distributed import SIZES

from .conftest import MODEL, PROMPT, relative

pytestmark = pytest.mark.engines

# older versions load no data parallel model
AXES = [
    axis for axis, size in SIZES.items() if size in {f.name for f in dataclasses.fields(DistributedConfig)}
]
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def changed(folder, change):
    """The shipped checkpoint with its tensors changed."""
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def without_a_layer(tensors):
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        del tensors[name]


def renamed(tensors):
    tensors["model.layers.1.mlp.other.weight"] = tensors.pop(UP)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            without_a_layer,
            r"it lacks model\.layers\.1\.\S+, model\S+, model\S+ and 6 more, which would",
        ),
        (renamed, r"it lacks \S+\.up_proj\.weight, .*; it has \S+\.other\.weight, which the model has not"),
        (lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()}), r"up_proj\.weight \(a rank gets"),
        (lambda tensors: tensors.update({NORM: tensors[NORM][:-2].clone()}), r"another shape of model\.norm"),
    ],
)
def test_weights_that_are_not_what_the_configuration_says_are_named(loaded, tmp_path, axis, change, said):
    folder = changed(tmp_path / "model", change)
    with pytest.raises(ModelError, match=said) as caught:
        loaded.load(folder, **{axis: 2})
    assert len(str(caught.value).splitlines()) == 1
    assert loaded.model.alive
    assert loaded.run(PROMPT).logits.shape[-1] == 2048


@pytest.mark.parametrize("axis", AXES)
def test_names_that_need_not_be_there_are_not_missed(session, tmp_path, axis, ids):
    """Tied weights are saved once, and older checkpoints hold tables that models now make themselves."""
    config = AutoConfig.from_pretrained(MODEL, tie_word_embeddings=True)
    torch.manual_seed(0)
    one = AutoModelForCausalLM.from_config(config).eval()
    one.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    session.load(tmp_path, **{axis: 2})
    with torch.no_grad():
        assert relative(session.run(ids).logits.torch(), one(ids, use_cache=False).logits) <= 1e-5


@pytest.mark.parametrize("change", ["zeros", "strange"])
def test_plain_parts_are_looked_up_in_the_unsharded_form(session, change):
    def build(rank, world_size, mesh, **_):
        import torch
        from torch import nn

        class Columns(nn.Module):
            def __init__(self, linear):
                super().__init__()
                self.weight = nn.Parameter(linear.weight.detach()[rank::world_size].clone())
                self.bias = nn.Parameter(linear.bias.detach()[rank::world_size].clone())

            def forward(self, x):
                return nn.functional.linear(x, self.weight, self.bias)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.up = nn.Linear(4, 6)
                nn.init.zeros_(self.up.bias)

            def forward(self, x):
                return self.up(x).sum(-1) * 0 + x.sum(-1)

        model = Model()
        if mesh is not None:
            model.up = Columns(model.up)
            if change == "strange" and rank:
                with torch.no_grad():
                    model.up.weight += 1
        return model

    whole = build(0, 1, None)
    session.load(build, unsharded=lambda: build(0, 1, None))
    x = torch.randn(3, 4)
    run = session.run({"x": x}, capture=["up"])
    if change == "zeros":
        with torch.no_grad():
            assert relative(run["up"].torch(), whole.up(x)) <= 1e-5
        for name, parameter in whole.named_parameters():
            assert torch.equal(session.model.parameter(name), parameter.detach())
        return
    said = r"rank 1 holds values of up\.weight that the unsharded form does not have"
    with pytest.raises(LayoutError, match=said):
        run["up"]
    with pytest.raises(LayoutError, match=said):
        session.model.parameter("up.weight")
