"""An intervention as one straight-line cell: a coroutine that goes on where the forward is at what it reads.

The cell runs in a coroutine of the main thread. When it asks for a site, it stops, and the forward goes on
until it gets there; then the cell gets the whole tensor and goes on to the next site it asks for. What it
does in between is done at the site where it is. The cell's text is all there is: no frame is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from greenlet import GreenletExit, greenlet

from flexmagic.engine.code import HookSource
from flexmagic.engine.exchange import RunStopped
from flexmagic.engine.tensors import dtype_name
from flexmagic.errors import LayoutError, SiteError
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site

MOST = 100_000
"""So often a cell may ask for the site at which it is; more is taken for a loop without an end."""


class Cell(Protocol):
    """What a coroutine runs, and what the watch says of it."""

    @property
    def source(self) -> HookSource:
        """The user's code."""

    def run(self) -> None:
        """Run it from its first line to its last."""


class Trace:
    """One cell in one forward, or in those of a generation: where it is, what it waits for, its tensor.

    What the cell asked for in vain is raised in the coroutine, so that the error has the user's line.
    ``steps``: how many forwards a generation may have, ``None`` for a run of one.
    ``line``: of a pipeline the ranks of its stages, one for each; else all ranks. ``reach`` is called with
    each site that the cell begins to wait for.
    """

    cell: Cell
    steps: int | None = None
    reach: Callable[[Site], None] = staticmethod(lambda _site: None)

    def __init__(
        self, rules: Mapping[Site, Rule], world_size: int, line: tuple[int, ...] | None = None
    ) -> None:
        self._rules, self._everyone, self._line = rules, set(range(world_size)), line
        self._coroutine: greenlet | None = None
        self._grad: bool | None = None
        self._over = False
        self._differentiates = False
        self._step = 0
        self._next: tuple[int, bool] | None = None
        self.waits_for: Site | None = None
        self._at: Site | None = None
        self._value: torch.Tensor | None = None
        self._given: list[torch.Tensor] = []
        self._asked = 0
        self._passed: set[Site] = set()
        self._left: list[tuple[torch.Tensor, int, str]] = []
        self._origins: dict[Any, Site] = {}

    # --- the forward's side ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Run the cell up to the first thing that it waits for, or on from there; raises what it raises."""
        if self._coroutine is not None:
            self._switch(True)  # noqa: FBT003 - what the coroutine's own call returns
            return
        self._coroutine, self._differentiates = greenlet(_body), torch.is_grad_enabled()
        self._switch(self)

    @property
    def waiting(self) -> str:
        """What the cell waits for, in words."""
        if self._next is not None:
            return f"step {self._next[0]}"
        return "nothing more" if self.waits_for is None else str(self.waits_for)

    def begins(self, step: int) -> bool:
        """A generation's forward begins: whether the cell waits for that."""
        self._step = step
        self._passed.clear()
        return self._next is not None and self._next[0] == step

    def passes(self, sites: Sequence[Site]) -> bool:
        """The forward is at some sites: whether the cell waits for none of them."""
        if self.waits_for in sites:
            return False
        self._passed.update(sites)
        return True

    def passed(self, rank: int) -> None:
        """The turn of another pipeline stage is over, of which this is a rank."""
        self._passed.update(
            site for site, rule in self._rules.items() if tuple(self._at_stages(rule)) == (rank,)
        )

    def arrive(self, x: torch.Tensor) -> torch.Tensor:
        """Let the cell go on with the tensor it waits for; returns what it left there, or ``x`` itself.

        Raises what the cell raises.
        """
        assert self.waits_for is not None  # meets() said so
        site, self._at, self.waits_for = self.waits_for, self.waits_for, None
        before, self._asked = x._version, 0  # noqa: SLF001 - torch's documented counter
        self._value, self._given = x, []
        try:
            self._switch()
            left = self._value
            self._check_carried(left)
        finally:
            self._left += [(_counter(t), t._version, _too_late(site)) for t in self._given]  # noqa: SLF001
            self._at, self._value, self._given = None, None, []
            self._passed.add(site)
        changed = left is not x or x._version != before  # noqa: SLF001
        return (
            left.clone() if changed else x
        )  # the model may write into what it gets, and the cell keeps its own

    def end(self, *, over: bool = True) -> None:
        """A forward is over, or with it the run; raises if the cell still waits for something in it.

        At the end of the run also if it wrote into a tensor too late.
        """
        self._over = over
        if self.waits_for is not None:
            which = "this run" if self.steps is None else f"step {self._step}"
            msg = (
                f"{self.waits_for} was never reached in {which}. The forward is over: its module does not "
                "run in it, or runs before what the cell waited for. Read sites in the order of the forward."
            )
            self._switch(SiteError(msg))

        if over and self._next is not None:
            step, needed = self._next
            msg = (
                f"step {step} was never reached: the generation had steps 0 to {self._step}. Generate more "
                f"tokens, or end before it: model.steps[:{self._step + 1}]. A slice without an end takes "
                "those that there are."
            )
            self._switch(SiteError(msg) if needed else False)
        if over:
            self._check_left()

    def close(self) -> None:
        """Let go of a cell that did not come to its end."""
        self._over = True
        if self._coroutine is not None and not self._coroutine.dead:
            with contextlib.suppress(BaseException):  # it is only to let go
                self._switch(GreenletExit())
        self._coroutine = None
        self._left, self._origins = [], {}

    def _switch(self, given: object = None) -> None:
        """Go over to the cell, in its own grad mode, until it stops or ends; an exception is raised there.

        What it wants done by all ranks together is done here, where :class:`RunStopped` ends the run.
        """
        assert self._coroutine is not None  # begin() made it
        grad = torch.is_grad_enabled()
        torch.set_grad_enabled(grad if self._grad is None else self._grad)
        try:
            throw, switch = self._coroutine.throw, self._coroutine.switch
            wanted = throw(given) if isinstance(given, BaseException) else switch(given)
            while callable(wanted):
                try:
                    done = wanted()
                except RunStopped:
                    raise
                except Exception as error:  # noqa: BLE001 - whatever it is, the cell's line asked for it
                    wanted = throw(error)
                else:
                    wanted = switch(done)
        finally:
            self._grad = torch.is_grad_enabled()
            torch.set_grad_enabled(grad)

    # --- the cell's side ------------------------------------------------------------------------------

    def read(self, site: Site) -> torch.Tensor:
        """The whole tensor at a site, once the forward is there; raises :class:`SiteError` or a refusal."""
        value = self._reach(site, "read")
        if not any(value is given for given in self._given):
            self._given.append(value)
            if value.grad_fn is not None:
                self._origins.setdefault(value.grad_fn, site)
        return value

    def write(self, site: Site, new: Any) -> None:
        """Make a copy of a tensor a site's value, once the forward is there."""
        value = self._reach(site, "assigned")
        if new is value:  # as after ``site *= 2``
            return
        if not isinstance(new, torch.Tensor):
            raise TypeError(f"{site} was assigned {type(new).__name__}; it takes a tensor")
        if (new.shape, new.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"{site} is {_kind(value)} and was assigned {_kind(new)}; shape and dtype must stay"
            )
        if new.device != value.device:
            raise ValueError(f"{site} is on {value.device} and was assigned a tensor on {new.device}")
        self._value = new.clone()
        self._check_carried(self._value)

    def ask(self, what: str, do: Callable[[], Any]) -> Any:
        """Have something done by all ranks together, where the forward is; returns what that gives."""
        self._check_left()
        if self._over:
            raise SiteError(f"{what} was asked for after the forward was over. Ask for it before.")
        if self._line is not None:
            raise SiteError(f"no rank of a pipeline has {what} whole. Load the model with --tp or --fsdp.")
        if self._differentiates:
            raise SiteError(
                f"a run with gradients cannot use {what}: the gradient through it would not be that of one "
                "process. Leave the loss out of this run."
            )
        return self._stop(do)

    def watch(self, tensor: torch.Tensor, why: str) -> None:
        """Refuse to go on, saying why, once something was written into a tensor."""
        self._left.append((_counter(tensor), tensor._version, why))  # noqa: SLF001

    def go_to(self, step: int, *, needed: bool) -> bool:
        """Stop until a generation's forward of this number begins; ``False`` for none that is not needed."""
        self._check_left()
        if self.steps is None:
            raise SiteError(
                "this run is one forward and has no steps. Give the cell a generation: --generate 8, "
                "max_new_tokens=8 in Python."
            )
        if step < self._step or (step == self._step and self._over):
            raise SiteError(
                f"step {step} has passed; the generation is at step {self._step}. Take later ones: "
                f"for step in model.steps[{self._step + 1}:]"
            )
        if step == self._step:
            return True
        if self._over:
            return False
        self._next = step, needed
        try:
            return bool(self._stop())
        finally:
            self._next = None

    def _reach(self, site: Site, done: str) -> torch.Tensor:
        """Stop until the forward is at a site, unless it is there now."""
        self._check_left()
        if site == self._at:
            self._asked += 1
            if self._asked > MOST:
                raise SiteError(
                    f"the cell asked for {site} {MOST:,} times without going on to another site: is that a "
                    "loop without an end?"
                )
        else:
            self._check(site, done)
            self._wait(site)
        assert self._value is not None  # arrive() sets it
        return self._value

    def _wait(self, site: Site) -> None:
        self.waits_for = site
        self.reach(site)
        try:
            self._stop()
        finally:
            self.waits_for = None

    def _stop(self, wanted: Callable[[], Any] | None = None) -> Any:
        """Go back to the forward, with what it is to do at once, if anything."""
        assert self._coroutine is not None  # this is running in it
        maker = self._coroutine.parent
        assert maker is not None  # it waits for this coroutine
        return maker.switch(wanted)

    def _check(self, site: Site, done: str) -> None:
        rule = self._rules[site]
        if self._over:
            raise SiteError(
                f"{site} was {done} after the forward was over. Read it before, where it is computed."
            )
        if rule.refused:
            raise LayoutError(f"{site} is refused: {rule.refused}")
        stages = self._at_stages(rule)
        if self._line is not None and len(stages) > 1 and site.path:
            raise LayoutError(f"{site} is on several pipeline stages, each of which comes there by itself")
        if not stages or (self._line is None and set(stages) != self._everyone):
            ranks = ", ".join(map(str, rule.ranks))
            raise LayoutError(f"{site} is on rank {ranks} only, and a trace runs on all ranks together")
        if site in self._passed:
            now = f"; the forward is at {self._at}" if self._at else ""
            how = (
                "Move this line up: sites are read in the order of the forward, and what was read stays "
                "readable under a name."
                if done == "read"
                else "Within one forward a value cannot go back to an earlier site: save it in one run and "
                "assign it in the next, or take it from another row."
            )
            later = "" if self.steps is None else " In the next forward: for step in model.steps[1:]."
            raise SiteError(f"{site} was {done} after it had passed{now}. {how}{later}")

    def everywhere(self, site: Site) -> bool:
        """Whether all stages of a pipeline come to a site together."""
        return len(self._at_stages(self._rules[site])) > 1

    def _at_stages(self, rule: Rule) -> list[int]:
        """The ranks that hold a site, of a pipeline one for each stage that does."""
        return [rank for rank in self._line or sorted(self._everyone) if rank in rule.ranks]

    def _check_left(self) -> None:
        """Raise :class:`SiteError` for a tensor that was written into when that changes nothing any more."""
        for at, (counter, version, why) in enumerate(self._left):
            if counter._version != version:  # noqa: SLF001
                del self._left[at]
                raise SiteError(why)

    def _check_carried(self, left: torch.Tensor | None) -> None:
        """Raise :class:`LayoutError` for a value through which a gradient would go back to another site."""
        if left is None or left.grad_fn is None:
            return
        queue, seen = [left.grad_fn], set[Any]()
        while queue:
            node = queue.pop()
            if node in seen:
                continue
            seen.add(node)
            origin = self._origins.get(node)
            if origin is None:
                queue += [before for before, _ in node.next_functions if before is not None]
            elif origin != self._at:
                raise LayoutError(
                    f"a run with gradients cannot carry a value from {origin} to {self._at}: the gradient "
                    "through it would not be that of one process. Cut it: .detach()"
                )

    def __str__(self) -> str:
        """The site at which the cell is."""
        return "" if self._at is None else str(self._at)


def _body(trace: Trace) -> None:
    _guarded(trace.cell, trace)


def _guarded(hook: Cell, site: Trace) -> None:
    """User code, under the name and with the variables by which the watch knows it; ``site`` tells where."""
    assert site.cell is hook
    hook.run()


def _counter(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without data that shares the version counter of one and its views."""
    alias = tensor.detach()
    alias.data = alias.new_empty(0)
    return alias


def _too_late(site: Site) -> str:
    return (
        f"the tensor read at {site} was written into after the site had passed, which changes "
        "nothing in the model. Write into it right after reading it, or into a copy: .clone()"
    )


def _kind(tensor: torch.Tensor) -> str:
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
