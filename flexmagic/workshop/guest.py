"""A guest's session: what a session is to its owner, as far as a guest may."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from flexmagic.client.table import Table
from flexmagic.engine.declared import Declared
from flexmagic.errors import ClusterError, HookError, InputError
from flexmagic.layout.patterns import listed
from flexmagic.workshop.address import Address
from flexmagic.workshop.frames import put
from flexmagic.workshop.guest_hooks import GuestHook, GuestHooks, table_of
from flexmagic.workshop.guest_known import GuestKnown
from flexmagic.workshop.guest_notices import GuestNotices
from flexmagic.workshop.guest_run import GuestRun
from flexmagic.workshop.link import Link, StartedAgainError

if TYPE_CHECKING:
    from flexmagic.client.waiting import Progress

OWNERS = "is the owner's in a workshop. As a guest you have %flexhook, %flexrun and what a run returns."


class GuestModel:
    """What a guest knows of the model: its name and its sites, asked for when they are looked at."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @functools.cached_property
    def _said(self) -> dict[str, Any]:
        return self._link.ask("sites")[0]

    @property
    def name(self) -> str:
        """The model's class."""
        return str(self._said["name"])

    @property
    def paths(self) -> list[str]:
        """The names of its modules."""
        return list(self._said["paths"])

    def layout_table(self) -> Table:
        """Every site with its whole shape and layout."""
        return table_of({**self._said, "title": str(self)})

    def tree(self) -> Table:
        """As :meth:`layout_table`: a guest has no other view of the model."""
        return self.layout_table()

    def __getattr__(self, name: str) -> Any:
        """What is the owner's of a model."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise ClusterError(f"{name} {OWNERS}")

    def __str__(self) -> str:
        """Class, source, mesh and bytes per rank."""
        return str(self._said["model"])

    def __repr__(self) -> str:
        """As :meth:`__str__`."""
        return f"<Model {self}>"


class Guest:
    """A place in a workshop: hooks and runs of one's own on a model that others use too.

    ``Guest.join("127.0.0.1:4000/token")``, with the address that the owner's line has. What is the owner's
    of a session raises :class:`ClusterError`.
    """

    owns_engines = False

    def __init__(self, link: Link) -> None:
        self._link = link
        self.hooks = GuestHooks(link)
        self.notices = GuestNotices(link)
        self.known = GuestKnown(lambda: self.model.paths, self.hooks)
        self._cancelled = False
        self.printer: Callable[[str], None] = print
        link.say = self._say

    @classmethod
    def join(cls, address: str, name: str = "") -> Self:
        """Take a place, or come back to one; raises :class:`ClusterError` or :class:`InputError`."""
        return cls(Link(Address.read(address), name))

    @property
    def cluster_name(self) -> str:
        """The name of the cluster behind the workshop."""
        return str(self._link.facts["cluster"])

    @property
    def name(self) -> str:
        """The guest's name in the workshop."""
        return str(self._link.facts["guest"])

    @property
    def address(self) -> str:
        """What brings this guest back to the same place; whoever has it is this guest."""
        return str(self._link.address)

    @property
    def notice(self) -> str:
        """What the workshop has to say to one who joins, or comes back."""
        return "\n".join(filter(None, map(str, map(self._link.facts.get, ("notice", "told")))))

    @property
    def model(self) -> GuestModel:
        """The loaded model."""
        return GuestModel(self._link)

    def hook(
        self,
        sites: str | Sequence[str],
        code: str | Declared = "",
        *,
        name: str | None = None,
        group: str | None = None,
        local: bool = False,
        step: Any = None,
        row: Any = None,
        token: Any = None,
        every: int = 1,
        when: str = "",
        first_line: int = 1,
        saved: tuple[GuestRun, str] | None = None,
    ) -> GuestHook:
        """Register a hook: a :class:`Declared`, code where the workshop allows it, or none, to capture only.

        ``saved``: puts in the value that a run of one's own has at a site. The rest as of a session.
        Raises :class:`HookError`, :class:`SiteError`, :class:`LayoutError` or :class:`InputError`.
        """
        del first_line
        if local or when:
            raise InputError("In a workshop a hook has neither --local nor --when: both run in the engines.")
        if callable(code):
            raise HookError("A function does not travel to a workshop: give the hook's body as text.")
        frames: list[bytes] = []
        fields: dict[str, Any] = {"code": code} if isinstance(code, str) and code.strip() else {}
        if isinstance(code, Declared):
            do: dict[str, Any] = {"kind": code.kind, "numbers": list(code.numbers)}
            if code.values is not None:
                do["values"] = put(np.asarray(code.values.float().numpy()), frames)
            fields["do"] = do
        if saved is not None:
            fields["saved"] = {"run": saved[0].number, "site": saved[1]}
        said, _ = self._link.ask(
            "hook", frames, sites=listed(sites), name=name, group=group, step=_picked(step), row=_picked(row),
            token=_picked(token), every=every, **fields,
        )  # fmt: skip
        return GuestHook(self.hooks, said["name"], group, text=said["hook"])

    def run(
        self,
        inputs: Any,
        *,
        capture: str | Sequence[str] = (),
        seed: int = 0,
        only: Any = None,
        without: Any = None,
        stop_at: str | None = None,
        skip: Any = (),
        progress: Progress | None = None,
        **owners: Any,
    ) -> GuestRun:
        """One forward under the enabled hooks, when one's turn has come; as :meth:`Session.run`.

        ``inputs``: a text, texts, or token ids. Gradients are the owner's.
        """
        if wrong := [name for name, value in owners.items() if value not in (None, False)]:
            raise InputError(f"{wrong[0]} {OWNERS}")
        return self._made(
            inputs, progress, capture=listed(capture), seed=seed, only=_names(only),
            without=_names(without) or [], stop_at=stop_at, skip=_skip(skip),
        )  # fmt: skip

    def generate(
        self,
        inputs: Any,
        max_new_tokens: int = 20,
        *,
        capture: str | Sequence[str] = (),
        seed: int = 0,
        only: Any = None,
        without: Any = None,
        skip: Any = (),
        progress: Progress | None = None,
        **sampling: Any,
    ) -> GuestRun:
        """Text by the model, when one's turn has come; as :meth:`Session.generate`."""
        return self._made(
            inputs, progress, capture=listed(capture), seed=seed, only=_names(only),
            without=_names(without) or [], skip=_skip(skip), new_tokens=max_new_tokens, sampling=sampling,
        )  # fmt: skip

    def _made(self, inputs: Any, progress: Progress | None, **fields: Any) -> GuestRun:
        self._cancelled = False
        while True:
            try:
                return self._waited(self._link.ask("run", inputs=_inputs(inputs), **fields)[0], progress)
            except StartedAgainError:  # the run went with the gateway that had it, and is asked for anew
                self._check_cancelled()

    def _waited(self, said: dict[str, Any], progress: Progress | None) -> GuestRun:
        ticket = said["ticket"]
        try:
            while said["state"] != "done":
                self._check_cancelled()
                if progress is not None:
                    progress(_Turn(said))  # type: ignore[arg-type]  # all that is done with it is to show it
                said, _ = self._link.ask("wait", ticket=ticket)
        except KeyboardInterrupt:
            with contextlib.suppress(StartedAgainError):
                self._link.ask("cancel", ticket=ticket)
            raise
        if said["said"]:
            self.printer(said["said"])
        for number in said["gone"]:
            self.printer(f"Note: run {number} was let go: you may hold so much and no more.")
        return GuestRun(self._link, said)

    def _say(self, text: str) -> None:
        self.printer(text)

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise KeyboardInterrupt

    def cancel(self) -> None:
        """End what is being waited for, as an interrupt would; from any thread."""
        self._cancelled = True

    def status(self) -> Table:
        """Who one is here, the model, and what one may take."""
        return table_of(self._link.ask("status")[0])

    def stop(self) -> None:
        """Leave the place empty; hooks and runs stay for when one comes back, for a while."""
        self._link.close()

    def leave(self, *, kernel: str = "") -> None:
        """As :meth:`stop`: what the end of the notebook does."""
        del kernel
        self.stop()

    def __getattr__(self, name: str) -> Any:
        """What is the owner's of a session."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise ClusterError(f"{name} {OWNERS}")

    def __repr__(self) -> str:
        """Who one is, and on which cluster."""
        return f"<Guest {self.name} on {self.cluster_name}: {self._link.facts['model']}>"


@dataclass(frozen=True)
class _Turn:
    """Where a run stands, as a status line shows it; of a generation also its text by now.

    The names are those of :class:`~flexmagic.client.waiting.Waited`.
    """

    said: dict[str, Any]
    seconds: float = 0.0

    @property
    def ranks(self) -> dict[int, tuple[str, int, int]]:
        """The text, and how many tokens of how many are there."""
        far = self.said.get("far")
        return {0: tuple(far)} if far else {}

    @property
    def tokens(self) -> list[tuple[str, float | None]]:
        """The new tokens, and how likely each was."""
        return [(str(token), likely) for token, likely in self.said.get("tokens", ())]

    @property
    def pace(self) -> str:
        """How fast, and where it stands before it begins."""
        return str(self.said.get("pace", ""))

    def __str__(self) -> str:
        where = "it runs"
        if self.said["state"] == "paused":
            where = "the workshop is paused"
        elif self.said["state"] == "waits":
            where = f"{self.said['place']} before you, about {self.said['wait']:.0f} s"
        return f"{self.seconds:.1f} s: {where}"


def _inputs(inputs: Any) -> Any:
    if isinstance(inputs, str) or (isinstance(inputs, list) and inputs and isinstance(inputs[0], str)):
        return inputs
    if isinstance(inputs, dict):
        raise InputError("In a workshop a run has a text, texts or token ids, not arguments of the model.")
    ids = np.asarray(inputs)
    if ids.dtype.kind not in "iu" or ids.ndim not in {1, 2} or not ids.size:
        raise InputError("A run has a text, texts, or token ids of shape [seq] or [batch, seq].")
    rows: Any = np.atleast_2d(ids).tolist()
    return rows


def _picked(value: Any) -> str | None:
    from flexmagic.engine.limits import Picks

    return None if value is None else str(Picks.read(value, "place"))


def _names(names: Any) -> list[str] | None:
    return None if names is None else [names] if isinstance(names, str) else list(names)


def _skip(skip: Any) -> dict[str, Any]:
    return dict(skip) if isinstance(skip, dict) else dict.fromkeys(listed(skip))
