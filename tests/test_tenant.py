"""A host of tenants without a cluster: what mends is not held to guests' limits."""

from types import SimpleNamespace

import pytest

from flexmagic.client.tenant import Host
from flexmagic.client.watching import TimeLimits
from flexmagic.errors import EngineError
from flexmagic.workshop.mending import Mending


@pytest.fixture
def host():
    made = Host.__new__(Host)
    made.heard = []
    waiting = SimpleNamespace(limits=TimeLimits(code=3.0))

    def every(verb, *_args):
        made.heard.append((verb, waiting.limits.run))
        if verb == "put_back":
            raise EngineError("gone")

    origin = SimpleNamespace(spec="a model"), ()
    made.calls = SimpleNamespace(waiting=waiting, all=every, one=lambda *_args: origin)
    made._turn = pytest.MonkeyPatch.context
    made.limit(5.0)
    return made


def test_what_is_unhurried_has_no_limit_and_all_else_has_it_again(host):
    waiting = host.calls.waiting
    seen = []

    def interrupted():
        seen.append(waiting.limits)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), host.unhurried():
        interrupted()
    assert seen == [TimeLimits(code=3.0, run=None)]
    assert waiting.limits == TimeLimits(code=3.0, run=5.0)


def test_looks_at_weights_and_putting_them_back_are_unhurried(host):
    host.weights()
    with pytest.raises(EngineError):
        host.put_back(["w"])
    verbs = ["weight_versions", "weight_sums", "load_model", "put_back", "drop_built"]
    assert host.heard == [(verb, None) for verb in verbs]
    assert host.calls.waiting.limits.run == 5.0


def test_starting_an_engine_again_is_unhurried(host, monkeypatch):
    monkeypatch.setattr(Host, "is_over", False)
    host.session = SimpleNamespace(recover=lambda: host.heard.append(host.calls.waiting.limits.run))
    journal = SimpleNamespace(note=lambda *_who, **_facts: None)
    job = SimpleNamespace(done=SimpleNamespace(done=lambda: False), guest=SimpleNamespace(said=[]))
    tries = [[EngineError("gone")], []]
    Mending(host, journal, lambda _jobs: tries.pop(0), lambda *_failed: pytest.fail("it was mended")).do(
        [job]
    )
    assert host.heard == [None]
    assert host.calls.waiting.limits.run == 5.0
