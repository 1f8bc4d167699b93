"""One forward of the model: its captures, tokens and what the hooks printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from flexmagic.client.activation import Activation, Origin, Siblings
from flexmagic.client.table import Table
from flexmagic.errors import LayoutError, SiteError
from flexmagic.layout.patterns import path_matches
from flexmagic.layout.sites import LOGITS, Site, one_of, resolve

if TYPE_CHECKING:
    from flexmagic.client.aliases import Target
    from flexmagic.client.calls import Calls
    from flexmagic.client.planning import Acting
    from flexmagic.engine.captures import RunKey
    from flexmagic.engine.verbs import RunAnswer
    from flexmagic.layout.rule import Rule


class Run:
    """What a forward left behind; index it with a site to get that site's :class:`Activation`.

    ``warnings``: hooks that did not act, one sentence each. ``seed``: what fixed its random draws.
    ``among``: all steps of the generation, or forwards of the cell, that this is one of.
    """

    def __init__(
        self,
        key: RunKey,
        calls: Calls,
        answers: list[RunAnswer],
        rules: Mapping[Site, Rule],
        *,
        hooks: Sequence[Acting] = (),
        warnings: tuple[str, ...] = (),
        end: str = "",
        seed: int = 0,
        standing_for: Callable[[Site], list[Target]] | None = None,
    ) -> None:
        self.known: dict[str, Any] = {
            "key": key, "answers": answers, "hooks": hooks, "warnings": warnings, "end": end, "seed": seed,
        }  # fmt: skip
        self._key = key
        self._calls = calls
        self._answers = answers
        self._rules = rules
        self._hooks = hooks
        self.warnings = warnings
        self.seed = seed
        self._end = end
        self._standing_for = standing_for or _itself
        self._context: dict[str, Any] | None = None
        self._lives = tuple(calls.lives)
        self._local = [answer.reply.local for answer in answers]
        self.among: Sequence[Run] = ()

    @property
    def lost(self) -> tuple[int, ...]:
        """The ranks that hold nothing of it any more, as their engines have ended."""
        return self._calls.gone(self._lives)

    def lost_on(self, ranks: Iterable[int]) -> None:
        """Note that ranks hold nothing of it any more, as their engines are not those that it was made on."""
        gone = set(ranks)
        self._lives = tuple(life - (rank in gone) for rank, life in enumerate(self._lives))

    @property
    def number(self) -> int:
        """The run's number in its session, counted from 1."""
        return self._key[1]

    @property
    def sites(self) -> list[str]:
        """The sites that were captured, in the model's order."""
        return [str(site) for site in self._captured]

    def _ipython_key_completions_(self) -> list[str]:
        """What IPython offers inside ``run["…"]``: the sites, the port left away where it is the output."""
        return [site.removesuffix(":output") for site in self.sites]

    @cached_property
    def _captured(self) -> list[Site]:
        held = set[Site]().union(*self._local)
        return [site for site in self._rules if site in held]

    def has(self, site: str) -> bool:
        """Whether a site was captured, or one that a pattern names."""
        return any(resolve(own, self._captured) for own, _ in self._standing_for(Site.parse(site)))

    @property
    def tokens(self) -> list[list[str]]:
        """The input's tokens as texts, one list per batch row; empty without a tokenizer."""
        return self._answers[0].tokens

    @property
    def ids(self) -> list[list[int]]:
        """The input's token ids, one list per batch row; empty for inputs that are no ids."""
        return self._answers[0].ids

    @property
    def context(self) -> dict[str, Any]:
        """What the hooks saved in ``ctx``, fetched when it is asked for: rank 0's, which all share.

        Of a pipeline it is what its last stage has, and what hooks saved on other stages only.
        """
        if self._context is None:
            last = next((r.ranks for s, r in self._rules.items() if (s.path, s.port) == ("", "output")), ())
            if not last or 0 in last:
                self._context = self._calls.one(0, "context", self._key)
            else:
                found = self._calls.all("context", self._key)
                found = [found[last[0]], *found]
                self._context = {k: v for context in reversed(found) for k, v in context.items()}
        return self._context

    @staticmethod
    def bring_contexts(runs: Sequence[Run]) -> None:
        """Fetch the :attr:`context` of several runs, all of the whole model on each rank, in one message."""
        missing = [run for run in runs if run._context is None]  # noqa: SLF001 - of this class
        if missing:
            from flexmagic.engine.tensors import apart

            found = missing[0]._calls.one(0, "contexts", [run._key for run in missing])  # noqa: SLF001
            for run, context in zip(missing, apart(*found), strict=True):
                run._context = context  # noqa: SLF001

    @property
    def seconds(self) -> float:
        """Seconds of the forward on the slowest rank."""
        return max(answer.reply.seconds for answer in self._answers)

    @property
    def loss(self) -> float | None:
        """The value of the run's loss on the whole batch; ``None`` for a run without one."""
        return self._answers[0].reply.loss

    @property
    def logits(self) -> Activation:
        """The model's logits, ``[batch, seq, vocab]``; raises :class:`SiteError` for a model without."""
        return self[str(LOGITS)]

    def top(self, k: int = 5, *, row: int = 0, position: int = -1) -> Table:
        """The ``k`` likeliest next tokens after a position of a batch row, with probability and logit.

        Only that position's logits travel. Without a tokenizer the token ids stand for themselves.
        """
        import numpy as np

        logits = self.logits[row, position].astype(np.float64)
        weights = np.exp(logits - logits.max())
        probabilities = weights / weights.sum()
        best = np.argsort(-logits, kind="stable")[:k]
        texts = self._calls.one(0, "decode", [[int(i)] for i in best])
        rows = tuple(
            (repr(text), f"{probabilities[i]:.1%}", f"{logits[i]:.3f}")
            for i, text in zip(best, texts, strict=True)
        )
        return Table(("next token", "probability", "logit"), rows)

    def __getitem__(self, site: str | tuple[str, str]) -> Activation:
        """The activation at a site, after all hooks there.

        ``run[site, hook]``, of a hook without a body: the value at that hook's place in their order.

        Raises :class:`SiteError` if the run holds none there, :class:`LayoutError` if the site is
        refused or its pieces do not fit together.
        """
        text, hook = site if isinstance(site, tuple) else (site, None)
        known = self._captured
        stands = self._standing_for(Site.parse(text))
        own, heads = stands[0] if len(stands) == 1 else (Site.parse(text), None)
        own_text = text if own == Site.parse(text) else str(own)
        try:
            found = one_of(own_text, known)
        except SiteError as error:
            raise self._explain(own_text, error) from None
        value = self._activation(found) if hook is None else self._between(found, hook)
        return value if heads is None else value.of_heads(heads, Site.parse(text))

    def _between(self, site: Site, name: str) -> Activation:
        """What a hook without body saw between other hooks, or after all of them."""
        at = next((n for n, h in enumerate(self._hooks) if h.source.name == name and site in h.sites), None)
        if at is None or not self._hooks[at].source.captures_only:
            msg = f"No hook {name!r} without a body captured {site} in this run."
            raise SiteError(msg)
        seen, acted = site.seen_by(name), self._acted(site)
        earlier = {str(hook) for hook in self._hooks[:at]}
        after = tuple(hook for hook in acted if hook in earlier)
        before = tuple(hook for hook in acted if hook not in earlier)
        if any(seen in local for local in self._local):
            return self._activation(site, seen, after, before)
        if before:
            msg = f"{site} came in micro-batches, of which only the last value is kept, after {before[-1]}."
            raise SiteError(msg)
        return self._activation(site)

    def _explain(self, text: str, error: SiteError) -> LayoutError | SiteError:
        pattern = Site.parse(text)
        surveyed = [s for s in self._rules if pattern.matches(s)]
        for answer in self._answers:
            for s, reason in answer.reply.outcome.refused.items():
                if pattern.matches(s):
                    return LayoutError(f"{s} is refused in this run: {reason}")
        refused = [s for s in surveyed if self._rules[s].refused]
        if refused and len(refused) == len(surveyed):
            return LayoutError(f"{refused[0]} is refused: {self._rules[refused[0]].refused}")
        if surveyed and self._end:
            return SiteError(f"This run was to stop at {self._end} and has no value of {text}.")
        if surveyed and not any(s in self._captured for s in surveyed):
            msg = (
                f'This run did not capture {text}. Run again with --capture "{pattern.path}" or a hook there.'
            )
            return SiteError(msg)
        return error

    def _activation(
        self,
        site: Site,
        seen: Site | None = None,
        after: tuple[str, ...] | None = None,
        before: tuple[str, ...] = (),
    ) -> Activation:
        """A captured site; ``seen``: the key of what was captured there between hooks."""
        for answer in self._answers:
            if site in answer.reply.outcome.refused:
                msg = f"{site} is refused in this run: {answer.reply.outcome.refused[site]}"
                raise LayoutError(msg)
        layout = self._rules[site].local_layout(
            [_shape(local.get(seen or site)) for local in self._local], self._answers[0].reply.extent
        )
        calls = max(a.reply.outcome.calls[site] for a in self._answers)
        warnings = (f"called {calls} times in this run: the last call is shown",) if calls > 1 else ()
        nbytes = sum(_nbytes(local.get(seen or site)) for local in self._local)
        tokens = tuple(tuple(row) for row in self.tokens)
        after = self._acted(site) if after is None else after
        origin = Origin(self._key, seen or site, after, before, tokens, nbytes, self._lives, warnings)
        siblings, steps = partial(self._siblings, site), partial(self._steps_with, site)
        if seen is not None:  # other steps have it after all hooks
            return Activation(self._calls, origin, layout, siblings)
        return Activation(self._calls, origin, layout, siblings, steps)

    def _acted(self, site: Site) -> tuple[str, ...]:
        """The hooks whose bodies ran at a site, in their order."""
        ran = {e.hook for a in self._answers for e in a.reply.outcome.edits if e.ran and e.site == str(site)}
        return tuple(str(hook) for hook in self._hooks if hook.source.name in ran)

    def _siblings(self, site: Site) -> dict[str, Callable[[], Activation]]:
        """The captured sites that differ from this one only in a layer number, by name."""
        pattern = ".".join("*" if part.isdigit() else part for part in site.path.split("."))
        alike = [
            other
            for other in self._captured
            if path_matches(pattern, other.path) and (other.port, other.leaf) == (site.port, site.leaf)
        ]
        return {str(other): _later(self._activation, other) for other in alike}

    def _steps_with(self, site: Site) -> tuple[str | None, dict[str, Siblings]]:
        """Its own step's name, and by name the steps of its run that captured a site: ``step 2 " to"``."""
        found: dict[str, Siblings] = {}
        for run in self.among:
            if site in run._captured:  # noqa: SLF001 - of this class
                found[run._step_name()] = partial(run._siblings, site)  # noqa: SLF001
        return (self._step_name(), found) if found else (None, {})

    def _step_name(self) -> str:
        seen = self.tokens[0] if len(self.tokens) == 1 else []
        what = f' "{seen[0]}"' if len(seen) == 1 else ""
        return f"step {self._key[-1]}{what}"

    def release(self, *, wait: bool = True) -> None:
        """Free this run's captures on the engines; looking at them then says so.

        Not to ``wait``: an engine that is gone is not told, and has freed them in its way.
        """
        if wait:
            self._calls.all("release", self._key)
            return
        self._calls.post_all("release", self._key)

    def __repr__(self) -> str:
        """Run number, input size and what was captured."""
        rows = self.tokens or self.ids
        size = f"{len(rows)} × {len(rows[0])} tokens, " if rows else ""
        return (
            f"<Run {self.number}: {size}{len(self._captured)} sites captured, {self.seconds * 1000:.0f} ms>"
        )


def _itself(pattern: Site) -> list[Target]:
    return [(pattern, None)]


def _later(make: Callable[[Site], Activation], site: Site) -> Callable[[], Activation]:
    return lambda: make(site)


def _shape(entry: tuple[tuple[int, ...], str] | None) -> tuple[int, ...] | None:
    return None if entry is None else entry[0]


def _nbytes(entry: tuple[tuple[int, ...], str] | None) -> int:
    if entry is None:
        return 0
    import math

    import torch

    return math.prod(entry[0]) * int(getattr(torch, entry[1]).itemsize)
