"""The models of the matrix cut into two stages of torch.distributed.pipelining, as a user may do it.

A model of transformers stays what it is: its forward runs on every stage, with stand-ins for what
is not there. The module written by hand is written anew, in two halves.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from .by_hand import megatron
from .models import ByHand, layers_of
from .strategies import torch_tp


class Skipped(nn.Identity):
    """In the place of a layer of another stage: gives back what it got."""

    def forward(self, x, *_others, **_options):
        return x


class Received(nn.Module):
    """In the place of BERT's embeddings on the second stage."""

    def forward(self, inputs_embeds=None, **_others):
        return inputs_embeds


class Nothing(nn.Module):
    """In the place of what is added to GPT-2's embeddings, on the second stage."""

    def forward(self, _positions):
        return torch.zeros(())


_ENDS = {
    "Llama": {"model.embed_tokens": None, "model.norm": Skipped, "lm_head": Skipped},
    "Mixtral": {"model.embed_tokens": None, "model.norm": Skipped, "lm_head": Skipped},
    "GPT-2": {
        "transformer.wte": None, "transformer.wpe": Nothing, "transformer.ln_f": Skipped, "lm_head": Skipped,
    },
    "BERT": {"embeddings": Received, "pooler": None},
}  # fmt: skip
"""Per model what only one of the stages has, and what stands for it on the other."""
_FIRST = ("model.embed_tokens", "transformer.wte", "transformer.wpe", "embeddings")
"""What the first stage has of these; the second has the others."""


def pipelined(model, name, mesh, *, micro_batches=1):
    """Two stages and a schedule; it is the schedule that is assigned to ``model``."""
    over = mesh["pp"] if mesh.ndim > 1 else mesh
    at = over.get_local_rank()
    part = _half_by_hand(model, at) if name == "by hand" else _half(model, name, at)
    stage = PipelineStage(part, at, 2, torch.device("cpu"), group=over.get_group())
    return ScheduleGPipe(stage, n_microbatches=micro_batches)


def pipelined_tp(model, name, mesh, *, micro_batches=1):
    """Tensor parallel layers, by torch's plans where they know them, then cut into two stages."""
    split = megatron if name == "GPT-2" else torch_tp
    return pipelined(split(model, name, mesh), name, mesh, micro_batches=micro_batches)


def _half(model, name, at):
    """A subclass of the model's own class, of which each stage has its layers and its end."""
    layers = layers_of(model, name)
    for n in range(len(layers)):
        if (n >= len(layers) // 2) != bool(at):
            layers[n] = Skipped()
    for path, stand_in in _ENDS[name].items():
        if (path in _FIRST) == bool(at):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, stand_in and stand_in())
    whole = type(model).forward

    def forward(self, x, **options):
        out = whole(self, **{"inputs_embeds" if at else "input_ids": x}, **options)
        return out if at else out[0]

    model.__class__ = type("Half", (type(model),), {"forward": forward})
    return model


def _half_by_hand(model, at):
    half = (Late if at else Early)()
    for name, module in model.named_children():
        if name == "blocks":
            half.blocks = nn.ModuleDict({str(at): module[at]})
        elif at:
            setattr(half, name, module)
    return half.eval()


class Early(nn.Module):
    """The first half of the module written by hand: its first block."""

    def forward(self, x):
        return x + self.blocks["0"](x)


class Late(nn.Module):
    """All the rest of it, as :class:`~.models.ByHand` goes on."""

    def forward(self, x):
        return ByHand.after_blocks(self, x + self.blocks["1"](x))
