"""Process groups of a rank: the model's, and one of our own for exchanges.

Every start has a *generation*: names in the store carry it, so that nothing of an earlier start
can be mistaken for the present one. Groups that were cut are made again, under their names, in a
new generation.
"""

from __future__ import annotations

import datetime as dt
import gc
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from flexmagic.engine.holders import instances_of, replace_everywhere
from flexmagic.engine.outboxes import Outboxes
from flexmagic.engine.private_groups import GroupSpec, known_groups, make_group, renew_reducers

STORE_TIMEOUT = dt.timedelta(seconds=60)

OWN = "flexmagic exchanges"
"""What our own group says it is for."""


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank among ``world_size``, its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def generators(self) -> list[torch.device]:
        """The devices, beside the CPU, on which this rank draws random numbers."""
        return [self.device] if self.device.type == "cuda" else []


@dataclass(frozen=True)
class Meeting:
    """Where ranks meet: the store that rank 0 serves, and the generation of what is made there."""

    host: str
    port: int
    generation: int


class Groups:
    """The default process group, flexmagic's own beside it, and those the model was made with."""

    def __init__(self, place: Place, meeting: Meeting, others: Sequence[GroupSpec] = ()) -> None:
        """Join the store and make the groups; ``others``: those that the ranks already there have."""
        self.place = place
        self._left: dict[str, list[dist.ProcessGroup]] = {}
        self._wanted: dict[str, GroupSpec] = {}
        self._open(meeting, others, self._reach(meeting))

    def _reach(self, meeting: Meeting) -> dist.Store:
        """The store, which rank 0 serves; a rank that comes before it tries again, ever less often."""
        store = dist.TCPStore(
            meeting.host,
            meeting.port,
            self.place.world_size,
            is_master=self.place.rank == 0,
            timeout=STORE_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=self._listens_at(meeting),
        )
        return dist.PrefixStore(f"flexmagic/{meeting.generation}", store)

    def _listens_at(self, meeting: Meeting) -> int | None:
        """A socket for the store of ranks of this machine, else it would listen to others, too."""
        if self.place.rank or not meeting.host.startswith("127."):
            return None
        try:
            return socket.create_server((meeting.host, meeting.port)).detach()  # the store closes it
        except OSError:  # the store says it
            return None

    def _open(self, meeting: Meeting, others: Sequence[GroupSpec], store: dist.Store) -> None:
        place = self.place
        self.meeting, self._store = meeting, store
        self.outboxes = Outboxes()
        backend = "gloo" if place.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=self._store, rank=place.rank, world_size=place.world_size)
        own = GroupSpec("1", tuple(range(place.world_size)), backend, OWN)
        for spec in others or [own]:
            make_group(spec)
        self.own = next(group for spec, group in known_groups().items() if spec.description == OWN)
        self.agree_on_start()

    def agree_on_start(self) -> None:
        """Connect all pairs now, so that the first run does not pay for it."""
        dist.barrier()
        dist.barrier(group=self.own)

    def specs(self) -> tuple[GroupSpec, ...]:
        """All groups of this rank but the default one, as they can be made again."""
        specs = self._wanted | {spec.name: spec for spec in known_groups()}
        return tuple(sorted((s for n, s in specs.items() if n != "0"), key=lambda spec: spec.order))

    def rebuild(self, meeting: Meeting, specs: Sequence[GroupSpec]) -> list[str]:
        """Leave all groups, make them again and put the new ones wherever the old ones are held.

        ``specs``: those of all ranks together, in order; all ranks call it at once. Returns the kinds
        of objects that still hold an old group, which fails when it is used.
        """
        self._set_aside()
        served = self._reach(meeting) if self.place.rank == 0 else None
        self.close()
        self._open(meeting, specs, served or self._reach(meeting))
        new = {spec.name: group for spec, group in known_groups().items()}
        left, self._left, self._wanted = self._left, {}, {}
        pairs = {id(old): (old, new[name]) for name, olds in left.items() for old in olds}
        keep_groups = instances_of(DeviceMesh, DistributedDataParallel)
        held = replace_everywhere(pairs, keep_groups)
        renew_reducers(keep_groups)
        return held

    def _set_aside(self) -> None:
        """Keep the present groups until there are new ones, beside those of a rebuild that failed."""
        for spec, group in known_groups().items():
            self._left.setdefault(spec.name, []).append(group)
            self._wanted[spec.name] = spec

    def close(self) -> None:
        """Leave all groups; tolerates groups that are already gone."""
        forget_failure()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()


def forget_failure() -> None:
    """Let go of the last exception: its frames hold what was being sent, and with it the sockets."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if isinstance(error, BaseException):
        traceback.clear_frames(error.__traceback__)
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            delattr(sys, name)


def abort_device_groups() -> None:
    """End what waits in groups between devices, from another thread; gloo's are ended by their sockets."""
    for spec, group in known_groups().items():
        if "nccl" in spec.backend:
            group.abort()
