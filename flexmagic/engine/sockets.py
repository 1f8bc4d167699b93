"""The connections between ranks, seen from outside of the libraries that opened them.

Gloo has no call that frees a rank which waits for another; shutting the sockets it waits on does.
A socket belongs to a process group if both its ends belong to ranks, and neither is the store's.
Linux only: sockets are found in ``/proc``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

Endpoint = tuple[str, int]
"""Address and port of one end of a connection."""

_MOVED = struct.Struct("=120xQQ")
"""Where Linux tells in ``TCP_INFO`` how many bytes were acknowledged and received."""


def endpoints() -> tuple[Endpoint, ...]:
    """The process's own ends of all its TCP connections."""
    return tuple(own for _, own, _ in _connections())


def moved(ranks: Collection[Endpoint], store_port: int) -> int:
    """Bytes that have gone, either way, through connections to other ranks but the store's, which chats."""
    total = 0
    for connection in _between(ranks, store_port):
        with contextlib.suppress(OSError, struct.error):
            told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MOVED.size)
            total += sum(_MOVED.unpack(told))
    return total


def shut(ranks: Collection[Endpoint], store_port: int) -> int:
    """Shut all connections to other ranks but the store's; whoever waits on one gets an error at once.

    Returns how many were shut. Listening sockets are left alone: gloo ends the process without them.
    """
    count = 0
    for connection in _between(ranks, store_port):
        with contextlib.suppress(OSError):  # the other end may have gone first
            connection.shutdown(socket.SHUT_RDWR)
            count += 1
    return count


def _between(ranks: Collection[Endpoint], store_port: int) -> Iterator[socket.socket]:
    """The connections to ``ranks``' ends that are not this process's own, nor the store's."""
    others = set(ranks) - set(endpoints())
    for connection, own, peer in _connections():
        if peer in others and store_port not in {own[1], peer[1]}:
            yield connection


def _connections() -> Iterator[tuple[socket.socket, Endpoint, Endpoint]]:
    """Every connected TCP socket of this process, duplicated for as long as it is looked at, and its ends."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:
            continue  # closed meanwhile
        with connection:
            if connection.family not in {socket.AF_INET, socket.AF_INET6}:
                continue
            if connection.type != socket.SOCK_STREAM:
                continue
            try:
                own, peer = connection.getsockname(), connection.getpeername()
            except OSError:
                continue  # listening, or closed by the other end
            yield connection, _plain(own), _plain(peer)


def _plain(address: tuple[str, int] | tuple[str, int, int, int]) -> Endpoint:
    return address[0].removeprefix("::ffff:"), address[1]
