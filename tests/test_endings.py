"""Word of engines that have ended, from the connection to whoever listens."""

import gc
import threading
from types import SimpleNamespace

from flexmagic.client.endings import Endings


class Cluster:
    """A connection that tells of engines as ipyparallel's does."""

    def __init__(self):
        self.hears = []
        self.client = SimpleNamespace(_registration_callbacks=self.hears)

    def say(self, event, engine):
        for hear in self.hears:
            hear({"event": event, "id": engine, "uuid": "u"})

    def end(self, engine):
        self.say("unregister", engine)


class Listener:
    def __init__(self, error=None):
        self.heard = []
        self.came = threading.Semaphore(0)
        self.error = error

    def ranks_ended(self, ranks):
        self.heard.append((ranks, threading.current_thread()))
        self.came.release()
        if self.error is not None:
            raise self.error

    def wait(self):
        assert self.came.acquire(timeout=30)


def test_all_hear_the_rank_on_a_thread_that_may_wait_whatever_one_of_them_does():
    cluster, listeners = Cluster(), [Listener(RuntimeError("no page")), Listener(), Listener()]
    endings = Endings(cluster, [4, 7])
    for listener in listeners:
        endings.tell(listener)
    cluster.end(7)
    for listener in listeners:
        listener.wait()
        assert [ranks for ranks, _ in listener.heard] == [(1,)]
        assert listener.heard[0][1] is not threading.current_thread()


def test_who_tells_twice_hears_once_and_others_engines_are_none_of_its_business():
    cluster, listener = Cluster(), Listener()
    endings = Endings(cluster, [0, 1])
    for _ in range(3):
        endings.tell(listener)
    assert len(cluster.hears) == 1
    cluster.end(5)
    cluster.say("register", 1)
    cluster.end(0)
    listener.wait()
    cluster.end(1)
    listener.wait()
    assert [ranks for ranks, _ in listener.heard] == [(0,), (1,)]


def test_nothing_is_asked_of_the_connection_before_somebody_listens_and_nobody_is_kept():
    cluster = Cluster()
    endings = Endings(cluster, [0])
    assert cluster.hears == []
    listener = Listener()
    endings.tell(listener)
    del listener
    gc.collect()
    before = threading.active_count()
    cluster.end(0)
    assert threading.active_count() <= before + 1
    assert not list(endings._listeners)
