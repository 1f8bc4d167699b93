"""What this machine has for ranks to run on."""

from __future__ import annotations

import os
from dataclasses import dataclass

from flexmagic.errors import ClusterError


@dataclass(frozen=True)
class Devices:
    """What one host offers to ranks: ``count`` devices of a ``kind`` (``GPU`` or ``CPU core``)."""

    kind: str
    count: int


def local_devices() -> Devices:
    """The GPUs of this host, or its CPU cores if it has none."""
    import torch

    if torch.cuda.is_available():
        return Devices("GPU", torch.cuda.device_count())
    return Devices("CPU core", len(os.sched_getaffinity(0)))


def check_size(n: int, devices: Devices, *, oversubscribe: bool) -> None:
    """Raise :class:`ClusterError` for a number of engines that the devices do not carry."""
    if n < 1:
        msg = f"A cluster needs at least one engine, not {n}. Type %flexcluster start -n 2."
        raise ClusterError(msg)
    if n > devices.count and not oversubscribe:
        have = f"{devices.count} {devices.kind}{'s' if devices.count != 1 else ''}"
        msg = (
            f"{n} engines asked for, but this machine has {have}. "
            f"Type %flexcluster start -n {devices.count}, "
            f"or let engines share them: %flexcluster start -n {n} --oversubscribe."
        )
        raise ClusterError(msg)


def rank_environment(rank: int, devices: Devices) -> dict[str, str]:
    """What an engine's process must know before it imports torch."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
        # large tensors on large pages, which cost less to get and to read from the notebook
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),
    }
    if devices.kind == "GPU":
        environment["CUDA_VISIBLE_DEVICES"] = str(rank % devices.count)
    return environment
