"""Tensor parallelism written by hand: plain local weights, and the modules' own collectives.

The engines import this module, so it knows neither pytest nor flexmagic.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import linear

from .models import ByHand, layers_of
from .strategies import ddp, fsdp2


class Columns(nn.Module):
    """Some of a linear layer's outputs."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Rows(Columns):
    """Some of a linear layer's inputs; ``join`` says what becomes of the ranks' results."""

    def __init__(self, weight, bias, join):
        super().__init__(weight, bias)
        self.join = join

    def forward(self, x):
        y = self.join(linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class Conv1DColumns(Columns):
    """Some outputs of a layer that keeps its weight as ``[in, out]``."""

    def forward(self, x):
        return x @ self.weight + self.bias


class Conv1DRows(Rows):
    """Some inputs of such a layer."""

    def forward(self, x):
        y = self.join(x @ self.weight)
        return y if self.bias is None else y + self.bias


class Ranks:
    """The ranks of one tensor parallel group, and the ways in which they share and join.

    ``interleaved``: rank r has every n-th column inside a feed-forward block. ``deferred``: sums are
    left to whoever calls ``add_up_after``. ``sequence``: what is added up is cut along the sequence.
    """

    def __init__(self, mesh, *, interleaved=False, deferred=False, sequence=False):
        over = mesh["tp"] if mesh.ndim > 1 else mesh
        self.rank, self.size, self.group = over.get_local_rank(), over.size(), over.get_group()
        self.interleaved, self.deferred, self.sequence = interleaved, deferred, sequence

    def part(self, tensor, dim=0):
        return tensor.tensor_split(self.size, dim)[self.rank]

    def inner(self, tensor, dim=0):
        """The part of a feed-forward block's inner width."""
        if not self.interleaved:
            return self.part(tensor, dim)
        return tensor.movedim(dim, 0)[self.rank :: self.size].movedim(0, dim)

    def add_up(self, y):
        y = y.clone()
        dist.all_reduce(y, group=self.group)
        return self.part(y, 1) if self.sequence else y

    def whole_sequence(self, x):
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def join(self, y):
        """What a layer that is cut along its inputs does with its result."""
        return y if self.deferred else self.add_up(y)

    def bias(self, bias):
        """A bias that is added once: by the first rank, where sums are made later."""
        return bias if bias is None or not (self.deferred and self.rank) else torch.zeros_like(bias)

    def add_up_after(self, module):
        """Have a module's first output added up, if that is not done inside."""
        if self.deferred:
            module.register_forward_hook(self._after)

    def _after(self, _module, _args, output):
        if isinstance(output, torch.Tensor):
            return self.add_up(output)
        return (self.add_up(output[0]), *output[1:])


def megatron(model, name, mesh, **options):
    """Plain local weights; the modules' own collectives. ``options``: see :class:`Ranks`."""
    ranks = Ranks(mesh, **options)
    for layer in layers_of(model, name):
        _LAYERS[name](layer, ranks)
    return model


def _columns(old, ranks):
    return Columns(ranks.inner(old.weight), None if old.bias is None else ranks.inner(old.bias))


def _rows(old, ranks):
    return Rows(ranks.inner(old.weight, 1), ranks.bias(old.bias), ranks.join)


def _attention(attention, ranks):
    """Grouped-query attention; where there are fewer key-value heads than ranks, several have the same."""
    heads = attention.k_proj.weight.shape[0] // attention.head_dim
    queries = attention.q_proj.weight.shape[0] // attention.head_dim
    for projection in ("k_proj", "v_proj"):
        weight = getattr(attention, projection).weight
        by_head = weight.unflatten(0, (heads, -1))
        mine = by_head[ranks.rank * heads // ranks.size] if heads < ranks.size else ranks.part(weight)
        setattr(attention, projection, Columns(mine))
    attention.num_key_value_groups = queries // ranks.size // max(heads // ranks.size, 1)
    attention.q_proj = Columns(ranks.part(attention.q_proj.weight))
    attention.o_proj = Rows(ranks.part(attention.o_proj.weight, 1), None, ranks.join)
    ranks.add_up_after(attention)


def _llama(layer, ranks):
    _attention(layer.self_attn, ranks)
    mlp = layer.mlp
    mlp.gate_proj, mlp.up_proj = _columns(mlp.gate_proj, ranks), _columns(mlp.up_proj, ranks)
    mlp.down_proj = _rows(mlp.down_proj, ranks)
    ranks.add_up_after(mlp)


def _mixtral(layer, ranks):
    """Every expert is cut along its inner width; what they give is added up behind them."""
    _attention(layer.self_attn, ranks)
    experts = layer.mlp.experts
    both = experts.gate_up_proj.detach().unflatten(1, (2, -1))
    experts.gate_up_proj = nn.Parameter(ranks.inner(both, 2).flatten(1, 2).clone())
    experts.down_proj = nn.Parameter(ranks.inner(experts.down_proj.detach(), 2).clone())
    layer.mlp.register_forward_hook(lambda _module, _args, output: ranks.add_up(output))


def _gpt2(layer, ranks):
    """The fused projection is cut inside each of its three parts, so that heads stay together."""
    attention, mlp = layer.attn, layer.mlp

    def heads(tensor):
        return ranks.part(tensor.unflatten(-1, (3, -1)), -1).flatten(-2)

    def into(old, inner):
        return Conv1DRows(inner(old.weight, 0), ranks.bias(old.bias), ranks.join)

    attention.c_attn = Conv1DColumns(heads(attention.c_attn.weight), heads(attention.c_attn.bias))
    attention.c_proj = into(attention.c_proj, ranks.part)
    attention.split_size //= ranks.size
    attention.num_heads //= ranks.size
    mlp.c_fc = Conv1DColumns(ranks.inner(mlp.c_fc.weight, 1), ranks.inner(mlp.c_fc.bias))
    mlp.c_proj = into(mlp.c_proj, ranks.inner)
    ranks.add_up_after(attention)
    ranks.add_up_after(mlp)


def _bert(layer, ranks):
    attention = layer.attention.self
    for name in ("query", "key", "value"):
        old = getattr(attention, name)
        setattr(attention, name, Columns(ranks.part(old.weight), ranks.part(old.bias)))
    old = layer.attention.output.dense
    layer.attention.output.dense = Rows(ranks.part(old.weight, 1), ranks.bias(old.bias), ranks.join)
    layer.intermediate.dense = _columns(layer.intermediate.dense, ranks)
    layer.output.dense = _rows(layer.output.dense, ranks)
    for output in (layer.attention.output, layer.output):
        ranks.add_up_after(output.dropout)


def _by_hand(layer, ranks):
    layer.gate, layer.up = _columns(layer.gate, ranks), _columns(layer.up, ranks)
    layer.down = _rows(layer.down, ranks)
    ranks.add_up_after(layer)


_LAYERS = {
    "Llama": _llama,
    "one key-value head": _llama,
    "two key-value heads": _llama,
    "GPT-2": _gpt2,
    "Mixtral": _mixtral,
    "experts and one key-value head": _mixtral,
    "experts and two key-value heads": _mixtral,
    "BERT": _bert,
    "by hand": _by_hand,
    "an odd width": _by_hand,
}


# --- with something else besides ----------------------------------------------------------------------


def megatron_ddp(model, name, mesh):
    return ddp(megatron(model, name, mesh), name, mesh)


def megatron_fsdp2(model, name, mesh):
    """Plain local weights, each rank's own sharded once more over the ranks with other rows."""
    return fsdp2(megatron(model, name, mesh), name, mesh)


def megatron_sequence(model, name, mesh):
    """Between the layers' inner parts every rank has a part of the sequence only."""
    model = megatron(model, name, mesh, sequence=True)
    ranks = Ranks(mesh)

    def whole(_module, args, kwargs):
        return (ranks.whole_sequence(args[0]), *args[1:]), kwargs

    for layer in layers_of(model, name):
        for inner in [layer] if name in ByHand.NAMES else [layer.attn, layer.mlp]:
            inner.register_forward_pre_hook(whole, with_kwargs=True)
    if name in ByHand.NAMES:
        model.__class__, model.ranks = InSequence, ranks
        return model
    first, last = layers_of(model, name)[0], model.transformer.ln_f
    first.register_forward_pre_hook(
        lambda _module, args, kwargs: ((ranks.part(args[0], 1), *args[1:]), kwargs), with_kwargs=True
    )
    last.register_forward_hook(lambda _module, _args, output: ranks.whole_sequence(output))
    return model


class InSequence(ByHand):
    """The module written by hand, of which the blocks' residual stream is cut along the sequence."""

    def forward(self, x):
        x = self.ranks.part(x, 1)
        for block in self.blocks:
            x = x + block(x)
        return self.after_blocks(self.ranks.whole_sequence(x))
