"""Notebooks that share a cluster, one after the other or at once: what each finds, and taking turns."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from flexmagic import ClusterError, FlexError, Session, SiteError
from flexmagic.client.cluster import Cluster

from .conftest import MODEL, PROMPT

pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

NOTEBOOK = f"""
from flexmagic import Session
session = Session.start(2, keep=True, oversubscribe=True)
print(session.cluster_name, flush=True)
session.load({str(MODEL)!r}, tp=2)
session.hook("model.layers.1.mlp", "x *= 0.25", name="quarter")
session.hook("model.layers.1.mlp", "x *= 0.5", name="quarter")
session.hook("model.layers.2.mlp", "x *= 2", name="double", group="g").enabled = False
run = session.run({PROMPT!r}, capture="model.layers.1.mlp.act_fn")
print(repr(float(run.logits.numpy().sum())), flush=True)
{{more}}
print("ready", flush=True)
input()
"""
"""A notebook in a process of its own, which can be killed."""


class Notebook:
    """Another process with a session, up to a point."""

    def __init__(self, more=""):
        code = NOTEBOOK.replace("{more}", more)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.cluster, self.total = self._line(), float(self._line())

    def _line(self):
        return self.process.stdout.readline().strip()

    def wait_for(self, word):
        while (line := self._line()) != word:
            assert line, "the other notebook has ended"

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def notebook(request):
    other = Notebook(getattr(request, "param", ""))
    yield other
    other.process.kill()
    other.process.communicate()
    with contextlib.suppress(ClusterError):  # the test may have ended them
        Cluster.attach(other.cluster).stop()


def total(run):
    return float(run.logits.numpy().sum())


def test_a_notebook_that_starts_again_finds_model_hooks_and_runs(notebook):
    notebook.wait_for("ready")
    notebook.kill()
    session = Session.attach(notebook.cluster)
    assert session.model.surveyed
    assert [(h.name, h.version, h.enabled, h.group) for h in session.hooks] == [
        ("quarter", 2, True, None),
        ("double", 1, False, "g"),
    ]
    assert list(session.runs) == [1]
    earlier = session.runs[1]
    assert total(earlier) == notebook.total
    run = session.run(PROMPT)
    assert run.number > 1
    assert total(run) == notebook.total, "the hook acts as it did"
    session.hooks["quarter"].undo()
    assert total(session.run(PROMPT)) != notebook.total
    with pytest.raises(SiteError):
        session.runs[99]


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.full)])
def test_a_cluster_with_an_engine_that_has_ended_can_be_attached_to_and_recovered(notebook, rank):
    notebook.wait_for("ready")
    first = Session.attach(notebook.cluster)
    os.kill(first._calls.ranks.seats[rank].pid, signal.SIGKILL)
    while not first._calls.ended():
        time.sleep(0.01)  # polling for the controller's own sign
    first.stop()
    notebook.kill()
    session = Session.attach(notebook.cluster)
    states = [row[-1] for row in session.status().rows]
    assert states == ["ended" if r == rank else "idle" for r in range(2)]
    with pytest.raises(FlexError, match=f"engine of rank {rank} has ended"):
        session.load(MODEL, tp=2)
    with pytest.raises(FlexError, match="%flexcluster recover"):
        session.run(PROMPT)
    done = session.recover()
    assert done.replaced == (rank,)
    assert [row[-1] for row in session.status().rows] == ["idle", "idle"]
    if rank == 0:
        assert "known to rank 0 alone" in str(done)
        session.hook("model.layers.1.mlp", "x *= 0.5")
    assert total(session.run(PROMPT)) == notebook.total, "the model and the hook are as they were"


LOOP = """
import os
flag = f"/tmp/flexmagic-{session.cluster_name}-"
session.hook("model.layers.0.mlp", f"open({flag!r} + str(rank), 'w').close()\\nwhile True: pass", name="loop")
session.limit(alone=1e9)
print(flag, flush=True)
session.run("x")
"""


@pytest.mark.parametrize("notebook", [LOOP], indirect=True)
def test_a_notebook_that_dies_in_a_run_leaves_a_usable_cluster(notebook):
    flag = notebook._line()
    entered = [Path(f"{flag}{rank}") for rank in range(2)]
    while not all(path.exists() for path in entered):
        time.sleep(0.01)  # polling for the engines' own sign, not waiting a fixed time
    notebook.kill()
    second = Session.attach(notebook.cluster)
    second.hooks.remove("loop")
    assert total(second.run(PROMPT)) == notebook.total
    for path in entered:
        path.unlink()


def test_two_notebooks_take_turns_and_keep_their_own_hooks(notebook):
    notebook.wait_for("ready")
    first, second = Session.attach(notebook.cluster), Session.attach(notebook.cluster)
    assert len(first.hooks) == 0, "the other notebook is alive: its hooks are its own"
    first.hook("model.layers.1.mlp", "x *= 3", name="mine")
    expected = {id(s): s.run(PROMPT).logits.torch() for s in (first, second)}
    assert not torch.equal(expected[id(first)], expected[id(second)])
    wrong = []

    def many(session):
        seen = [session.run(PROMPT).logits.torch() for _ in range(10)]
        wrong.extend(logits for logits in seen if not torch.equal(logits, expected[id(session)]))

    threads = [threading.Thread(target=many, args=(s,)) for s in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    third = Session.attach(notebook.cluster, hooks=True)
    assert {"quarter", "double", "mine"} >= {hook.name for hook in third.hooks} >= {"quarter", "double"}
    for session in (first, second, third):
        session.stop()
