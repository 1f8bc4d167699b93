"""A generation: several forwards, one after the other, and the text they made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.client.run import Run
from flexmagic.errors import InputError

if TYPE_CHECKING:
    from flexmagic.client.activation import Activation
    from flexmagic.client.aliases import Target
    from flexmagic.client.calls import Calls
    from flexmagic.client.planning import Acting
    from flexmagic.engine.captures import RunKey
    from flexmagic.engine.verbs import GenerateAnswer
    from flexmagic.layout.rule import Rule
    from flexmagic.layout.sites import Site


class Generation(Run):
    """What a generation left behind: a :class:`Run` for each step, and the text.

    Indexed with a site it gives the last step that captured it; ``run.step(2)["model.layers.3"]`` is
    that of step 2. Step 0 is the prefill, which sees the whole prompt; each later one sees one token.
    """

    def __init__(
        self,
        key: RunKey,
        calls: Calls,
        answers: list[GenerateAnswer],
        rules: Mapping[Site, Rule],
        *,
        hooks: Sequence[Acting] = (),
        warnings: tuple[str, ...] = (),
        seed: int = 0,
        standing_for: Callable[[Site], list[Target]] | None = None,
    ) -> None:
        each = [[answer.steps[n] for answer in answers] for n in range(len(answers[0].steps))]
        self._steps = [
            Run((*key[:2], n), calls, step, rules, hooks=hooks, seed=seed, standing_for=standing_for)
            for n, step in enumerate(each)
        ]
        for run in self._steps:
            run.among = self._steps
        last = [answer.steps[-1] for answer in answers]
        super().__init__(
            key, calls, last, rules, hooks=hooks, warnings=warnings, seed=seed, standing_for=standing_for
        )
        self.known = {"key": key, "answers": answers, "hooks": hooks, "warnings": warnings, "seed": seed}
        self._made = answers[0]

    def lost_on(self, ranks: Iterable[int]) -> None:
        """As :meth:`Run.lost_on`, with all steps."""
        gone = list(ranks)
        super().lost_on(gone)
        for run in self._steps:
            run.lost_on(gone)

    @property
    def steps(self) -> int:
        """The number of forwards."""
        return len(self._steps)

    def step(self, number: int) -> Run:
        """One forward, counted from 0, or from the end if negative; raises :class:`InputError` beyond."""
        if not -self.steps <= number < self.steps:
            msg = f"There is no step {number}: this run has steps 0 to {self.steps - 1}."
            raise InputError(msg)
        return self._steps[number]

    @property
    def sites(self) -> list[str]:
        """The sites that were captured in any step, in the model's order."""
        found = {site for run in self._steps for site in run.sites}
        return [str(site) for site in self._rules if str(site) in found]

    @property
    def tokens(self) -> list[list[str]]:
        """Prompt and new tokens as texts, one list per batch row; empty without a tokenizer."""
        return self._made.tokens

    @property
    def ids(self) -> list[list[int]]:
        """Prompt and new token ids, one list per batch row, as the model's own ``generate`` returns them."""
        return self._made.ids

    @property
    def text(self) -> list[str]:
        """The new text of each batch row, without the prompt; empty without a tokenizer."""
        return self._made.text

    @property
    def seconds(self) -> float:
        """Seconds of all forwards, each on its slowest rank."""
        return sum(run.seconds for run in self._steps)

    def __getitem__(self, site: str | tuple[str, str]) -> Activation:
        """The activation at a site in the last step that captured it; raises as :class:`Run` does."""
        for run in reversed(self._steps):
            if run.has(site if isinstance(site, str) else site[0]):
                return run[site]
        return super().__getitem__(site)

    def __repr__(self) -> str:
        """Run number, size, what was captured, and the text."""
        sizes = f"{len(self.ids)} × {self._made.prompt} + {len(self.ids[0]) - self._made.prompt} tokens"
        said: Any = self.text[0] if len(self.text) == 1 else self.text
        return f"<Run {self.number}: {sizes}, {self.steps} steps, {len(self.sites)} sites captured: {said!r}>"
