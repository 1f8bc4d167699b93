"""Runs: planned with what is known of the model, made on all ranks, and asked for what went wrong."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.client import failures
from flexmagic.client.calls import Calls, Progress
from flexmagic.client.hook_book import HookBook, Names
from flexmagic.client.hooks import Hook
from flexmagic.client.model import Model
from flexmagic.client.notes import notes
from flexmagic.client.run import Run
from flexmagic.errors import FlexError, ModelError, SiteError
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.client.planning import Planned
    from flexmagic.engine.verbs import RunAnswer


class Running:
    """Makes a session's runs and numbers them."""

    def __init__(
        self, calls: Calls, owner: str, hooks: HookBook, printer: Callable[[str], None] = print
    ) -> None:
        self._calls = calls
        self._owner = owner
        self._hooks = hooks
        self._printer = printer
        self._numbers = itertools.count(1)

    def run(
        self,
        model: Model,
        inputs: Any,
        capture: str | Sequence[str],
        *,
        progress: Progress | None,
        only: Names | None = None,
        without: Names = (),
        **options: Any,
    ) -> Run:
        """One run; a model that changed since its survey is surveyed anew first.

        Raises :class:`InputError`, :class:`HookError` or :class:`ModelError`.
        """
        patterns = [Site.parse(t) for t in ([capture] if isinstance(capture, str) else capture)]
        if not model.surveyed:
            model.update(self._calls.all("survey_for", inputs, progress=progress))
        hooks = self._hooks.acting(only, without)
        key = (self._owner, next(self._numbers))
        attempt = functools.partial(
            self._attempt, model, hooks, patterns, inputs, progress=progress, key=key, **options
        )
        made = attempt()
        if made is None:  # the model, or the kind of input, is a new one
            model.update(self._calls.all("survey_for", inputs, progress=progress))
            made = attempt()
        if made is None:
            msg = "The model changes with every forward, so that no survey of it holds."
            raise ModelError(msg)
        planned, answers = made
        self._print(answers)
        try:
            failures.raise_for([answer.reply for answer in answers], model.rules)
        except FlexError:
            self._calls.all("release", planned.run.key)
            raise
        said = notes(planned.hooks, [answer.reply.outcome for answer in answers], steps=1)
        for note in said:
            self._printer(f"Note: {note}")
        return Run(
            planned.run.key, self._calls, answers, model.rules, hooks=planned.hooks, warnings=tuple(said)
        )

    def _attempt(
        self,
        model: Model,
        hooks: list[Hook],
        patterns: list[Site],
        inputs: Any,
        *,
        progress: Progress | None,
        **options: Any,
    ) -> tuple[Planned, list[RunAnswer]] | None:
        """Plan a run with what is known of the model, and make it; ``None`` if that no longer holds."""
        from flexmagic.client.planning import plan

        if options["backward"] is not None and not model.knows_gradients:
            model.update(self._calls.all("survey_gradients", inputs, progress=progress))
        try:
            planned = plan(model, hooks, patterns, **options)
        except SiteError:
            if any(self._calls.all("is_stale", inputs)):
                return None
            raise
        answers = self._calls.all("run", planned.run, inputs, progress=progress)
        return None if None in answers else (planned, answers)

    def _print(self, answers: list[RunAnswer]) -> None:
        """Show what hooks printed: once if all ranks printed the same, else by rank."""
        printed = ["".join(text for _, _, text in answer.reply.outcome.printed) for answer in answers]
        if len(set(printed)) == 1:
            if printed[0]:
                self._printer(printed[0].rstrip("\n"))
            return
        for rank, text in enumerate(printed):
            for line in text.splitlines():
                self._printer(f"[rank {rank}] {line}")
