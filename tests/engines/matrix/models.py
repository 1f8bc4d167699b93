"""The models of the matrix: tiny checkpoints made on the spot, and a module written by hand.

The engines import this module too, so it knows neither pytest nor flexmagic.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

SHIPPED = Path(__file__).parents[3] / "demo_notebooks" / "model"
ROWS, SEQ = 4, 12

SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 176,
    "vocab_size": 203,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64}
CHECKPOINTS = {
    "one key-value head": ("llama", SMALL | {"num_key_value_heads": 1}),
    "two key-value heads": ("llama", SMALL | {"num_key_value_heads": 2}),
    "GPT-2": ("gpt2", {k: v for k, v in SMALL.items() if k.endswith(("_id", "size", "range"))} | _GPT2),
    "Mixtral": ("mixtral", SMALL | _EXPERTS),
    "experts and one key-value head": ("mixtral", SMALL | _EXPERTS | {"num_key_value_heads": 1}),
    "experts and two key-value heads": ("mixtral", SMALL | _EXPERTS | {"num_key_value_heads": 2}),
    "BERT": ("bert", SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
}

BY_HAND = {"by hand": 30, "an odd width": 31}
"""The module written by hand, by the width of its blocks."""


def write(name: str, folder: Path) -> Path:
    """A model's checkpoint on disk; norms and biases are not left at their neutral values."""
    if name == "Llama":
        return SHIPPED
    if name in BY_HAND:
        return folder
    kind, options = CHECKPOINTS[name]
    return folder if (folder / "config.json").exists() else made(_class(name), kind, options, folder)


def made(auto_class: type, kind: str, options: dict[str, object], folder: Path) -> Path:
    """A random checkpoint of a configuration."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    model = auto_class.from_config(AutoConfig.for_model(kind, **options))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path.lower() or "ln_" in path or path.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def _class(name):
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModel if name == "BERT" else AutoModelForCausalLM


def whole(name: str, folder: str | Path) -> nn.Module:
    """The undistributed model."""
    if name in BY_HAND:
        return ByHand(BY_HAND[name]).eval()
    return _class(name).from_pretrained(folder, attn_implementation="eager").eval()


def inputs(name: str, rows: int) -> dict[str, torch.Tensor]:
    """A batch of different rows."""
    generator = torch.Generator().manual_seed(5)
    if name in BY_HAND:
        return {"x": torch.randn(rows, SEQ, ByHand.WIDTH, generator=generator)}
    return {"input_ids": torch.randint(3, 200, (rows, SEQ), generator=generator)}


@dataclass
class Picks:
    """What a module returns as an object of its own: values, indices and a mask."""

    values: torch.Tensor
    indices: torch.Tensor
    mask: torch.Tensor


class Feed(nn.Module):
    """A gated feed-forward block, of the shape that tensor parallelism splits."""

    def __init__(self, width, inner):
        super().__init__()
        self.gate = nn.Linear(width, inner)
        self.up = nn.Linear(width, inner, bias=False)
        self.act = nn.SiLU()
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Nested(nn.Module):
    """A tuple in a dict, a number that depends on the values and one that counts rows."""

    def forward(self, x):
        mean = x.mean()
        return {"parts": (x.relu(), (x - 1).relu()), "mean": mean, "rows": torch.tensor(float(len(x)))}


class Choose(nn.Module):
    """The largest features of every position, as an object."""

    def forward(self, x):
        values, indices = x.topk(3, -1)
        return Picks(values, indices, x > 0)


class SeqFirst(nn.Module):
    """A layer that takes and returns ``[seq, batch, width]``."""

    def __init__(self, width):
        super().__init__()
        self.feed = nn.Linear(width, width)

    def forward(self, x):
        return self.feed(x).tanh()


class Flat(nn.Module):
    """A layer that takes and returns ``[batch * seq, width]``, and an empty tensor besides."""

    def __init__(self, width):
        super().__init__()
        self.feed = nn.Linear(width, width)

    def forward(self, x):
        return self.feed(x), x[:, :0]


class Rows(nn.Module):
    """What mixes rows: backwards, all of them twice, and each without their mean."""

    def forward(self, x):
        return x.flip(0), torch.cat([x, x]), x - x.mean(0)


class ByHand(nn.Module):
    """A module with odd outputs."""

    WIDTH = 16
    NAMES = frozenset(BY_HAND)

    def __init__(self, inner=30):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Feed(self.WIDTH, inner) for _ in range(2)])
        self.nested, self.choose = Nested(), Choose()
        self.seq_first, self.flat = SeqFirst(self.WIDTH), Flat(self.WIDTH)
        self.rows = Rows()
        self.head = nn.Linear(self.WIDTH, 7)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.after_blocks(x)

    def after_blocks(self, x):
        """What comes after the blocks; a pipeline's last stage does this alone."""
        nested = self.nested(x)
        x = x + nested["parts"][0] - nested["parts"][1]
        picks = self.choose(x)
        x = x + picks.values.sum(-1, keepdim=True) * picks.mask + picks.indices.sum(-1, keepdim=True) / 50
        x = x + self.seq_first(x.transpose(0, 1)).transpose(0, 1)
        self.rows(x)
        flat, _nothing = self.flat(x.flatten(0, 1))
        return self.head(flat.view(x.shape))


LAYERS = {
    "Llama": "model.layers",
    "one key-value head": "model.layers",
    "two key-value heads": "model.layers",
    "GPT-2": "transformer.h",
    "Mixtral": "model.layers",
    "experts and one key-value head": "model.layers",
    "experts and two key-value heads": "model.layers",
    "BERT": "encoder.layer",
    "by hand": "blocks",
    "an odd width": "blocks",
}
"""Where each model has its list of layers."""


def layers_of(model: nn.Module, name: str) -> nn.ModuleList:
    """A model's list of layers."""
    return model.get_submodule(LAYERS[name])
