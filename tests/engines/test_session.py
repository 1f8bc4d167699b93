"""Clusters and sessions: started, attached to, left without a trace."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from flexmagic import ClusterError, Session
from flexmagic.client.cluster import Cluster
from flexmagic.client.devices import Devices, check_size, rank_environment

from .conftest import MODEL, PROMPT

pytestmark = pytest.mark.engines


def pids_of(session):
    return [int(row[3]) for row in session.status().rows]


def family(session):
    """The controller, the engines and all they started."""
    own = [session._cluster._cluster.controller.pid, *pids_of(session)]
    return [p for pid in own for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]


def gone(processes, timeout=15):
    return not psutil.wait_procs(processes, timeout)[1]


def test_status_is_a_table_of_ranks(loaded):
    table = loaded.status()
    assert table.columns == (
        "rank",
        "engine",
        "host",
        "pid",
        "device",
        "memory",
        "model part",
        "captures",
        "state",
    )
    assert [row[0] for row in table.rows] == ["0", "1"]
    assert all(row[4] == "cpu" for row in table.rows) or torch.cuda.is_available()
    assert all("LlamaForCausalLM" in row[6] for row in table.rows)
    assert all(psutil.pid_exists(pid) for pid in pids_of(loaded))
    assert str(table).count("\n") == 4
    assert "<script" not in table._repr_html_()


def test_a_second_session_attaches_and_finds_the_model(loaded):
    other = Session.attach(loaded.cluster_name)
    try:
        assert other.model.name == loaded.model.name
        mine, theirs = loaded.run(PROMPT), other.run(PROMPT)
        assert torch.equal(mine.logits.torch(), theirs.logits.torch())
        with pytest.raises(ClusterError, match=r"No such cluster.*Running: .*flexmagic-"):
            Session.attach("nonexistent")
    finally:
        other.stop()
    assert all(psutil.pid_exists(pid) for pid in pids_of(loaded))


def test_two_sessions_hooks_and_captures_never_meet(loaded):
    """A second notebook counts its runs and versions from 1 too, and may use the same names."""
    first, second = Session.attach(loaded.cluster_name), Session.attach(loaded.cluster_name)
    try:
        plain = first.run(PROMPT)
        before = plain.logits.torch()
        first.hook("model.layers.0.mlp", "x *= 2", name="h")
        second.hook("model.layers.0.mlp", "x *= 0", name="h")
        doubled = first.run(PROMPT)
        silenced = second.run(PROMPT)
        assert silenced.number == plain.number
        assert torch.equal(plain.logits.torch(), before)
        results = [plain.logits.torch(), doubled.logits.torch(), silenced.logits.torch()]
        assert len({float(r.sum()) for r in results}) == 3
        silenced.release()
        assert torch.equal(plain.logits.torch(), before)
    finally:
        first.stop()
        second.stop()


def test_leaving_a_session_ends_its_engines_and_nothing_else():
    with Session.start(1) as session:
        processes = family(session)
        file = session._cluster._cluster.cluster_file
        assert os.path.exists(file)  # noqa: PTH110
        assert all(p.is_running() for p in processes)
    assert gone(processes)
    assert not os.path.exists(file)  # noqa: PTH110


def test_a_controller_of_which_a_part_ends_at_once_is_replaced(monkeypatch):
    """As where another process took a port first that the controller had found free."""
    controllers, awaited = [], Cluster._await_engines

    def lamed(self, *args):
        controllers.append(self._cluster.controller.process)
        if len(controllers) == 1:
            while not (parts := controllers[0].children()):
                assert controllers[0].is_running()
            parts[0].kill()
        awaited(self, *args)

    monkeypatch.setattr(Cluster, "_await_engines", lamed)
    with Session.start(1, oversubscribe=True) as session:
        assert session.status().rows
    assert len(controllers) == 2
    assert not controllers[0].is_running()


def test_a_failed_start_leaves_nothing(monkeypatch):
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    monkeypatch.setattr("flexmagic.client.cluster.START_TIMEOUT", 0.0)
    with pytest.raises(ClusterError, match="could not be started"):
        Session.start(1)
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert gone(left)


SCRIPT = """
    import sys, time
    from flexmagic import Session
    session = Session.start(1, keep={keep})
    print(session.cluster_name, *(row[3] for row in session.status().rows), flush=True)
    session.load_cell("import torch; model = torch.nn.Linear(2, 2)")
    print("loaded", flush=True)
    {then}
