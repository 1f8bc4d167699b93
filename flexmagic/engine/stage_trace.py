"""A trace over pipeline stages: its cell runs on every rank, and goes on where the stage is whose turn it is.

The stages take their turns one after the other. At a site that the cell waits for, the stage that has it
sends the whole tensor to the others, whose cells go on with it as well; what they make of it is done
there. So every cell has the same values, and those of an earlier stage are at hand in a later one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from flexmagic.engine.exchange import RunEnds, RunStopped
from flexmagic.engine.groups import Groups
from flexmagic.engine.messages import Instead, receive, send


@dataclass
class Line:
    """The ranks of one pipeline's stages, this one's place among them, and what they tell each other.

    ``over``: all of them know that the run has failed, and nobody waits for a message any more.
    ``arrives``: what is done with a tensor of another stage; ``passed``: after another stage's turn.
    """

    groups: Groups
    ranks: tuple[int, ...]
    arrives: Callable[[torch.Tensor], None] = lambda _x: None
    passed: Callable[[int], None] = lambda _rank: None
    over: bool = False
    _told: bool = field(default=False, init=False)
    _followed: bool = field(default=False, init=False)

    @property
    def stage(self) -> int:
        """The stage of this rank."""
        return self.ranks.index(self.groups.place.rank)

    @property
    def is_last(self) -> bool:
        """Whether no stage comes after this one."""
        return self.stage == len(self.ranks) - 1

    def tell(self, x: torch.Tensor) -> None:
        """The cell waits for a site of this stage, and here is its tensor."""
        self._send([x])

    def before(self) -> None:
        """Before this turn: go along with the stages before; raises :class:`RunStopped` if one fails."""
        for stage in range(self.stage):
            self._follow(stage)

    def after(self, error: BaseException | None, *, well: bool) -> None:
        """After this stage's turn; the last one's is over only when the model's output has been seen."""
        if (error is not None and not isinstance(error, RunEnds)) or not well:
            self._end(Instead.FAILED)
        elif not self.is_last:
            self._end(Instead.ENDED)

    def finish(self) -> None:
        """After the forward: go along with the later stages; raises :class:`RunStopped` if one fails."""
        self._end(Instead.ENDED)
        if not self._followed:
            self._followed = True
            for stage in range(self.stage + 1, len(self.ranks)):
                self._follow(stage)

    def _end(self, how: Instead) -> None:
        if not (self._told or self.over):
            self._told = True
            self._send(how)
            self.over = how is Instead.FAILED

    def _send(self, what: list[torch.Tensor] | Instead) -> None:
        place = self.groups.place
        others = [rank for rank in self.ranks if rank != place.rank]
        for work in [w for rank in others for w in send(self.groups.own, rank, what, place.device)]:
            work.wait()

    def _follow(self, stage: int) -> None:
        """Let this rank's cell go on with what another stage tells, until its turn is over."""
        while not self.over:
            told = receive(self.groups.own, self.ranks[stage], self.groups.place.device)
            if told is Instead.ENDED:
                self.passed(self.ranks[stage])
                return
            if isinstance(told, Instead):
                self.over = True
                raise RunStopped(f"pipeline stage {stage} failed")
            self.arrives(told[0])
