"""A workshop without engines: how it is opened or not, who is named, and what is kept of what is said."""

import socket
from types import SimpleNamespace

import pytest

from flexmagic.client.hooks import HookVersion
from flexmagic.engine.code import HookSource
from flexmagic.engine.declared import Declared
from flexmagic.errors import ClusterError, FlexError, InputError, ModelError
from flexmagic.layout.sites import Site
from flexmagic.workshop import gateway, worlds
from flexmagic.workshop.allowance import Allowance, Use
from flexmagic.workshop.desk import Job
from flexmagic.workshop.gateway import Workshop
from flexmagic.workshop.guests import Guest, Guests
from flexmagic.workshop.memory import OTHER_KIND, Memory
from flexmagic.workshop.opening import end_workshop, open_workshop
from flexmagic.workshop.requests import parse
from flexmagic.workshop.running import Runner, RunResult
from flexmagic.workshop.weights_watch import EVERY, WeightsWatch
from flexmagic.workshop.worlds import SAID, Worlds


class Host:
    """A cluster with a model of one weight; ``wrong`` names what raises."""

    wrong, made = "", []

    def __init__(self, folder):
        self.folder, self.closed = folder, False
        self.session = SimpleNamespace(cluster_name="c")
        self.calls = SimpleNamespace(all=lambda *_asked: [], ranks=SimpleNamespace(pids=[1]))
        self.versions, self.sums = [{"w": 0}], [{"w": (1, 1)}]
        self.back = KeyboardInterrupt
        Host.made.append(self)

    def _raise(self, what):
        if self.wrong == what:
            raise ModelError(what)

    @property
    def model(self):
        self._raise("model")
        return "a model"

    def weights(self):
        self._raise("weights")
        return self.versions, self.sums

    def no_boxes(self):
        self._raise("boxes")
        return ""

    def begin_boxes(self):
        pass

    def find_model(self):
        pass

    def put_back(self, _names):
        raise self.back

    def close(self):
        self.closed = True


