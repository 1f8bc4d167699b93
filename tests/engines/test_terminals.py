"""`ipython` and `jupyter console` in a terminal, typed into through a pty as a user types."""

import os
import re
import sys

import pexpect
import psutil
import pytest

from .conftest import MODEL

pytestmark = [pytest.mark.engines, pytest.mark.slow]
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")
PATIENCE = 90
TERMINALS = {
    "ipython": [
        "-m", "IPython", "--simple-prompt", "--no-banner", "--no-confirm-exit", "--ext=flexmagic",
    ],
    "console": ["-m", "jupyter_console", "--simple-prompt", "--no-confirm-exit", "--kernel=flexmagic"],
}  # fmt: skip


class Terminal:
    """A program in a pty: lines typed in, text read out."""

    def __init__(self, arguments, environment):
        self.child = pexpect.spawn(
            sys.executable,
            arguments,
            env=environment,
            encoding="utf-8",
            timeout=PATIENCE,
            dimensions=(40, 160),
        )

    def typed(self, line):
        """Type a line; what is on screen when the next prompt is there."""
        self.child.sendline(line)
        return self.prompt()

    def prompt(self):
        self.child.expect(r"In \[(\d+)\]: $")
        return CODES.sub("", self.child.before)


@pytest.fixture(params=TERMINALS)
def terminal(request, tmp_path):
    from flexmagic_kernel import install

    home = {"IPYTHONDIR": str(tmp_path), "JUPYTER_PATH": str(tmp_path / "share" / "jupyter")}
    if request.param == "console":
        install(prefix=str(tmp_path))
    before = engines()
    terminal = Terminal(TERMINALS[request.param], {**os.environ, **home})
    terminal.prompt()
    yield terminal
    terminal.child.sendline("exit")
    terminal.child.expect(pexpect.EOF)
    terminal.child.close()
    left = [psutil.Process(pid) for pid in engines() - before if psutil.pid_exists(pid)]
    assert not psutil.wait_procs(left, PATIENCE)[1]


def engines():
    """The processes of all clusters on this machine."""
    words = ((process.pid, process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    return {pid for pid, line in words if any("ipyparallel" in word for word in line)}


def cell(magic, line, body):
    """A cell magic as one line, which a terminal's prompt takes."""
    return f"h = get_ipython().run_cell_magic({magic!r}, {line!r}, {body!r})"


def test_the_main_job_an_interrupt_and_a_clean_end(terminal, tmp_path):
    assert "idle" in terminal.typed("%flexcluster start -n 2 --oversubscribe")
    assert "LlamaForCausalLM" in terminal.typed(f"%flexmodel {MODEL} --tp 2")
    terminal.typed(cell("flexhook", "model.layers.3.mlp --name damp", "x *= 0.5"))
    terminal.typed("run = %flexrun 'The capital of France is'")
    assert "model.layers.3.mlp:output" in terminal.typed("run['model.layers.3.mlp']")
    assert "SiteError" in terminal.typed("run['model.layers.9.mlp']")
    here = tmp_path / "here"
    terminal.typed(cell("flexhook", "lm_head --name loop", f"open({str(here)!r}, 'w')\nwhile True: pass"))
    terminal.child.sendline("%flexrun 'The capital of France is'")
    while not here.exists():
        assert terminal.child.isalive()
    terminal.child.sendintr()
    assert "KeyboardInterrupt" in terminal.prompt()
    terminal.typed("%flexhook --remove loop")
    terminal.typed("run = %flexrun 'The capital of France is' --without damp")
    assert "Paris" in terminal.typed("run.top(1)")
