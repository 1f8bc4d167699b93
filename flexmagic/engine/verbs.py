"""What a client may ask of a rank about its seat, its hooks and its runs; plain data in and out."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexmagic.engine import cell, generation, lending, look, sweeping
from flexmagic.engine import together as together_
from flexmagic.engine.box_walls import available
from flexmagic.engine.captures import Reader, RunKey
from flexmagic.engine.cell import CellAnswer
from flexmagic.engine.code import HookSource
from flexmagic.engine.generation import Request
from flexmagic.engine.groups import Groups, Meeting, Place
from flexmagic.engine.inputs import Prepared, prepare
from flexmagic.engine.lending import Lent
from flexmagic.engine.outlet import Offer
from flexmagic.engine.prints import Displays, Say, nowhere
from flexmagic.engine.private import come_to_rest
from flexmagic.engine.private_groups import GroupSpec
from flexmagic.engine.progress import Tell
from flexmagic.engine.runtime import RunPlan, RunReply, Runtime
from flexmagic.engine.slot import Slot, verb
from flexmagic.engine.tensors import together
from flexmagic.errors import FlexError
from flexmagic.layout.heads import Heads
from flexmagic.layout.layout import Span
from flexmagic.layout.sites import Site
from flexmagic.view.reduce import merge_overviews
from flexmagic.view.source import Overview

Spans = tuple[Span, ...]


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
    if Slot.runtime is None:
        return None
    place = Slot.runtime.place
    return Seat(place.rank, place.world_size, socket.gethostname(), os.getpid(), str(place.device))


def join(  # noqa: PLR0917 - the places of one call that is sent as a tuple
    namespace: dict[str, Any],
    rank: int,
    world_size: int,
    meeting: Meeting,
    others: Sequence[GroupSpec] = (),
    tell: Tell = lambda *_: None,
    say: Say = lambda _said: None,
    displays: Displays = nowhere,
) -> Seat:
    """Make this process a rank: choose its device, connect the groups, keep the namespace.

    ``others``: the groups of ranks that are there already, which all make again at the same time.
    ``tell`` carries how far a call is to whoever waits for it, ``say`` what its code has printed; what
    it displays is sent there by ``displays``.
    """
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place = Place(rank, world_size, device)
    Slot.runtime = Runtime(Groups(place, meeting, others), namespace, tell, say, displays)
    namespace.setdefault("torch", torch)
    namespace.update(rank=rank, world_size=world_size, device=device)
    joined = seat()
    assert joined is not None  # set just above
    gc.collect()  # what libraries have made stays: to look it through again and again costs runs up to 0.3 s
    gc.freeze()
    return joined


@dataclass(frozen=True)
class Membership:
    """The process groups that a rank is in, and the generation they are of."""

    groups: tuple[GroupSpec, ...]
    generation: int


@verb
def groups(runtime: Runtime) -> Membership:
    """The groups of this rank, as they can be made again."""
    return Membership(runtime.groups.specs(), runtime.groups.meeting.generation)


@verb
def rebuild(runtime: Runtime, meeting: Meeting, specs: Sequence[GroupSpec]) -> list[str]:
    """Make all groups again, in a new generation; all ranks call it at once. See :meth:`Groups.rebuild`."""
    if runtime.loaded is not None:
        come_to_rest(runtime.loaded.model)
    return runtime.groups.rebuild(meeting, specs)


@verb
def leave(runtime: Runtime) -> None:
    """Let go of everything and leave the groups."""
    runtime.forget_model()
    runtime.boxes.end()
    runtime.groups.close()
    Slot.runtime = None


@verb
def define_hook(runtime: Runtime, source: HookSource) -> None:
    """Compile a hook on this rank; it acts in no run that does not name it."""
    runtime.define(source)


@verb
def forget_hook(runtime: Runtime, owner: str, name: str, version: int) -> None:
    """Drop one version of a hook."""
    runtime.hooks.pop((owner, name, version), None)


@verb
def end_box(runtime: Runtime, owner: str) -> None:
    """End the process in which an owner's boxed hooks run on this rank, if there is one."""
    runtime.boxes.end(owner)


