"""`flexmagic doctor` names what is missing and how to mend it."""

import importlib.metadata
import json
import socket

import pytest

from flexmagic.cli import doctor
from flexmagic.cli.main import main
from flexmagic_kernel import install


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
    assert "pip install anywidget" in said.out
    assert "1 of" in said.err


def test_a_build_without_gloo_cannot_meet(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: False)
    assert next(doctor.torch_build()).state == "bad"


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


def test_a_kernel_whose_python_is_gone_is_found(monkeypatch, tmp_path):
    path = install("lost", prefix=str(tmp_path))
    spec = json.loads((path / "kernel.json").read_text())
    spec["argv"][0] = "/nowhere/bin/python"
    (path / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    (lost,) = [text for state, text in found(doctor.kernelspecs) if state == "bad"]
    assert "'lost'" in lost
    assert "flexmagic kernel install --name lost" in lost


def test_a_front_end_without_the_widgets_extension_is_found(monkeypatch):
    monkeypatch.setattr("jupyter_core.paths.jupyter_path", lambda *_parts: [])
    assert [state for state, _ in found(doctor.front_end)] == ["good", "bad", "bad"]
