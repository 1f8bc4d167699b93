"""Process groups of a rank: the model's, and one of our own for exchanges.

Every start has a *generation*: names in the store carry it, so that nothing of an earlier start
can be mistaken for the present one.
"""

from __future__ import annotations

import datetime as dt
import gc
from dataclasses import dataclass

import torch
import torch.distributed as dist

STORE_TIMEOUT = dt.timedelta(seconds=60)


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


class Groups:
    """The default process group and flexmagic's own group beside it."""

    def __init__(self, place: Place, host: str, port: int, generation: int) -> None:
        """Join the store at ``host:port`` (rank 0 serves it) and create both groups."""
        self.place = place
        self.generation = generation
        store = dist.TCPStore(
            host,
            port,
            place.world_size,
            is_master=place.rank == 0,
            timeout=STORE_TIMEOUT,
            wait_for_workers=False,
        )
        self._store = dist.PrefixStore(f"flexmagic/{generation}", store)
        backend = "gloo" if place.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=self._store, rank=place.rank, world_size=place.world_size)
        self.own = dist.new_group(backend=backend)
        self.agree_on_start()

    def agree_on_start(self) -> None:
        """Connect all pairs now, so that the first run does not pay for it."""
        dist.barrier()
        dist.barrier(group=self.own)

    def close(self) -> None:
        """Leave all groups; tolerates groups that are already gone."""
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