@verb
def begin_boxes(runtime: Runtime) -> None:
    """Begin with what boxes are made of, if there can be any; nobody waits for it."""
    runtime.boxes.begin()


@verb
def end_boxes(runtime: Runtime) -> None:
    """End all boxes of this rank, and what they are made of."""
    runtime.boxes.end()


@verb
def no_boxes(_runtime: Runtime) -> str:
    """Why this rank can make no box; ``""`` if it can."""
    return available()


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
def sizes_of(runtime: Runtime, inputs: Sequence[Any]) -> list[tuple[int, int] | FlexError]:
    """Rows and tokens per row of some inputs, without a run, or why one cannot be run on."""
    assert runtime.loaded is not None  # the client has a model
    found: list[tuple[int, int] | FlexError] = []
    for one in inputs:
        try:
            ids = prepare(one, runtime.model, runtime.loaded.tokenizer, runtime.place.device).ids
            found.append((len(ids), len(ids[0]) if ids else 0))
        except FlexError as error:
            found.append(error)
    return found


@dataclass(frozen=True)
class SweepAnswer:
    """A rank's report of a forward with several traces, and of each trace."""

    reply: RunReply
    cells: list[RunAnswer]
    reused: int


@verb
def run_sweep(runtime: Runtime, plan: RunPlan, inputs: Any, traces: sweeping.Traces) -> SweepAnswer | None:
    """One forward with several traces; ``None`` on all ranks if it cannot be, or as of :func:`run`."""
    assert runtime.loaded is not None  # the client has a model
    prepared = prepare(inputs, runtime.model, runtime.loaded.tokenizer, runtime.place.device)
    if runtime.is_stale(prepared):
        return None
    swept = sweeping.sweep(runtime, plan, prepared, traces)
    if swept is None:
        return None
    cells = [RunAnswer(cell, prepared.tokens, prepared.ids) for cell in swept.cells]
    return SweepAnswer(swept.reply, cells, swept.reused)


@verb
def run_together(
    runtime: Runtime, joint: RunPlan, plans: Sequence[RunPlan], inputs: Sequence[Any]
) -> list[RunAnswer] | None:
    """One forward with the runs of several people; ``None`` if it cannot be, or as of :func:`run`."""
    assert runtime.loaded is not None  # the client has a model
    tokenizer, device = runtime.loaded.tokenizer, runtime.place.device
    prepared = [prepare(one, runtime.model, tokenizer, device) for one in inputs]
    replies = together_.run_together(runtime, joint, plans, prepared)
    if replies is None:
        return None
    return [RunAnswer(r, p.tokens, p.ids) for r, p in zip(replies, prepared, strict=True)]


@verb
def end_sweep(runtime: Runtime) -> None:
    """Let go of what the traces of a sweep had in common."""
    runtime.prefix = None


@dataclass(frozen=True)
class GenerateAnswer:
    """A rank's report of a generation: each step as a run, then all ids, tokens and texts of each row."""

    steps: list[RunAnswer]
    ids: list[list[int]]
    tokens: list[list[str]]
    prompt: int
    text: list[str]


@verb
def generate(runtime: Runtime, plan: RunPlan, inputs: Any, request: Request) -> GenerateAnswer | None:
    """Text by the model's own ``generate``; ``None`` as :func:`run` does."""
    model = runtime.model
    assert runtime.loaded is not None  # the line above raises otherwise
    tokenizer = runtime.loaded.tokenizer
    prepared = prepare(inputs, model, tokenizer, runtime.place.device, generating=True)
    if runtime.is_stale(prepared):
        return None
    made = generation.generate(runtime, plan, prepared, request)
    steps = [RunAnswer(step.reply, _tokens(tokenizer, step.ids), step.ids) for step in made.steps]
    new = [row[made.prompt :] for row in made.ids]
    text = [] if tokenizer is None else [tokenizer.decode(row, skip_special_tokens=True) for row in new]
    return GenerateAnswer(steps, made.ids, _tokens(tokenizer, made.ids), made.prompt, text)


