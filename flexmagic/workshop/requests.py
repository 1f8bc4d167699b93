"""What a guest may ask for: one plain value per request, made only of fields that were checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.engine.limits import Limits
from flexmagic.errors import InputError
from flexmagic.layout.patterns import is_regex
from flexmagic.workshop.fields import TEXT, Fields
from flexmagic.workshop.frames import MalformedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from flexmagic.engine.declared import Declared

BINS = 4096
"""Bins of an overview along each of its dims, at most."""

SWITCHES = ("enable", "disable", "complement", "remove", "undo")
"""What can be done to hooks by name."""

SAMPLING = {"temperature": (1e-3, 100.0), "top_p": (1e-6, 1.0), "top_k": (1.0, 1e6)}
"""Numbers that a generation takes, each within its bounds."""


@dataclass(frozen=True)
class Saved:
    """A value that a run of the guest's own left, to be put in elsewhere."""

    run: int
    step: int | None
    site: str


@dataclass(frozen=True)
class PutHook:
    """Register a hook: declared, with code, of a saved value or, of none of these, one that captures."""

    sites: tuple[str, ...]
    name: str | None
    group: str | None
    limits: Limits
    do: Declared | None
    code: str
    saved: Saved | None


@dataclass(frozen=True)
class Switch:
    """Do something to hooks by name."""

    action: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class MakeRun:
    """A forward, or a generation of so many new tokens."""

    inputs: str | list[str] | list[list[int]]
    capture: tuple[str, ...]
    seed: int
    only: tuple[str, ...] | None
    without: tuple[str, ...]
    stop_at: str | None
    skip: Mapping[str, float | None]
    new_tokens: int | None
    sampling: Mapping[str, Any]


@dataclass(frozen=True)
class Ticket:
    """Ask for what became of a run, or end it."""

    ticket: int


@dataclass(frozen=True)
class Where:
    """A captured tensor: the guest's own run, the step of a generation, the site, and one rank's piece.

    ``shown``: the number of one that the owner shows, which has none of the rest but a rank.
    """

    run: int
    step: int | None
    site: str
    hook: str | None
    rank: int | None
    shown: int | None = None


@dataclass(frozen=True)
class Look:
    """What is known of one, and its ``values`` too if they are few enough for one answer."""

    where: Where
    values: bool


@dataclass(frozen=True)
class Read:
    """A slice of one; ``whole``: refused where some of it is lost, else zeros are there."""

    where: Where
    index: tuple[int | slice, ...]
    whole: bool


@dataclass(frozen=True)
class Overview:
    """Two of its dims in bins."""

    where: Where
    rows: int
    cols: int
    fixed: dict[int, int]
    row_edges: NDArray[np.int64]
    col_edges: NDArray[np.int64]


@dataclass(frozen=True)
class Shares:
    """What each rank holds, counted into bins."""

    where: Where
    edges: NDArray[np.float64]


@dataclass(frozen=True)
class Top:
    """The likeliest next tokens."""

    run: int
    step: int | None
    k: int
    row: int
    position: int


@dataclass(frozen=True)
class Release:
    """Let go of a run."""

    run: int


@dataclass(frozen=True)
class Context:
    """What the hooks of a run saved."""

    run: int


@dataclass(frozen=True)
class Since:
    """Ask what the owner has put up after a notice."""

    number: int


@dataclass(frozen=True)
class Nothing:
    """A request without fields."""


Request = (
    PutHook
    | Switch
    | MakeRun
    | Ticket
    | Where
    | Look
    | Read
    | Overview
    | Shares
    | Top
    | Release
    | Context
    | Since
    | Nothing
)


