"""The cluster: one engine per rank, started here or found running.

ipyparallel launches and connects; every rank is an engine set of its own, so that each has its own
environment and can be signalled alone. Local clusters listen on loopback only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flexmagic.client import reaper
from flexmagic.client.devices import Devices, check_size, local_devices, rank_environment
from flexmagic.client.pulse import Pulse, lives, status
from flexmagic.client.restart import Offer, take
from flexmagic.client.running_clusters import found_running, profile_of
from flexmagic.client.turns import Turns
from flexmagic.errors import ClusterError

TAIL, LINE = 3, 160
"""How many lines of an engine's log are shown, and how many characters of each."""

_CHATTER = re.compile(r"\S+ \S+ \[(IPEngine|KernelNanny)[.\d]*\] ")
"""What an engine's log says of its own messages."""

NOTICED = 0.5
"""Seconds in which it is known how a process ended."""

UNLISTED = 5.0
"""Seconds in which the controller notices that an engine has ended."""

START_TIMEOUT = 120.0
"""Seconds in which all engines must have come up."""

TRIES = 2
"""How often a cluster is started once more of whose controller a part has ended at once."""

_CONTROLLER = ["--nodb", "--HeartMonitor.period=500", "--HeartMonitor.max_heartmonitor_misses=3"]


class _LameControllerError(ClusterError):
    """A part of a controller has ended: start another."""


