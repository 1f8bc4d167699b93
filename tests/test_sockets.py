"""Connections of this process to another's, over loopback."""

import socket
import subprocess
import sys

import pytest

from flexmagic.engine import sockets

OTHER = """
import socket, sys
ends = [socket.create_connection(("127.0.0.1", int(port))) for port in sys.argv[1:]]
print(*(end.getsockname()[1] for end in ends), flush=True)
for line in sys.stdin:
    ends[int(line)].sendall(b"x" * 1000)
"""


class Peer:
    """Another process with connections to listening sockets of ours; ``ends`` are its ends, ``here`` ours."""

    def __init__(self, count):
        self.listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        ports = [str(server.getsockname()[1]) for server in self.listening]
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, *ports], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ends = [("127.0.0.1", int(port)) for port in self.process.stdout.readline().split()]
        self.here = [server.accept()[0] for server in self.listening]

    def send(self, number):
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()

    def port(self, number):
        return self.listening[number].getsockname()[1]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        for one in [*self.here, *self.listening]:
            one.close()


@pytest.fixture
def peer():
    peer = Peer(2)
    yield peer
    peer.close()


def test_own_ends_of_all_connections_are_told_but_not_listening_ones(peer):
    told = sockets.endpoints()
    assert {one.getsockname() for one in peer.here} <= set(told)
    with socket.create_server(("127.0.0.1", 0)) as alone:
        assert alone.getsockname() not in sockets.endpoints()


def test_bytes_through_connections_to_ranks_are_counted_and_others_are_not(peer):
    before = sockets.moved(peer.ends[:1], 0)
    peer.send(1)
    assert len(peer.here[1].recv(1000, socket.MSG_WAITALL)) == 1000
    assert sockets.moved(peer.ends[:1], 0) == before
    peer.send(0)
    assert len(peer.here[0].recv(1000, socket.MSG_WAITALL)) == 1000
    assert sockets.moved(peer.ends[:1], 0) == before + 1000
    assert sockets.moved(peer.ends, 0) == before + sockets.moved(peer.ends[1:], 0) + 1000
    assert sockets.moved(peer.ends, peer.port(0)) == sockets.moved(peer.ends[1:], 0)  # the store's port


def test_what_is_shut_ends_at_once_and_the_store_is_spared(peer):
    assert sockets.shut(peer.ends, store_port=peer.port(1)) == 1
    assert peer.here[0].recv(1) == b""
    peer.send(1)
    assert peer.here[1].recv(1000, socket.MSG_WAITALL)  # the store's connection goes on


def test_nothing_else_of_the_process_is_shut(peer):
    near, far = socket.socketpair()
    server = socket.create_server(("127.0.0.1", 0))
    mine = socket.create_connection(server.getsockname())
    back, _ = server.accept()
    own = {mine.getsockname(), back.getsockname()}
    with near, far, server, mine, back:
        assert own <= set(sockets.endpoints())
        assert sockets.shut([*peer.ends, *own, server.getsockname()], 0) == 2  # the peer's, not our own
        mine.sendall(b"still")
        assert back.recv(5) == b"still"
        near.sendall(b"there")
        assert far.recv(5) == b"there"
        socket.create_connection(server.getsockname()).close()


def test_shutting_again_or_nothing_is_no_error(peer):
    assert sockets.shut([], 0) == 0
    sockets.shut(peer.ends, 0)
    assert sockets.shut(peer.ends, 0) >= 0
    assert sockets.moved([], 0) == 0


def test_addresses_of_both_families_compare_equal():
    assert sockets._plain(("::ffff:127.0.0.1", 5, 0, 0)) == ("127.0.0.1", 5)
