"""What a client may ask of a rank about what outlives a run: edited weights, modules, persistent values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flexmagic.engine.distributed import local_part
from flexmagic.engine.private import come_to_rest, gathered
from flexmagic.engine.probe import note
from flexmagic.engine.runtime import Runtime
from flexmagic.engine.slot import verb
from flexmagic.engine.tree import parameters_of, unit_gathered
from flexmagic.engine.weight_edits import WeightEdit
from flexmagic.layout.seen import Seen


@verb
def seen_parameters(runtime: Runtime, names: list[str]) -> dict[str, Seen]:
    """How this rank's parts of parameters lie; without those that it has no part of. All ranks call it."""
    come_to_rest(runtime.model)
    found = {}
    for name in names:
        parameter = parameters_of(runtime.model).get(name)
        if parameter is not None:
            with unit_gathered(runtime.model, name), gathered(parameter):
                parameter = parameters_of(runtime.model)[name]
                found[name] = note(local_part(parameter), parameter)
    return found


@verb
def edit_weights(runtime: Runtime, edit: WeightEdit) -> int:
    """Run code on whole parameters and write this rank's parts, or nowhere; returns the edit's number."""
    return runtime.edits.apply(edit, runtime.model, runtime.groups, runtime.namespace)


@verb
def undo_weights(runtime: Runtime, number: int) -> None:
    """Put back what an edit wrote."""
    runtime.edits.undo(number, runtime.model)


@verb
def restore_weights(runtime: Runtime) -> None:
    """Put back everything that edits wrote."""
    runtime.edits.restore(runtime.model)


@verb
def put_module(
    runtime: Runtime, owner: str, name: str, module: nn.Module, optimizer: tuple[str, Any] | None = None
) -> None:
    """Register a module under a name, on this rank's device."""
    modules = runtime.lasting[owner].modules
    modules.put(name, module, runtime.place.device, optimizer)
    runtime.namespace.setdefault("modules", modules)


@verb
def drop_module(runtime: Runtime, owner: str, name: str) -> None:
    """Forget a module."""
    runtime.lasting[owner].modules.drop(name)


@verb
def give_module(runtime: Runtime, owner: str, name: str) -> tuple[nn.Module, tuple[str, Any] | None]:
    """A module and the state of its optimizer, for a rank that has none."""
    return runtime.lasting[owner].modules.give(name)


@verb
def module_sums(runtime: Runtime, owner: str) -> dict[str, tuple[tuple[int, int], ...]]:
    """Exact sums over the state of every module on this rank."""
    return runtime.lasting[owner].modules.sums()


@verb
def module_kinds(runtime: Runtime, owner: str) -> dict[str, tuple[str, int]]:
    """The class and number of parameters of every module."""
    modules = runtime.lasting[owner].modules
    return {
        name: (type(modules[name]).__name__, sum(p.numel() for p in modules[name].parameters()))
        for name in modules
    }


@verb
def module_state(runtime: Runtime, owner: str, name: str) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers."""
    state = runtime.lasting[owner].modules[name].state_dict()
    return {key: value.detach().cpu() for key, value in state.items()}


@verb
def load_module_state(runtime: Runtime, owner: str, name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Give a module these parameters and buffers."""
    runtime.lasting[owner].modules[name].load_state_dict(dict(state))


@verb
def module_gradients(runtime: Runtime, owner: str, name: str) -> dict[str, torch.Tensor]:
    """The gradients of a module's parameters, as far as there are some."""
    module = runtime.lasting[owner].modules[name]
    return {key: p.grad.detach().cpu() for key, p in module.named_parameters() if p.grad is not None}


@verb
def graded_modules(runtime: Runtime, owner: str) -> list[str]:
    """The modules that have gradients."""
    modules = runtime.lasting[owner].modules
    return [name for name in modules if any(p.grad is not None for p in modules[name].parameters())]


@verb
def step_modules(
    runtime: Runtime, owner: str, names: Sequence[str], kind: str, options: Mapping[str, Any]
) -> dict[str, tuple[tuple[int, int], ...]]:
    """One step of an optimizer; returns exact sums over the modules' new state."""
    modules = runtime.lasting[owner].modules
    modules.step(names, kind, options)
    return modules.sums()


@verb
def forget_gradients(runtime: Runtime, owner: str) -> None:
    """Forget the gradients of all modules."""
    runtime.lasting[owner].modules.zero_grad()


@verb
def persistent_names(runtime: Runtime, owner: str) -> list[str]:
    """The names of the values that persist on this rank."""
    return list(runtime.lasting[owner].persistent)


@verb
def get_persistent(runtime: Runtime, owner: str, name: str) -> dict[str, Any]:
    """A value that persists on this rank, by its name; nothing where there is none."""
    values = runtime.lasting[owner].persistent
    return {name: values[name]} if name in values else {}


@verb
def set_persistent(runtime: Runtime, owner: str, name: str, value: Any) -> None:
    """Make a value persist under a name."""
    runtime.lasting[owner].persistent[name] = value


@verb
def drop_persistent(runtime: Runtime, owner: str, name: str) -> None:
    """Forget a value that persists."""
    runtime.lasting[owner].persistent.pop(name, None)
