"""Making guests' runs: within their limits, several in one forward where that is the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from flexmagic.client.failures import ON_THE_ENGINES
from flexmagic.client.hooks import sites_at
from flexmagic.client.sweep import site_bytes
from flexmagic.client.together import Wish, fills_up, run_together
from flexmagic.engine.declared import declares
from flexmagic.errors import FlexError, InputError
from flexmagic.layout.sites import Site
from flexmagic.workshop import answers
from flexmagic.workshop import requests as asked
from flexmagic.workshop.allowance import Allowance, OverLimitError
from flexmagic.workshop.journal import digest

if TYPE_CHECKING:
    from flexmagic.client.hooks import HookVersion
    from flexmagic.client.run import Run
    from flexmagic.client.tenant import Host
    from flexmagic.workshop.answers import Answer
    from flexmagic.workshop.desk import Job
    from flexmagic.workshop.guests import Guest
    from flexmagic.workshop.weights_watch import WeightsWatch

HELD = 50
"""How many runs of a guest the engines hold at most."""

REMEMBERED = 10_000
"""How much code it is remembered of that it has run well."""

IN_A_HOOK = (
    "This code runs on the engines, where the notebook's variables are not: "
    "define the name in the hook itself."
)
"""What a guest can do about a name that is not known."""

CHANGED = "The model's weights changed while this run was made, so its result is not to be trusted; "


@dataclass
class RunResult:
    """How a job ended; ``hooks``: a hash of them, ``together``: how many runs shared its forward."""

    job: Job
    hooks: str = ""
    seconds: float = 0.0
    together: int = 1
    answer: Answer | None = None
    error: FlexError | None = None


@dataclass(frozen=True)
class _Ready:
    """A run that may be made: its rows, tokens per row, and bytes that it captures."""

    rows: int
    length: int
    held: int
    result: RunResult

    @property
    def density(self) -> float:
        """Bytes captured for each token."""
        return self.held / max(1, self.rows * self.length)


class Runner:
    """Makes runs. ``alarm`` hears whose run changed which parameters, and says what was done about it.

    A hook's code shares no forward before the same code has run well by itself, at the same sites and for
    whomever: others would wait for what it breaks.
    """

    def __init__(
        self, host: Host, weights: WeightsWatch, alarm: Callable[[list[str], list[str]], str]
    ) -> None:
        self._host, self._weights, self._alarm = host, weights, alarm
        self._fills: dict[str, bool] = {}
        self._since: set[str] = set()
        self._looked = weights.checks
        self._proven: set[str] = set()

    def mates(self, first: Job, other: Job) -> bool:
        """Whether two runs may be made in one forward, as far as can be told from what is asked for."""
        requests = [job.request for job in (first, other) if isinstance(job.request, asked.MakeRun)]
        plain = all(r.new_tokens is None and r.stop_at is None and not r.skip for r in requests)
        return len(requests) == 2 and plain and self._proves_well(first) and self._proves_well(other)

    def _proves_well(self, job: Job) -> bool:
        acting = self._acting(job)
        sources = [version.source for version in acting]
        if not all(s.boxed or s.captures_only or declares(s) for s in sources):  # code that sees all rows
            return False
        return _boxed(acting) <= self._proven

    def _acting(self, job: Job) -> list[HookVersion]:
        """The hooks that act in a run."""
        tenant, request = job.guest.tenant, job.request
        if tenant is None or not isinstance(request, asked.MakeRun):
            return []
        try:
            acting = tenant.hooks.acting(request.only, request.without)
        except FlexError:  # the run will say it
            return []
        return [hook.current for hook in acting]

    def run(self, jobs: Sequence[Job], allowance: Allowance) -> list[RunResult]:
        """Make the runs of some jobs; every job has a result."""
        done, ready = [], list[_Ready]()
        self._host.limit(allowance.seconds)
        inputs = [job.request.inputs for job in jobs if isinstance(job.request, asked.MakeRun)]
        sizes = self._host.calls.one(0, "sizes_of", inputs)
        for job, size in zip(jobs, sizes, strict=True):
            result = RunResult(job, _hooks_of(job.guest))
            try:
                rows, length, held = self._check(job, size)
            except FlexError as error:
                result.error = error
                done.append(result)
            else:
                ready.append(_Ready(rows, length, held, result))
        for group in self._groups(ready, allowance):
            self._make(group)
            done += group
        self._after(len(jobs), [result.job.guest.name for result in done])
        return done

    def _groups(self, ready: list[_Ready], allowance: Allowance) -> list[list[RunResult]]:
        """What may share a forward: all, once it is known that filling up shorter rows changes nothing.

        A forward that is shared takes no more tokens, and no more bytes, than one guest's may.
        """
        fills = len({each.length for each in ready}) > 1 and self._fills_up()
        found: list[list[_Ready]] = []
        open_: dict[int, list[_Ready]] = {}
        for each in sorted(ready, key=lambda each: each.length):
            kind = 0 if fills else each.length
            group = [*open_.get(kind, []), each]
            tokens = sum(one.rows for one in group) * each.length
            if tokens > allowance.tokens or tokens * max(one.density for one in group) > allowance.captured:
                group = [each]
            if len(group) == 1:
                found.append(group)
            else:
                found[found.index(open_[kind])] = group
            open_[kind] = group
        return [[one.result for one in group] for group in found]

    def _fills_up(self) -> bool:
        """Whether filling up changes nothing in the model that is loaded now; measured once."""
        name = str(self._host.model)
        if name not in self._fills:
            self._fills[name] = fills_up(self._host)
        return self._fills[name]

    @property
    def since(self) -> list[str]:
        """Whose runs were made since all weights were last looked at, by whomever."""
        return sorted(self._since) if self._weights.checks == self._looked else []

    def _after(self, count: int, names: list[str]) -> None:
        self._since = {*self.since, *names}
        self._looked = self._weights.checks
        if unseen := self._weights.after_runs(count):
            self._alarm(sorted(self._since), unseen)

    def _check(self, job: Job, size: tuple[int, int] | FlexError) -> tuple[int, int, int]:
        """Raise what a guest may not have before anything runs; rows, tokens per row, bytes captured."""
        request = job.request
        assert isinstance(request, asked.MakeRun)
        if isinstance(size, FlexError):
            raise size
        rows, length = size
        use, tenant = job.guest.use, answers.tenant_of(job.guest)
        use.tokens(rows * (length + (request.new_tokens or 0)))
        model, held = tenant.model, 0
        if model.surveyed:
            patterns = [Site.parse(text) for text in request.capture]
            patterns += [
                p for h in tenant.hooks.acting(request.only, request.without) for p in h.current.patterns
            ]
            sites = {
                site for pattern in patterns if not pattern.is_gradient for site in sites_at(model, pattern)
            }
            sites |= {site for site in model.rules if not site.path and site.port == "output"}
            held = sum(site_bytes(model.rules[s], rows, length) for s in sites if not model.rules[s].refused)
            use.captured(held)
        return rows, length, held

    def _make(self, group: list[RunResult]) -> None:
        """Make runs of one length, in one forward if that can be, and take note of each."""
        began = time.perf_counter()
        if len(group) > 1:
            found, changed = self._host.watched(
                lambda: run_together(self._host, [_wish(r.job) for r in group]), self._weights.before_run
            )
            runs = found if isinstance(found, list) else None
            if changed:
                self._changed(group, changed)
                return
            if runs is not None:
                seconds = (time.perf_counter() - began) / len(group)
                with self._host.calls.bundling():
                    for result, run in zip(group, runs, strict=True):
                        result.together, result.seconds = len(group), seconds
                        self._keep(result, run)
                return
        for result in group:
            self._make_alone(result)

    def _make_alone(self, result: RunResult) -> None:
        job, began = result.job, time.perf_counter()
        made, changed = self._host.watched(lambda: _made(job), self._weights.before_run)
        result.seconds = time.perf_counter() - began
        code = _boxed(self._acting(job))
        if changed:
            self._changed([result], changed)
        elif isinstance(made, KeyboardInterrupt):
            result.error = InputError("The run was interrupted.")
        elif isinstance(made, FlexError):
            result.error = _to_guest(made)
            self._proven -= code
        else:
            if len(self._proven) > REMEMBERED:
                self._proven.clear()
            self._proven |= code
            self._keep(result, made)  # type: ignore[arg-type]  # what is left is a run

    def _changed(self, group: list[RunResult], parameters: list[str]) -> None:
        done = self._alarm([result.job.guest.name for result in group], parameters)
        for result in group:
            result.error = FlexError(CHANGED + done)

    def _keep(self, result: RunResult, run: Run) -> None:
        """Let the guest have a run, and let go of older ones where it holds too much."""
        guest = result.job.guest
        guest.runs[run.number] = run
        answers.tenant_of(guest).note(run)
        held = {number: bytes_of(one) for number, one in guest.runs.items()}
        most = guest.use.allowance.captured
        gone = []
        while (sum(held.values()) > most or len(held) > HELD) and held:
            oldest = min(held)
            del held[oldest]
            answers.forget(guest, oldest)
            gone.append(oldest)
        if run.number in gone:
            result.error = OverLimitError(
                f"This run captured {bytes_of(run):,} bytes; you may hold {most:,}. Capture fewer sites."
            )
            return
        header = answers.run_header(guest, run)
        header["gone"] = gone
        result.answer = header, []


def _to_guest(error: FlexError) -> FlexError:
    """An error of a hook's code, with what a guest can do about it."""
    error.args = (str(error).replace(ON_THE_ENGINES, IN_A_HOOK), *error.args[1:])
    return error


