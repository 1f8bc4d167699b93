"""Installing and removing the kernelspec.

The kernel is ipykernel, started with ``--ext=flexmagic_kernel`` (IPython's option to load an extension at
start-up), so whatever ipykernel learns, this kernel can. Its settings are options of that command line.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager

from flexmagic.errors import InputError

DISPLAY_NAME = "Python 3 (flexmagic)"
"""What Jupyter's launcher and kernel menu show."""

LOAD_EXTENSION = "--ext=flexmagic_kernel"
"""The argument that makes IPython load the extension."""

_OURS = {LOAD_EXTENSION, "--ext=flexmagic"}
"""By these arguments we know our own kernels again, also those of earlier versions."""

RESOURCES = Path(__file__).with_name("resources")


@dataclass(frozen=True)
class Start:
    """What a kernel has from its start on: a cluster of ``engines``, or the running one of a ``profile``.

    ``model``: folder or hub id, loaded at once. Without any of them, cells start what they need.
    """

    engines: int | None = None
    profile: str = ""
    model: str = ""

    def arguments(self) -> list[str]:
        """The settings as options of the kernel's command line; raises :class:`InputError`."""
        if self.engines is not None and self.profile:
            msg = "Choose one: --engines starts a cluster, --profile attaches to one that is running."
            raise InputError(msg)
        if self.engines is not None and self.engines < 1:
            msg = f"--engines {self.engines}: a cluster needs at least one."
            raise InputError(msg)
        model = str(Path(self.model).absolute()) if self.model and Path(self.model).is_dir() else self.model
        given = {"engines": self.engines, "profile": self.profile, "model": model}
        wanted = [f"--FlexMagic.{name}={value}" for name, value in given.items() if value]
        return ["--FlexMagic.background=True", *wanted] if wanted else []

    def __str__(self) -> str:
        """What tells this kernel from others in a menu."""
        size = f"{self.engines} engines" if self.engines else self.profile
        return ", ".join(part for part in (size, Path(self.model).name) if part)


def kernel_json(start: Start = Start()) -> dict[str, Any]:
    """The content of ``kernel.json``: ipykernel's own for this Python, the extension and its settings."""
    from ipykernel.kernelspec import get_kernel_dict

    content: dict[str, Any] = get_kernel_dict(
        extra_arguments=[LOAD_EXTENSION, *start.arguments()],
        python_arguments=["-Xfrozen_modules=off"],  # as ipykernel's: the debugger wants it
    )
    name = f"{DISPLAY_NAME.removesuffix(')')}: {start})" if str(start) else DISPLAY_NAME
    return content | {"display_name": name}


def install(
    name: str = "flexmagic",
    *,
    user: bool = False,
    prefix: str | None = None,
    start: Start = Start(),
) -> Path:
    """Install the kernel and return its directory; an older installation of ours is replaced.

    ``start``: what it has from its start on. Under names of their own, several can live side by side.

    By default into this Python's environment, with ``user`` into the user's Jupyter directory,
    with ``prefix`` below another environment. Raises :class:`InputError` for a name that cannot be
    used or belongs to another kernel, and for a place that cannot be written.
    """
    manager = _manager(user=user, prefix=prefix)
    directory = _directory(manager, name)
    if directory.exists() and not is_ours(directory):
        msg = f"{directory} holds another kernel. Choose another name with --name."
        raise InputError(msg)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "spec"
        shutil.copytree(RESOURCES, source)
        (source / "kernel.json").write_text(json.dumps(kernel_json(start), indent=1) + "\n", encoding="utf-8")
        try:
            manager.install_kernel_spec(
                str(source), name, user=user, prefix=None if user else prefix or sys.prefix
            )
        except OSError as error:
            msg = f"{error.filename or directory} cannot be written: {error.strerror}. Try --user."
            raise InputError(msg) from None
    return directory


def uninstall(name: str = "flexmagic", *, user: bool = False, prefix: str | None = None) -> Path:
    """Remove the kernel from where :func:`install` put it with the same arguments.

    Directories that this leaves empty go too. Returns what was the kernel's directory. Raises
    :class:`InputError` if there is no such kernel, if it is not ours or cannot be removed.
    """
    directory = _directory(_manager(user=user, prefix=prefix), name)
    if not directory.is_dir():
        msg = f"There is no kernel {name!r} in {directory.parent}. See `jupyter kernelspec list`."
        raise InputError(msg)
    if not is_ours(directory):
        msg = f"The kernel {name!r} in {directory.parent} is not one of flexmagic's; it stays."
        raise InputError(msg)
    try:
        shutil.rmtree(directory)
    except OSError as error:
        msg = f"{error.filename or directory} cannot be removed: {error.strerror}."
        raise InputError(msg) from None
    with suppress(OSError):  # ends at the first directory that holds something else
        for parent in list(directory.parents)[:3]:  # kernels, jupyter, share
            parent.rmdir()
    return directory


def _manager(*, user: bool, prefix: str | None) -> KernelSpecManager:
    """A manager that knows one place only: the one that is asked for."""
    if user and prefix:
        msg = "Choose one place: --user or --prefix."
        raise InputError(msg)
    manager = KernelSpecManager()
    place = Path(prefix or sys.prefix).absolute() / "share" / "jupyter" / "kernels"
    manager.kernel_dirs = [manager.user_kernel_dir if user else str(place)]
    return manager


def _directory(manager: KernelSpecManager, name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        msg = f"{name!r} cannot name a kernel: use letters, digits, '-', '.' and '_' only."
        raise InputError(msg)
    return Path(manager.kernel_dirs[0]) / name.lower()


def is_ours(directory: Path) -> bool:
    """Whether a kernel's directory was written by :func:`install`."""
    try:
        content = json.loads((directory / "kernel.json").read_text(encoding="utf-8"))
        return not _OURS.isdisjoint(content["argv"])
    except (OSError, ValueError, LookupError, TypeError):
        return False
