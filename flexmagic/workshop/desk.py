"""The work of a gateway: what guests ask for, in fair turns, one thing at a time on the cluster."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from flexmagic.client.waiting import Waited
from flexmagic.errors import FlexError, InputError
from flexmagic.workshop import requests as asked
from flexmagic.workshop.answers import Answer
from flexmagic.workshop.guests import Guest
from flexmagic.workshop.rota import Rota

LINGER = 0.02
"""Seconds that runs wait for others to share their forward."""

IDLE = 1.0
"""Seconds after which a worker that has nothing to do looks after the house."""


@dataclass(eq=False)
class Job:
    """Something that a guest asked for. ``began``: when it was its turn, by the gateway's clock.

    ``waited``: how far a generation is, and its text by now.
    """

    guest: Guest
    kind: str
    request: asked.Request
    ticket: int = 0
    began: float | None = None
    waited: Waited | None = None
    done: Future[Answer] = field(default_factory=Future)

    @property
    def is_run(self) -> bool:
        """Whether it is a run, not a look."""
        return isinstance(self.request, asked.MakeRun)


class Desk:
    """Two queues, of runs and of everything else, which take turns, and one thread that works them off.

    ``do``: does some jobs at once; ``mates``: whether two of a kind may be done together, and ``most`` of
    them at a time; ``idle``: called about every second.
    """

    def __init__(
        self,
        do: Callable[[list[Job]], None],
        mates: Callable[[Job, Job], bool],
        most: Callable[[], int],
        idle: Callable[[], None],
    ) -> None:
        self._do, self._mates, self._most, self._idle = do, mates, most, idle
        self._runs, self._looks = Rota[Job](), Rota[Job]()
        self._errands: deque[tuple[Callable[[], object], Future[None]]] = deque()
        self._wake = threading.Condition()
        self._closing = self.paused = False
        self._owed, self._looks_until = 0, 0.0
        self.now: list[Job] = []
        self._mean = 1.0
        self._thread = threading.Thread(target=self._work, name="flexmagic-workshop", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def add(self, job: Job) -> bool:
        """Let a job wait for its turn; ``False`` if too much of its guest waits already."""
        with self._wake:
            if self._closing:
                return False
            added = (self._runs if job.is_run else self._looks).add(job.guest.name, job)
            self._wake.notify()
            return added

    def errand(self, work: Callable[[], object]) -> Future[None]:
        """Have the worker do something of the owner's, before what guests ask for."""
        done: Future[None] = Future()
        with self._wake:
            if self._closing:
                done.set_exception(InputError("The workshop was closed."))
                return done
            self._errands.append((work, done))
            self._wake.notify()
        return done

    def place(self, job: Job) -> tuple[int, float]:
        """How many runs come before a run, and in about how many seconds it begins."""
        with self._wake:
            before = self._runs.place(job.guest.name, job) + bool(self.now)
            return before, before * self._mean / max(1, self._most())

    def withdraw(self, job: Job) -> bool:
        """Take back what still waits; ``False`` if it has begun or is over."""
        with self._wake:
            return self._runs.remove(job.guest.name, job)

    def drop(self, guest: Guest) -> list[Job]:
        """Take back all that waits of a guest."""
        with self._wake:
            return [*self._runs.drop(guest.name), *self._looks.drop(guest.name)]

    def pause(self, *, paused: bool) -> None:
        """Begin no more runs, or go on with them; looks go on in any case."""
        with self._wake:
            self.paused = paused
            self._wake.notify()

    @property
    def waiting(self) -> int:
        """How many runs wait."""
        return len(self._runs)

    def close(self) -> None:
        """Begin nothing more, and wait for what has begun."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _take(self) -> list[Job]:
        """What is to be done next; nothing after a while without anything.

        After runs it is the turn of the looks that wait by then, and of more while few runs wait to share a
        forward, but for no longer than a turn of runs takes on average. Few runs linger a moment for more.
        """
        with self._wake:
            if not self._closing and not self._ready and not self._errands:
                self._wake.wait(IDLE)
            if self._closing or not self._ready or self._errands:
                return []
            if not len(self._looks) and self._few:
                self._wake.wait_for(lambda: len(self._looks) or not self._few or self._closing, LINGER)
            owed = (self._owed > 0 or self._few) and time.monotonic() < self._looks_until
            runs = len(self._runs) > 0 and not self.paused and not (owed and len(self._looks))
            taken = (self._runs if runs else self._looks).take()
            if taken is None:  # it was taken back while others were waited for
                return []
            first = taken[1]
            found = [first]
            if (most := self._most()) > 1:
                rota = self._runs if runs else self._looks
                found += [job for _, job in rota.take_like(lambda job: self._mates(first, job), most - 1)]
            self.now = found if runs else []
            self._owed -= 0 if runs else len(found)
            return found

    def _note_runs(self) -> None:
        """Runs have just been done: the looks that wait by now are next, for as long as runs take."""
        self._owed, self._looks_until = len(self._looks), time.monotonic() + self._mean

    @property
    def _few(self) -> bool:
        """Whether it is better to wait for more runs, as they cost little more together."""
        return len(self._runs) < self._most() / 2

    @property
    def _ready(self) -> bool:
        return len(self._looks) > 0 or (len(self._runs) > 0 and not self.paused)

    def _run_errands(self) -> None:
        while self._errands:
            work, done = self._errands.popleft()
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - whoever waits for it hears of it
                done.set_exception(error)
            else:
                done.set_result(None)

    def _work(self) -> None:
        last = time.monotonic()
        while not self._closing:
            self._run_errands()
            jobs, began = self._take(), time.monotonic()
            if jobs:
                for job in jobs:
                    job.began = began
                self._surely_do(jobs)
                if jobs[0].is_run:
                    self._mean += 0.2 * (time.monotonic() - began - self._mean)
                    self._note_runs()
                self.now = []
            if time.monotonic() - last > IDLE:
                last = time.monotonic()
                with contextlib.suppress(Exception):  # a disk that is full; it comes again in a second
                    self._idle()
        self._run_errands()
        for job in self._rest():
            job.done.set_exception(InputError("The workshop was closed."))

    def _surely_do(self, jobs: list[Job]) -> None:
        """Do jobs; whatever happens, this thread goes on and nobody waits for ever."""
        try:
            self._do(jobs)
        except BaseException as error:  # noqa: BLE001 - an interrupt among them
            for job in jobs:
                if not job.done.done():
                    said = f"The workshop could not do that: {type(error).__name__}."
                    job.done.set_exception(FlexError(said))

    def _rest(self) -> list[Job]:
        out = []
        for rota in (self._runs, self._looks):
            while (taken := rota.take()) is not None:
                out.append(taken[1])
        return out
