"""What listens for others: this machine only, unless the owner asks for more."""

import psutil
import pytest

from flexmagic.engine.box_walls import available
from flexmagic.workshop.address import Address
from flexmagic.workshop.guest import Guest
from flexmagic.workshop.link import Link
from flexmagic.workshop.opening import open_workshop

from .conftest import PROMPT

pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

EVERYWHERE = "0.0.0.0"  # noqa: S104 - that is what is tried
WORDS = {
    "ipyparallel.engine": "engine",
    "engine.nanny": "nanny",
    "ipyparallel.controller": "controller",
    "box_start": "box",
}


def ours():
    """This process, and all that were started from it, by what they are."""
    me = psutil.Process()
    found = {("gateway", me.pid): me}
    for process in me.children(recursive=True):
        command = " ".join(process.cmdline())
        found |= {(kind, process.pid): process for word, kind in WORDS.items() if word in command}
    return found


def open_to_others(found):
    """Sockets of processes at which something from beyond this machine could arrive: kind and port."""
    out = set()
    for (kind, _), process in found.items():
        for one in process.net_connections(kind="inet"):
            waits = one.status == psutil.CONN_LISTEN or (one.type.name == "SOCK_DGRAM" and not one.raddr)
            if waits and not one.laddr.ip.startswith("127.") and one.laddr.ip != "::1":
                out.add((kind, one.laddr.port))
    return out


def with_code(guest):
    """A run, with code in a box if there can be one."""
    if not available():
        guest.hook("model.layers.1.mlp", "x *= 0.5", name="half")
    guest.run(PROMPT)


@pytest.mark.parametrize("host", ["127.0.0.1", EVERYWHERE])
def test_nothing_listens_beyond_this_machine_unless_asked(loaded, tmp_path, host):
    before = open_to_others(ours())
    server = open_workshop(loaded.cluster_name, guests=1, host=host, journal=tmp_path / "log.jsonl")
    try:
        line = next(iter(server.lines.values())).split()[-1]
        there = Address.read(line)
        guest = Guest(Link(Address("127.0.0.1", there.port, there.token, there.fingerprint), "ann"))
        with_code(guest)
        found = ours()
        kinds = [kind for kind, _ in found]
        assert kinds.count("engine") >= 2
        assert kinds.count("controller") >= 1
        assert available() or kinds.count("box") >= 4, "a template and a box for each engine"
        listening = {
            port for process in found.values() for port in map(_port, process.net_connections(kind="inet"))
        }
        assert server.port in listening, "sockets are seen at all"
        assert before == set(), "the cluster alone"
        assert open_to_others(found) == (set() if host != EVERYWHERE else {("gateway", server.port)})
    finally:
        server.close()


def _port(one):
    return one.laddr.port if one.status == psutil.CONN_LISTEN else None