@pytest.fixture
def host(monkeypatch, tmp_path):
    """The hosts that were made, each for the same cluster."""
    monkeypatch.setattr(Host, "made", [])
    monkeypatch.setattr(gateway, "Host", lambda _cluster: Host(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Host


def free(folder):
    """Whether nobody holds the workshop of the cluster, of which nothing is left."""
    memory = Memory(folder, "c")
    left = memory.take()
    memory.forget()
    return left == {}


@pytest.mark.parametrize("wrong", ["model", "weights", "boxes", "journal"])
def test_an_opening_that_fails_gives_back_all_that_it_held(host, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(Host, "wrong", wrong)
    with pytest.raises(OSError if wrong == "journal" else ModelError):
        Workshop(None, journal=tmp_path)  # a folder is no file
    assert host.made[0].closed
    assert free(tmp_path)


def test_a_door_that_cannot_be_opened_gives_back_all_that_was_held(host, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ClusterError, match="cannot listen"):
        open_workshop(None, port=taken.getsockname()[1])
    assert host.made[0].closed
    assert not list(tmp_path.glob("*.json"))
    assert free(tmp_path)


@pytest.mark.parametrize("hub", [True, False])
def test_a_gateway_of_another_kind_does_not_go_on_with_the_guests_of_before(host, tmp_path, hub):
    kinds = [{"users": lambda token: token}, {}]
    mine, other = kinds if hub else kinds[::-1]
    before = Workshop(None, **mine)
    before.join("ann" if hub else before.guests.key, "ann")
    before.close(for_good=False)
    with pytest.raises(ClusterError, match=OTHER_KIND[:40]):
        Workshop(None, **other)
    assert host.made[-1].closed
    again = Workshop(None, **mine)
    assert [guest.name for guest in again.guests] == ["ann"]
    again.close(for_good=False)
    assert "is closed" in end_workshop(None), "any kind may end it"
    assert free(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError("made in a cell"), RuntimeError])
def test_weights_that_could_not_be_put_back_pause_the_workshop(host, error):
    workshop = Workshop(None)
    host.made[0].back = error
    assert workshop._alarm(["ann"], ["w"]) == "the workshop is paused."
    assert workshop.paused
    assert "ann: w. They are as they are now" in workshop.alarm
    assert ("made in a cell" if isinstance(error, FlexError) else error.__name__) in workshop.alarm
    workshop.resume()
    assert (workshop.paused, workshop.alarm) == (False, "")
    workshop.close()


def test_weights_that_are_put_back_have_the_sums_of_before(host, tmp_path):
    made = Host(tmp_path)
    watch = WeightsWatch(made)
    made.put_back = lambda _names: None
    assert watch.put_back(["w"]) == ""
    made.sums = [{"w": (2, 2)}]
    assert "differs from what was there before" in watch.put_back(["w"])


@pytest.fixture
def runner(host, tmp_path):
    made = Host(tmp_path)
    made.alarms = []
    made.watch = WeightsWatch(made)
    made.runner = Runner(made, made.watch, lambda who, what: made.alarms.append((who, what)))
    return made


def change(host):
    host.sums = [{"w": (host.sums[0]["w"][0] + 1, 1)}]


def test_who_is_named_for_weights_had_runs_since_they_were_last_looked_at(runner):
    after = runner.runner._after
    after(EVERY - 1, ["ann"])
    assert not runner.alarms
    change(runner)
    after(1, ["ben"])
    assert runner.alarms.pop() == (["ann", "ben"], ["w"])
    assert runner.runner.since == []
    after(1, ["cleo"])
    assert runner.runner.since == ["cleo"]
    runner.watch.look()  # the owner's
    assert runner.runner.since == []
    after(EVERY - 1, ["ben"])
    change(runner)
    after(1, ["ann"])
    assert runner.alarms == [(["ann", "ben"], ["w"])], "cleo's run came before the owner looked"


def test_a_look_of_the_owners_names_who_had_runs(host):
    workshop = Workshop(None)
    host.made[0].put_back = lambda _names: change(host.made[0])
    workshop._runner._after(1, ["ann"])
    change(host.made[0])
    assert workshop.check_weights() == ["w"]
    assert "in a run of ann: w" in workshop.alarm
    change(host.made[0])
    workshop.check_weights()
    assert "in a run of guests: w" in workshop.alarm, "nobody had one since"
    workshop.close()


def test_what_hooks_say_is_kept_up_to_a_bound_until_a_run_takes_it(host, tmp_path, monkeypatch):
    said = []
    made = SimpleNamespace(owner="world")
    monkeypatch.setattr(worlds, "Tenant", lambda _host, say, **_options: (said.append(say), made)[1])
    ann = Guest("ann", "", Use(Allowance, lambda: 0.0), 0.0)
    guests = Guests(1, lambda _name, _token: ann, lambda: 0.0, open_to_all=True)
    Worlds(Host(tmp_path), guests, trusted=False).enter(ann)
    for _ in range(5):
        said[0]("x" * (SAID - 1))
    assert sum(map(len, ann.said)) == 2 * (SAID - 1)
    ann.said.clear()
    said[0]("y" * (2 * SAID))
    assert ann.said == ["y" * SAID]


def acting(site="m.0", **source):
    """A job whose run has one such hook."""
    hook = SimpleNamespace(current=HookVersion(HookSource("h", 1, **source), (Site.parse(site),)))
    guest = Guest("ann", "", Use(Allowance, lambda: 0.0), 0.0)
    guest.tenant = SimpleNamespace(owner="w", hooks=SimpleNamespace(acting=lambda _only, _without: [hook]))
    return Job(guest, "run", parse("run", {"inputs": "x"}, []))


def test_code_that_runs_in_the_engines_shares_no_forward(runner):
    mates = runner.runner.mates
    half, look = acting(function=Declared("scale", (0.5,)).function()), acting(boxed=False)
    boxed, trusted = acting(text="x *= 2", boxed=True), acting(text="x *= 2")
    assert mates(half, look)
    assert not mates(half, boxed), "it has not run well by itself yet"
    result = RunResult(boxed)
    runner.watched = lambda _work, _before: (InputError("no"), [])
    runner.runner._make_alone(result)
    assert not mates(half, boxed), "it has not run well"
    runner.watched = lambda _work, _before: (None, [])
    runner.runner._keep = lambda _result, _run: None
    runner.runner._make_alone(result)
    assert mates(half, boxed)
    assert mates(half, acting(text="x *= 2", boxed=True)), "another's, who wrote the same"
    assert not mates(half, acting(text="x *= 2", boxed=True, site="m.1")), "elsewhere it may not run"
    assert not mates(half, acting(text="x *= 3", boxed=True))
    assert not mates(half, trusted)
    assert not mates(trusted, look)
