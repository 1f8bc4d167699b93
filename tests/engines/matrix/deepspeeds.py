"""DeepSpeed's ways, where it is installed: parameters shared out at rest, and tensor parallel inference."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def _deepspeed():
    """The library, told before it is imported that there is a CPU only."""
    place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    os.environ.update({key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os.environ.update({"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(dist.get_world_size())})
    import deepspeed

    return deepspeed


_ZERO = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def zero3(model, _name, _mesh):
    """Every rank keeps a share of every parameter, and has it whole only while a module works."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine, *_ = _deepspeed().initialize(model=model, optimizer=optimizer, config=dict(_ZERO))
    engine.eval()  # which returns nothing
    return engine


def zero3_accelerate(model, _name, _mesh):
    """The same through Accelerate."""
    _deepspeed()
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=dict(_ZERO)))
        engine, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
    if type(engine).__name__ != "DeepSpeedEngine":
        raise TypeError("Accelerate made no DeepSpeed engine of it")
    engine.eval()  # which returns nothing
    return engine


def auto_tp(model, _name, mesh):
    """DeepSpeed finds the linear layers and cuts them; on a CPU not evenly."""
    return _deepspeed().init_inference(
        model,
        tensor_parallel={"tp_size": mesh.size()},
        dtype=torch.float32,
        replace_with_kernel_inject=False,
    )
