"""What a rank says of itself: its memory, its part of the model, what it keeps of runs."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch
from torch import nn

from flexmagic.engine.distributed import local_part
from flexmagic.engine.private import at_rest
from flexmagic.engine.runtime import Runtime
from flexmagic.engine.tree import kind_of, unwrapped

TRIES = 5
"""How often captures are counted that a run changes at the same time."""


@dataclass(frozen=True)
class Vital:
    """Bytes in use, what is counted in ``memory``, and the model's class."""

    memory: int
    memory_is: str
    parameter_bytes: int
    capture_bytes: int
    model: str


def vital(runtime: Runtime) -> Vital:
    """How this rank is; may be asked from another thread while the rank is at work."""
    memory, memory_is = _memory(runtime.place.device)
    loaded = runtime.loaded
    name = "" if loaded is None else kind_of(unwrapped(loaded.model)).__name__
    own = 0 if loaded is None else parameter_bytes(loaded.model)
    return Vital(memory, memory_is, own, _captured(runtime), name)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of this rank's own part of the parameters."""
    return sum(local_part(at_rest(p)).nbytes for p in model.parameters())


def _memory(device: torch.device) -> tuple[int, str]:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), "allocated on the device"
    with open("/proc/self/statm") as statm:  # noqa: PTH123 - a kernel file, read at once
        pages = [int(n) for n in statm.read().split()]
    return (pages[1] - pages[2]) * resource.getpagesize(), "private memory of the process"


def _captured(runtime: Runtime) -> int:
    for _ in range(TRIES):
        try:
            return runtime.captures.nbytes
        except RuntimeError:  # changed while it was counted
            continue
    return 0
