"""What each request does in its guest's own world. Nothing here can name anybody else's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from flexmagic.client.wire import WORTH
from flexmagic.errors import FlexError, HookError, InputError, SiteError
from flexmagic.workshop import requests as asked
from flexmagic.workshop.frames import FRAMES, put

if TYPE_CHECKING:
    from flexmagic.client.activation import Activation
    from flexmagic.client.generation import Generation
    from flexmagic.client.run import Run
    from flexmagic.client.tenant import Tenant
    from flexmagic.view.source import Stats
    from flexmagic.workshop.desk import Job
    from flexmagic.workshop.guests import Guest

Answer = tuple[dict[str, Any], list[bytes]]
"""A reply's header and its frames."""

Index = tuple[int | slice, ...]
"""One int or slice per dim."""

AT_ONCE = 64 << 20
"""Bytes of values in one reply."""

LARGEST = 16
"""Bytes of the largest number."""

LOOKED = 64
"""How many captured tensors of a guest are remembered."""

NO_CODE = (
    "Hooks with code are off in this workshop, as its engines can make no boxes for them. "
    "Use one without code: %flexhook SITE --do zero, scale, add, mean, resample, patch, project or clamp."
)


def tenant_of(guest: Guest) -> Tenant:
    """The guest's world."""
    assert guest.tenant is not None  # the gateway makes one before it answers anything
    return guest.tenant


def run_of(guest: Guest, number: int, step: int | None = None) -> Run:
    """A run of the guest's own; raises :class:`SiteError` for any other number."""
    run = guest.runs.get(number)
    if run is None:
        mine = ", ".join(map(str, guest.runs)) or "none"
        raise SiteError(f"You have no run {number}. Your runs: {mine}.")
    if step is None:
        return run
    if not hasattr(run, "step"):
        raise SiteError(f"Run {number} is one forward and has no steps.")
    found: Run = cast("Generation", run).step(step)
    return found


def activation(guest: Guest, where: asked.Where) -> Activation:
    """A captured tensor of the guest's own, or one that the owner shows."""
    if where.shown is not None:
        return guest.board.view(where.shown, where.rank)
    key = (where.run, where.step, where.site, where.hook, where.rank)
    run = run_of(guest, where.run, where.step)
    if key not in guest.looked:
        found = run[where.site] if where.hook is None else run[where.site, where.hook]
        guest.looked[key] = found if where.rank is None else cast("Activation", found.held(where.rank))
        while len(guest.looked) > LOOKED:
            guest.looked.popitem(last=False)
    return guest.looked[key]


def forget(guest: Guest, number: int) -> None:
    """Let go of one run."""
    run = guest.runs.pop(number, None)
    for key in [key for key in guest.looked if key[0] == number]:
        del guest.looked[key]
    if run is not None:
        tenant_of(guest).release(run)


def _hook(guest: Guest, request: asked.PutHook, code: bool) -> Answer:  # noqa: FBT001
    tenant = tenant_of(guest)
    what = request.do
    if request.saved is not None:
        what = _saved(guest, request.saved)
    known = {hook.name for hook in tenant.hooks}
    if (request.name or ", ".join(request.sites)) not in known:
        guest.use.hooks(len(known) + 1)
    nbytes = _holds(guest, what)
    if request.code:
        if not code:
            raise HookError(NO_CODE)
        limits = request.limits
        hook = tenant.hook(
            request.sites, request.code, name=request.name, group=request.group, step=_text(limits.step),
            row=_text(limits.row), token=_text(limits.token), every=limits.every, first_line=2,
        )  # fmt: skip
    else:
        hook = tenant.declare(request.sites, what, request.limits, name=request.name, group=request.group)
    if nbytes:
        guest.values[hook.name, hook.version] = nbytes
    return {"hook": repr(hook), "name": hook.name, **_hooks_header(tenant)}, []


def _holds(guest: Guest, what: Any) -> int:
    """Bytes of a hook's values, if the guest may hold so much in all versions of its hooks."""
    kept = {(hook.name, number) for hook in tenant_of(guest).hooks for number in hook.versions}
    guest.values = {version: size for version, size in guest.values.items() if version in kept}
    values = getattr(what, "values", None)
    nbytes = 0 if values is None else int(values.nbytes)
    total, most = sum(guest.values.values()) + nbytes, guest.use.allowance.captured
    if nbytes and total > most:
        raise InputError(
            f"Your hooks would hold {total:,} bytes of values; you may hold {most:,}: remove some."
        )
    return nbytes


def _text(picks: Any) -> str | None:
    return None if picks is None else str(picks)


def _saved(guest: Guest, saved: asked.Saved) -> Any:
    from flexmagic.engine.declared import Declared

    found = activation(guest, asked.Where(saved.run, saved.step, saved.site, None, None))
    _check_size(found, math.prod(found.shape))
    return Declared("patch", (), found.torch())


