"""The ways of distributing a model: functions that run on every rank and return what it then calls.

Each gets the undistributed model, its name in :mod:`models` and the device mesh. The engines import
this module, so it knows neither pytest nor flexmagic.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel

from .models import layers_of

# --- data parallel ------------------------------------------------------------------------------------


def ddp(model, _name, mesh):
    group = mesh["dp"].get_group() if mesh.ndim > 1 else None
    return DistributedDataParallel(model, process_group=group)


def fsdp1(model, name, _mesh):
    kinds = {type(layer) for layer in layers_of(model, name)}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def fsdp1_accelerate(model, name, _mesh):
    """Accelerate's preparation; on a CPU it must be told that it is FSDP, else it makes DDP of it."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    os.environ.update({key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.device = torch.device("cpu")  # without an index, as FSDP names it
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(layers_of(model, name)[0]).__name__],
        cpu_ram_efficient_loading=False,
    )
    prepared = accelerator.prepare(model)
    if not any(isinstance(module, FullyShardedDataParallel) for module in prepared.modules()):
        raise TypeError("Accelerate made no FSDP of it")
    return prepared


def fsdp2(model, name, mesh):
    over = mesh["fsdp"] if mesh.ndim > 1 else mesh
    for layer in layers_of(model, name):
        fully_shard(layer, mesh=over)
    return fully_shard(model, mesh=over)


# --- everything on every rank, parts of it not in memory ----------------------------------------------


def offloaded(model, name, _mesh, to="cpu"):
    """Accelerate's dispatch inside a rank: the last layer's weights stay in memory or on disk."""
    import tempfile

    from accelerate import cpu_offload, disk_offload

    layer = layers_of(model, name)[-1]
    device = torch.device("cpu")
    if to == "cpu":
        cpu_offload(layer, execution_device=device)
    else:
        disk_offload(layer, tempfile.mkdtemp(), execution_device=device)
    return model


# --- tensor parallel by torch's plans -----------------------------------------------------------------

_PLANS = {
    "Llama": {
        "self_attn.q_proj": "out", "self_attn.k_proj": "out", "self_attn.v_proj": "out",
        "self_attn.o_proj": "in", "mlp.gate_proj": "out", "mlp.up_proj": "out", "mlp.down_proj": "in",
    },
    "BERT": {
        "attention.self.query": "out", "attention.self.key": "out", "attention.self.value": "out",
        "attention.output.dense": "in", "intermediate.dense": "out", "output.dense": "in",
    },
    "by hand": {"gate": "out", "up": "out", "down": "in"},
}  # fmt: skip
_WHOLE_CHAINS = {
    "Llama": ("mlp.gate_proj", "mlp.up_proj"),
    "BERT": ("intermediate.dense",),
    "by hand": ("gate", "up"),
}


_PLANS["an odd width"], _WHOLE_CHAINS["an odd width"] = _PLANS["by hand"], _WHOLE_CHAINS["by hand"]


def torch_tp(model, name, mesh, *, shown=False):
    """``shown``: the outputs that element-wise operations alone follow are DTensors."""
    over = mesh["tp"] if mesh.ndim > 1 else mesh
    for layer in layers_of(model, name):
        plan = {}
        for path, way in _PLANS[name].items():
            if way == "in":
                plan[path] = RowwiseParallel()
            else:
                plan[path] = ColwiseParallel(use_local_output=not (shown and path in _WHOLE_CHAINS[name]))
        parallelize_module(layer, over, plan)
    if name == "Llama":
        embed, head = RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model, over, {"model.embed_tokens": embed, "lm_head": head})
    return model


def sequence_parallel(model, _name, mesh):
    """A Llama whose residual stream is split along the sequence between the layers' inner parts."""
    cut, whole = Shard(1), Replicate()
    parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=whole),
            "model.norm": SequenceParallel(use_local_output=True),
            "lm_head": ColwiseParallel(input_layouts=cut, output_layouts=whole),
        },
    )
    for layer in model.model.layers:
        into_attention = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": cut},
            desired_input_kwarg_layouts={"hidden_states": whole},
            use_local_output=True,
        )
        into_mlp = PrepareModuleInput(
            input_layouts=(cut,), desired_input_layouts=(whole,), use_local_output=True
        )
        plan = {
            "input_layernorm": SequenceParallel(use_local_output=True),
            "post_attention_layernorm": SequenceParallel(use_local_output=True),
            "self_attn": into_attention,
            "mlp": into_mlp,
        }
        for path, way in _PLANS["Llama"].items():
            plan[path] = ColwiseParallel() if way == "out" else RowwiseParallel(output_layouts=cut)
        parallelize_module(layer, mesh, plan)
    rank, ranks = mesh.get_local_rank(), mesh.size()

    def cut_sequence(_module, args, kwargs):
        return (args[0].tensor_split(ranks, 1)[rank], *args[1:]), kwargs

    model.model.layers[0].register_forward_pre_hook(cut_sequence, with_kwargs=True)
    return model


# --- tensor parallel by hand: plain weights, collectives in the forward -------------------------------


