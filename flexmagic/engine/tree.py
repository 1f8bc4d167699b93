"""The model's own module names, whatever wraps its modules.

Data parallelism, sharding, compilation and checkpointing put wrappers around modules and so change
their paths. Here a wrapper is looked through: the module inside has the path the user knows.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any, cast

from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel


class Staged(nn.Module):
    """A model of which this rank holds one stage: it stands at the root, the stage's modules below it."""

    def __init__(self, stage_module: nn.Module) -> None:
        super().__init__()
        self.stage_module = stage_module


def inner_of(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper wraps; ``None`` for a module that is no wrapper."""
    name = _wrapped_in(type(module))  # type: ignore[arg-type]  # it takes the hash of instances for the class's
    return cast("nn.Module", getattr(module, name)) if name else None


@functools.lru_cache(maxsize=1024)
def _wrapped_in(kind: type[nn.Module]) -> str:
    """The attribute in which modules of a class have what they wrap, ``""`` for what is no wrapper."""
    wrappers: list[tuple[type[nn.Module], str]] = [
        (Staged, "stage_module"),
        (DistributedDataParallel, "module"),
        (FullyShardedDataParallel, "module"),
        (OptimizedModule, "_orig_mod"),
        (CheckpointWrapper, "_checkpoint_wrapped_module"),
    ]
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None:
        wrappers += [(deepspeed.DeepSpeedEngine, "module"), (deepspeed.InferenceEngine, "module")]
    return next((name for wrapper, name in wrappers if issubclass(kind, wrapper)), "")


def unwrapped(module: nn.Module) -> nn.Module:
    """The innermost module behind any number of wrappers; the module itself if there is none."""
    while (inner := inner_of(module)) is not None:
        module = inner
    return module


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its own path, ``""`` for the model itself; a shared module under its first path."""
    found: dict[str, nn.Module] = {}
    _walk(model, "", set(), found)
    return found


def _walk(module: nn.Module, path: str, seen: set[nn.Module], found: dict[str, nn.Module]) -> None:
    shown = module if isinstance(module, Staged) else unwrapped(module)
    module = unwrapped(module)
    if module in seen:
        return
    seen.add(module)
    found[path] = shown
    for name, child in module.named_children():
        _walk(child, f"{path}.{name}" if path else name, seen, found)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its own path, a shared one under its first."""
    found: dict[str, nn.Parameter] = {}
    known: set[nn.Parameter] = set()
    for path, module in modules_of(model).items():
        for name, parameter in unwrapped(module).named_parameters(recurse=False):
            if parameter not in known:
                known.add(parameter)
                found[f"{path}.{name}" if path else name] = parameter
    return found


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class that the user knows: ``fully_shard`` puts one of its own before it."""
    kinds = type(unwrapped(module)).__mro__
    return cast("type[nn.Module]", next(kind for kind in kinds if not issubclass(kind, FSDPModule)))


def unit_gathered(
    model: nn.Module, name: str, *, write: bool = False
) -> contextlib.AbstractContextManager[Any]:
    """The parameters of the FSDP1 unit that holds one of them whole, on all ranks, which enter it together.

    ``write``: what is written into them meanwhile stays. Nothing happens where there is no such unit,
    nor to the other units.
    """
    paths = {module: path for path, module in modules_of(model).items()}
    units = [unit for unit in model.modules() if isinstance(unit, FullyShardedDataParallel)]
    around = [unit for unit in units if f"{name}.".startswith(_prefix(paths.get(unwrapped(unit), name)))]
    if not around:
        return contextlib.nullcontext()
    innermost = max(around, key=lambda unit: len(paths[unwrapped(unit)]))
    held: contextlib.AbstractContextManager[Any] = FullyShardedDataParallel.summon_full_params(
        innermost, recurse=False, writeback=write
    )
    return held


def _prefix(path: str) -> str:
    return f"{path}." if path else ""
