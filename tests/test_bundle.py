"""What is posted in a block goes to each rank in few messages, in its order."""

import threading

import pytest

from flexmagic.client.bundle import MOST, bundle_of, bundled


class Calls:
    def __init__(self):
        self.sent = []

    def send(self, rank, verb, args):
        self.sent.append((rank, verb, args))

    def post(self, rank, verb, *args):
        bundle = bundled(self)
        if bundle is None:
            self.send(rank, verb, args)
        else:
            bundle.add(rank, verb, args)


@pytest.fixture
def calls():
    return Calls()


def test_one_message_for_each_rank(calls):
    with bundle_of(calls, calls.send):
        calls.post(0, "keep", "w", b"1")
        calls.post(1, "release", (1, 2))
        calls.post(0, "release", (1, 2))
        assert calls.sent == []
    assert calls.sent == [
        (0, "several", ([("keep", ("w", b"1"), {}), ("release", ((1, 2),), {})],)),
        (1, "release", ((1, 2),)),
    ]
    calls.post(0, "after")
    assert calls.sent[-1] == (0, "after", ())


def test_what_is_too_much_for_one_message_goes_in_several(calls):
    half = bytes(MOST // 2)
    with bundle_of(calls, calls.send):
        for name in "abc":
            calls.post(0, "keep", name, half)
        assert [len(args[0]) for _, _, args in calls.sent] == [2]
    kept = [args if verb == "keep" else args[0] for _, verb, args in calls.sent]
    assert kept == [[("keep", ("a", half), {}), ("keep", ("b", half), {})], ("c", half)]


def test_it_is_left_when_the_block_fails_and_only_this_threads(calls):
    other = Calls()

    def fails():
        with bundle_of(calls, calls.send):
            with bundle_of(calls, calls.send):
                calls.post(0, "within")
            other.post(0, "others")
            thread = threading.Thread(target=calls.post, args=(0, "elsewhere"))
            thread.start()
            thread.join()
            assert calls.sent == [(0, "elsewhere", ())]
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    assert other.sent == [(0, "others", ())]
    assert calls.sent[1:] == [(0, "within", ())]
    assert bundled(calls) is None
