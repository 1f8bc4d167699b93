"""A workshop: the only holder of the cluster's connection file, between its guests and the engines."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from flexmagic.client.gathering import Gathering
from flexmagic.client.table import Table
from flexmagic.client.tenant import Host
from flexmagic.errors import ClusterError, EngineError, FlexError, InputError, ModelError
from flexmagic.workshop import answers, standing
from flexmagic.workshop import requests as asked
from flexmagic.workshop.allowance import Allowance, Use, Window
from flexmagic.workshop.answers import Answer
from flexmagic.workshop.desk import Desk, Job
from flexmagic.workshop.guests import Guest, Guests, OverError
from flexmagic.workshop.journal import Journal
from flexmagic.workshop.lesson import TOLD, Lesson
from flexmagic.workshop.memory import OTHER_KIND, Memory
from flexmagic.workshop.mending import Mending
from flexmagic.workshop.notices import Board
from flexmagic.workshop.running import Runner, RunResult
from flexmagic.workshop.weights_watch import WeightsWatch
from flexmagic.workshop.worlds import Worlds

GUESTS = 30
"""How many guests there may be, if it is not said."""

TOGETHER = 16
"""How many runs of guests share one forward at most."""

IDLE_MINUTES = 120.0
"""Minutes after which the world of a guest who asks for nothing is dropped."""

REFUSALS = 100
"""Refusals of one guest that the log notes in a minute, and of all strangers."""

KEPT_JOBS = 4
"""How many finished runs of a guest can still be asked for by their tickets."""


class Workshop:
    """Guests, each with a world of their own on one loaded model; every method may be called from any thread.

    ``trusted``: the code of guests' hooks runs in the engines with all that these can do, not in boxes.
    ``together``: how many guests' runs may share one forward, 1 for none. ``open_to_all``: one key lets
    anybody in; else every place has its own token, or ``users`` says whose a token is. What a gateway of the
    same cluster left that has ended is gone on with, by the same kind of gateway, or to be ended by any
    (``ending``). Raises :class:`ClusterError` or :class:`ModelError`.
    """

    def __init__(
        self,
        cluster: str | None,
        *,
        guests: int = GUESTS,
        allowance: Allowance | None = None,
        trusted: bool = False,
        together: int = TOGETHER,
        open_to_all: bool = True,
        users: Callable[[str], str] | None = None,
        journal: Path | None = None,
        idle_minutes: float = IDLE_MINUTES,
        ending: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.together, self.idle_minutes = together, idle_minutes
        self._clock = clock
        self._host = Host(cluster)
        self.name = self._host.session.cluster_name
        self.memory = Memory(self._host.folder, self.name)
        with contextlib.ExitStack() as undo:
            undo.callback(self._host.close)
            undo.callback(self.memory.let_go)
            before = self.memory.take()
            self._hub = users is not None
            if before and before.get("hub", False) != self._hub and not ending:
                raise ClusterError(OTHER_KIND)
            _ = self._host.model
            self._weights = WeightsWatch(self._host)
            self.no_boxes = self._host.no_boxes()
            self.allowance = allowance or Allowance(**before.get("allowance", {}))
            self.trusted = trusted or before.get("trusted", False)
            known = before.get("journal") or Path.cwd() / f"{self.name}-workshop.jsonl"
            self.journal = Journal(journal or Path(known))
            self.board = Board()
            open_now = before.get("open", open_to_all) and users is None
            self.guests = Guests(guests, self._guest, clock, open_to_all=open_now, users=users)
            self._worlds = Worlds(self._host, self.guests, trusted=self.trusted)
            self._runner = Runner(self._host, self._weights, self._alarm)
            self._refusals: dict[str, Window] = {}
            self._tickets = itertools.count(1)
            self.alarm = before.get("alarm", "")
            do = Mending(self._host, self.journal, self._tried, self._fail).do
            self._desk = Desk(do, self._mates, lambda: self.together, self._look_after)
            self.lesson = Lesson(
                self.board, self.guests, self.journal, self._host.calls, errand=self._desk.errand,
                code=lambda: self.code,
            )  # fmt: skip
            self.goes_on = bool(before)
            if before:
                self._recall(before)
            self.memory.facts = self._facts
            if not self.trusted:
                self._host.begin_boxes()
            self._desk.start()
            self.memory.save()
            what = "open again" if before else "open"
            self.journal.note("owner", what, model=str(self._host.model), trusted=self.trusted)
            undo.pop_all()  # it is open

    def _guest(self, name: str, token: str) -> Guest:
        return Guest(name, token, Use(lambda: self.allowance, self._clock), self._clock(), self.board)

    def _facts(self) -> dict[str, Any]:
        """What a gateway that comes after this one must know."""
        own = {"allowance": asdict(self.allowance), "trusted": self.trusted, "alarm": self.alarm}
        more = {
            "engines": self._host.calls.ranks.pids,
            "journal": str(self.journal.path),
            "open": bool(self.guests.key),
            "paused": self._desk.paused,
            "hub": self._hub,
        }
        return {**own, **more, **self.guests.known}

    def _recall(self, before: dict[str, Any]) -> None:
        """Be the workshop of before: its guests, what the engines hold of theirs, paused or not."""
        self.guests.recall(before)
        self._desk.pause(paused=before["paused"])
        self._worlds.find(before.get("engines"))

    @property
    def code(self) -> bool:
        """Whether guests' hooks may have code: in boxes, or because they are trusted."""
        return self.trusted or not self.no_boxes

    @property
    def is_over(self) -> bool:
        """Whether the cluster has ended, and the workshop with it."""
        return self._host.is_over

    # what guests ask for

    def join(self, secret: str, name: str) -> dict[str, Any]:
        """Let a guest in or back; see :meth:`Guests.join`."""
        guest, seat, token = self.guests.join(secret, name)
        self.memory.save()
        notice, guest.notice = guest.notice, ""
        self.journal.note(guest.name, "join", new=bool(token))
        return {
            "guest": guest.name, "seat": seat, "token": token, "cluster": self.name,
            "model": str(self._host.model), "limits": str(self.allowance), "code": self.code,
            "runs": list(guest.runs), "notice": notice, "told": TOLD,
        }  # fmt: skip

    def ask(self, guest: Guest, kind: Any, given: dict[str, Any], frames: list[bytes]) -> Job | Answer:
        """A guest's request: its answer, or a job whose answer comes. Raises :class:`InputError`, as said."""
        request = asked.parse(kind, given, frames)
        if isinstance(request, asked.Since):
            up = [notice.header for notice in self.board.since(request.number)]
            return {"board": self.board.name, "notices": up}, []
        guest.seen = self._clock()
        if kind == "status":
            table = standing.to_guest(self, self._desk, str(self._host.model), guest)
            return {"columns": table.columns, "rows": table.rows}, []
        if isinstance(request, asked.Ticket):
            job = guest.jobs.get(request.ticket)
            if job is None:
                raise InputError("You have no run under that ticket.")
            return self._cancel(job) if kind == "cancel" else job
        job = Job(guest, kind, request)
        if job.is_run:
            self._accept(guest, job)
        if not self._desk.add(job):
            guest.jobs.pop(job.ticket, None)
            raise InputError("Too much of what you asked for still waits: let it come first.")
        return ({"ticket": job.ticket, **self.progress(job)}, []) if job.is_run else job

    def _accept(self, guest: Guest, job: Job) -> None:
        under_way = next((j for j in list(guest.jobs.values()) if not j.done.done()), None)
        if under_way is not None:
            raise InputError("Your last run is still under way: one at a time. Wait for it, or interrupt it.")
        guest.use.run()
        job.ticket = next(self._tickets)
        guest.jobs[job.ticket] = job
        for old in list(guest.jobs)[:-KEPT_JOBS]:
            del guest.jobs[old]

    def refused(self, who: str, status: int, error: str) -> None:
        """Note what was refused before anybody looked at it; of a flood, so much a minute."""
        known = self._refusals.setdefault(
            who if any(who == g.name for g in self.guests) else "", Window(self._clock)
        )
        if known.total < REFUSALS:
            known.add()
            self.journal.note(who, "refused", status=status, error=error[:200])

    def progress(self, job: Job) -> dict[str, Any]:
        """Where a run stands: how many turns come before it, and its estimated wait in seconds."""
        if job.began is not None:
            said = {"state": "runs", "place": 0, "wait": 0.0}
            if job.waited is not None and job.waited.ranks:
                said |= {"far": job.waited.ranks.get(0), "tokens": job.waited.tokens, "pace": job.waited.pace}
            return said
        place, wait = self._desk.place(job)
        return {"state": "paused" if self._desk.paused else "waits", "place": place, "wait": round(wait, 2)}

    def _cancel(self, job: Job) -> Answer:
        if self._desk.withdraw(job):
            job.done.set_exception(InputError("The run was taken back before its turn came."))
        elif job in self._desk.now and len(self._desk.now) == 1:
            self._host.calls.waiting.cancel()
        return {}, []

    # the worker

    def _mates(self, first: Job, other: Job) -> bool:
        return self._runner.mates(first, other) if first.is_run else answers.mates(first, other)

    def _tried(self, jobs: list[Job]) -> list[EngineError]:
        """Give jobs their answers; which engines that ended kept from it, those jobs being left open."""
        ended: list[EngineError] = []
        if jobs[0].is_run or len(jobs) == 1:
            self._held(jobs, ended)
        else:
            Gathering(self._host.calls).do([partial(self._held, [job], ended) for job in jobs])
        return ended

    def _answer(self, jobs: list[Job]) -> None:
        if any([self._worlds.enter(job.guest) for job in jobs]):  # noqa: C419 - all are to enter
            self.memory.save()
        if not jobs[0].is_run:
            job = jobs[0]
            job.done.set_result(answers.answer(job.guest, job.kind, job.request, code=self.code))
            return
        for result in self._runner.run(jobs, self.allowance):
            self._finish(result)

    def _held(self, jobs: list[Job], ended: list[EngineError]) -> None:
        """Runs, or one look; an engine that has ended is put in ``ended``, its jobs being left open."""
        try:
            self._answer(jobs)
        except EngineError as error:
            ended.append(error)
        except FlexError as error:
            self._fail(jobs, error)
        except KeyboardInterrupt:
            self._fail(jobs, InputError("Interrupted."))
        except Exception as error:  # noqa: BLE001 - the worker must live; the guest hears of it
            self.journal.note("gateway", "error", error=f"{type(error).__name__}: {error}")
            self._fail(jobs, FlexError(f"The workshop could not do that: {type(error).__name__}."))

    def _finish(self, result: RunResult) -> None:
        job, guest = result.job, result.job.guest
        guest.use.finished(result.seconds)
        error = result.error
        self.journal.note(
            guest.name, "run", hooks=result.hooks, seconds=round(result.seconds, 4), together=result.together,
            outcome="ok" if error is None else f"{type(error).__name__}: {str(error)[:200]}",
        )  # fmt: skip
        if error is not None:
            self._fail([job], error)
        else:
            assert result.answer is not None  # there is one or the other
            job.done.set_result(result.answer)

    def _fail(self, jobs: list[Job], error: FlexError) -> None:
        error = OverError() if self.is_over else error
        for job in jobs:
            if not job.done.done():
                job.guest.errors += 1
                job.guest.last_error = str(error).partition("\n")[0][:120]
                if not job.is_run:
                    self.refused(job.guest.name, 200, str(error))
                job.done.set_exception(error)

    def _alarm(self, who: list[str], parameters: list[str]) -> str:
        """Weights were changed while guests' runs were made; what was done about it.

        They are put back from where they were loaded. Where that cannot be, nothing more runs until the
        owner says so.
        """
        self.journal.note("gateway", "weights changed", guests=who, parameters=parameters[:50])
        named = ", ".join(parameters[:3]) + (" …" if len(parameters) > 3 else "")
        self.alarm = f"Weights changed in a run of {', '.join(who)}: {named}."
        paused = self._desk.paused
        self._desk.pause(paused=True)
        why_not = self._weights.put_back(parameters)
        if not why_not:
            self._desk.pause(paused=paused)
            self.alarm += " They were put back, bit for bit, and the workshop goes on."
            self.journal.note("gateway", "weights put back", parameters=parameters[:50])
            return f"{named}: put back, bit for bit, and the workshop goes on."
        self.alarm += f" They are as they are now: {why_not}. Load the model again, then resume."
        self.journal.note("gateway", "weights not put back", reason=why_not)
        return "the workshop is paused."

    def _look_after(self) -> None:
        """Drop worlds that nobody has asked anything of for long, and write down what there is to know."""
        for guest in self.guests:
            if guest.tenant is not None and self._clock() - guest.seen > self.idle_minutes * 60:
                self._worlds.leave(guest)
                idle = f"{self.idle_minutes:g} minutes"
                guest.notice = f"Nothing was asked for in {idle}: your hooks and runs were dropped."
                self.journal.note(guest.name, "idle world dropped")
        self.memory.save()

    # what the owner does

    def status(self) -> Table:
        """Who is there, what they wait for, what they have taken, and what failed last."""
        return standing.to_owner(self, self._desk.waiting)

    @property
    def paused(self) -> bool:
        """Whether runs wait for :meth:`resume`."""
        return self._desk.paused

    def pause(self) -> None:
        """Begin no more runs."""
        self._desk.pause(paused=True)
        self.memory.save()
        self.journal.note("owner", "pause")

    def resume(self) -> None:
        """Go on, with the weights as they are now."""
        if self.alarm:
            self._desk.errand(self._settle).result()
        self._desk.pause(paused=False)
        self.memory.save()
        self.journal.note("owner", "resume")

    def check_weights(self) -> list[str]:
        """Look at all weights now; names those that changed unseen since the last time."""
        found: list[str] = []

        def look() -> None:
            who = self._runner.since
            found.extend(self._weights.look())
            if found:
                self._alarm(who or ["guests"], found)

        self._desk.errand(look).result()
        return found

    def _settle(self) -> None:
        """Take the model and its weights as they are now."""
        self._host.find_model()
        self._weights.look()
        self.alarm = ""

    def drop(self, name: str) -> None:
        """Send a guest away: the token is void, and hooks and runs are gone. Raises :class:`ClusterError`."""
        guest = self.guests.out(name)
        for job in self._desk.drop(guest):
            job.done.set_exception(InputError("You were asked to leave this workshop."))
        self.memory.save()
        self._desk.errand(lambda: self._worlds.leave(guest))
        self.journal.note("owner", "drop", guest=name)

    def limit(self, text: str) -> Allowance:
        """Change what guests may take, from now on; raises :class:`InputError`."""
        self.allowance = self.allowance.changed(text)
        self.memory.save()
        self.journal.note("owner", "limits", limits=str(self.allowance))
        return self.allowance

    def close(self, *, for_good: bool = True) -> None:
        """Send all guests away and leave nothing of theirs on the engines, which stay.

        Not ``for_good``: only stop, so that a gateway that is opened later goes on with all of it.
        """
        self._desk.close()
        for guest in self.guests if for_good else ():
            self._worlds.leave(guest)
        with contextlib.suppress(FlexError, ModelError):
            changed = self._weights.look()
            what = "close" if for_good else "stop"
            self.journal.note("owner", what, weights="unchanged" if not changed else changed[:50])
            if for_good:
                self._host.calls.all("end_boxes")
        self.journal.close()
        self._host.close()
        if for_good:
            self.memory.forget()
        else:
            self.memory.save()
            self.memory.let_go()
