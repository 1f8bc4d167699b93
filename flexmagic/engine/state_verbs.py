"""What a client may ask of a rank about what outlives a run: edited weights, modules, persistent values."""

from __future__ import annotations

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
