"""Runs: planned with what is known of the model, made on all ranks, and asked for what went wrong."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.client import failures
from flexmagic.client.calls import Calls, Progress
from flexmagic.client.hooks import HookBook
from flexmagic.client.model import Model
from flexmagic.client.run import Run
from flexmagic.errors import FlexError, ModelError, SiteError, StuckError
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.engine.runtime import RunPlan
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
        **options: Any,
    ) -> Run:
        """One run; a model that changed since its survey is surveyed anew first.

        Raises :class:`InputError`, :class:`HookError` or :class:`ModelError`.
        """
        patterns = [Site.parse(t) for t in ([capture] if isinstance(capture, str) else capture)]
        if not model.surveyed:
            model.update(self._calls.all("survey_for", inputs, progress=progress))
        key = (self._owner, next(self._numbers))
        attempt = functools.partial(
            self._attempt, model, patterns, inputs, progress=progress, key=key, **options
        )
        made = attempt()
        if made is None:  # the model, or the kind of input, is a new one
            model.update(self._calls.all("survey_for", inputs, progress=progress))
            made = attempt()
        if made is None:
            msg = "The model changes with every forward, so that no survey of it holds."
            raise ModelError(msg)
        planned, acted, answers = made
        self._print(answers)
        try:
            failures.raise_for([answer.reply for answer in answers], model.rules)
        except FlexError:
            self._calls.all("release", planned.key)
            raise
        return Run(planned.key, self._calls, answers, model.rules, acted)

    def _attempt(
        self, model: Model, patterns: list[Site], inputs: Any, *, progress: Progress | None, **options: Any
    ) -> tuple[RunPlan, dict[Site, str], list[RunAnswer]] | None:
        """Plan a run with what is known of the model, and make it; ``None`` if that no longer holds."""
        from flexmagic.client.planning import plan

        if options["backward"] is not None and not model.knows_gradients:
            model.update(self._calls.all("survey_gradients", inputs, progress=progress))
        try:
            planned, acted = plan(model, self._hooks.enabled, patterns, **options)
        except SiteError:
            if any(self._calls.all("is_stale", inputs)):
                return None
            raise
        try:
            answers = self._calls.all("run", planned, inputs, progress=progress)
        except (StuckError, KeyboardInterrupt) as ended:
            with contextlib.suppress(FlexError):  # an engine that had to be ended has no captures to drop
                self._calls.all("release", planned.key)
            if isinstance(ended, StuckError):
                failures.raise_for_stuck(ended, self._calls.world_size)
            raise
        if len({answer.reply.error for answer in answers if answer is not None}) > 1:
            self._calls.rebuild()  # a rank that left the forward alone may have left half a message behind
        return None if None in answers else (planned, acted, answers)

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
