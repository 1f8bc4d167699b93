"""The few things a client may ask of a rank: one function each, plain data in and out.

A refusal is an answer, not an exception: every verb returns a :class:`Reply`, so that a client
waiting for all ranks hears from all of them.
"""

from __future__ import annotations

import functools
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from flexmagic.engine import distributed, look
from flexmagic.engine.captures import RunKey
from flexmagic.engine.code import HookSource, failure, shifted
from flexmagic.engine.distributed import Loaded, LoadSpec
from flexmagic.engine.groups import Groups, Place
from flexmagic.engine.inputs import prepare
from flexmagic.engine.probe import note
from flexmagic.engine.progress import Tell
from flexmagic.engine.runtime import RunPlan, RunReply, Runtime
from flexmagic.engine.tensors import dtype_name
from flexmagic.engine.tree import kind_of, modules_of, parameters_of, unwrapped
from flexmagic.engine.twin import probe_inputs
from flexmagic.errors import CellError, FlexError, ModelError
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Rule
from flexmagic.layout.seen import Seen
from flexmagic.layout.sites import Site

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Reply(Generic[T]):
    """A verb's result, or the error it ended with and where that came from."""

    value: T | None = None
    error: FlexError | None = None
    trace: str = ""


class _Slot:
    """The one runtime of this process."""

    runtime: Runtime | None = None


def verb(function: Callable[Concatenate[Runtime, P], T]) -> Callable[P, Reply[T]]:
    """Make a function of the runtime callable by name from a client."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Reply[T]:
        if _Slot.runtime is None:
            return Reply(error=ModelError("This engine has not joined a session."))
        return _answer(lambda runtime: function(runtime, *args, **kwargs), _Slot.runtime)

    return call


def _answer(function: Callable[[Runtime], T], runtime: Runtime) -> Reply[T]:
    try:
        return Reply(value=function(runtime))
    except FlexError as error:
        return Reply(error=error)
    except Exception as error:  # noqa: BLE001 - the client must hear of anything
        trace = traceback.format_exc()
        traceback.clear_frames(error.__traceback__)
        return Reply(error=FlexError(f"{type(error).__name__}: {error}"), trace=trace)


@dataclass(frozen=True)
class Seat:
    """Where a rank sits: what a status table shows of it when it joins."""

    rank: int
    world_size: int
    host: str
    pid: int
    device: str


def seat() -> Seat | None:
    """The process's seat, ``None`` before :func:`join`."""
    if _Slot.runtime is None:
        return None
    place = _Slot.runtime.place
    return Seat(
        place.rank, place.world_size, socket.gethostname(), _Slot.runtime.process(), str(place.device)
    )


def join(  # noqa: PLR0917 - the places of one call that is sent as a tuple
    namespace: dict[str, Any],
    rank: int,
    world_size: int,
    host: str,
    port: int,
    generation: int,
    tell: Tell = lambda _what, _done, _total: None,
) -> Seat:
    """Make this process a rank: choose its device, connect the groups, keep the namespace.

    ``tell`` carries how far a call is to whoever waits for it.
    """
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place = Place(rank, world_size, device)
    _Slot.runtime = Runtime(Groups(place, host, port, generation), namespace, tell)
    namespace.setdefault("torch", torch)
    namespace.update(rank=rank, world_size=world_size, device=device)
    joined = seat()
    assert joined is not None  # set just above
    return joined


@verb
def leave(runtime: Runtime) -> None:
    """Let go of everything and leave the groups."""
    runtime.forget_model()
    runtime.groups.close()
    _Slot.runtime = None


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
    as far as there is one.
    """

    name: str
    source: str
    mesh: Mesh
    modules: tuple[Part, ...]
    rules: dict[Site, Rule]
    parameters: dict[str, tuple[tuple[int, ...], str]]
    whole: dict[str, tuple[int, ...]]
    local_bytes: int


@verb
def check_model(_runtime: Runtime, spec: LoadSpec) -> None:
    """Refuse what cannot be loaded or split, before any rank starts to."""
    distributed.check_source(spec)


@verb
def load_model(runtime: Runtime, spec: LoadSpec) -> None:
    """Load this rank's part of a model; :func:`adopt_model` takes it once all ranks have one."""
    runtime.built = distributed.load(spec, runtime.tell)


ASSIGNED = ("model", "tokenizer", "unsharded")
"""What a cell that builds a model may assign."""


@verb
def build_model(runtime: Runtime, cell: HookSource, axes: Mesh) -> None:
    """Run a user's cell that builds ``model``; :func:`adopt_model` takes it once all ranks have one."""
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
    tokenizer, unsharded = runtime.namespace.get("tokenizer"), runtime.namespace.get("unsharded")
    if not isinstance(built, nn.Module):
        _restore(runtime, previous)
        msg = f"the cell must assign a torch.nn.Module to `model`; it is {type(built).__name__}."
        raise ModelError(msg)
    runtime.built = Loaded(built.eval(), tokenizer, axes, "a cell", unsharded)
    _restore(runtime, previous)


def _restore(runtime: Runtime, previous: dict[str, Any]) -> None:
    for key in ASSIGNED:
        runtime.namespace.pop(key, None)
    runtime.namespace.update(previous)


