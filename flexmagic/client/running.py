"""Runs: planned with what is known of the model, made on all ranks, and asked for what went wrong."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.client import failures
from flexmagic.client.calls import Calls
from flexmagic.client.cell_run import CellRun
from flexmagic.client.displays import printed
from flexmagic.client.generation import Generation
from flexmagic.client.hook_book import HookBook, Names
from flexmagic.client.model import Model
from flexmagic.client.notes import RoomNotes, notes
from flexmagic.client.planning import Planned, plan
from flexmagic.client.run import Run
from flexmagic.client.streaming import Streaming
from flexmagic.client.waiting import Progress
from flexmagic.errors import CellError, FlexError, HookError, ModelError, SiteError, StuckError
from flexmagic.layout.patterns import listed
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.engine.cell import CellAnswer
    from flexmagic.engine.code import HookSource
    from flexmagic.engine.tracing import TraceSource
    from flexmagic.engine.verbs import RunAnswer


class Running:
    """Makes a session's runs and numbers them."""

    def __init__(
        self,
        calls: Calls,
        owner: str,
        hooks: HookBook,
        *,
        printer: Callable[[str], None] = printed,
        note: Callable[[Run], None] = lambda _run: None,
        first: int = 1,
    ) -> None:
        self._calls = calls
        self._owner = owner
        self._hooks = hooks
        self.printer = printer
        self._streaming = Streaming(self._show, calls.world_size)
        self._room = RoomNotes()
        self._note = note
        self._numbers = itertools.count(first)

    def _show(self, text: str) -> None:
        self.printer(text)

    def run(self, model: Model, inputs: Any, capture: str | Sequence[str], **options: Any) -> Run:
        """One run; a model that changed since its survey is surveyed anew first.

        Raises :class:`InputError`, :class:`HookError` or :class:`ModelError`.
        """
        planned, answers = self._made(model, inputs, capture, "run", (), **options)
        said = self._checked(planned, [[answer] for answer in answers], model)
        end = str(planned.run.short.stop_at or "")
        run = Run(
            planned.run.key, self._calls, answers, model.rules,
            hooks=planned.all_hooks, warnings=said, end=end, standing_for=model.standing_for,
            seed=planned.run.seed,
        )  # fmt: skip
        self._note(run)
        return run

    def sweep(
        self,
        model: Model,
        inputs: Any,
        sources: Sequence[TraceSource],
        *,
        sweep: int,
        reuse: bool,
        seed: int,
        progress: Progress | None,
    ) -> tuple[list[Run], int] | None:
        """The runs of several traces, made in one forward of all their rows; ``None`` if that cannot be.

        And how many layers of the model did not run, as what the traces of ``sweep`` have in common before
        their first edits was known; only with ``reuse``. They are not noted for a notebook that starts
        again: there may be very many.
        """
        from flexmagic.engine.sweeping import Traces

        numbers = [next(self._numbers) for _ in sources]
        planned = plan(model, [], [], key=(self._owner, next(self._numbers)), seed=seed)
        answers = self._answers(
            planned, "run_sweep", inputs, (Traces(sources, numbers, sweep, reuse),), progress
        )
        if None in answers:
            return None
        try:
            failures.raise_for([answer.reply for answer in answers], model.rules)
        except (HookError, ModelError):  # each trace alone says it better, or has another reason
            for number in numbers:
                self._calls.all("release", (self._owner, number))
            return None
        self.tell([[answer] for answer in answers])
        runs = [
            Run(
                (self._owner, number), self._calls, [answer.cells[at] for answer in answers], model.rules,
                standing_for=model.standing_for,
            )
            for at, number in enumerate(numbers)
        ]  # fmt: skip
        return runs, answers[0].reused

    def number(self) -> int:
        """A number that no run has."""
        return next(self._numbers)

    def acting(self, only: Names | None, without: Names | None) -> bool:
        """Whether any hook acts in a run."""
        return bool(self._hooks.acting(only, without))

    def generate(
        self,
        model: Model,
        inputs: Any,
        capture: str | Sequence[str],
        max_new_tokens: int,
        generating: Mapping[str, Any],
        **options: Any,
    ) -> Generation:
        """One generation; raises as :meth:`run` does."""
        from flexmagic.engine.generation import Request

        request = Request(max_new_tokens, generating)
        planned, answers = self._made(model, inputs, capture, "generate", (request,), **options)
        said = self._checked(planned, [answer.steps for answer in answers], model)
        key = planned.run.key
        run = Generation(
            key, self._calls, answers, model.rules,
            hooks=planned.all_hooks, warnings=said, standing_for=model.standing_for, seed=planned.run.seed,
        )  # fmt: skip
        self._note(run)
        return run

    def cell(
        self,
        model: Model,
        source: HookSource,
        capture: str | Sequence[str],
        *,
        progress: Progress | None,
        only: Names | None,
        without: Names | None,
        **options: Any,
    ) -> CellRun:
        """One cell; raises :class:`CellError`, and as :meth:`run` does."""
        if not model.surveyed:
            raise ModelError(
                "What this model takes is not known yet: run it once with %flexrun --inputs first."
            )
        from flexmagic.engine.verbs import RunAnswer

        patterns, hooks = [Site.parse(text) for text in listed(capture)], self._hooks.acting(only, without)
        key = (self._owner, next(self._numbers))

        def attempt() -> tuple[Planned, list[CellAnswer | None]]:
            planned = plan(model, hooks, patterns, key=key, **options)
            heard = self._streaming.beside(progress)
            return planned, self._calls.all("run_cell", planned.run, source, progress=heard)

        try:
            planned, answers = attempt()
            if None in answers:  # the model changed since its survey
                model.update(self._calls.all("survey_for", [0], progress=progress))
                planned, answers = attempt()
        except CellError as error:
            raise failures.cell_failed(error, self._calls.world_size) from None
        made = [answer for answer in answers if answer is not None]
        self._streaming.end([answer.printed for answer in made], [answer.shown for answer in made])
        steps = [[RunAnswer(step.reply, [], step.ids) for step in answer.steps] for answer in made]
        if any(steps):
            self._checked(planned, steps, model)
        if stopped := sorted({answer.failed for answer in made if answer.failed}):
            raise FlexError("The cell was ended on all ranks together: " + "; ".join(stopped))
        runs = [
            Run((*key, n), self._calls, [of_rank[n] for of_rank in steps], model.rules, hooks=planned.hooks)
            for n in range(min(map(len, steps)))
        ]
        return CellRun(made, runs)

    def _made(
        self,
        model: Model,
        inputs: Any,
        capture: str | Sequence[str],
        verb: str,
        more: tuple[Any, ...],
        *,
        progress: Progress | None,
        only: Names | None = None,
        without: Names | None = None,
        **options: Any,
    ) -> tuple[Planned, list[Any]]:
        """A run's plan and every rank's answer to it, whatever it says."""
        patterns = [Site.parse(text) for text in listed(capture)]
        if not model.surveyed:
            model.update(self._calls.all("survey_for", inputs, progress=progress))
        hooks = self._hooks.acting(only, without)
        key = (self._owner, next(self._numbers))

        def attempt() -> tuple[Planned, list[Any]] | None:
            """Plan with what is known of the model, and run; ``None`` if that no longer holds."""
            if options.get("backward") is not None and not model.knows_gradients:
                model.update(self._calls.all("survey_gradients", inputs, progress=progress))
            try:
                planned = plan(model, hooks, patterns, key=key, **options)
            except SiteError:
                if any(self._calls.all("is_stale", inputs)):
                    return None
                raise
            answers = self._answers(planned, verb, inputs, more, progress)
            return None if None in answers else (planned, answers)

        made = attempt()
        if made is None:  # the model, or the kind of input, is a new one
            model.update(self._calls.all("survey_for", inputs, progress=progress))
            made = attempt()
        if made is None:
            msg = "The model changes with every forward, so that no survey of it holds."
            raise ModelError(msg)
        return made

    def _answers(
        self, planned: Planned, verb: str, inputs: Any, more: tuple[Any, ...], progress: Progress | None
    ) -> list[Any]:
        """Every rank's answer; what failed first is the error if ranks could not meet."""
        try:
            heard = self._streaming.beside(progress)
            answers = self._calls.all(verb, planned.run, inputs, *more, progress=heard)
        except (StuckError, KeyboardInterrupt) as ended:
            self._streaming.end()
            with contextlib.suppress(FlexError):  # an engine that had to be ended has no captures to drop
                self._calls.all("release", planned.run.key)
            if isinstance(ended, StuckError):
                failures.raise_for_stuck(ended, self._calls.world_size)
            raise
        if len({failures.model_error(answer) for answer in answers if answer is not None}) > 1:
            self._calls.rebuild()  # a rank that left the forward alone may have left half a message behind
        return answers

    def _checked(self, planned: Planned, steps: list[list[RunAnswer]], model: Model) -> tuple[str, ...]:
        """Print what hooks said, raise what went wrong; what the user should know of a run that went well.

        ``steps``: each rank's answers, one per forward.
        """
        self.tell(steps)
        try:
            for at in range(max(map(len, steps))):
                replies = [of_rank[min(at, len(of_rank) - 1)].reply for of_rank in steps]
                failures.raise_for(replies, model.rules)
        except FlexError:
            self._calls.all("release", planned.run.key)
            raise
        by_rank = [[answer.reply for answer in of_rank] for of_rank in steps]
        cut = planned.run.short.stop_at is not None or bool(planned.run.short.skip)
        said = [*notes(planned.hooks, by_rank, cut=cut), *self._room.notes([of[-1].room for of in by_rank])]
        for note in said:
            self.printer(f"Note: {note}")
        return tuple(said)

    def tell(self, steps: list[list[RunAnswer]]) -> None:
        """Show what hooks printed and displayed and was not shown meanwhile."""
        by_rank = [[answer.reply.outcome for answer in of_rank] for of_rank in steps]
        self._streaming.end(
            ["".join(text for outcome in of for _, _, text in outcome.printed) for of in by_rank],
            [{n: shown for outcome in of for n, shown in outcome.shown.items()} for of in by_rank],
        )
        for outcome in (outcome for of in by_rank for outcome in of):
            outcome.shown.clear()  # it may be large, and is not shown again
