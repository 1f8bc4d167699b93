"""The ways of distributing a model: functions that run on every rank and return what it then calls.

Each gets the undistributed model, its name in :mod:`models` and the device mesh. The engines import
this module, so it knows neither pytest nor flexmagic.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
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
    "Mixtral": {
        "self_attn.q_proj": "out", "self_attn.k_proj": "out", "self_attn.v_proj": "out",
        "self_attn.o_proj": "in",
    },
    "BERT": {
        "attention.self.query": "out", "attention.self.key": "out", "attention.self.value": "out",
        "attention.output.dense": "in", "intermediate.dense": "out", "output.dense": "in",
    },
    "by hand": {"gate": "out", "up": "out", "down": "in"},
}  # fmt: skip
_WHOLE_CHAINS = {
    "Llama": ("mlp.gate_proj", "mlp.up_proj"),
    "Mixtral": (),
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
    if name in {"Llama", "Mixtral"}:
        embed, head = RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model, over, {"model.embed_tokens": embed, "lm_head": head})
    return model


def sequence_parallel(model, name, mesh):
    """A Llama or Mixtral whose residual stream is split along the sequence between the layers' parts."""
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
        plan = {
            "input_layernorm": SequenceParallel(use_local_output=True),
            "post_attention_layernorm": SequenceParallel(use_local_output=True),
            "self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": cut},
                desired_input_kwarg_layouts={"hidden_states": whole},
                use_local_output=True,
            ),
            "mlp": PrepareModuleInput(
                input_layouts=(cut,), desired_input_layouts=(whole,), use_local_output=True
            ),
        }
        for path, way in _PLANS[name].items():
            plan[path] = ColwiseParallel() if way == "out" else RowwiseParallel(output_layouts=cut)
        parallelize_module(layer, mesh, plan)
        if name == "Mixtral":  # its experts give out the whole sequence
            given = PrepareModuleOutput(output_layouts=(whole,), desired_output_layouts=(cut,))
            parallelize_module(layer, mesh, {"mlp": given})
    rank, ranks = mesh.get_local_rank(), mesh.size()

    def cut_sequence(_module, args, kwargs):
        return (args[0].tensor_split(ranks, 1)[rank], *args[1:]), kwargs

    model.model.layers[0].register_forward_pre_hook(cut_sequence, with_kwargs=True)
    return model


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
