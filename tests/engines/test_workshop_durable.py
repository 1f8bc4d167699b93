"""What a workshop survives: a gateway that is killed, an engine that is, a notebook that restarts."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from jupyter_client.manager import start_new_kernel

from flexmagic.engine.declared import Declared
from flexmagic.errors import ClusterError, FlexError
from flexmagic.workshop.address import Address
from flexmagic.workshop.guest import Guest
from flexmagic.workshop.link import Link
from flexmagic.workshop.opening import announcement, open_workshop

from .conftest import PROMPT, relative
from .test_workshop import at_once

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

SITE, PARTS = "model.layers.1.mlp", "model.layers.1.mlp.act_fn"
FLEXMAGIC = (
    sys.executable,
    "-c",
    "from flexmagic.cli.main import main; raise SystemExit(main())",
    "workshop",
)
AS_BEFORE = "The workshop's gateway was started again. You are ann: hooks and runs are as they were."


class Gateway:
    """`flexmagic workshop serve` as a process of its own."""

    def __init__(self, cluster, log, *options):
        command = [*FLEXMAGIC, "serve", "--profile", cluster]
        self.process = subprocess.Popen(
            [*command, "--log", str(log), "--every", "0.5", *options], stdout=subprocess.PIPE, text=True
        )
        self.said = self.line("", until="Interrupt to stop")

    def line(self, what, until=""):
        """Read what it says until a line has what is looked for; all of it."""
        read = ""
        for line in self.process.stdout:
            read += line
            if (until or what) in line:
                return read
        raise AssertionError(f"it ended: {read}")

    @property
    def address(self):
        return re.search(r"%flexcluster join (\S+)", self.said)[1]

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait(60)
        with contextlib.suppress(ValueError):
            return self.process.stdout.read()


@pytest.fixture
def gateway(owner, tmp_path):
    """Starts gateways to the cluster; the workshop is closed for good at the end."""
    made = []

    def start(*options):
        made.append(Gateway(owner.cluster_name, tmp_path / "log.jsonl", *options))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.end()
        one.process.stdout.close()
    with contextlib.suppress(ClusterError):
        open_workshop(owner.cluster_name, journal=tmp_path / "log.jsonl").close()


def joined(address, name):
    guest = Guest.join(address, name)
    guest.said = []
    guest.printer = guest.said.append
    return guest


@pytest.fixture(scope="module")
def truths(one_process, ids):
    """The logits of one process without a hook, and with the site scaled."""

    def scaled(_module, _args, out):
        return out * 0.25

    with torch.no_grad():
        plain = one_process(ids).logits
        handle = one_process.get_submodule(SITE).register_forward_hook(scaled)
        quarter = one_process(ids).logits
        handle.remove()
    assert relative(quarter, plain) > 1e-3
    return plain, quarter


def test_a_gateway_that_was_killed_goes_on_with_its_guests(owner, gateway, truths, tmp_path):
    plain, quarter = truths
    first = gateway("--limits", "runs=1000 tokens=100")
    ann, ben = joined(first.address, "ann"), joined(first.address, "ben")
    ann.hook(SITE, Declared("scale", (0.25,)), name="mine")
    ann.hook("model.layers.2", Declared("zero"), name="off")
    ann.hooks.disable("off")
    run = ann.run(PROMPT, capture=SITE)
    values = run[SITE].numpy()
    (file,) = owner._cluster._security.glob(f"{owner.cluster_name}-workshop.json")
    assert file.stat().st_mode & 0o077 == 0
    text = file.read_text()
    for secret in (first.address.split("/")[1], ann._link.facts["token"], ann._link.facts["seat"]):
        assert secret not in text, "of tokens there are hashes only"
    first.end(signal.SIGKILL)
    result = []
    waiting = threading.Thread(target=lambda: result.append(ben.run(PROMPT)))
    waiting.start()  # while there is no gateway
    second = gateway()
    waiting.join()
    assert "2 guests are known" in second.said
    assert Address.read(second.address).port == Address.read(first.address).port
    assert relative(result[0].logits.torch(), plain) < 1e-5
    assert sum("started again. You are ben" in text for text in ben.said) == 1
    again = ann.run(PROMPT)
    assert ann.said == [AS_BEFORE]
    assert relative(again.logits.torch(), quarter) < 1e-5
    assert again.number > run.number
    assert (run[SITE].numpy() == values).all(), "the run of before is still there"
    assert [(hook.name, hook.enabled) for hook in ann.hooks] == [("mine", True), ("off", False)]
    with pytest.raises(FlexError, match="you may have 100"):
        ann.run([PROMPT] * 20)
    assert joined(first.address, "cleo").name == "cleo", "the line of before lets in new guests"
    assert joined(ann.address, "x").name == "ann"
    with pytest.raises(ClusterError, match="another one took it"):
        ann.run(PROMPT)
    with pytest.raises(ClusterError, match="open on this cluster already"):
        open_workshop(owner.cluster_name, journal=tmp_path / "other.jsonl")
    assert '"open again"' in (tmp_path / "log.jsonl").read_text()


def test_an_interrupted_gateway_stops_and_its_workshop_is_closed_by_a_command(owner, gateway, tmp_path):
    first = gateway()
    ann = joined(first.address, "ann")
    run = ann.run(PROMPT, capture=SITE)
    assert "workshop close" in first.end(signal.SIGINT)
    close = [*FLEXMAGIC, "close", "--profile", owner.cluster_name]
    said = subprocess.run(close, check=False, capture_output=True, text=True, timeout=120)
    assert "is closed" in said.stdout, said.stderr
    assert not list(owner._cluster._security.glob(f"{owner.cluster_name}-workshop*"))
    assert subprocess.run(close, check=False, capture_output=True, text=True, timeout=120).returncode == 1
    server = open_workshop(owner.cluster_name, port=int(first.address.split(":")[1].split("/")[0]))
    with contextlib.closing(server), pytest.raises(ClusterError, match="has no place in the workshop"):
        run[SITE].numpy()


def test_an_engine_that_ends_is_replaced_and_nobody_types_anything(owner, tmp_path, truths):
    plain, quarter = truths
    server = open_workshop(owner.cluster_name, journal=tmp_path / "log.jsonl")
    with contextlib.closing(server):
        line = server.lines[""].split()[-1]
        ann, ben = joined(line, "ann"), joined(line, "ben")
        ann.hook(SITE, Declared("scale", (0.25,)), name="mine")
        owner.hook(SITE, "x *= 0.25", name="owners")
        run = ann.run(PROMPT, capture=PARTS)
        for rank in (1, 0):
            ann.said.clear(), ben.said.clear()
            pid = owner._calls.ranks.seats[rank].pid
            os.kill(pid, signal.SIGKILL)
            runs = at_once(*(lambda g=g: (g, g.run(PROMPT)) for g in (ann, ben)))
            for guest, made in runs:
                assert relative(made.logits.torch(), quarter if guest is ann else plain) < 1e-5
            assert any("started again with your hooks" in text for text in ann.said + ben.said)
            with pytest.raises(FlexError, match=f"rank {rank} held was lost"):
                run[PARTS].numpy()
            run = ann.run(PROMPT, capture=PARTS)
            assert run[PARTS].numpy().any()
            assert relative(owner.run(PROMPT).logits.torch(), quarter) < 1e-5, "the owner's hook is there too"
            assert owner._calls.ranks.seats[rank].pid != pid
        assert server.workshop.alarm == ""
        log = (tmp_path / "log.jsonl").read_text()
        assert log.count('"engine ended"') == 2
    owner.hooks["owners"].remove()


def typed(client, cell):
    """What a kernel prints and shows for a cell, as text; an error there is one here."""
    said = []

    def hear(message):
        content = message["content"]
        shown = content.get("data", {}).get("text/plain", "")
        said.append(content.get("text", "") or "\n".join(content.get("traceback", [])) or shown)

    reply = client.execute_interactive(cell, timeout=120, output_hook=hear)
    assert reply["content"]["status"] == "ok", "".join(said)
    return "".join(said)


@pytest.mark.parametrize("ended", [(), (0,)])
def test_the_owners_notebook_restarts_in_the_middle(owner, tmp_path, truths, ended):
    attach = f"%load_ext flexmagic\n%flexcluster attach {owner.cluster_name}\n"
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        said = typed(client, f"{attach}%flexworkshop open --log {tmp_path}/log.jsonl --limits tokens=100")
        ann = joined(re.search(r"%flexcluster join (\S+)", said)[1], "ann")
        ann.hook(SITE, Declared("scale", (0.25,)), name="mine")
        run = ann.run(PROMPT, capture=SITE)
        values = run[SITE].numpy()
        owner._cluster._cluster.update_cluster_file()  # it knows nothing of engines that others started
        for rank in ended:
            os.kill(owner._calls.ranks.seats[rank].pid, signal.SIGKILL)
        manager.restart_kernel()
        result = []
        waiting = threading.Thread(target=lambda: result.append(ann.run(PROMPT)))
        waiting.start()
        client.wait_for_ready(timeout=60)
        said = typed(client, attach)
        waiting.join()
        assert "The workshop goes on: 1 guests are known" in said
        assert ("was started again under its id" in said) == bool(ended)
        assert "[IPEngine" not in said, "what engines log is not for the notebook"
        assert ann.said[-1] == AS_BEFORE
        assert len(ann.said) <= 2, "and before it, that it is waited for"
        assert relative(result[0].logits.torch(), truths[1]) < 1e-5
        assert (run[SITE].numpy() == values).all()
        with pytest.raises(FlexError, match="you may have 100"):
            ann.run([PROMPT] * 20)
        typed(client, "%flexworkshop pause\n%flexworkshop resume")  # it is this notebook's again
        assert "closed" in typed(client, "%flexworkshop close")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_beyond_this_machine_it_has_the_same_certificate_and_tokens(owner, tmp_path):
    log = tmp_path / "log.jsonl"
    server = open_workshop(owner.cluster_name, guests=2, host="127.0.0.2", journal=log)
    lines = dict(server.lines)
    guest = Guest(Link(Address.read(lines["guest2"].split()[-1])))
    guest.printer = lambda _text: None
    guest.run(PROMPT)
    server.close(for_good=False)
    again = open_workshop(owner.cluster_name, journal=log)
    with contextlib.closing(again):
        assert again.host == "127.0.0.2"
        assert again.lines == {}
        assert "1 guests are known" in announcement(again)
        assert guest.run(PROMPT).top(1).rows
        assert Guest(Link(Address.read(lines["guest1"].split()[-1]))).name == "guest1"
    open_workshop(owner.cluster_name, journal=log).close(for_good=False)
    with pytest.raises(ClusterError, match="Close it for good"):
        open_workshop(owner.cluster_name, host="127.0.0.3", journal=log)
    open_workshop(owner.cluster_name, journal=log).close()
