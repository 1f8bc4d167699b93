"""A guest's tensor: how often the gateway is asked, and in how many pieces."""

import math

import numpy as np
import pytest

from flexmagic.errors import SiteError
from flexmagic.workshop.frames import put
from flexmagic.workshop.guest_run import GuestRun
from flexmagic.workshop.link import _InOne

VALUES = np.arange(12, dtype=np.float32).reshape(1, 3, 4)


class Link:
    """A gateway with one tensor, that notes what it was asked; it gives ``most`` values at once."""

    def __init__(self, most=100):
        self.asked, self.most = [], most

    def ask(self, kind, *, run, step, site, hook, **more):
        self.asked.append(kind)
        if site not in {"m", "m:output"}:
            raise SiteError("not here")
        frames = []
        if kind == "read":
            index = tuple(slice(*part) if isinstance(part, list) else part for part in more["index"])
            return {"array": put(VALUES[index], frames)}, frames
        info = {
            "site": "m:output", "shape": VALUES.shape, "dims": ["batch", "seq", "4"], "dtype": "float32",
            "mesh": "tp=2", "placements": [], "hook": None, "run": 1, "step": None, "nbytes": VALUES.nbytes,
            "partial": False, "warnings": [], "missing_ranks": [], "form": "", "pieces": [],
        }  # fmt: skip
        header = {"info": info, "text": "m:output, float32", "tokens": [["a", "b", "c"]]}
        if more.get("values") and math.prod(VALUES.shape) <= self.most:
            header["array"] = put(VALUES, frames)
        return header, frames


def run_of(link):
    said = {
        "number": 1,
        "seed": 0,
        "seconds": 0.1,
        "tokens": [],
        "ids": [],
        "warnings": [],
        "sites": ["m:output"],
    }
    return GuestRun(link, said)


@pytest.mark.parametrize("name", ["m", "m:output"])
def test_a_whole_tensor_is_asked_for_once(name):
    link = Link()
    found = run_of(link)[name]
    assert link.asked == []
    assert (found.numpy() == VALUES).all()
    assert repr(found) == "m:output, float32"
    assert found.labels(1) == ["a", "b", "c"]
    assert found.bytes_moved == VALUES.nbytes
    assert link.asked == ["look"]
    assert (found.numpy() == VALUES).all()
    assert (found[0, 1] == VALUES[0, 1]).all()
    assert link.asked == ["look", "read", "read"]


def test_one_that_is_too_large_comes_in_parts():
    link = Link(most=10)
    assert (run_of(link)["m"].numpy() == VALUES).all()
    assert link.asked == ["look", "read"]


def test_what_was_not_captured_is_refused_at_once():
    link = Link()
    with pytest.raises(SiteError, match="not here"):
        run_of(link)["n"]
    with pytest.raises(SiteError, match="not here"):
        run_of(link)["n", "hook"]
    assert link.asked == ["look", "look"]


def test_a_request_leaves_in_one_piece():
    class Socket:
        def __init__(self):
            self.sent = []

        def sendall(self, data):
            self.sent.append(bytes(data))

        def close(self):
            pass

    for _ in range(2):
        connection = _InOne("h")
        connection.sock = socket = Socket()
        connection.request("POST", "/ask", b"body", {"X": "1"})
        (whole,) = socket.sent
        assert whole.startswith(b"POST /ask HTTP/1.1\r\n")
        assert whole.endswith(b"\r\n\r\nbody")
        assert connection._held is None