def _boxed(acting: Sequence[HookVersion]) -> set[str]:
    """Hashes of the code of hooks that runs in a box, each with where it does."""
    boxed = [version for version in acting if version.source.boxed]
    return {digest([v.source.text, str(v.source.limits), *map(str, v.patterns)]) for v in boxed}


_SIZES: WeakKeyDictionary[Run, int] = WeakKeyDictionary()


def bytes_of(run: Run) -> int:
    """What a run holds on all engines together."""
    if run not in _SIZES:
        answers_ = run.known["answers"]
        _SIZES[run] = sum(s.reply.nbytes for answer in answers_ for s in getattr(answer, "steps", [answer]))
    return _SIZES[run]


def _wish(job: Job) -> Wish:
    request = job.request
    assert isinstance(request, asked.MakeRun)
    return Wish(
        answers.tenant_of(job.guest), request.inputs, list(request.capture), request.seed, request.only,
        list(request.without),
    )  # fmt: skip


def _made(job: Job) -> Run:
    """One run by itself."""
    request, tenant = job.request, answers.tenant_of(job.guest)
    assert isinstance(request, asked.MakeRun)
    options: dict[str, Any] = answers.options_of(request)
    if request.new_tokens is not None:
        options["progress"] = lambda waited: setattr(job, "waited", waited)
        return tenant.generate(request.inputs, request.new_tokens, **options, **request.sampling)
    return tenant.run(request.inputs, stop_at=request.stop_at, **options)


def _hooks_of(guest: Guest) -> str:
    """A hash of the hooks that are on."""
    if guest.tenant is None:
        return ""
    return digest(
        f"{h.name} {h.sites} {h.current.source.limits} {h.current.source.text}"
        for h in guest.tenant.hooks.enabled
    )