def _tokens(tokenizer: Any, ids: list[list[int]]) -> list[list[str]]:
    return [] if tokenizer is None else [[tokenizer.decode([i]) for i in row] for row in ids]


@verb
def run_cell(runtime: Runtime, plan: RunPlan, source: HookSource) -> CellAnswer | None:
    """A user's cell under the plan; ``None`` as :func:`run` does."""
    if runtime.guessable and runtime.is_stale(Prepared({}, [], [])):
        return None
    return cell.run_cell(runtime, plan, source)


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
def take_heads(
    runtime: Runtime, run_id: RunKey, sites: tuple[Site, Site], heads: Heads, spans: Spans
) -> None:
    """Keep the heads in this rank's piece of the first site under the second; ``spans``: its features."""
    _, columns = heads.held(spans)
    piece = runtime.captures.get(run_id, sites[0])
    index = torch.tensor(columns, device=piece.device, dtype=torch.int64)
    found = piece.index_select(-1, index).unflatten(-1, (len(columns) // heads.width, heads.width))
    runtime.captures.keep(run_id, sites[1], found)


@verb
def read(runtime: Runtime, run_id: RunKey, site: Site, parts: list[tuple[slice, ...]]) -> list[Any]:
    """Raw bytes of slices of a captured piece."""
    piece = runtime.captures.get(run_id, site)
    return [look.slice_bytes(piece, part) for part in parts]


@verb
def lend(
    runtime: Runtime, run_id: RunKey, site: Site, parts: list[tuple[slice, ...]], reader: Reader
) -> list[Lent | Offer]:
    """Where slices of a captured piece are to be had, by a reader's machine and process."""
    return lending.lend(runtime.captures, (run_id, site), parts, reader, runtime.outlet)


@verb
def give_back(runtime: Runtime, reader: Reader) -> None:
    """Let go of what a reader had been lent."""
    lending.give_back(runtime.captures, reader, runtime.outlet)


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
) -> Overview:
    """The parts of a captured piece inside a window, reduced to the window's bins all together."""
    piece = runtime.captures.get(run_id, site)
    return merge_overviews([look.overview(piece, local, result, window) for local, result in parts])


@verb
def context(runtime: Runtime, run_id: RunKey) -> dict[str, Any]:
    """What the hooks of a run saved in ``ctx`` on this rank."""
    return runtime.captures.context(run_id)


@verb
def contexts(runtime: Runtime, run_ids: list[RunKey]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What the hooks of several runs saved in ``ctx`` on this rank; see :func:`together`."""
    return together([runtime.captures.context(run_id) for run_id in run_ids])


@verb
def release(runtime: Runtime, run_id: RunKey) -> None:
    """Forget a run's captures."""
    runtime.captures.drop(run_id)


@verb
def keep(runtime: Runtime, owner: str, name: str, value: bytes | None) -> None:
    """Keep what a session leaves of itself; ``None`` drops it."""
    runtime.kept.keep(owner, name, value)


@verb
def kept(runtime: Runtime, owner: str, name: str) -> bytes | None:
    """What a session left under a name."""
    return runtime.kept.get(owner, name)


@verb
def kept_names(runtime: Runtime, owner: str) -> list[str]:
    """The names of all that a session left, oldest first."""
    return runtime.kept.names(owner)


@verb
def all_kept(runtime: Runtime, owner: str) -> dict[str, bytes]:
    """All that a session left, by name, oldest first."""
    return runtime.kept.all(owner)


@verb
def owners(runtime: Runtime) -> list[str]:
    """The sessions that left something, in the order in which they came."""
    return runtime.kept.owners()


@verb
def budget(runtime: Runtime, nbytes: int) -> None:
    """How many bytes of captures this rank keeps; the oldest runs go when there are more."""
    runtime.captures.budget = nbytes