@verb
def adopt_model(runtime: Runtime) -> ModelReport:
    """Take the model that was loaded or built, now that every rank has one, and survey it."""
    assert runtime.built is not None  # the client calls this only then
    built, runtime.built = runtime.built, None
    runtime.adopt(built)
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
        parameters={n: (tuple(p.shape), dtype_name(p.dtype)) for n, p in parameters_of(model).items()},
        whole=runtime.whole,
        local_bytes=runtime.parameter_bytes(),
    )


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
    made_up = probe_inputs(runtime.model, 1, 1) is not None
    runtime.survey(None if made_up else prepared.arguments)
    return _report(runtime)


@verb
def survey_gradients(runtime: Runtime, inputs: Any) -> ModelReport:
    """Survey how gradients lie, with a tiny input, or the user's own where none can be made up."""
    assert runtime.loaded is not None  # the client has a model
    if probe_inputs(runtime.model, 1, 1) is not None:
        runtime.survey_gradients(None)
    else:
        prepared = prepare(inputs, runtime.model, runtime.loaded.tokenizer, runtime.place.device)
        runtime.survey_gradients(prepared.arguments)
    return _report(runtime)


@verb
def define_hook(runtime: Runtime, source: HookSource) -> None:
    """Compile a hook on this rank; it acts in no run that does not name it."""
    runtime.define(source)


@verb
def forget_hook(runtime: Runtime, owner: str, name: str, version: int) -> None:
    """Drop one version of a hook."""
    runtime.hooks.pop((owner, name, version), None)


@dataclass(frozen=True)
class RunAnswer:
    """A rank's report of a run, with the tokens it ran on."""

    reply: RunReply
    tokens: list[list[str]]
    ids: list[list[int]]


@verb
def run(runtime: Runtime, plan: RunPlan, inputs: Any) -> RunAnswer | None:
    """One forward under the plan; ``None`` on all ranks if the model has to be surveyed anew first."""
    model = runtime.model
    assert runtime.loaded is not None  # the line above raises otherwise
    prepared = prepare(inputs, model, runtime.loaded.tokenizer, runtime.place.device)
    if runtime.is_stale(prepared):
        return None
    return RunAnswer(runtime.run(plan, prepared), prepared.tokens, prepared.ids)


@verb
def is_stale(runtime: Runtime, inputs: Any) -> bool:
    """Whether the model is another than was surveyed, on any rank."""
    assert runtime.loaded is not None  # the client has a model
    return runtime.is_stale(prepare(inputs, runtime.model, runtime.loaded.tokenizer, runtime.place.device))


@verb
def decode(runtime: Runtime, ids: list[list[int]]) -> list[str]:
    """Token ids as texts, one per list; without a tokenizer the ids themselves."""
    tokenizer = runtime.loaded.tokenizer if runtime.loaded is not None else None
    return [" ".join(map(str, i)) if tokenizer is None else tokenizer.decode(i) for i in ids]


@verb
def read(runtime: Runtime, run_id: RunKey, site: Site, parts: list[tuple[slice, ...]]) -> list[Any]:
    """Raw bytes of slices of a captured piece."""
    piece = runtime.captures.get(run_id, site)
    return [look.slice_bytes(piece, part) for part in parts]


@verb
def stats(runtime: Runtime, run_id: RunKey, site: Site, parts: list[tuple[slice, ...]]) -> list[Any]:
    """Counts and moments of slices of a captured piece."""
    piece = runtime.captures.get(run_id, site)
    return [look.stats(piece, part) for part in parts]


@verb
def overview(
    runtime: Runtime,
    run_id: RunKey,
    site: Site,
    parts: list[tuple[tuple[slice, ...], tuple[slice, ...]]],
    window: look.Window,
) -> list[Any]:
    """The parts of a captured piece inside a window, reduced to the window's bins."""
    piece = runtime.captures.get(run_id, site)
    return [look.overview(piece, local, result, window) for local, result in parts]


@dataclass(frozen=True)
class ParameterPart:
    """A rank's part of a parameter: raw bytes, and what is known of where it lies."""

    raw: NDArray[np.uint8]
    seen: Seen


@verb
def parameter(runtime: Runtime, name: str) -> ParameterPart | None:
    """The rank's part of a parameter; ``None`` where it has none of that name."""
    found = parameters_of(runtime.model).get(name)
    if found is None:
        return None
    local = distributed.local_part(found)
    return ParameterPart(look.slice_bytes(local, tuple(slice(None) for _ in local.shape)), note(local, found))


@verb
def context(runtime: Runtime, run_id: RunKey) -> dict[str, Any]:
    """What the hooks of a run saved in ``ctx`` on this rank."""
    return runtime.captures.context(run_id)


@verb
def release(runtime: Runtime, run_id: RunKey) -> None:
    """Forget a run's captures."""
    runtime.captures.drop(run_id)


@dataclass(frozen=True)
class Vital:
    """What a rank says of itself."""

    memory: int
    memory_is: str
    parameter_bytes: int
    capture_bytes: int
    model: str


@verb
def vitals(runtime: Runtime) -> Vital:
    """Memory, parameters and captures of this rank."""
    memory, memory_is = runtime.memory()
    name = kind_of(unwrapped(runtime.model)).__name__ if runtime.loaded is not None else ""
    return Vital(memory, memory_is, runtime.parameter_bytes(), runtime.captures.nbytes, name)
