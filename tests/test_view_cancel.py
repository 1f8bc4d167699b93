"""The Cancel button, in a real kernel: a click that comes over a subshell arrives while the cell runs."""

import pytest
from jupyter_client.manager import start_new_kernel

CELL = """
import threading
from flexmagic.magics.status_line import waiting
from flexmagic.client.waiting import Waited

cancelled = threading.Event()
with waiting(get_ipython(), "Working", quiet=0.5, cancel=cancelled.set) as line:
    while not cancelled.wait(0.05):
        line.tick(Waited(0.0, {}))
    print("cancelled")
"""
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def client():
    manager, client = start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def heard(client, wanted):
    """Messages on the kernel's public channel up to the first that is wanted."""
    messages = []
    while not messages or not wanted(messages[-1]):
        messages.append(client.get_iopub_msg(timeout=30))
    return messages


def asked(client, kind):
    client.control_channel.send(client.session.msg(kind, {}))
    return client.get_control_msg(timeout=30)["content"]


def test_a_click_during_the_cell_ends_what_it_waits_for_and_leaves_no_button(client):
    subshell = asked(client, "create_subshell_request")["subshell_id"]
    cell = client.session.msg("execute_request", {"code": CELL}, metadata={"cellId": "a notebook's"})
    client.shell_channel.send(cell)
    running = cell["header"]["msg_id"]
    shown = heard(client, lambda m: VIEW in m["content"].get("data", {}))[-1]
    button = shown["content"]["data"][VIEW]["model_id"]
    click = client.session.msg(
        "comm_msg",
        {"comm_id": button, "data": {"method": "custom", "content": {"event": "click"}}},
    )
    click["header"]["subshell_id"] = subshell
    client.shell_channel.send(click)
    rest = heard(
        client,
        lambda m: (
            m["parent_header"].get("msg_id") == running and m["content"].get("execution_state") == "idle"
        ),
    )
    said = "".join(m["content"]["text"] for m in rest if m["msg_type"] == "stream")
    assert said == "cancelled\n"
    last = [m for m in rest if m["msg_type"] == "update_display_data"]
    ids = {m["content"]["transient"]["display_id"] for m in last}
    assert shown["content"]["transient"]["display_id"] in ids
    assert not any(VIEW in m["content"]["data"] for m in last)
    assert any(m["msg_type"] == "comm_close" and m["content"]["comm_id"] == button for m in rest)
