"""The engines of a cluster as ranks, asked one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.client import engine_side
from flexmagic.client.cluster import Cluster, is_unlisted
from flexmagic.client.control import Control
from flexmagic.client.endings import Endings
from flexmagic.client.mail import Answer, Mail
from flexmagic.client.straight import Lines, Straight
from flexmagic.errors import ClusterError, EngineError

if TYPE_CHECKING:
    from flexmagic.engine.verbs import Seat


RECOVER = "Type %flexcluster recover."


class Ranks:
    """Rank ``r`` is the ``r``-th engine; ``seats``: where each sits, once it was seen to have joined.

    ``lives``: how often each rank's engine was replaced.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.engines = cluster.members
        self.control = Control(cluster, self.engines)
        self.endings = Endings(cluster, self.engines)
        self.seats: list[Seat | None] = []
        self.lives = [0] * len(self.engines)
        self._ended: set[int] = set()
        self.endings.tell(self)
        self.lines = Lines()
        self._mail = Mail(lambda: cluster.client)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.engines)

    @property
    def pids(self) -> list[int]:
        """The process of each rank's engine, 0 where it is not known."""
        return [0 if seat is None else seat.pid for seat in self.seats]

    def ask(self, rank: int, function: Callable[..., Any], *args: Any) -> Answer:
        """Have a rank run a function, by the controller; the pending answer."""
        try:
            return self._mail.send(self.engines[rank], function, *args)
        except IndexError:
            raise self.gone_error([rank]) from None

    def call(self, rank: int, verb: str, payload: bytes, *, answer: bool = True) -> Answer | Straight:
        """Have a rank run a verb, on the shortest way there is; the pending answer, if one is to come.

        What was sent through the controller and is still under way there is not overtaken.
        """
        line, client = self.lines.of(rank), self.cluster.client
        if line is not None and not client.outstanding:
            pending = line.send(client, verb, payload, answer=answer)
            if pending is not None:
                return pending
        return self.ask(rank, engine_side.call, verb, payload)

    def value(self, rank: int, answer: Answer | Straight) -> Any:
        """What a rank answered; raises :class:`EngineError` if its engine ended instead."""
        try:
            return answer.get()
        except ConnectionError as error:  # a straight line has ended
            if is_unlisted(self.cluster.client, self.engines[rank]):
                raise self.gone_error([rank]) from error
            msg = f"The connection to rank {rank} broke, though its engine is there. Run it again."
            raise ClusterError(msg) from error
        except Exception as error:
            text = str(error)
            if "died" in text or "stopped" in text:
                raise self.gone_error([rank]) from error
            msg = f"Rank {rank} could not answer: {text}"
            raise ClusterError(msg) from error

    def ended(self) -> tuple[int, ...]:
        """The ranks whose engine is gone, as far as is known here; asks nobody."""
        alive = set(self.cluster.engines)
        return tuple(rank for rank, engine in enumerate(self.engines) if engine not in alive)

    def alive(self) -> list[int]:
        """The ranks whose engine is there."""
        gone = self.ended()
        return [rank for rank in range(self.world_size) if rank not in gone]

    def refuse_if_ended(self, ranks: Iterable[int]) -> None:
        """Raise :class:`EngineError` if the engine of any of these ranks is gone."""
        self.cluster.check_controller()
        gone = sorted(set(self.ended()) & set(ranks))
        if gone:
            raise self.gone_error(gone)

    def gone_error(self, ranks: Sequence[int]) -> EngineError:
        """The error that names ranks whose engine is gone, with their last words."""
        what = f"The engine of rank {', '.join(map(str, ranks))} has ended."
        return EngineError("\n".join([what, *self.cluster.last_words(ranks), RECOVER]), tuple(ranks))

    def end(self, rank: int) -> None:
        """End the process of a rank that nothing else brings back."""
        self.cluster.end(self.engines[rank])

    def renew(self, ranks: Iterable[int]) -> None:
        """Note that engines were replaced: what runs left on them until now is gone."""
        for rank in ranks:
            self.lives[rank] += 1
            self._ended.discard(rank)

    def ranks_ended(self, ranks: tuple[int, ...]) -> None:
        """Hear that engines have ended, at any time and from any thread."""
        self._ended.update(ranks)

    def replaced(self) -> list[int]:
        """The ranks whose engine somebody else has replaced since this was last asked; asks nobody."""
        found = sorted(self._ended - set(self.ended())) if self._ended else []
        self.renew(found)
        return found

    def gone(self, lives: Sequence[int]) -> tuple[int, ...]:
        """The ranks that no longer hold what they held when :attr:`lives` was this."""
        renewed = [rank for rank, life in enumerate(lives) if life != self.lives[rank]]
        return tuple(sorted({*renewed, *self.ended()}))
