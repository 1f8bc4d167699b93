"""Whether a process is at work: the same with and without a mark of the system's."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from flexmagic.client.pulse import Pulse


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as one:
        yield one
        one.kill()


@pytest.fixture(params=["marked", "asked for"])
def pulse_of(request, monkeypatch):
    if request.param == "asked for":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    elif not hasattr(os, "pidfd_open"):
        pytest.skip("this system marks no process's end")
    return lambda process: Pulse(psutil.Process(process.pid))


def test_it_beats_until_the_process_has_ended(process, pulse_of):
    pulse = pulse_of(process)
    assert pulse.beats
    process.send_signal(signal.SIGSTOP)
    assert pulse.beats, "one that is stopped has not ended"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is listed still
    assert not pulse.beats
    assert not pulse_of(process).beats
    process.wait()
    assert not pulse.beats


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system marks no process's end")
def test_what_marked_it_is_given_back(process):
    pulse, fds = Pulse(psutil.Process(process.pid)), psutil.Process().num_fds
    held = fds()
    pulse.close()
    pulse.close()
    assert pulse.beats
    assert fds() == held - 1