def _hooks_header(tenant: Tenant) -> dict[str, Any]:
    table = tenant.hooks.table()
    hooks = [{"name": h.name, "group": h.group, "enabled": h.enabled} for h in tenant.hooks]
    return {"columns": table.columns, "rows": table.rows, "title": table.title, "hooks": hooks}


def _hooks(guest: Guest, _request: asked.Nothing) -> Answer:
    return _hooks_header(tenant_of(guest)), []


def _switch(guest: Guest, request: asked.Switch) -> Answer:
    hooks = tenant_of(guest).hooks
    if request.action == "remove":
        for hook in hooks.named(request.names):
            hook.remove()
    elif request.action == "undo":
        for name in request.names:
            hooks[name].undo()
    else:
        getattr(hooks, request.action)(*request.names)
    return _hooks_header(tenant_of(guest)), []


def run_header(guest: Guest, run: Run) -> dict[str, Any]:
    """What a guest is told of a run that is over."""
    said, guest.said[:] = "".join(guest.said), []
    header: dict[str, Any] = {
        "number": run.number, "sites": run.sites, "tokens": run.tokens, "ids": run.ids, "seed": run.seed,
        "seconds": run.seconds, "warnings": run.warnings, "said": said, "text": repr(run),
    }  # fmt: skip
    if hasattr(run, "steps"):
        made = cast("Generation", run)
        header |= {"new_text": made.text, "steps": [made.step(n).sites for n in range(made.steps)]}
    return header


def _look(guest: Guest, request: asked.Look) -> Answer:
    found = activation(guest, request.where)
    info = found.info
    pieces = [[p.rank, p.spans, p.local, p.addend] for p in info.pieces]
    facts = {
        name: getattr(info, name)
        for name in (
            "site", "shape", "dims", "dtype", "mesh", "placements", "hook", "run", "step", "nbytes",
            "partial", "warnings", "missing_ranks", "form",
        )
    }  # fmt: skip
    tokens = found._origin.tokens  # noqa: SLF001 - what labels() shows
    header: dict[str, Any] = {"info": {**facts, "pieces": pieces}, "text": repr(found), "tokens": tokens}
    frames: list[bytes] = []
    if request.values and math.prod(found.shape) * LARGEST <= AT_ONCE:
        header["array"] = _values(guest, found, (slice(None),) * len(found.shape), frames)
    return header, frames


def _check_size(found: Activation, count: int) -> int:
    import torch

    nbytes = count * int(getattr(torch, found.dtype).itemsize)
    if nbytes > AT_ONCE:
        raise InputError(
            f"{nbytes:,} bytes are asked for at once; {AT_ONCE:,} are the most: take a part of it."
        )
    return nbytes


def _read(guest: Guest, request: asked.Read) -> Answer:
    found = activation(guest, request.where)
    if len(request.index) != len(found.shape):
        raise InputError(f"{found.site} has {len(found.shape)} dims; the index names {len(request.index)}.")
    frames: list[bytes] = []
    return {"array": _values(guest, found, request.index, frames, whole=request.whole)}, frames


def _values(
    guest: Guest, found: Activation, index: Index, frames: list[bytes], *, whole: bool = True
) -> dict[str, Any]:
    """A part of a tensor, put into frames within what the guest may move."""
    import numpy as np

    guest.use.move(_check_size(found, math.prod(_sizes(found.shape, index))))
    return put(np.asarray(found[index] if whole else found.read(index)), frames)


def _stats(guest: Guest, where: asked.Where) -> Answer:
    return {"stats": _stats_header(activation(guest, where).stats())}, []


def _stats_header(stats: Stats) -> list[float]:
    return [
        stats.n, stats.nan, stats.posinf, stats.neginf, stats.zeros, stats.min, stats.max, stats.mean,
        stats.std,
    ]  # fmt: skip


OVERVIEW = ("row_edges", "col_edges", "mean", "rms", "extremum", "n", "nan", "posinf", "neginf")
"""The arrays of an overview."""


def _overview(guest: Guest, request: asked.Overview) -> Answer:
    found = activation(guest, request.where)
    rank, shape = len(found.shape), found.shape
    shown = {request.cols} | ({request.rows} if request.rows >= 0 else set())
    one_dim = rank == 1 and request.rows == -1
    if shown | request.fixed.keys() != set(range(rank)) or (len(shown) != 2 and not one_dim):
        raise InputError("An overview shows two dims and is fixed in every other one.")
    edges = {request.cols: request.col_edges, request.rows: request.row_edges}
    if any(at >= shape[dim] for dim, at in request.fixed.items()) or any(
        int(e[-1]) > (shape[dim] if dim >= 0 else 1) for dim, e in edges.items()
    ):
        raise InputError(f"The overview reaches beyond {list(shape)}.")
    got = found.overview(request.rows, request.cols, request.fixed, request.row_edges, request.col_edges)
    frames: list[bytes] = []
    arrays = {name: put(getattr(got, name), frames) for name in OVERVIEW}
    guest.use.move(sum(map(len, frames)))
    return {"arrays": arrays, "peaks": [[p.row, p.col, p.value] for p in got.peaks]}, frames


