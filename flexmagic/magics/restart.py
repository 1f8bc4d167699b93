"""A kernel that restarts leaves its cluster to itself: noticed when it ends, offered when it is back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmagic.client.restart import Offer, offers

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.magics.desk import Desk


def kernel_name(shell: InteractiveShell) -> str:
    """What a kernel is called that stays the same when it restarts; ``""`` in a terminal."""
    if not hasattr(shell, "kernel"):
        return ""
    from ipykernel.connect import get_connection_file

    try:
        return Path(get_connection_file()).name
    except RuntimeError:  # a kernel inside another program has no file
        return ""


def left_for(shell: InteractiveShell) -> list[Offer]:
    """What earlier processes of a shell's kernel have left for it."""
    name = kernel_name(shell)
    return offers(name, Path(shell.ipython_dir)) if name else []


class Restart:
    """Watches for the end of the kernel's process: if it is for a restart, the cluster stays for a while."""

    def __init__(self, shell: InteractiveShell, desk: Desk) -> None:
        self._kernel: Any = getattr(shell, "kernel", None)
        self._name = kernel_name(shell)
        self._shell = shell
        self._desk = desk

    def add(self) -> None:
        """Listen to the kernel; say what was left for it."""
        if self._kernel is None or not self._name:
            return
        self._kernel.do_shutdown = self._do_shutdown
        for offer in left_for(self._shell):
            print(
                f"The cluster of before the restart is still there ({offer.holds}). "
                f"To go on with it: %flexcluster attach {offer.cluster}"
            )

    def remove(self) -> None:
        """Leave the kernel as it was."""
        if self._kernel is not None and self._name:
            del self._kernel.do_shutdown

    def _do_shutdown(self, restart: bool) -> Any:  # noqa: FBT001 - as ipykernel calls it
        """The kernel's own method, for which a session has prepared if the kernel will be back."""
        if restart and self._desk.has_session:
            self._desk.session.leave(kernel=self._name)
        return type(self._kernel).do_shutdown(self._kernel, restart)