"""


def script(then, *, keep=False):
    code = textwrap.dedent(SCRIPT).format(keep=keep, then=then)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def started(process):
    name, *pids = process.stdout.readline().split()
    assert process.stdout.readline() == "loaded\n"
    engines = [psutil.Process(int(pid)) for pid in pids]
    return name, [p for e in engines for p in (e, *e.children(recursive=True))]


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_engines_end_with_the_script_that_started_them_however_it_ends(how):
    process = script("" if how == "exit" else "time.sleep(600)")
    name, engines = started(process)
    if how == "kill":
        process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert gone(engines)
    with pytest.raises(ClusterError):
        Session.attach(name)


def test_kept_engines_stay_with_their_model_until_they_are_stopped():
    process = script("", keep=True)
    name, engines = started(process)
    process.wait(60)
    assert process.returncode == 0
    assert all(p.is_running() for p in engines)
    session = Session.attach(name)
    assert session.model.name == "Linear"
    session.shutdown_engines()
    assert gone(engines)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_engine_is_named_and_its_piece_is_a_hole(dead):
    with Session.start(2, oversubscribe=True) as session:
        session.load(MODEL, tp=2)
        run = session.run(PROMPT, capture="model.layers.1.mlp.up_proj")
        half, logits = run["model.layers.1.mlp.up_proj"], run.logits
        whole, all_logits = half.numpy(), logits.numpy()
        os.kill(pids_of(session)[dead], signal.SIGKILL)
        while not session._calls.ended():
            session._cluster.client.wait_interactive(timeout=0.01)
        assert (logits.numpy() == all_logits).all()  # the other rank holds a replica
        with pytest.raises(ClusterError, match=f"rank {dead} has ended"):
            half.numpy()
        assert half.info.missing_ranks == (dead,)
        n = whole.shape[-1] // 2
        left = slice(n, None) if dead == 0 else slice(n)
        assert (half[0, :, left] == whole[0, :, left]).all()
        assert (half.read((0, slice(None), slice(None)))[:, left] == whole[0, :, left]).all()
        assert half.stats().n == whole.size // 2
        edges = np.arange(0, 2 * n + 1, n)
        seen = half.overview(1, 2, {0: 0}, np.arange(len(whole[0]) + 1), edges)
        assert (seen.n.sum(0) > 0).tolist() == [dead == 1, dead == 0]
        with pytest.raises(ClusterError, match=f"rank {dead}"):
            session.run(PROMPT)
        states = [row[-1] for row in session.status().rows]
        assert states[dead] == "ended"
        assert states[1 - dead] in {"idle", "busy"}


def test_each_rank_gets_its_own_device():
    gpus = Devices("GPU", 2)
    assert [rank_environment(r, gpus)["CUDA_VISIBLE_DEVICES"] for r in range(3)] == ["0", "1", "0"]
    assert "CUDA_VISIBLE_DEVICES" not in rank_environment(0, Devices("CPU core", 4))
    check_size(2, gpus, oversubscribe=False)
    with pytest.raises(ClusterError, match=r"this machine has 2 GPUs\. Type %flexcluster start -n 2"):
        check_size(3, gpus, oversubscribe=False)
    check_size(3, gpus, oversubscribe=True)


def test_importing_is_light():
    code = (
        "import sys, flexmagic\n"
        "heavy = {'torch', 'ipyparallel', 'ipywidgets', 'transformers'} & set(sys.modules)\n"
        "import json; print(json.dumps(sorted(heavy)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []


def test_each_rank_says_how_far_its_loading_is(session):
    heard = []
    session.load(MODEL, tp=2, progress=heard.append)
    told = [waited for waited in heard if waited.ranks]
    assert told, "no rank said anything"
    what, done, total = next(iter(told[-1].ranks.values()))
    assert what == "loading weights"
    assert 0 < done <= total
    assert any(len(waited.ranks) == 2 for waited in told)
    assert "loading weights, " in str(told[-1])
    apart = replace(told[-1], ranks={0: (what, 1, total), 1: (what, 2, total)})
    assert f"rank 0 1/{total}, rank 1 2/{total}" in str(apart)
