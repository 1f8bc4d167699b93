"""What a client may ask of a rank about its model: to load, build, survey, describe or drop it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from flexmagic.engine import distributed, look
from flexmagic.engine.code import HookSource, failure, shifted
from flexmagic.engine.distributed import Loaded, LoadSpec
from flexmagic.engine.inputs import prepare
from flexmagic.engine.origin import Origin, written_into
from flexmagic.engine.private import gathered, shape_of
from flexmagic.engine.private_groups import handed_out
from flexmagic.engine.probe import note
from flexmagic.engine.rows import kind_of_sharing
from flexmagic.engine.runtime import Runtime
from flexmagic.engine.scan import Scanned
from flexmagic.engine.scan import scan as scanned
from flexmagic.engine.slot import verb
from flexmagic.engine.stage_making import as_model
from flexmagic.engine.tensors import dtype_name
from flexmagic.engine.tree import kind_of, modules_of, parameters_of, unit_gathered, unwrapped
from flexmagic.engine.vitals import parameter_bytes
from flexmagic.errors import CellError
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Rule
from flexmagic.layout.seen import Seen, WeightSplit
from flexmagic.layout.sites import Site


@dataclass(frozen=True)
class Part:
    """One module: its path, its class, and whether it has parameters on the reporting rank."""

    path: str
    kind: str
    owns: bool


@dataclass(frozen=True)
class ModelReport:
    """What a client needs to know of a model: one rank's view.

    ``parameters``: shape and dtype as this rank has them; ``whole``: shapes in the unsharded model,
    as far as there is one; ``weights``: those that a forward uses in parts. ``sharing``: by what the
    rows of a batch are shared out. ``heads``: how many its attention has, if its configuration says so.
    ``edits``: the weight edits in force by number, each with its parameters and its code.
    """

    name: str
    source: str
    mesh: Mesh
    modules: tuple[Part, ...]
    rules: dict[Site, Rule]
    parameters: dict[str, tuple[tuple[int, ...], str]]
    whole: dict[str, tuple[int, ...]]
    weights: tuple[WeightSplit, ...]
    sharing: str
    local_bytes: int
    heads: int | None = None
    edits: Mapping[int, tuple[tuple[str, ...], str]] = field(default_factory=dict)


@verb
def check_model(_runtime: Runtime, spec: LoadSpec) -> None:
    """Refuse what cannot be loaded or split, before any rank starts to."""
    distributed.check_source(spec)


@verb
def load_model(runtime: Runtime, spec: LoadSpec) -> None:
    """Load this rank's part of a model; :func:`adopt_model` takes it once all ranks have one."""
    with runtime.spent.making(runtime.groups) as names:
        loaded = distributed.load(spec, runtime.tell)
    runtime.spent.note(loaded.model, names)
    runtime.built = loaded, Origin(spec=spec, groups=tuple(names))


@verb
def reload(runtime: Runtime, origin: Origin, lost: Sequence[int]) -> None:
    """Load this rank's part again, without those ranks that have theirs, into the groups that they made."""
    assert origin.spec is not None  # what a cell made is made again by all ranks
    with handed_out(origin.groups, lost):
        runtime.built = distributed.load(origin.spec, runtime.tell), origin


@verb
def rerun(runtime: Runtime, origin: Origin) -> None:
    """Run the cell again that made the model; all ranks together."""
    assert origin.cell is not None  # what was loaded is loaded again
    _build(runtime, *origin.cell)


@verb
def origin(runtime: Runtime) -> tuple[Origin | None, tuple[str, ...]]:
    """What the model was made from, and which parameters on this rank were written into since."""
    changed = () if runtime.loaded is None else written_into(runtime.loaded.model, runtime.versions)
    return runtime.origin, changed


ASSIGNED = ("model", "tokenizer", "unsharded")
"""What a cell that builds a model may assign."""


@verb
def build_model(
    runtime: Runtime, cell: HookSource, axes: Mesh, unsharded: Callable[[], nn.Module] | None = None
) -> None:
    """Run a user's cell that builds ``model``; :func:`adopt_model` takes it once all ranks have one."""
    with runtime.spent.making(runtime.groups) as names:
        _build(runtime, cell, axes, unsharded)
    assert runtime.built is not None  # just built
    runtime.spent.note(runtime.built[0].model, names)


def _build(runtime: Runtime, cell: HookSource, axes: Mesh, unsharded: Callable[[], nn.Module] | None) -> None:
    given = (cell, axes, unsharded)
    place = runtime.place
    mesh = init_device_mesh(place.device.type, axes.shape, mesh_dim_names=axes.axes)
    names = {"rank": place.rank, "world_size": place.world_size, "device": place.device, "mesh": mesh}
    previous = {key: runtime.namespace.pop(key) for key in ASSIGNED if key in runtime.namespace}
    try:
        if cell.function is not None:
            built = cell.function(**names)
        else:
            runtime.namespace.update(names)
            exec(compile(shifted(cell), cell.filename, "exec"), runtime.namespace)  # noqa: S102 - the user's cell
            built = runtime.namespace.get("model")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything; it becomes data
        _restore(runtime, previous)
        where = failure(place.rank, error, cell.filename, source=cell)
        msg = "the cell failed"
        raise CellError(msg, (where,)) from None
    tokenizer = runtime.namespace.get("tokenizer")
    unsharded = unsharded or runtime.namespace.get("unsharded")
    _restore(runtime, previous)
    model = as_model(built)
    model.eval()  # not every wrapper returns itself
    runtime.built = Loaded(model, tokenizer, axes, "a cell", unsharded), Origin(cell=given)


