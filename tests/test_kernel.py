"""The kernelspec: installed, started, and gone again without a trace."""

from __future__ import annotations

import ast
import json
import os
import signal
import struct
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

import flexmagic_kernel
from flexmagic.errors import InputError

MODEL = Path(__file__).parents[1] / "demo_notebooks" / "model"


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "environment"


def installed(prefix: Path) -> Path:
    return prefix / "share" / "jupyter" / "kernels"


@contextmanager
def kernel(name: str, directory: Path):
    """A running kernel by its spec's name, and its client."""
    manager = KernelManager(
        kernel_name=name, kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(directory)])
    )
    manager.start_kernel()
    kernel.manager = manager
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def value_of(client, expression: str) -> str:
    """The repr of an expression, evaluated in the kernel."""
    reply = client.execute("", user_expressions={"value": expression}, reply=True, timeout=60)
    answer = reply["content"]["user_expressions"]["value"]
    assert answer["status"] == "ok", answer
    return answer["data"]["text/plain"]


def test_the_kernel_starts_with_the_extension_loaded(prefix):
    flexmagic_kernel.install(prefix=str(prefix))
    with kernel("flexmagic", installed(prefix)) as client:
        assert value_of(client, "1 + 1") == "2"
        assert value_of(client, "__import__('sys').executable") == repr(sys.executable)
        assert value_of(client, "'flexmagic' in get_ipython().extension_manager.loaded") == "True"
        line = "sorted(m for m in get_ipython().magics_manager.magics['line'] if m.startswith('flex'))"
        assert "flexrun" in value_of(client, line)


def test_the_spec_is_ipykernels_own_with_our_name_and_logos(prefix):
    path = flexmagic_kernel.install("Second.Name", prefix=str(prefix))
    spec = json.loads((path / "kernel.json").read_text())
    assert path == installed(prefix) / "second.name"
    assert spec["display_name"] == "Python 3 (flexmagic)"
    assert spec["argv"][0] == sys.executable
    assert spec["argv"][-3:] == ["-f", "{connection_file}", "--ext=flexmagic_kernel"]
    for size in (32, 64):
        head = (path / f"logo-{size}x{size}.png").read_bytes()[:24]
        assert struct.unpack(">II", head[16:]) == (size, size)
    assert "<svg" in (path / "logo-svg.svg").read_text()


def test_kernels_with_settings_of_their_own_live_side_by_side(prefix, tmp_path):
    flexmagic_kernel.install(prefix=str(prefix))
    start = flexmagic_kernel.Start(engines=4, model=str(tmp_path))
    path = flexmagic_kernel.install("four", prefix=str(prefix), start=start)
    spec = json.loads((path / "kernel.json").read_text())
    assert spec["display_name"] == f"Python 3 (flexmagic: 4 engines, {tmp_path.name})"
    assert spec["argv"][-3:] == [
        "--FlexMagic.background=True",
        "--FlexMagic.engines=4",
        f"--FlexMagic.model={tmp_path}",
    ]
    assert sorted(p.name for p in installed(prefix).iterdir()) == ["flexmagic", "four"]


@pytest.mark.parametrize("start", [{"engines": 2, "profile": "lab"}, {"engines": 0}])
def test_settings_that_mean_nothing_together_are_refused(start, prefix):
    with pytest.raises(InputError, match="engines"):
        flexmagic_kernel.install(prefix=str(prefix), start=flexmagic_kernel.Start(**start))
    assert not prefix.exists()


def test_a_setting_says_where_it_is_from(prefix, monkeypatch):
    monkeypatch.setenv("FLEXMAGIC_RUN_LIMIT", "60")
    flexmagic_kernel.install(prefix=str(prefix), start=flexmagic_kernel.Start(profile="nowhere"))
    with kernel("flexmagic", installed(prefix)) as client:
        client.execute("%config FlexMagic.engines = 3", reply=True, timeout=60)
        rows = "{r[0]: r[1:3] for r in get_ipython().run_line_magic('flexconfig', '').rows}"
        assert ast.literal_eval(value_of(client, rows)) == {
            "engines": ("3", "set in this session"),
            "oversubscribe": ("False", "default"),
            "keep": ("False", "default"),
            "background": ("True", "command line, as of a kernelspec"),
            "profile": ("'nowhere'", "command line, as of a kernelspec"),
            "model": ("''", "default"),
            "model_options": ("''", "default"),
            "run_limit": ("60.0", "environment, FLEXMAGIC_RUN_LIMIT"),
            "alone_limit": ("10.0", "default"),
            "captures": ("''", "default"),
        }
        reply = client.execute("%flexcluster status", reply=True, timeout=60, stop_on_error=False)["content"]
        assert reply["ename"] == "ClusterError"
        assert "No such cluster is running" in reply["evalue"]
        reply = client.execute("%flexcluster status", reply=True, timeout=60, stop_on_error=False)["content"]
        assert "%flexcluster start -n 3" in reply["evalue"]


@pytest.mark.engines
def test_the_cluster_and_its_model_come_while_cells_already_run(prefix):
    start = flexmagic_kernel.Start(engines=1, model=str(MODEL))
    flexmagic_kernel.install(prefix=str(prefix), start=start)
    with kernel("flexmagic", installed(prefix)) as client:
        assert value_of(client, "get_ipython()._flexmagic_desk.has_session") == "False"  # a cell, and no wait
        call = "get_ipython().run_line_magic('flexrun', '\"The capital of France is\"').top(1).rows[0][0]"
        assert "Paris" in value_of(client, call)


