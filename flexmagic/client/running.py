"""Runs: planned with what is known of the model, made on all ranks, and asked for what went wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.client import failures
from flexmagic.client.calls import Calls, Progress
from flexmagic.client.generation import Generation
from flexmagic.client.hook_book import HookBook, Names
from flexmagic.client.model import Model
from flexmagic.client.notes import notes
from flexmagic.client.planning import Planned, plan
from flexmagic.client.run import Run
from flexmagic.errors import FlexError, ModelError, SiteError
from flexmagic.layout.patterns import listed
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.engine.verbs import RunAnswer


class Running:
    """Makes a session's runs and numbers them."""

    def __init__(
        self,
        calls: Calls,
        owner: str,
        hooks: HookBook,
        *,
        printer: Callable[[str], None] = print,
        note: Callable[[Run], None] = lambda _run: None,
        first: int = 1,
    ) -> None:
        self._calls = calls
        self._owner = owner
        self._hooks = hooks
        self._printer = printer
        self._note = note
        self._numbers = itertools.count(first)

    def run(self, model: Model, inputs: Any, capture: str | Sequence[str], **options: Any) -> Run:
        """One run; a model that changed since its survey is surveyed anew first.

        Raises :class:`InputError`, :class:`HookError` or :class:`ModelError`.
        """
        planned, answers = self._made(model, inputs, capture, "run", (), **options)
        said = self._checked(planned, [[answer] for answer in answers], model)
        end = str(planned.run.short.stop_at or "")
        run = Run(
            planned.run.key, self._calls, answers, model.rules,
            hooks=planned.hooks, warnings=said, end=end, standing_for=model.standing_for,
        )  # fmt: skip
        self._note(run)
        return run

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
            hooks=planned.hooks, warnings=said, standing_for=model.standing_for,
        )  # fmt: skip
        self._note(run)
        return run

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
            answers = self._calls.all(verb, planned.run, inputs, *more, progress=progress)
            return None if None in answers else (planned, answers)

        made = attempt()
        if made is None:  # the model, or the kind of input, is a new one
            model.update(self._calls.all("survey_for", inputs, progress=progress))
            made = attempt()
        if made is None:
            msg = "The model changes with every forward, so that no survey of it holds."
            raise ModelError(msg)
        return made

    def _checked(self, planned: Planned, steps: list[list[RunAnswer]], model: Model) -> tuple[str, ...]:
        """Print what hooks said, raise what went wrong; what the user should know of a run that went well.

        ``steps``: each rank's answers, one per forward.
        """
        self._print(steps)
        try:
            for at in range(max(map(len, steps))):
                replies = [of_rank[min(at, len(of_rank) - 1)].reply for of_rank in steps]
                failures.raise_for(replies, model.rules)
        except FlexError:
            self._calls.all("release", planned.run.key)
            raise
        outcomes = [answer.reply.outcome for of_rank in steps for answer in of_rank]
        cut = planned.run.short.stop_at is not None or bool(planned.run.short.skip)
        said = notes(planned.hooks, outcomes, steps=len(steps[0]), cut=cut)
        for note in said:
            self._printer(f"Note: {note}")
        return tuple(said)

    def _print(self, steps: list[list[RunAnswer]]) -> None:
        """Show what hooks printed: once if all ranks printed the same, else by rank."""
        printed = [
            "".join(text for answer in of_rank for _, _, text in answer.reply.outcome.printed)
            for of_rank in steps
        ]
        if len(set(printed)) == 1:
            if printed[0]:
                self._printer(printed[0].rstrip("\n"))
            return
        for rank, text in enumerate(printed):
            for line in text.splitlines():
                self._printer(f"[rank {rank}] {line}")