def _restore(runtime: Runtime, previous: dict[str, Any]) -> None:
    for key in ASSIGNED:
        runtime.namespace.pop(key, None)
    runtime.namespace.update(previous)


@verb
def adopt_model(runtime: Runtime) -> ModelReport:
    """Take the model that was loaded or built, now that every rank has one, and survey it."""
    assert runtime.built is not None  # the client calls this only then
    built, runtime.built = runtime.built, None
    runtime.adopt(*built)
    return _report(runtime)


@verb
def readopt_model(runtime: Runtime) -> ModelReport:
    """Survey a model of which some rank made its part again; the others keep theirs and their captures."""
    built, runtime.built = runtime.built, None
    if built is None:
        assert runtime.loaded is not None  # this rank kept its part
        assert runtime.origin is not None  # it was made from something
        built = runtime.loaded, runtime.origin
    runtime.adopt(*built, keep=True)
    return _report(runtime)


@verb
def drop_built(runtime: Runtime) -> None:
    """Forget what was loaded or built: another rank has none."""
    runtime.built = None


@verb
def describe_model(runtime: Runtime) -> ModelReport | None:
    """The report of the loaded model, ``None`` without one."""
    return _report(runtime) if runtime.loaded is not None else None


def _report(runtime: Runtime) -> ModelReport:
    assert runtime.loaded is not None  # callers checked
    model = runtime.model
    parts = modules_of(model)
    return ModelReport(
        name=kind_of(parts[""]).__name__,
        source=runtime.loaded.source,
        mesh=runtime.loaded.mesh,
        modules=tuple(
            Part(path, kind_of(module).__name__, any(True for _ in module.parameters()))
            for path, module in parts.items()
        ),
        rules=dict(runtime.rules),
        parameters={n: (shape_of(p), dtype_name(p.dtype)) for n, p in parameters_of(model).items()},
        whole=runtime.whole,
        weights=runtime.weights,
        sharing=kind_of_sharing(model),
        local_bytes=parameter_bytes(model),
        heads=_heads(parts[""]),
        edits=dict(runtime.edits.made),
    )


def _heads(model: nn.Module) -> int | None:
    config: Any = getattr(unwrapped(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "num_attention_heads", None)
    return found if isinstance(found, int) else None


@verb
def unwrap(runtime: Runtime) -> int:
    """Let go of the model; returns how many hooks of ours are left on it (0, checked)."""
    model = runtime.model
    runtime.forget_model()
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)  # noqa: SLF001 - torch has no public count
        for module in model.modules()
    )


@verb
def survey_for(runtime: Runtime, inputs: Any) -> ModelReport:
    """Survey a model, with the user's own input if none can be made up."""
    assert runtime.loaded is not None  # the client has a model
    prepared = prepare(inputs, runtime.model, runtime.loaded.tokenizer, runtime.place.device)
    runtime.survey(None if runtime.guessable else prepared.arguments)
    return _report(runtime)


@verb
def scan(runtime: Runtime, inputs: Any) -> dict[Site, Scanned]:
    """Every site's whole shape for an input; no rank computes, and this one asks no other."""
    assert runtime.loaded is not None  # the client has a model
    return scanned(runtime, prepare(inputs, runtime.model, runtime.loaded.tokenizer, runtime.place.device))


@verb
def survey_gradients(runtime: Runtime, inputs: Any) -> ModelReport:
    """Survey how gradients lie, with a tiny input, or the user's own where none can be made up."""
    assert runtime.loaded is not None  # the client has a model
    if runtime.guessable:
        runtime.survey_gradients(None)
    else:
        prepared = prepare(inputs, runtime.model, runtime.loaded.tokenizer, runtime.place.device)
        runtime.survey_gradients(prepared.arguments)
    return _report(runtime)


@dataclass(frozen=True)
class ParameterPart:
    """A rank's part of a parameter: raw bytes, and what is known of where it lies."""

    raw: NDArray[np.uint8]
    seen: Seen


@verb
def parameter(runtime: Runtime, name: str) -> ParameterPart | None:
    """The rank's part of a parameter; ``None`` where it has none of that name. All ranks call it together."""
    found = parameters_of(runtime.model).get(name)
    if found is None:
        return None
    with unit_gathered(runtime.model, name), gathered(found):
        found = parameters_of(runtime.model)[name]
        local = distributed.local_part(found).clone()  # what is gathered is let go of again
        everything = tuple(slice(None) for _ in local.shape)
        return ParameterPart(look.slice_bytes(local, everything), note(local, found))
