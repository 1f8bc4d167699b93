"""Ctrl-C while the engines work: control is back, and the next run is right."""

import os
import signal
import threading
import time

import pytest
import torch

from .conftest import PROMPT

pytestmark = pytest.mark.engines


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(600)"])
@pytest.mark.parametrize("site", ["model.layers.0.mlp", "model.layers.0.mlp.up_proj"])
def test_an_interrupt_ends_endless_user_code_and_the_model_stays(loaded, tmp_path, site, body):
    before = loaded.run(PROMPT).logits.torch()
    flag = tmp_path / "entered"
    loaded.hook(site, f"open({str(flag)!r} + str(rank), 'w').close()\n{body}", name="endless")

    def interrupt():
        entered = [flag.with_name(f"entered{rank}") for rank in range(2)]
        while not all(path.exists() for path in entered):
            time.sleep(0.01)  # polling for the engines' own sign, not waiting a fixed time
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        loaded.run(PROMPT)
    watcher.join()
    loaded.hooks["endless"].remove()
    assert torch.equal(loaded.run(PROMPT).logits.torch(), before)


def test_a_call_can_be_cancelled_from_another_thread(loaded, tmp_path):
    before = loaded.run(PROMPT).logits.torch()
    flag = tmp_path / "entered"
    loaded.hook(
        "model.layers.0.mlp",
        f"open({str(flag)!r} + str(rank), 'w').close()\nwhile True: pass",
        name="endless",
    )

    def cancel():
        while not all(flag.with_name(f"entered{rank}").exists() for rank in range(2)):
            time.sleep(0.01)  # polling for the engines' own sign, not waiting a fixed time
        loaded.cancel()

    watcher = threading.Thread(target=cancel)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        loaded.run(PROMPT)
    watcher.join()
    loaded.hooks["endless"].remove()
    assert torch.equal(loaded.run(PROMPT).logits.torch(), before)


def test_an_interrupt_while_only_some_ranks_have_been_asked_ends_all(loaded, monkeypatch):
    before = loaded.run(PROMPT).logits.torch()
    loaded.hook("model.layers.0.mlp", "while True: pass", name="endless")
    call, verbs = loaded._calls.ranks.call, []

    def call_and_interrupt(rank, verb, payload, **kwargs):
        answer = call(rank, verb, payload, **kwargs)
        verbs.append((rank, verb))
        if verbs[-1] == (0, "run"):
            os.kill(os.getpid(), signal.SIGINT)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(loaded._calls.ranks, "call", call_and_interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"(?s)rank 0.*rank 1.*ready"):
            loaded.run(PROMPT)
    assert (1, "run") in verbs
    loaded.hooks["endless"].remove()
    assert torch.equal(loaded.run(PROMPT).logits.torch(), before)
