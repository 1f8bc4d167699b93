"""Loading, reloading and unloading the extension: as often as one likes, and IPython is as it was."""

import logging
import signal
import subprocess
import sys
import threading
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np  # noqa: F401 - it adds filters of warnings when it is first imported
import pytest
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.manager import start_new_kernel

from flexmagic import load_ipython_extension, unload_ipython_extension
from flexmagic.client.waiting import Waited
from flexmagic.magics import status_line


def snapshot(shell):
    """All of IPython and of the process that an extension can change, as what can be compared."""
    formatters = shell.display_formatter.formatters.values()
    return {
        "magics": {kind: dict(names) for kind, names in shell.magics_manager.magics.items()},
        "registry": dict(shell.magics_manager.registry),
        "aliases": sorted(name for name, _ in shell.alias_manager.aliases),
        "transforms": [*shell.input_transformers_cleanup, None, *shell.input_transformers_post],
        "events": {event: list(calls) for event, calls in shell.events.callbacks.items()},
        "configurables": [id(one) for one in shell.configurables],
        "matchers": list(shell.Completer.custom_matchers),
        "hooks": {
            name: list(hook) if hasattr(hook, "__iter__") else hook for name, hook in shell.hooks.items()
        },
        "errors": shell.custom_exceptions,
        "formatters": [(f.type_printers.copy(), f.deferred_printers.copy()) for f in formatters],
        "names": {name for name in shell.user_ns if not name.startswith("_")},
        "attributes": set(vars(shell)),
        "class": set(dir(type(shell))),
        "process": (sys.excepthook, sys.displayhook, signal.getsignal(signal.SIGINT), sys.meta_path[:]),
        "logging": (logging.root.handlers[:], logging.root.level),
        "warnings": warnings.filters[:],
    }


@pytest.fixture
def shell():
    """A fresh shell whose own magics are all there: those of IPython come when they are first looked at."""
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    getattr(shell.magics_manager, "load_all_lazy_magics", lambda: None)()
    yield shell
    InteractiveShell.clear_instance()


def changed(before, after):
    return [part for part in before if before[part] != after[part]]


def test_ipython_is_as_it_was(shell):
    before = snapshot(shell)
    for _ in range(2):
        shell.run_line_magic("load_ext", "flexmagic")
        loaded = snapshot(shell)
        assert {"magics", "registry", "transforms", "configurables", "matchers"} <= set(
            changed(before, loaded)
        )
        assert "flexrun" in loaded["magics"]["line"]
        shell._flexmagic_desk.cells.switch_on()
        shell._flexmagic_desk.owners.refuse()
        shell.run_line_magic("unload_ext", "flexmagic")
        assert changed(before, snapshot(shell)) == []


def test_loading_again_changes_nothing_and_keeps_the_session(shell):
    shell.run_line_magic("load_ext", "flexmagic")
    loaded, desk = snapshot(shell), shell._flexmagic_desk
    shell.run_line_magic("load_ext", "flexmagic")
    load_ipython_extension(shell)
    assert changed(loaded, snapshot(shell)) == []
    assert shell._flexmagic_desk is desk


def test_reloading_leaves_as_many_of_everything(shell):
    shell.run_line_magic("load_ext", "flexmagic")
    loaded = snapshot(shell)
    shell.run_line_magic("reload_ext", "flexmagic")
    again = snapshot(shell)
    assert len(again["configurables"]) == len(loaded["configurables"])
    assert len(again["transforms"]) == len(loaded["transforms"])
    assert len(again["matchers"]) == len(loaded["matchers"]) == 1
    assert again["registry"].keys() == loaded["registry"].keys()
    assert again["magics"]["line"].keys() == loaded["magics"]["line"].keys()


def test_unloading_what_is_not_loaded_is_said_by_ipython_and_harms_nothing(shell, capsys):
    before = snapshot(shell)
    shell.run_line_magic("unload_ext", "flexmagic")
    assert "not loaded" in capsys.readouterr().out
    unload_ipython_extension(shell)
    assert changed(before, snapshot(shell)) == []


KERNEL = """
ip = get_ipython()
def parts():
    kernel = ip.kernel
    return {
        "attributes": {k: v for k, v in vars(kernel).items() if k.startswith("do_")},
        "messages": (dict(kernel.shell_handlers), dict(kernel.control_handlers)),
        "comms": set(kernel.comm_manager.targets),
    }
before = parts()
ip.run_line_magic("load_ext", "flexmagic")
loaded = parts()
ip.run_line_magic("unload_ext", "flexmagic")
print(loaded != before, parts() == before)
"""


def test_a_kernel_is_as_it_was():
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        heard = []
        client.execute_interactive(KERNEL, timeout=60, output_hook=lambda m: heard.append(m["content"]))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert [content["text"] for content in heard if "text" in content] == ["True True\n"], heard


def test_importing_and_loading_bring_in_no_heavy_library():
    script = (
        "import sys; from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance(); shell.run_line_magic('load_ext', 'flexmagic')\n"
        "print(sorted({'torch', 'transformers', 'ipyparallel', 'ipywidgets', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("%flexrum 'Paris'", "there is no magic %flexrum. Did you mean %flexrun?"),
        ("a = 1\nrun = %flexrum 'Paris'", "there is no magic %flexrum. Did you mean %flexrun?"),
        ("%%flexhok model.norm\nx *= 2", "there is no magic %%flexhok. Did you mean %%flexhook?"),
        ("text = '''\n%flexrum\n'''\nassert text", ""),
        ("%time 1 + 1", ""),
    ],
)
def test_a_magic_that_is_nearly_there(cell, said, shell, capsys):
    shell.run_line_magic("load_ext", "flexmagic")
    result = shell.run_cell(cell)
    assert result.success is not bool(said)
    assert said in capsys.readouterr().out
    if said:
        assert isinstance(result.error_before_exec, SyntaxError)  # nothing of the cell has run
        assert "a" not in shell.user_ns


def test_a_session_that_comes_says_how_far_it_is(shell, capsys, monkeypatch):
    shell.run_line_magic("load_ext", "flexmagic")
    monkeypatch.setattr(status_line, "LOG", 0.0)
    ticked, tick = threading.Event(), status_line.StatusLine.tick

    def ticks(line, *far):
        tick(line, *far)
        if any(far):
            ticked.set()

    monkeypatch.setattr(status_line.StatusLine, "tick", ticks)
    session = SimpleNamespace(limit=lambda **_: None, attend=lambda _: None, cancel=None, leave=lambda: None)

    def begin(say, said):
        say(said)
        assert ticked.wait(60)
        return session

    for said, told in (
        ("1 up, waiting for the engines", "1 up, waiting for the engines"),
        (Waited(0.0, {0: ("loading weights", 3, 39)}), "loading weights, 3/39"),
    ):
        ticked.clear()
        shell._flexmagic_desk._session = None
        shell._flexmagic_desk.expect("Starting 2 engines", partial(begin, said=said))
        assert shell._flexmagic_desk.session is session
        assert told in capsys.readouterr().out
    shell.run_line_magic("unload_ext", "flexmagic")
