"""Pieces for a notebook on another machine, sent straight to it and not through the controller.

The rank listens where the other ranks reach it, only there, and only once somebody has asked. What is
said is encrypted under a key that the notebook was told over the cluster's own, authenticated
connection, and a piece is sent to whoever names the ticket that came with the key, while it is lent.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import zmq

WANTED = struct.Struct("<QQQ")
"""What is asked for: the part's number, the first byte of it and how many."""

SIZE = 64 << 20
"""Bytes that one request may ask for."""


@dataclass(frozen=True)
class Offer:
    """Where a part can be had, as the rank says it; plain data.

    ``endpoint`` and ``key``: where it listens, and its public key; ``ticket`` and ``part``: what to ask for.
    """

    endpoint: str
    key: bytes
    ticket: bytes
    part: int
    nbytes: int


class Outlet:
    """What a rank has on offer; it begins to listen with its first offer.

    ``host``: an address at which ranks meet: the rank listens on its own way there.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._parts: dict[bytes, Sequence[torch.Tensor]] = {}
        self._socket: Any = None
        self._key = b""
        self._endpoint = ""

    def offer(self, parts: Sequence[torch.Tensor]) -> list[Offer]:
        """Offer some tensors, contiguous ones on the CPU, until :meth:`withdraw`."""
        if self._socket is None:
            self._listen()
        ticket = secrets.token_bytes(16)
        self._parts[ticket] = parts
        return [Offer(self._endpoint, self._key, ticket, at, p.nbytes) for at, p in enumerate(parts)]

    def withdraw(self, parts: Sequence[torch.Tensor]) -> None:
        """Offer them no more."""
        for ticket, offered in list(self._parts.items()):
            if offered is parts:
                del self._parts[ticket]

    def _listen(self) -> None:
        server: Any = zmq.Context.instance().socket(zmq.ROUTER)
        self._key, server.curve_secretkey = zmq.curve_keypair()
        server.curve_server, server.linger, server.ipv6 = True, 0, ":" in self._host
        server.sndhwm = 16  # a reader that does not read holds up itself
        host = towards(self._host)
        shown = f"[{host}]" if ":" in host else host
        self._endpoint = f"tcp://{shown}:{server.bind_to_random_port(f'tcp://{shown}')}"
        self._socket = server
        threading.Thread(target=self._serve, args=(server,), name="flexmagic outlet", daemon=True).start()

    def _serve(self, server: Any) -> None:
        """Send what is asked for; what is no request is passed over, as whoever sent it is nobody we know."""
        with contextlib.suppress(zmq.ContextTerminated, zmq.ZMQError):
            while True:
                frames = server.recv_multipart()
                if len(frames) != 3 or len(frames[2]) != WANTED.size:
                    continue
                who, ticket, wanted = frames
                raw = self._part(ticket, *WANTED.unpack(wanted))
                server.send_multipart([who, wanted, raw], copy=False)

    def _part(self, ticket: bytes, part: int, start: int, size: int) -> Any:
        """The bytes asked for; none for what is not, or no longer, on offer."""
        parts = self._parts.get(ticket, ())
        if part >= len(parts) or not 0 < size <= SIZE or start + size > parts[part].nbytes:
            return b""
        flat = parts[part].reshape(-1).view(torch.uint8)
        return flat[start : start + size].numpy()


def towards(host: str) -> str:
    """The address of this machine from which it reaches another; nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
