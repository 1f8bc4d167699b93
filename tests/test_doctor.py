"""`flexmagic doctor` names what is missing and how to mend it."""

import importlib.metadata
import json
import shlex
import socket
import sys

import pytest

from flexmagic.cli import doctor
from flexmagic.cli.main import main
from flexmagic_kernel import Start, install


def found(check):
    return [(finding.state, str(finding)) for finding in check()]


def test_here_all_is_well(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "process groups over gloo" in said
    assert said.endswith("flexmagic can work here.\n")
    assert doctor.SIGNS["bad"] not in said


def test_a_missing_package_is_named_and_the_exit_code_is_1(monkeypatch, capsys):
    version = importlib.metadata.version

    def without(name):
        if name == "anywidget":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert main(["doctor"]) == 1
    said = capsys.readouterr()
    assert "✗ anywidget is not installed\n" in said.out
    assert "pip install 'anywidget>=" in said.out
    assert "1 of" in said.err


def test_closed_ports_are_found(monkeypatch):
    def refuse(*_args, **_options):
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    ((state, text),) = found(doctor.ports)
    assert state == "bad"
    assert "refused" in text


@pytest.mark.parametrize(("free", "state"), [(64 << 20, "odd"), (4 << 30, "good")])
def test_little_shared_memory_is_told(monkeypatch, free, state):
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": free}))
    assert [s for s, _ in found(doctor.shared_memory)] == [state]


@pytest.mark.parametrize("place", ["user", "prefix"])
def test_a_kernel_whose_python_is_gone_is_found_and_made_anew_as_it_was(place, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    where = {"user": True} if place == "user" else {"prefix": str(tmp_path)}
    path = install("lost", start=Start(engines=3, model="a model"), **where)
    whole = (path / "kernel.json").read_text()
    spec = json.loads(whole)
    spec["argv"][0] = "/nowhere/bin/python"
    (path / "kernel.json").write_text(json.dumps(spec))
    (lost,) = [text for state, text in found(doctor.kernelspecs) if state == "bad"]
    assert "'lost'" in lost
    command = lost.rpartition("Install it again: ")[2]
    assert main(shlex.split(command)[1:]) == 0
    assert (path / "kernel.json").read_text() == whole
    assert str(path) in capsys.readouterr().out
    assert "bad" not in [state for state, _ in found(doctor.kernelspecs)]


def test_without_a_kernel_the_way_to_one_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("flexmagic_kernel.is_ours", lambda _folder: False)
    ((state, text),) = found(doctor.kernelspecs)
    assert state == "odd"
    assert "flexmagic kernel install" in text


def test_an_old_python_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    assert [state for state, _ in found(doctor.python)] == ["bad"]


def test_a_version_that_flexmagic_does_not_work_with_is_told(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.0" if name == "torch" else version(name)
    )
    states = dict(
        zip([text.split()[1] for _, text in found(doctor.packages)], found(doctor.packages), strict=True)
    )
    state, text = states["torch"]
    assert state == "bad"
    assert "torch 1.0, where flexmagic works with" in text
    assert "pip install 'torch<2.14,>=2.9'" in text
    assert [name for name, (state, _) in states.items() if state == "bad"] == ["torch"]


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        ("import torch", "cannot be imported"),
        ("torch.distributed.is_available()", "without torch.distributed"),
        ("torch.distributed.is_gloo_available()", "install a build of torch that has it"),
    ],
)
def test_a_torch_that_does_not_do_is_told(broken, word, monkeypatch):
    if broken == "import torch":
        monkeypatch.setitem(sys.modules, "torch", None)
    else:
        monkeypatch.setattr(broken.removesuffix("()"), lambda: False)
    state, text = found(doctor.torch_build)[0]
    assert state == "bad"
    assert word in text


def test_no_shared_memory_at_all_is_told(monkeypatch):
    monkeypatch.setattr("pathlib.Path.is_dir", lambda _path: False)
    ((state, text),) = found(doctor.shared_memory)
    assert state == "odd"
    assert "over sockets" in text


def test_no_jupyterlab_is_told(monkeypatch):
    def without(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    ((state, text),) = found(doctor.front_end)
    assert state == "odd"
    assert "pip install 'flexmagic[lab]'" in text


def test_a_front_end_without_the_widgets_extension_is_found(monkeypatch):
    monkeypatch.setattr("jupyter_core.paths.jupyter_path", lambda *_parts: [])
    assert [state for state, _ in found(doctor.front_end)] == ["good", "bad", "bad"]