class Columns(nn.Module):
    """Some of a linear layer's outputs."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Rows(Columns):
    """Some of a linear layer's inputs; the ranks' results are added up, unless that is left to others."""

    def __init__(self, weight, bias=None, *, group=None, reduce=True):
        super().__init__(weight, bias)
        self.group, self.reduce = group, reduce

    def forward(self, x):
        y = linear(x, self.weight)
        if self.reduce:
            y = y.clone()
            dist.all_reduce(y, group=self.group)
        return y if self.bias is None else y + self.bias


class Conv1DColumns(nn.Module):
    """Some outputs of a layer that keeps its weight as ``[in, out]``."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x):
        return x @ self.weight + self.bias


class Conv1DRows(Conv1DColumns):
    """Some inputs of such a layer, results added up."""

    def forward(self, x):
        y = x @ self.weight
        dist.all_reduce(y)
        return y + self.bias


def megatron(model, name, mesh, **options):
    """Plain local weights; the modules' own collectives. ``options``: see the function per model."""
    over = mesh["tp"] if mesh.ndim > 1 else mesh
    for layer in layers_of(model, name):
        _MEGATRON[name](layer, over.get_local_rank(), over.size(), over.get_group(), **options)
    return model


def _llama(layer, rank, ranks, group, *, interleaved=False, deferred=False):
    """``interleaved``: rank r has every n-th column. ``deferred``: the sum is made after ``o_proj``."""
    attention, mlp = layer.self_attn, layer.mlp
    width = mlp.gate_proj.out_features

    def part(weight, dim):
        if interleaved and weight.shape[dim] == width:
            return weight[rank::ranks] if dim == 0 else weight[:, rank::ranks]
        return weight.tensor_split(ranks, dim)[rank]

    heads = attention.k_proj.weight.shape[0] // attention.head_dim
    queries = attention.q_proj.weight.shape[0] // attention.head_dim
    for projection in ("k_proj", "v_proj"):
        weight = getattr(attention, projection).weight
        mine = weight.unflatten(0, (heads, -1))[rank * heads // ranks] if heads < ranks else part(weight, 0)
        setattr(attention, projection, Columns(mine))
    attention.num_key_value_groups = queries // ranks // max(heads // ranks, 1)
    attention.q_proj = Columns(part(attention.q_proj.weight, 0))
    attention.o_proj = Rows(part(attention.o_proj.weight, 1), group=group, reduce=not deferred)
    if deferred:

        def add_up(_module, _args, output):
            whole = output[0].clone()
            dist.all_reduce(whole, group=group)
            return (whole, *output[1:])

        attention.register_forward_hook(add_up)
    mlp.gate_proj, mlp.up_proj = Columns(part(mlp.gate_proj.weight, 0)), Columns(part(mlp.up_proj.weight, 0))
    mlp.down_proj = Rows(part(mlp.down_proj.weight, 1), group=group)


def _gpt2(layer, rank, ranks, _group):
    """The fused projection is cut inside each of its three parts, so that heads stay together."""
    attention, mlp = layer.attn, layer.mlp

    def heads(tensor):
        three = tensor.unflatten(-1, (3, -1))
        return three.tensor_split(ranks, -1)[rank].flatten(-2)

    attention.c_attn = Conv1DColumns(heads(attention.c_attn.weight), heads(attention.c_attn.bias))
    attention.c_proj = Conv1DRows(attention.c_proj.weight.tensor_split(ranks, 0)[rank], attention.c_proj.bias)
    attention.split_size //= ranks
    attention.num_heads //= ranks
    mlp.c_fc = Conv1DColumns(
        mlp.c_fc.weight.tensor_split(ranks, 1)[rank], mlp.c_fc.bias.tensor_split(ranks)[rank]
    )
    mlp.c_proj = Conv1DRows(mlp.c_proj.weight.tensor_split(ranks, 0)[rank], mlp.c_proj.bias)


def _bert(layer, rank, ranks, group):
    attention = layer.attention.self
    for name in ("query", "key", "value"):
        setattr(attention, name, _columns(getattr(attention, name), rank, ranks))
    layer.attention.output.dense = _rows(layer.attention.output.dense, rank, ranks, group)
    layer.intermediate.dense = _columns(layer.intermediate.dense, rank, ranks)
    layer.output.dense = _rows(layer.output.dense, rank, ranks, group)


def _by_hand(layer, rank, ranks, group):
    layer.gate, layer.up = _columns(layer.gate, rank, ranks), _columns(layer.up, rank, ranks)
    layer.down = _rows(layer.down, rank, ranks, group)


def _columns(old, rank, ranks):
    bias = None if old.bias is None else old.bias.tensor_split(ranks)[rank]
    return Columns(old.weight.tensor_split(ranks)[rank], bias)


def _rows(old, rank, ranks, group):
    return Rows(old.weight.tensor_split(ranks, 1)[rank], old.bias, group=group)


_MEGATRON = {
    "Llama": _llama,
    "one key-value head": _llama,
    "two key-value heads": _llama,
    "GPT-2": _gpt2,
    "BERT": _bert,
    "by hand": _by_hand,
    "an odd width": _by_hand,
}

# --- experts ------------------------------------------------------------------------------------------


def expert_parallel(_model, _name, mesh, folder="", **sizes):
    """Transformers' own loading, the experts shared out."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**sizes)
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", distributed_config=config
    ).eval()


# --- two at once --------------------------------------------------------------------------------------


def torch_tp_fsdp2(model, name, mesh):
    return fsdp2(torch_tp(model, name, mesh), name, mesh)


def megatron_ddp(model, name, mesh):
    return ddp(megatron(model, name, mesh), name, mesh)
