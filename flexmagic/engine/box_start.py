"""The template of an engine's boxes: a process with torch and nothing else, which is copied for each.

It runs no guest's code itself. It ends with the engine, and with it, all boxes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys

from flexmagic.engine.box_walls import Room, available


def main(fd: int) -> None:
    """Copy this process for everyone who asks over an open socket, and say the copy's process id."""
    import torch

    from flexmagic.engine.box_inside import live, rehearse

    if available():  # it also reads the library, which could not be done in a box
        return
    torch.set_num_threads(1)
    rehearse()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to be waited for
    asked = socket.socket(fileno=fd)
    gc.freeze()  # what is here already is shared by all copies as long as nobody writes into it
    asked.sendall(b"ready")
    while True:
        raw, fds, _, _ = socket.recv_fds(asked, 4096, 2)
        if not raw:
            return
        pid = os.fork()
        if pid == 0:
            asked.close()
            try:
                live(socket.socket(fileno=fds[0]), fds[1], Room(**json.loads(raw)))
            finally:
                os._exit(0)
        for each in fds:
            os.close(each)
        asked.sendall(str(pid).encode())


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(int(sys.argv[1]))
