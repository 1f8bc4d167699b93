"""A workshop behind a real JupyterHub, as the README sets it up, with its proxy, tokens and users."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from jupyter_client.blocking import BlockingKernelClient

from .conftest import PROMPT, relative
from .test_workshop_durable import typed

pytest.importorskip("jupyterhub", reason="JupyterHub is not installed")
pytest.importorskip("jupyter_server", reason="users of the hub have no server to run")
PROXY = shutil.which("configurable-http-proxy")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        PROXY is None, reason="the hub's proxy is not on PATH: npm install configurable-http-proxy"
    ),
]

SITE = "model.layers.1.mlp"
README = Path(__file__).parents[2] / "README.md"
SECRET = secrets.token_hex()
MORE = """
import os

c.JupyterHub.bind_url = "http://127.0.0.1:8000"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:8081"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:8001"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = FOLDER + "/{username}"
if os.geteuid() == 0:
    c.Spawner.args = ["--allow-root"]
if "IPYTHONDIR" in os.environ:  # where the cluster's files are
    c.JupyterHub.services[0]["environment"] = {"IPYTHONDIR": os.environ["IPYTHONDIR"]}
c.JupyterHub.services.append({"name": "test", "api_token": TOKEN})
rights = ["admin:users", "admin:servers", "access:servers"]
c.JupyterHub.load_roles.append({"name": "test", "services": ["test"], "scopes": rights})
given = c.Spawner.server_token_scopes
c.Spawner.server_token_scopes = lambda spawner: given[:-1] if spawner.user.name == "eve" else given
"""
"""What a hub needs beside the README's lines; users for a test, and one whose token has too little."""


def free_ports(count):
    made = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in made]
    for one in made:
        one.close()
    return ports


class Hub:
    """A JupyterHub with its proxy, until :meth:`end`."""

    def __init__(self, folder, cluster):
        self.folder = folder
        text = README.read_text(encoding="utf-8").split("In `jupyterhub_config.py`:", 1)[1]
        text = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace('"CLUSTER"', repr(cluster))
        text += MORE.replace("FOLDER", repr(str(folder))).replace("TOKEN", repr(SECRET))
        for port, mine in zip(("8000", "8001", "8081", "10101"), free_ports(4), strict=True):
            assert f"127.0.0.1:{port}" in text
            text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{mine}")
        self.url = re.search(r'bind_url = "([^"]+)', text)[1]
        config = folder / "jupyterhub_config.py"
        config.write_text(text, encoding="utf-8")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyterhub", "-f", str(config)], cwd=folder, text=True,
            env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.said = []
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._wait, daemon=True).start()
        self._ready.wait(180)
        if self.process.poll() is not None:
            self.end()
            raise AssertionError("".join(self.said))

    def _wait(self):
        self.process.wait()
        self._ready.set()

    def _read(self):
        with self.process.stdout as said:
            for line in said:
                self.said.append(line)
                if "JupyterHub is now running" in line:
                    self._ready.set()

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"token {SECRET}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)  # noqa: S310
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - the hub just started
            return answer.read().decode()

    def kernel(self, user):
        """A kernel in the server of a user of the hub, who is made as well."""
        self.ask("POST", f"/hub/api/users/{user}", {})
        self.ask("POST", f"/hub/api/users/{user}/server", {})
        said = self.ask("GET", f"/hub/api/users/{user}/server/progress")  # which ends when it is there
        assert '"ready": true' in said, said + "".join(self.said)
        number = json.loads(self.ask("POST", f"/user/{user}/api/kernels", {"name": "python3"}))["id"]
        client = BlockingKernelClient()
        client.load_connection_file(
            str(self.folder / user / ".local/share/jupyter/runtime" / f"kernel-{number}.json")
        )
        client.start_channels()
        client.wait_for_ready(timeout=120)
        return client

    def end(self):
        self.process.terminate()
        self.process.wait(60)
        left = self.folder / "jupyterhub-proxy.pid"
        if left.is_file():  # of a hub that fails, the proxy stays
            os.kill(int(left.read_text().split()[0]), signal.SIGTERM)


@pytest.fixture
def hub(owner, tmp_path):
    made = Hub(tmp_path, owner.cluster_name)
    yield made
    made.end()


def refused(client, cell):
    said = []

    def hear(message):
        said.extend(message["content"].get("traceback", []))

    reply = client.execute_interactive(cell, timeout=120, output_hook=hear)
    assert reply["content"]["status"] == "error"
    return "".join(said)


def test_users_of_a_hub_join_from_their_own_servers(hub, edited, one_process, ids, tmp_path):
    with torch.no_grad():
        plain = one_process(ids).logits
        with edited({SITE: lambda out: out * 0.25}) as model:
            quarter = model(ids).logits
    assert relative(quarter, plain) > 1e-3
    ann, eve = hub.kernel("ann"), hub.kernel("eve")
    said = typed(ann, "%load_ext flexmagic\n%flexcluster join")
    assert (
        f"You are ann. To come back to this place: %flexcluster join {hub.url}/services/flexmagic\n" in said
    )
    typed(ann, f'%flexhook {SITE} --do "scale 0.25" --name mine')
    typed(ann, f'run = %flexrun "{PROMPT}" --capture {SITE}\nfree = %flexrun "{PROMPT}" --without mine')
    typed(ann, f"import numpy as np\nnp.save('{tmp_path}/run.npy', run.logits.numpy())")
    typed(ann, f"np.save('{tmp_path}/free.npy', free.logits.numpy())")
    assert relative(np.load(tmp_path / "run.npy"), quarter) < 1e-5
    assert relative(np.load(tmp_path / "free.npy"), plain) < 1e-5
    assert f"{SITE}:output" in typed(ann, f'run["{SITE}"]')
    why = refused(eve, "%load_ext flexmagic\n%flexcluster join")
    assert "eve: your token of JupyterHub lacks access:services!service=flexmagic" in why
    for client in (ann, eve):
        client.stop_channels()