def _shares(guest: Guest, request: asked.Shares) -> Answer:
    import numpy as np

    frames: list[bytes] = []
    found = activation(guest, request.where).shares(request.edges)
    counts = put(np.array([share.counts for share in found], np.int64), frames)
    return {"shares": [[s.rank, _stats_header(s.stats)] for s in found], "counts": counts}, frames


def _digests(guest: Guest, where: asked.Where) -> Answer:
    return {"digests": list(activation(guest, where).digests().items())}, []


def _top(guest: Guest, request: asked.Top) -> Answer:
    run = run_of(guest, request.run, request.step)
    try:
        table = run.top(request.k, row=request.row, position=request.position)
    except IndexError as error:
        raise InputError(f"There is no such place in run {request.run}: {error}") from None
    return {"columns": table.columns, "rows": table.rows}, []


def _context(guest: Guest, request: asked.Context) -> Answer:
    import numpy as np
    import torch

    frames: list[bytes] = []
    plain: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    found = run_of(guest, request.run).context
    for name, value in found.items():
        if isinstance(value, torch.Tensor) and len(frames) < FRAMES:
            values = value.detach().cpu()
            values = values.float() if values.is_floating_point() and values.itemsize <= 2 else values
            guest.use.move(values.nbytes)
            arrays[name] = put(np.asarray(values.numpy()), frames)
        else:
            known = isinstance(value, (bool, int, float, str, type(None)))
            plain[name] = (
                value if known else f"<{type(value).__name__}: only numbers, texts and tensors travel>"
            )
    return {"plain": plain, "arrays": arrays}, frames


def _release(guest: Guest, request: asked.Release) -> Answer:
    run_of(guest, request.run)
    forget(guest, request.run)
    return {}, []


def _sites(guest: Guest, _request: asked.Nothing) -> Answer:
    model = tenant_of(guest).model
    table = model.layout_table()
    return {
        "model": str(model), "name": model.name, "columns": table.columns, "rows": table.rows,
        "paths": list(model.paths),
    }, []  # fmt: skip


LOOKS: Mapping[type, Callable[..., Answer]] = {
    asked.Look: _look,
    asked.Read: _read,
    asked.Overview: _overview,
    asked.Shares: _shares,
    asked.Switch: _switch,
    asked.Top: _top,
    asked.Release: _release,
    asked.Context: _context,
}
"""What answers requests that have a form of their own."""

NAMED: Mapping[str, Callable[..., Answer]] = {
    "stats": _stats,
    "digests": _digests,
    "hooks": _hooks,
    "sites": _sites,
}
"""What answers those that share one."""


def answer(guest: Guest, kind: str, request: asked.Request, *, code: bool) -> Answer:
    """Do what a guest asks for, but for runs; ``code``: hooks may have some."""
    if isinstance(request, asked.PutHook):
        return _hook(guest, request, code)
    return (LOOKS.get(type(request)) or NAMED[kind])(guest, request)


def is_small(guest: Guest, request: asked.Request) -> bool:
    """Whether a look asks the ranks for little, so that it can be answered together with others'."""
    if isinstance(request, asked.PutHook):
        return request.saved is None
    if not isinstance(request, asked.Read | asked.Look):
        return False
    if isinstance(request, asked.Look) and not request.values:  # it asks no rank at all
        return True
    try:
        found = activation(guest, request.where)
    except FlexError:  # it will be told so
        return True
    whole = (slice(None),) * len(found.shape)
    index = request.index if isinstance(request, asked.Read) else whole
    if found.layout.partial or len(index) != len(whole):
        return False
    return math.prod(_sizes(found.shape, index)) * LARGEST < WORTH


def mates(first: Job, other: Job) -> bool:
    """Whether the looks of two guests may be answered together."""
    small = all(is_small(job.guest, job.request) for job in (first, other))
    return small and first.guest is not other.guest


def _sizes(shape: Sequence[int], index: Index) -> list[int]:
    return [
        len(range(size)[part]) if isinstance(part, slice) else 1
        for size, part in zip(shape, index, strict=True)
    ]


def options_of(request: asked.MakeRun) -> dict[str, Any]:
    """A run's options as :meth:`Work.run` takes them."""
    only: Sequence[str] | None = request.only
    return {
        "capture": list(request.capture), "seed": request.seed, "only": only,
        "without": list(request.without),
        "skip": dict(request.skip),
    }  # fmt: skip