class Cluster:
    """A running cluster and the connection to it."""

    def __init__(self, ipp_cluster: Any, client: Any, *, owned: bool, keep: bool) -> None:
        self._cluster = ipp_cluster
        self.client = client
        self.owned = owned
        self.keep = keep
        self._size = _size_of(ipp_cluster.engines)
        self._over = ""
        self._pulse: Pulse | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self.turns = Turns(Path(ipp_cluster.profile_dir) / "security" / f"{ipp_cluster.cluster_id}.turn")

    @classmethod
    def start(
        cls, n: int, *, keep: bool, oversubscribe: bool, progress: Callable[[int, str], None]
    ) -> Cluster:
        """Start a controller and ``n`` engines on this host; all or none.

        ``progress`` hears how many of the ``n`` engines are up. Raises :class:`ClusterError`.
        """
        devices = local_devices()
        check_size(n, devices, oversubscribe=oversubscribe)
        for _ in range(TRIES):
            with contextlib.suppress(_LameControllerError):
                return cls._started(n, devices, keep=keep, progress=progress)
        return cls._started(n, devices, keep=keep, progress=progress)

    @classmethod
    def _started(
        cls, n: int, devices: Devices, *, keep: bool, progress: Callable[[int, str], None]
    ) -> Cluster:
        from flexmagic.client.cluster_file import SharedCluster

        launched = SharedCluster(
            cluster_id=f"flexmagic-{uuid.uuid4().hex[:6]}",
            delay=0,
            controller_ip="127.0.0.1",
            controller_args=_CONTROLLER,
            shutdown_atexit=not keep,
            log_level=logging.CRITICAL,
            load_profile=False,
            parent=None,
        )
        cluster = cls(launched, None, owned=True, keep=keep)
        cluster._size = n
        try:
            progress(0, "starting the controller")
            launched.start_controller_sync()
            for rank in range(n):
                cluster._start_engine(rank, devices)
            if not keep:
                cluster._reaper = reaper.start(launched.cluster_file)
            cluster.client = launched.connect_client_sync()
            cluster._await_engines(n, progress)
        except BaseException as error:
            cluster.stop()
            if isinstance(error, Exception) and not isinstance(error, ClusterError):
                msg = f"The engines could not be started: {error}"
                raise ClusterError(msg) from error
            raise
        return cluster

    def _await_engines(self, n: int, progress: Callable[[int, str], None]) -> None:
        waited, step = 0.0, 0.2
        while len(self.client.ids) < n:
            progress(len(self.client.ids), "waiting for the engines")
            gone = [
                f"rank {rank}" for rank in range(n) if any(not p.is_running() for p in self._processes(rank))
            ]
            if gone or waited > START_TIMEOUT:
                what = (
                    f"{', '.join(gone)} ended at once"
                    if gone
                    else f"not all were up after {START_TIMEOUT:.0f} s"
                )
                msg = f"The engines could not be started: {what}. Their logs are in {self.log_folder}."
                raise ClusterError(msg)
            self._check_schedulers()
            with contextlib.suppress(TimeoutError):
                self.client.wait_for_engines(n, timeout=step, interactive=False)
            waited += step
        self._check_schedulers()
        progress(n, "engines are up")

    def _check_schedulers(self) -> None:
        """Raise if one of the controller's processes has ended: what it was to pass on would never come.

        The controller asks the system for free ports before it takes them, and others may be faster.
        """
        controller = getattr(self._cluster.controller, "process", None)
        if controller is not None and not all(map(lives, controller.children())):
            raise _LameControllerError(
                f"A part of the cluster's controller has ended at once. Its log is in {self.log_folder}."
            )

    @classmethod
    def attach(cls, name: str | None = None) -> Cluster:
        """Connect to a cluster that is already running, by its id, its profile, or the only one there is.

        Raises :class:`ClusterError` if there is none, or several to choose from.
        """
        found = found_running()
        wanted = {k: c for k, c in found.items() if name in (None, k) or profile_of(c) == name}
        if len(wanted) != 1:
            listed = ", ".join(sorted(wanted or found)) or "none"
            hint = "Type %flexcluster attach NAME." if found else "Type %flexcluster start -n 2."
            what = "Several clusters are" if wanted else "No such cluster is"
            msg = f"{what} running. Running: {listed}. {hint}"
            raise ClusterError(msg)
        cluster = next(iter(wanted.values()))
        cluster.log = logging.getLogger(f"{__name__}.{cluster.cluster_id}")
        cluster.log.setLevel(logging.CRITICAL)  # a kernel's would show the logs of engines started here
        try:
            client = cluster.connect_client_sync(timeout=10)
        except Exception as error:
            msg = f"The cluster {cluster.cluster_id} does not answer: {error}"
            raise ClusterError(msg) from error
        if not client.ids:
            client.close()
            msg = f"The cluster {cluster.cluster_id} has no engines."
            raise ClusterError(msg)
        return cls(cluster, client, owned=False, keep=True)

    @property
    def name(self) -> str:
        """The id by which another notebook can attach."""
        return str(self._cluster.cluster_id)

    @property
    def log_folder(self) -> Path:
        """Where the engines' logs are."""
        return Path(self._cluster.profile_dir) / "log"

    @property
    def engines(self) -> list[int]:
        """The ids of the engines that are there, in rank order; :class:`ClusterError` after the end."""
        if self._over:
            raise ClusterError(self._over)
        return sorted(self.client.ids)

    @property
    def members(self) -> list[int]:
        """The ids of all engines, in rank order, also of those that have ended, as far as can be told."""
        return self.engines if self._size is None else list(range(self._size))

    def end(self, engine: int) -> None:
        """End one engine's process, whatever it is doing, and see that the controller notices."""
        with contextlib.suppress(Exception):  # an engine on another host, or one that is gone
            self.client.send_signal("SIGKILL", [engine], block=False)  # its nanny does it
        for process in self._processes(engine):  # whose nanny may be gone
            with contextlib.suppress(Exception):
                process.kill()
        is_unlisted(self.client, engine)

    def check_controller(self) -> None:
        """Raise :class:`ClusterError` if the controller, which was started here, has ended."""
        if not self._controller_lives:
            msg = (
                "The cluster's controller has ended, so that its engines cannot be reached any more. "
                "Type %flexcluster stop, then start again."
            )
            raise ClusterError(msg)

    @property
    def _controller_lives(self) -> bool:
        """Whether the controller is at work, as far as is seen from here: it may be another machine's."""
        process = getattr(self._cluster.controller, "process", None)
        if process is None:
            return True
        if self._pulse is None or self._pulse.of is not process:
            self._pulse = Pulse(process)
        return self._pulse.beats

    def last_words(self, ranks: Iterable[int]) -> list[str]:
        """How engines ended, as far as their launchers and logs tell."""
        words = []
        for rank in ranks:
            words += [self._how_it_ended(rank), *self._log_tail(rank)]
        return [word for word in words if word]

    def _how_it_ended(self, rank: int) -> str:
        code = None
        for process in self._processes(rank):
            with contextlib.suppress(Exception):  # of a process that others started, the system tells nothing
                code = process.wait(NOTICED)
        if not isinstance(code, int):
            stopped = any(status(process) == "stopped" for process in self._processes(rank))
            return f"Rank {rank} answers nobody: its process is stopped, as by SIGSTOP." if stopped else ""
        if code >= 0:
            return f"Rank {rank} exited with code {code}."
        name = signal.Signals(-code).name
        why = " (often: out of memory)" if name == "SIGKILL" else ""
        return f"Rank {rank} was ended by {name}{why}."

    def _processes(self, rank: int) -> list[Any]:
        """The process of a rank's engine, if it was started one by one, here or by another notebook."""
        engine_set = self._cluster.engines.get(self._set_of(rank))
        launchers = getattr(engine_set, "launchers", {}).values()
        return [launcher.process for launcher in launchers if launcher.process is not None]

    def _log_tail(self, rank: int) -> list[str]:
        path = self.log_folder / f"ipengine-{self.name}-{self._set_of(rank)}-0.log"
        if not path.is_file():
            return []
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        told = [line[:LINE] for line in lines if not _CHATTER.match(line)][-TAIL:]
        return [f"The end of {path}:", *(f"    {line}" for line in told)] if told else []

    def replace(self, ranks: Sequence[int]) -> None:
        """Start engines again, under their ids, in place of those that ended.

        Raises :class:`ClusterError` if they were not started one by one, or do not come up.
        """
        missing = [rank for rank in ranks if is_unlisted(self.client, rank)]  # someone may have replaced it
        if missing and self._size is None:
            msg = (
                f"The engine of rank {missing[0]} was not started by flexmagic, so that it cannot be "
                f"started again from here. Start one with `ipengine --IPEngine.id={missing[0]}`, then "
                "%flexcluster recover."
            )
            raise ClusterError(msg)
        devices = local_devices()
        for rank in missing:
            with contextlib.suppress(Exception):  # a frozen one is still there, another is not
                self._cluster.engines[self._set_of(rank)].signal(signal.SIGKILL)
            self._start_engine(rank, devices)
        self._await_engines(len(self.members), lambda _up, _what: None)
        if self._reaper is not None:
            self._dismiss_reaper()
            self._reaper = reaper.start(self._cluster.cluster_file)

    def _set_of(self, rank: int) -> str:
        """The engine set that is one rank's; by its name whoever attaches knows how many there are."""
        return f"rank{rank}of{self._size}"

    def _start_engine(self, rank: int, devices: Devices) -> None:
        self._cluster.start_engines_sync(
            n=1,
            engine_set_id=self._set_of(rank),
            environment=rank_environment(rank, devices),
            engine_args=[f"--IPEngine.id={rank}"],
        )

    def outlive(self, kernel: str, holds: str) -> None:
        """Stay for a while when this process ends, for the kernel that comes in its place.

        Nothing for a cluster that others started or that stays anyway.
        """
        if self._reaper is None:
            return
        path = Offer(self.name, kernel, holds).write(self._security)
        reaper.offer(self._reaper, path)
        self._cluster.shutdown_atexit = False
        self._reaper, self.keep = None, True

    def adopt(self, kernel: str) -> None:
        """Take a cluster that an earlier process of this kernel has left: it ends with this one."""
        if take(self._security, self.name, kernel):
            self.owned, self.keep = True, False
            self._reaper = reaper.start(self._cluster.cluster_file)

    def disconnect(self) -> None:
        """Close the connection; the engines stay."""
        self._over = "This session has left its cluster. Type %flexcluster attach to look at what is there."
        self._dismiss_reaper()
        if self.client is not None:
            self.client.close()
        if not Path(self._cluster.cluster_file).is_file():
            self.turns.forget()

    def stop(self) -> None:
        """End the engines and the controller, and forget them."""
        self._over = (
            "The cluster was stopped, and what runs had left on its engines is gone. Run again on a new one."
        )
        if self.client is not None:
            with contextlib.suppress(Exception):  # a broken connection must not keep engines alive
                self.client.close()
        process = getattr(self._cluster.controller, "process", None)
        left = [] if process is None else reaper.family_of({process.pid})  # of a controller that was killed
        with contextlib.suppress(OSError):
            left += reaper.named_in(Path(self._cluster.cluster_file))  # also what another notebook started
        self._cluster.stop_controller_sync()  # first, so that nobody takes it for engines to be started again
        self._cluster.stop_engines_sync()
        reaper.end(left)
        reaper.forget(self._security / f"cluster-{self.name}.json")
        self._dismiss_reaper()

    @property
    def _security(self) -> Path:
        """Where the connection files are."""
        return Path(self._cluster.profile_dir) / "security"

    def _dismiss_reaper(self) -> None:
        if self._reaper is not None:
            reaper.dismiss(self._reaper)
            self._reaper = None


def is_unlisted(client: Any, engine: int) -> bool:
    """Whether the controller knows no engine of this id; one just ended may be listed for a moment."""
    deadline = time.monotonic() + UNLISTED
    while engine in client.ids and time.monotonic() < deadline:
        time.sleep(0.02)
    return engine not in client.ids


def is_over(cluster: Cluster) -> bool:
    """Whether it was stopped, by whomever, or its controller has ended, as far as is seen from here."""
    running: Any = cluster._cluster  # noqa: SLF001 - ipyparallel's own
    return not os.path.exists(running.cluster_file) or not cluster._controller_lives  # noqa: PTH110, SLF001 - often


def _size_of(engine_sets: Iterable[str]) -> int | None:
    """How many ranks a cluster that was started here, or by another notebook, has; ``None`` for others."""
    named = (re.fullmatch(r"rank\d+of(\d+)", name) for name in engine_sets)
    return next((int(match[1]) for match in named if match), None)