def parse(kind: Any, given: Mapping[str, Any], frames: Sequence[bytes]) -> Request:
    """A request of a kind from its fields; raises :class:`InputError` for what is not exactly one."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise MalformedError("A workshop knows no such request.")
    fields = Fields(given, frames)
    request = KINDS[kind](fields)
    fields.done()
    return request


def pattern(text: str) -> str:
    """A site pattern that takes no long to match; raises :class:`InputError` for a regular expression."""
    path = text.partition(":")[0]
    if is_regex(text) or "/" in text:
        raise InputError(
            "In a workshop sites are named by paths with * and braces, not by regular expressions."
        )
    if any(part.count("*") > 2 for part in path.split(".")) or text.count("{") > 2:
        raise InputError(f"{text!r} has too many stars or braces for a workshop.")
    return text


def _hook(fields: Fields) -> PutHook:
    put = PutHook(
        tuple(pattern(site) for site in fields.texts("sites")),
        fields.optional("name"),
        fields.optional("group"),
        _limits(fields),
        _declared(inner) if (inner := fields.maybe("do")) else None,
        fields.optional("code", TEXT) or "",
        _saved(inner) if (inner := fields.maybe("saved")) else None,
    )
    if (put.do is not None) + bool(put.code) + (put.saved is not None) > 1:
        raise MalformedError("A hook does one thing: code, something declared, or a saved value.")
    return put


def _saved(fields: Fields) -> Saved:
    made = Saved(fields.whole("run", 1, 1 << 40), _step(fields), pattern(fields.text("site")))
    fields.done()
    return made


def _limits(fields: Fields) -> Limits:
    step, row, token = (fields.optional(name) for name in ("step", "row", "token"))
    return Limits.read(step, row, token, fields.whole("every", 1, 1 << 30, 1))


def _declared(fields: Fields) -> Declared:
    import torch

    from flexmagic.engine.declared import KINDS as DONE
    from flexmagic.engine.declared import Declared

    values = fields.array("values")
    made = Declared(
        fields.one_of("kind", tuple(DONE)),
        fields.numbers("numbers"),
        None if values is None else torch.from_numpy(values.copy()),
    )
    fields.done()
    return made


def _switch(fields: Fields) -> Switch:
    return Switch(fields.one_of("action", SWITCHES), fields.texts("names"))


def _run(fields: Fields) -> MakeRun:
    return MakeRun(
        fields.inputs("inputs"),
        tuple(pattern(site) for site in fields.texts("capture", 256)),
        fields.whole("seed", 0, 1 << 31, 0),
        fields.maybe_texts("only"),
        fields.texts("without"),
        _maybe_pattern(fields, "stop_at"),
        _skips(fields.within("skip")),
        fields.maybe_whole("new_tokens", 1, 4096),
        _sampling(fields.within("sampling")),
    )


def _maybe_pattern(fields: Fields, name: str) -> str | None:
    found = fields.optional(name)
    return None if found is None else pattern(found)


def _skips(fields: Fields) -> dict[str, float | None]:
    return {pattern(site): fields.maybe_number(site, -1e300, 1e300) for site in fields.names}


def _sampling(fields: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {"do_sample": True} if fields.flag("do_sample") else {}
    for name, (low, high) in SAMPLING.items():
        if (value := fields.maybe_number(name, low, high)) is not None:
            found[name] = int(value) if name == "top_k" else value
    fields.done()
    return found


def _ticket(fields: Fields) -> Ticket:
    return Ticket(fields.whole("ticket", 1, 1 << 40))


def _step(fields: Fields) -> int | None:
    return fields.maybe_whole("step", 0, 1 << 20)


def _where(fields: Fields) -> Where:
    shown = fields.maybe_whole("shown", 1, 1 << 40)
    if shown is not None:
        return Where(0, None, "", None, fields.maybe_whole("rank", 0, 1 << 20), shown)
    return Where(
        fields.whole("run", 1, 1 << 40), _step(fields), pattern(fields.text("site")), fields.optional("hook"),
        fields.maybe_whole("rank", 0, 1 << 20),
    )  # fmt: skip


def _look(fields: Fields) -> Look:
    return Look(_where(fields), fields.flag("values"))


def _read(fields: Fields) -> Read:
    return Read(_where(fields), fields.index("index"), fields.flag("whole"))


def _overview(fields: Fields) -> Overview:
    import numpy as np

    fixed = [fields.wholes(name, 8, 0, 1 << 40) for name in ("fixed_dims", "fixed_at")]
    if len(fixed[0]) != len(fixed[1]):
        raise MalformedError("An overview is fixed at one place of each dim that it does not show.")
    edges = [
        np.array(fields.wholes(name, BINS + 1, 0, 1 << 40), np.int64) for name in ("row_edges", "col_edges")
    ]
    if any(len(e) < 2 or bool((np.diff(e) <= 0).any()) for e in edges):
        raise MalformedError("The edges of an overview's bins ascend.")
    rows, cols = fields.whole("rows", -1, 7), fields.whole("cols", 0, 7)
    where = _where(fields)
    return Overview(where, rows, cols, dict(zip(*fixed, strict=True)), edges[0], edges[1])


def _shares(fields: Fields) -> Shares:
    import numpy as np

    edges = np.array(fields.numbers("edges", 2048), np.float64)
    if len(edges) < 2 or bool((np.diff(edges) < 0).any()):
        raise MalformedError("The edges of bins ascend.")
    return Shares(_where(fields), edges)


def _top(fields: Fields) -> Top:
    reach = 1 << 20
    return Top(
        fields.whole("run", 1, 1 << 40), _step(fields), fields.whole("k", 1, 100, 5),
        fields.whole("row", -reach, reach, 0), fields.whole("position", -reach, reach, -1),
    )  # fmt: skip


def _nothing(_fields: Fields) -> Nothing:
    return Nothing()


KINDS: Mapping[str, Callable[[Fields], Request]] = {
    "hook": _hook,
    "switch": _switch,
    "hooks": _nothing,
    "run": _run,
    "wait": _ticket,
    "cancel": _ticket,
    "look": _look,
    "read": _read,
    "stats": _where,
    "overview": _overview,
    "shares": _shares,
    "digests": _where,
    "top": _top,
    "release": lambda fields: Release(fields.whole("run", 1, 1 << 40)),
    "context": lambda fields: Context(fields.whole("run", 1, 1 << 40)),
    "sites": _nothing,
    "status": _nothing,
    "notices": lambda fields: Since(fields.whole("since", 0, 1 << 40)),
}
"""Every request by its name."""
