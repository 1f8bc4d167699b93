"""`flexmagic workshop serve` in a terminal, with guests in a process and in a notebook; and how it ends."""

import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pexpect
import pytest
import torch
from jupyter_client.manager import start_new_kernel

from flexmagic import Session
from flexmagic.engine.box_walls import available
from flexmagic.engine.declared import Declared
from flexmagic.errors import ClusterError, FlexError

from .conftest import MODEL, PROMPT, relative
from .test_workshop_durable import AS_BEFORE, FLEXMAGIC, Gateway, joined, typed

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

SITE = "model.layers.1.mlp"
JOIN = r"%flexcluster join (\S+)"
OVER = "This workshop is over: its cluster has ended"

GUEST = """
import sys
import numpy as np
from flexmagic.workshop.guest import Guest
address, prompt, site, path = sys.argv[1:]
guest = Guest.join(address, "ann")
guest.hook(site, {hook}, name="mine")
plain, edited = guest.run(prompt, without="mine"), guest.run(prompt)
np.savez(path, plain=plain.logits.numpy(), edited=edited.logits.numpy())
print(guest.status())
"""


@pytest.fixture
def truths(edited, one_process, ids):
    """The logits of one process without a hook, and with the site scaled."""
    with torch.no_grad():
        plain = one_process(ids).logits
        with edited({SITE: lambda out: out * 0.25}) as model:
            quarter = model(ids).logits
    assert relative(quarter, plain) > 1e-3
    return plain, quarter


class Terminal:
    """`flexmagic workshop serve` in a terminal."""

    def __init__(self, cluster, folder):
        options = ["serve", "--profile", cluster, "--guests", "3", "--every", "0.5"]
        program, *rest = FLEXMAGIC
        self.window = pexpect.spawn(
            program, [*rest, *options], encoding="utf-8", timeout=120, cwd=folder, dimensions=(40, 200)
        )
        self.window.expect("Interrupt to stop")
        self.said = self.window.before

    @property
    def address(self):
        return re.search(JOIN, self.said)[1]

    def interrupt(self):
        """Type Ctrl-C; what it said until its end, and its exit code."""
        self.window.sendintr()
        self.window.expect(pexpect.EOF)
        self.window.close()
        return self.window.before, self.window.exitstatus


@pytest.fixture
def kernel():
    """A notebook kernel of a guest."""
    manager, client = start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.fixture
def gateway(owner, tmp_path):
    """Starts gateways to the cluster; the last is ended and its workshop closed."""
    made = []

    def start():
        made.append(Gateway(owner.cluster_name, tmp_path / "log.jsonl"))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.end()
        one.process.stdout.close()
    close(owner)


def workshop(*words):
    return subprocess.run([*FLEXMAGIC, *words], check=False, capture_output=True, text=True, timeout=120)


def close(owner):
    said = workshop("close", "--profile", owner.cluster_name)
    assert "is closed" in said.stdout, said.stderr
    assert not list(owner._cluster._security.glob(f"{owner.cluster_name}-workshop*"))


def test_a_workshop_is_served_from_a_terminal(owner, kernel, truths, tmp_path):
    plain, quarter = truths
    boxes = not available()
    served = Terminal(owner.cluster_name, tmp_path)
    line = served.address
    hook = "'x *= 0.25'" if boxes else "__import__('flexmagic').engine.declared.Declared('scale', (0.25,))"
    code = GUEST.replace("{hook}", hook)
    guest = [sys.executable, "-c", code, line, PROMPT, SITE, str(tmp_path / "ann.npz")]
    done = subprocess.run(guest, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "ann.npz")
    assert relative(found["edited"], quarter) < 1e-5
    assert relative(found["plain"], plain) < 1e-5
    served.window.expect(r"ann\s+idle\s+2\s")
    said = typed(kernel, f"%load_ext flexmagic\n%flexcluster join {line} --as ben")
    assert "You are ben" in said
    typed(kernel, f'%flexhook {SITE} --do "scale 0.25" --name mine')
    if boxes:
        typed(kernel, f"%%flexhook {SITE} --name mine\nx *= 0.25")
    typed(kernel, f'run = %flexrun "{PROMPT}" --capture model.layers.*.mlp')
    typed(kernel, f"import numpy as np; np.save('{tmp_path}/ben.npy', run.logits.numpy())")
    assert relative(np.load(tmp_path / "ben.npy"), quarter) < 1e-5
    assert f"{SITE}:output" in typed(kernel, f'run["{SITE}"]')
    shown = typed(kernel, f'print(run["{SITE}"].stats())')
    served.window.expect(r"ben\s+idle\s+1\s")
    said, status = served.interrupt()
    assert "workshop close" in said
    assert status == 0
    again = Terminal(owner.cluster_name, tmp_path)
    assert "2 guests are known" in again.said
    assert typed(kernel, f'print(run["{SITE}"].stats())').endswith(shown), "what it had is still there"
    assert "mine" in typed(kernel, "%flexhook")
    assert again.interrupt()[1] == 0
    close(owner)


def test_it_ends_with_its_cluster_and_says_so(kernel, tmp_path):
    heard = []
    with Session.start(2, oversubscribe=True) as session:
        session.load(MODEL, tp=2)
        folder, name = session._cluster._security, session.cluster_name
        gateway = Gateway(name, tmp_path / "log.jsonl")
        ann, ben = joined(gateway.address, "ann"), joined(gateway.address, "ben")
        typed(kernel, f"%load_ext flexmagic\n%flexcluster join {gateway.address} --as cleo")
        ben.run(PROMPT)

        def runs():
            try:
                while True:
                    ann.run(PROMPT)
            except ClusterError as error:
                heard.append(str(error))

        working = threading.Thread(target=runs)
        working.start()
        pids = [seat.pid for seat in session._calls.ranks.seats]
    assert gateway.process.wait(60) == 1
    working.join()
    gateway.process.stdout.close()
    assert heard[0].startswith(OVER)
    assert ann.said == []
    with pytest.raises(ClusterError, match=OVER):
        ann.run(PROMPT)
    assert ann.said == [], "who has heard that it is over waits for nobody"
    assert '"engine ended"' not in (tmp_path / "log.jsonl").read_text()
    assert not list(folder.glob(f"*{name}*")), "nothing is left beside the connection files"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_gateway_and_an_engine_that_end_at_once(owner, gateway, truths, rank):
    plain, quarter = truths
    first = gateway()
    ann = joined(first.address, "ann")
    ann.hook(SITE, Declared("scale", (0.25,)), name="mine")
    owner.hook(SITE, "x *= 2", name="owners")
    run = ann.run(PROMPT, capture=f"{SITE}.act_fn")
    pid = owner._calls.ranks.seats[rank].pid
    os.kill(pid, signal.SIGKILL)
    first.end(signal.SIGKILL)
    second = gateway()
    assert "1 guests are known" in second.said
    again = ann.run(PROMPT)
    assert ann.said == [AS_BEFORE]
    assert relative(again.logits.torch(), quarter) < 1e-5
    assert again.number > run.number
    with pytest.raises(FlexError, match=f"rank {rank} held was lost"):
        run[f"{SITE}.act_fn"].numpy()
    assert relative(owner.run(PROMPT, without="owners").logits.torch(), plain) < 1e-5
    assert relative(owner.run(PROMPT).logits.torch(), plain) > 1e-3, "the owner's hook is there too"
    assert owner._calls.ranks.seats[rank].pid != pid
    owner.hooks["owners"].remove()