@pytest.mark.engines
@pytest.mark.slow
def test_a_kernel_that_restarts_finds_its_cluster_and_its_model(prefix, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    flexmagic_kernel.install(prefix=str(prefix))
    with kernel("flexmagic", installed(prefix)) as client:
        client.execute("%flexcluster start -n 1", reply=True, timeout=120)
        client.execute(f"%flexmodel {MODEL} --tp 1", reply=True, timeout=120)
        pid = "get_ipython()._flexmagic_desk.session.status().rows[0][3]"
        before = ast.literal_eval(value_of(client, pid))
        kernel.manager.restart_kernel()
        client.wait_for_ready(timeout=60)
        offer = value_of(client, "__import__('flexmagic').magics.restart.left_for(get_ipython())")
        assert "1 engines, LlamaForCausalLM" in offer
        name = offer.split("cluster='")[1].split("'")[0]
        client.execute(f"%flexcluster attach {name}", reply=True, timeout=60)
        assert value_of(client, "get_ipython()._flexmagic_desk.session.owns_engines") == "True"
        assert ast.literal_eval(value_of(client, pid)) == before
        call = "get_ipython().run_line_magic('flexrun', '\"The capital of France is\"').top(1).rows[0][0]"
        assert "Paris" in value_of(client, call)
        client.shutdown()
    left = [psutil.Process(int(before))] if psutil.pid_exists(int(before)) else []
    assert not psutil.wait_procs(left, 60)[1]


def shown(client, code):
    """What a cell shows on the way to its end, as messages; nobody answers the comms that it opens."""
    heard = []
    client.execute_interactive(code, timeout=120, output_hook=heard.append)
    return heard


@pytest.mark.engines
@pytest.mark.timeout(300)
def test_a_front_end_without_widgets_an_interrupt_and_a_kernel_that_is_killed(prefix, tmp_path, monkeypatch):
    """As VS Code without its renderers: comms that nobody answers, pictures and text, an end by force."""
    home, here = tmp_path / "ipython", tmp_path / "here"
    monkeypatch.setenv("IPYTHONDIR", str(home))
    start = flexmagic_kernel.Start(engines=1, model=str(MODEL))
    flexmagic_kernel.install(prefix=str(prefix), start=start)
    with kernel("flexmagic", installed(prefix)) as client:
        heard = shown(client, "run = %flexrun 'Paris is' --capture model.norm\nrun['model.norm']")
        assert "comm_open" in {message["msg_type"] for message in heard}
        bundles = [m["content"]["data"] for m in heard if m["msg_type"] == "display_data"]
        assert any("image/png" in data for data in bundles)
        assert all("text/plain" in data for data in bundles)
        assert "model.norm:output" in "".join(data["text/plain"] for data in bundles)
        shown(client, f"%%flexhook lm_head --name loop\nopen({str(here)!r}, 'w')\nwhile True: pass")
        endless, next_one = client.execute("%flexrun 'Paris is'"), client.execute("1 + 1")
        while not here.exists():
            assert client.is_alive()
        kernel.manager.interrupt_kernel()
        replies = [client.get_shell_msg(timeout=60) for _ in range(2)]
        ends = {reply["parent_header"]["msg_id"]: reply["content"] for reply in replies}
        assert ends[endless]["ename"] == "KeyboardInterrupt"
        assert ends[next_one]["status"] == "aborted", "Run All stops"
        mine = [one for one in psutil.process_iter() if with_home(one, home)]
        assert len(mine) > 2
        os.kill(kernel.manager.provisioner.pid, signal.SIGKILL)
        assert not psutil.wait_procs(mine, 60)[1]
    assert not list(home.glob("profile_default/security/*"))


def with_home(process, home):
    """Whether a process of another is at work for a kernel that has this folder."""
    try:
        return process.environ().get("IPYTHONDIR") == str(home) and process.pid != os.getpid()
    except psutil.Error:
        return False


def test_uninstall_leaves_nothing(prefix):
    prefix.mkdir()
    flexmagic_kernel.install(prefix=str(prefix))
    flexmagic_kernel.install(prefix=str(prefix))  # a second time replaces the first
    assert any(prefix.iterdir())
    flexmagic_kernel.uninstall(prefix=str(prefix))
    assert not any(prefix.iterdir())


def test_uninstall_leaves_what_is_not_ours(prefix):
    flexmagic_kernel.install(prefix=str(prefix))
    other = installed(prefix) / "other"
    other.mkdir()
    (other / "kernel.json").write_text(json.dumps({"argv": ["python", "-m", "other"]}))
    with pytest.raises(InputError, match="not one of flexmagic's"):
        flexmagic_kernel.uninstall("other", prefix=str(prefix))
    with pytest.raises(InputError, match="another kernel"):
        flexmagic_kernel.install("other", prefix=str(prefix))
    flexmagic_kernel.uninstall(prefix=str(prefix))
    assert [p.name for p in installed(prefix).iterdir()] == ["other"]


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a b", "-x"])
def test_names_that_cannot_be_used_are_refused(name, prefix):
    for call in (flexmagic_kernel.install, flexmagic_kernel.uninstall):
        with pytest.raises(InputError, match="cannot name a kernel"):
            call(name, prefix=str(prefix))
    assert not prefix.exists()


def test_the_users_own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    path = flexmagic_kernel.install(user=True)
    assert path == tmp_path / "data" / "kernels" / "flexmagic"
    assert flexmagic_kernel.uninstall(user=True) == path
    assert not path.exists()
