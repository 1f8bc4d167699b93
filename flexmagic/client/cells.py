"""Whole cells on a loaded model, where :class:`~flexmagic.client.work.Work` has hooks and single runs."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, TypeVar

from flexmagic.client.calls import Calls
from flexmagic.client.cell_run import CellRun
from flexmagic.client.hook_book import Names
from flexmagic.client.losses import Losses
from flexmagic.client.model import Model
from flexmagic.client.pace import Counted
from flexmagic.client.planning import Skipped
from flexmagic.client.run import Run
from flexmagic.client.running import Running
from flexmagic.client.scan import Scan, scanned
from flexmagic.client.scripts import cell_source, trace_source
from flexmagic.client.sweep import (
    MEMORY,
    ONE_FORWARD,
    Batches,
    Over,
    Sweep,
    cells_at_once,
    combinations,
    ends_of,
)
from flexmagic.client.waiting import Attending, Progress
from flexmagic.errors import InputError

T = TypeVar("T")

LIMIT = 60.0
"""Seconds that a trace may take between two sites."""


@contextlib.contextmanager
def limited(calls: Calls, code: float | None) -> Iterator[None]:
    """Give user code so many seconds at one site, for the length of a block."""
    before = calls.waiting.limits
    calls.waiting.limits = replace(before, code=code)
    try:
        yield
    finally:
        calls.waiting.limits = before


class Cells(ABC):
    """The part of a session that runs a user's cells on every engine."""

    losses: Losses
    _calls: Calls
    _running: Running

    def attend(self, attending: Attending | None) -> None:
        """Have someone told of what takes long and has no ``progress`` of its own; see :class:`Attending`."""
        self._calls.waiting.attending = attending

    def progress(self, steps: Iterable[T], what: str = "Step") -> Iterator[T]:
        """Go through ``steps``, and tell in a notebook's cell how far that is: a loop of one's own over runs.

        Once it takes over a second there is a line with the pace and the time that is left, if ``steps``
        has a length, and a button that ends the loop as an interrupt does. In a script nothing is shown.
        """
        attending = self._calls.waiting.attending
        total = len(steps) if isinstance(steps, Sized) else None
        shown = contextlib.nullcontext(None) if attending is None else attending.counting(what, total)
        with shown as counted:
            for done, step in enumerate(steps, 1):
                yield step
                if counted is not None:
                    counted(done)

    @property
    @abstractmethod
    def model(self) -> Model:
        """The loaded model; raises :class:`ModelError` if there is none."""

    def trace(
        self,
        inputs: Any,
        code: str | Callable[..., Any],
        *,
        given: Mapping[str, Any] | None = None,
        capture: str | Sequence[str] = (),
        seed: int = 0,
        grad: bool = False,
        backward: str | Callable[[Any], Any] | None = None,
        only: Names | None = None,
        without: Names | None = None,
        stop_at: str | None = None,
        skip: Skipped = (),
        max_new_tokens: int | None = None,
        generating: Mapping[str, Any] | None = None,
        limit: float | None = LIMIT,
        progress: Progress | None = None,
        first_line: int = 1,
    ) -> Run:
        """One forward, or one generation, with an intervention written as ordinary code in its order.

        ``code`` sees ``model``: reading ``model.layers[2].output`` waits until the forward is there and
        gives the whole tensor, of the whole batch; what is then written into it, or assigned to
        ``model.layers[4].mlp.output``, the model goes on with. ``save.name = value`` puts a value into
        :attr:`Run.context`. Also at hand: ``ctx``, ``rank``, the engines' namespace and the names of
        ``given``; nothing of the notebook. A function gets those of these names that it takes.

        ``model.lm_head(h)`` is what a module makes of whole tensors, apart from the forward: hooks do not
        act in it; ``model.norm.weight`` is a copy of the whole parameter. With ``max_new_tokens`` the model
        generates, with the options ``generating`` of its own ``generate``, and
        ``for step in model.steps[2:4]`` goes on in these of its forwards, of which 0 sees the whole prompt.

        The code runs on every rank, after the enabled hooks of each site. Sites that it does not ask
        for cost no exchange. ``limit``: so many seconds it may take at one site, ``None`` for no limit.
        The rest is as in :meth:`run`.

        Raises :class:`CellError` for code that does not compile, :class:`HookError` for one that fails,
        such as by asking for a site that the forward has passed, :class:`StuckError` for one that does
        not come to its next site.
        """
        source = trace_source(code, given or {}, first_line)
        with limited(self._calls, limit):
            if max_new_tokens is not None:
                if grad or backward is not None or stop_at is not None:
                    raise InputError("A loss, grad and stop_at need one forward: leave max_new_tokens out.")
                return self._running.generate(
                    self.model, inputs, capture, max_new_tokens, generating or {}, trace=source,
                    progress=progress, only=only, without=without, seed=seed, skip=skip,
                )  # fmt: skip
            return self._running.run(
                self.model, inputs, capture, trace=source, progress=progress, only=only, without=without,
                seed=seed, grad=grad, backward=self.losses.meant(backward), stop_at=stop_at, skip=skip,
            )  # fmt: skip

    def run_cell(
        self,
        text: str,
        *,
        capture: str | Sequence[str] = (),
        seed: int = 0,
        grad: bool = False,
        only: Names | None = None,
        without: Names | None = None,
        progress: Progress | None = None,
        first_line: int = 1,
    ) -> CellRun:
        """Any code on every engine, with ``model`` and ``tokenizer``, hooks and captures active.

        They act in each forward of the whole model that the cell makes, by ``model(...)`` or
        ``model.generate(...)``; each is a step, a run of its own. Every rank is to give the model the
        same input, the whole batch. The cell shares the engines' namespace with ``%%px``. Its last
        expression is ``value``: once if all ranks have the same, else by rank. ``grad``: run it with
        autograd on.

        Raises :class:`CellError` for code that fails, on any rank, :class:`HookError` for a hook that
        does, :class:`ModelError` for ``grad`` over pipeline stages.
        """
        return self._running.cell(
            self.model, cell_source(text, first_line), capture,
            progress=progress, only=only, without=without, seed=seed, grad=grad,
        )  # fmt: skip

    def scan(self, inputs: Any, sites: str | Sequence[str] = ()) -> Scan:
        """Every site's whole shape and dtype for an input, without computing: from fake tensors.

        ``sites``: patterns, all inputs and outputs without any. What has no unsharded form is shown as
        the survey says, and what neither knows is left out. Raises :class:`InputError`,
        :class:`SiteError`, or :class:`ModelError` for a model of which nothing is known without a run.
        """
        return scanned(self._calls, self.model, inputs, sites)

    def sweep(
        self,
        inputs: Any,
        code: str | Callable[..., Any],
        over: Over,
        *,
        given: Mapping[str, Any] | None = None,
        memory: int = MEMORY,
        **options: Any,
    ) -> Sweep:
        """A trace for each combination of values, which it sees under their names.

        ``session.sweep(prompts, code, {"layer": range(4), "position": range(7)})["p"]`` is the grid
        ``[4, 7]`` of what the code saved as ``save.p``. Options and errors are those of :meth:`trace`;
        the first error ends the sweep.

        As many traces go into one forward, as rows of one batch, as take about ``memory`` bytes on a
        rank; 0 for one forward each. Each sees its own rows alone. The first is also run by itself, and
        if the others would not have its values, or have enabled hooks, captures, a loss or what else is
        for whole runs, each has a forward of its own. Layers that come before all that the traces of a
        forward touch are computed once for the sweep, so that traces of one layer are best next to each
        other; one of the traces of the first such forward is run alone too.
        """
        named = list(combinations(over))
        cells = [{**(given or {}), **names} for names in named]
        counted = Counted(options.get("progress"), "traces", len(cells))
        options["progress"] = counted.heard
        number = self._running.number()
        first = self.trace(inputs, code, given=cells[0], **options)
        counted.count(1)

        def alone(cell: dict[str, Any]) -> Run:
            run = self.trace(inputs, code, given=cell, **options)
            counted.count(1)
            return run

        def shared(some: list[dict[str, Any]], reuse: bool) -> tuple[list[Run], int] | None:  # noqa: FBT001
            made = self._in_one(inputs, code, some, options, sweep=number, reuse=reuse)
            counted.count(0 if made is None else len(made[0]))
            return made

        together = self._together(first, len(cells), memory, options)
        batches = Batches(alone, shared, together, ends_of(over, together))
        try:
            return Sweep(over, batches.run(cells, first))
        finally:
            if batches.checked:
                self._calls.all("end_sweep")

    def _together(self, first: Run, count: int, memory: int, options: Mapping[str, Any]) -> int:
        """How many traces one forward may have."""
        wanted = {name for name, value in options.items() if value and name not in ONE_FORWARD}
        hooks = self._running.acting(options.get("only"), options.get("without"))
        if wanted or hooks or count < 3:
            return 1
        return cells_at_once(self.model.rules, first.ids, memory)

    def _in_one(
        self,
        inputs: Any,
        code: str | Callable[..., Any],
        cells: list[dict[str, Any]],
        options: Mapping[str, Any],
        *,
        sweep: int,
        reuse: bool,
    ) -> tuple[list[Run], int] | None:
        limit = options.get("limit", LIMIT)
        source = trace_source(code, cells[0], options.get("first_line", 1))
        sources = [replace(source, given=given) for given in cells]
        with limited(self._calls, None if limit is None else limit * len(cells)):
            return self._running.sweep(
                self.model, inputs, sources, sweep=sweep, reuse=reuse,
                seed=options.get("seed", 0), progress=options.get("progress"),
            )  # fmt: skip
