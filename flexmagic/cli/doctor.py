"""`flexmagic doctor`: whether all is there that flexmagic needs, and how to mend what is not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flexmagic.errors import FlexError

OLDEST_PYTHON = (3, 11)
LITTLE = 512 << 20
"""Bytes of shared memory below which large activations travel more slowly."""

WIDGETS = ("@jupyter-widgets/jupyterlab-manager", "anywidget")
"""The front-end extensions that draw the viewer."""

SIGNS = {"good": "✓", "odd": "!", "bad": "✗"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``good``, ``odd`` (works, with less) or ``bad``; ``mend``: what to do."""

    state: str
    what: str
    mend: str = ""

    def __str__(self) -> str:
        """A line, and one more for what to do."""
        return f"{SIGNS[self.state]} {self.what}" + (f"\n    {self.mend}" if self.mend else "")


def run_doctor() -> None:
    """Look at everything and print it; raises :class:`FlexError` if something is missing."""
    findings = [finding for check in CHECKS for finding in check()]
    for finding in findings:
        print(finding)
    bad = sum(finding.state == "bad" for finding in findings)
    if bad:
        msg = f"{bad} of {len(findings)} checks failed: mend what is marked {SIGNS['bad']}."
        raise FlexError(msg)
    print("flexmagic can work here.")


def python() -> Iterator[Finding]:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= OLDEST_PYTHON
    mend = "" if good else "Install Python 3.11 or newer and make the environment with it."
    yield Finding("good" if good else "bad", f"Python {version} in {sys.prefix}", mend)


def packages() -> Iterator[Finding]:
    """What is imported everywhere, in the versions that flexmagic asks for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    asked = {one.name: one for one in map(Requirement, importlib.metadata.requires("flexmagic") or ())}
    for name in (
        "torch",
        "transformers",
        "accelerate",
        "ipyparallel",
        "ipykernel",
        "ipywidgets",
        "anywidget",
    ):
        wanted = asked[name].specifier if name in asked else SpecifierSet()
        mend = f"{sys.executable} -m pip install '{name}{wanted}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("bad", f"{name} is not installed", mend)
            continue
        if not wanted.contains(version, prereleases=True):
            yield Finding("bad", f"{name} {version}, where flexmagic works with {wanted}", mend)
        else:
            yield Finding("good", f"{name} {version}")


def torch_build() -> Iterator[Finding]:
    """Torch's devices and the backends of its process groups."""
    try:
        import torch
        from torch import distributed
    except (ImportError, OSError) as error:  # also a shared library that is not there
        yield Finding("bad", f"torch cannot be imported: {error}", "Install it again, see pytorch.org.")
        return
    if not distributed.is_available():
        yield Finding("bad", "torch was built without torch.distributed", "Install a build from pytorch.org.")
        return
    there = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    named = ", ".join(name for name, has in there.items() if has) or "none"
    gloo = there["gloo"]
    yield Finding(
        "good" if gloo else "bad",
        f"process groups over {named}",
        "" if gloo else "flexmagic meets over gloo: install a build of torch that has it.",
    )
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        yield Finding("good", f"{len(gpus)} GPUs: {', '.join(gpus)}")
    else:
        cores = len(os.sched_getaffinity(0))
        yield Finding("odd", f"no GPU that torch can use: engines share {cores} CPU cores")


def ports() -> Iterator[Finding]:
    """Whether processes of this machine can talk to one another."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            yield Finding("good", "ports on the loopback device can be opened and reached")
    except OSError as error:
        mend = "Engines cannot talk here: look for a firewall or a sandbox that forbids loopback."
        yield Finding("bad", f"no connection over 127.0.0.1: {error}", mend)


def shared_memory() -> Iterator[Finding]:
    """Room in shared memory."""
    folder = Path("/dev/shm")  # noqa: S108 - where Linux has it
    if not folder.is_dir():
        yield Finding("odd", "no /dev/shm: large activations travel over sockets, more slowly")
        return
    free = shutil.disk_usage(folder).free
    mend = "" if free >= LITTLE else "In a container: start it with --shm-size=2g or --ipc=host."
    yield Finding("odd" if mend else "good", f"{free >> 20:,} MiB of shared memory are free", mend)


def kernelspecs() -> Iterator[Finding]:
    """Our kernels, and whether their Python is still there."""
    from jupyter_client.kernelspec import KernelSpecManager

    import flexmagic_kernel

    found = False
    for name, folder in KernelSpecManager().find_kernel_specs().items():
        if not flexmagic_kernel.is_ours(Path(folder)):
            continue
        found = True
        argv = json.loads((Path(folder) / "kernel.json").read_text(encoding="utf-8"))["argv"]
        there = shutil.which(argv[0]) is not None
        mend = "" if there else f"Install it again: {_install_again(name, Path(folder), argv)}"
        gone = "" if there else f", whose {argv[0]} is gone"
        yield Finding("good" if there else "bad", f"kernel {name!r} in {folder}{gone}", mend)
    if not found:
        mend = "flexmagic kernel install (or %load_ext flexmagic in any Python kernel)"
        yield Finding("odd", "no kernel of flexmagic is installed", mend)


def _install_again(name: str, folder: Path, argv: list[str]) -> str:
    """The command that makes a kernel anew in its place, with the settings it has."""
    from jupyter_core.paths import jupyter_data_dir

    kernels = folder.parent
    if kernels == Path(jupyter_data_dir()) / "kernels":
        place = ["--user"]
    elif kernels == Path(sys.prefix) / "share" / "jupyter" / "kernels":
        place = []
    else:
        place = ["--prefix", str(kernels.parents[2])]
    words = [word.removeprefix("--FlexMagic.").partition("=") for word in argv]
    settings = [(key, value) for key, _, value in words if key in {"engines", "profile", "model"}]
    options = [part for key, value in settings for part in (f"--{key}", value)]
    return shlex.join(["flexmagic", "kernel", "install", *place, "--name", name, *options])


def front_end() -> Iterator[Finding]:
    """JupyterLab, and the extensions that it needs for the viewer."""
    try:
        yield Finding("good", f"jupyterlab {importlib.metadata.version('jupyterlab')}")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("odd", "JupyterLab is not in this environment", "pip install 'flexmagic[lab]'")
        return
    from jupyter_core.paths import jupyter_path

    for name in WIDGETS:
        there = any((Path(folder) / name).is_dir() for folder in jupyter_path("labextensions"))
        package = "jupyterlab_widgets" if name.startswith("@") else name
        mend = "" if there else f"{sys.executable} -m pip install --force-reinstall {package}"
        state, word = ("good", "is") if there else ("bad", "is not")
        yield Finding(state, f"JupyterLab's extension {name} {word} installed", mend)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python,
    packages,
    torch_build,
    ports,
    shared_memory,
    kernelspecs,
    front_end,
)
"""In the order in which they are printed."""
