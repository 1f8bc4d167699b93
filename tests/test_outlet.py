"""What is offered is sent to whoever has the ticket and the key, while it is offered, and nothing else is."""

import socket

import pytest
import torch
import zmq

from flexmagic.engine.outlet import SIZE, WANTED, Outlet, towards


@pytest.fixture
def ask():
    """Ask an offer's rank, and have the answer; ``None`` if none comes."""
    made = []

    def asking(offer, *, ticket=None, part=None, start=0, size=4, frames=None, key=True):
        client = zmq.Context.instance().socket(zmq.DEALER)
        made.append(client)
        client.linger = 0
        if key:
            client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
            client.curve_serverkey = offer.key
        client.connect(offer.endpoint)
        wanted = WANTED.pack(offer.part if part is None else part, start, size)
        client.send_multipart(frames or [ticket or offer.ticket, wanted])
        if not client.poll(5000 if key and not frames else 300):
            return None
        which, raw = client.recv_multipart()
        assert which == wanted
        return raw

    yield asking
    for client in made:
        client.close()


def test_parts_are_sent_while_they_are_offered(ask):
    outlet = Outlet("127.0.0.1")
    parts = [torch.arange(6, dtype=torch.int16), torch.randn(3, 5, dtype=torch.bfloat16)]
    offers = outlet.offer(parts)
    others = outlet.offer(more := [torch.zeros(2)])
    for offer, part in zip(offers, parts, strict=True):
        assert offer.nbytes == part.nbytes
        raw = ask(offer, size=part.nbytes)
        assert raw == bytes(part.reshape(-1).view(torch.uint8).numpy())
        assert ask(offer, start=2, size=6) == raw[2:8]
    outlet.withdraw(parts)
    assert [ask(offer) for offer in offers] == [b"", b""]
    assert ask(others[0]) == bytes(4)
    outlet.withdraw(more)
    assert ask(others[0]) == b""


@pytest.mark.parametrize(
    "asked",
    [
        {"ticket": bytes(16)},
        {"part": 1},
        {"part": 2**63},
        {"start": 6, "size": 3},
        {"size": 0},
        {"size": 2**63},
    ],
)
def test_what_is_not_on_offer_is_not_sent(ask, asked):
    (offer,) = Outlet("127.0.0.1").offer([torch.zeros(2)])
    assert ask(offer, **asked) == b""
    assert ask(offer) == bytes(4)


@pytest.mark.parametrize("frames", [[b"hello"], [b"", b"", b"", b""], [b"x" * 16, b"short"]])
def test_what_is_no_request_has_no_answer_and_stops_nothing(ask, frames):
    (offer,) = Outlet("127.0.0.1").offer([torch.zeros(2)])
    assert ask(offer, frames=frames) is None
    assert ask(offer) == bytes(4)


def test_without_the_key_nothing_is_heard(ask):
    (offer,) = Outlet("127.0.0.1").offer([torch.zeros(2)])
    assert ask(offer, key=False) is None
    assert ask(offer) == bytes(4)


def test_no_more_than_so_much_is_sent_at_once(ask):
    (offer,) = Outlet("127.0.0.1").offer([torch.zeros(SIZE + 1, dtype=torch.uint8)])
    assert ask(offer, size=SIZE + 1) == b""
    assert len(ask(offer, start=1, size=SIZE)) == SIZE


def test_it_listens_only_where_the_other_ranks_are():
    (offer,) = Outlet("127.0.0.1").offer([torch.zeros(2)])
    host, port = offer.endpoint.removeprefix("tcp://").split(":")
    assert host == towards("127.0.0.1") == "127.0.0.1"
    own = towards("203.0.113.1") if _routed() else "127.0.0.1"
    if not own.startswith("127."):
        with pytest.raises(OSError, match="refused"), socket.create_connection((own, int(port)), 2):
            pass


def _routed():
    try:
        return bool(towards("203.0.113.1"))
    except OSError:
        return False
