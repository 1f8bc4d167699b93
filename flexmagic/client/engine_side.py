"""The few functions that run inside ipyparallel's engines: they hand calls to the engine's verbs.

The one place where an engine meets IPython.
"""

from __future__ import annotations

import os
import socket
from typing import Any

PROGRESS = "flexmagic progress"
"""Under this key an engine publishes how far it is."""

PRINTED = "flexmagic printed"
"""Under this key an engine publishes what its code has printed."""

TOKENS = "flexmagic tokens"
"""Under this key an engine publishes the tokens that it has generated, with how likely each was."""


def host_name() -> str:
    """The name of the engine's host."""
    return socket.gethostname()


def seat() -> Any:
    """Where this engine sits, if it has joined a session; ``None`` otherwise."""
    import sys

    verbs = sys.modules.get("flexmagic.engine.verbs")
    return None if verbs is None else verbs.seat()


def offer_port(host: str) -> int:
    """A free port on this engine's host, for the store that rank 0 will serve."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def packed(args: Any, kwargs: Any = None) -> bytes:
    """Arguments of a verb as :func:`call` takes them."""
    import cloudpickle

    raw: bytes = cloudpickle.dumps((args, kwargs or {}))
    return raw


def call(verb: str, payload: bytes) -> Any:
    """Run one of the engine's verbs with arguments pickled by value."""
    import cloudpickle

    from flexmagic.engine import look_verbs, model_verbs, state_verbs, verbs

    args, kwargs = cloudpickle.loads(payload)
    room = next(room for room in (verbs, model_verbs, state_verbs, look_verbs) if hasattr(room, verb))
    return getattr(room, verb)(*args, **kwargs)


def prepare() -> None:
    """Import what takes long, and then answer on the control channel."""
    from IPython import get_ipython

    from flexmagic.client import control
    from flexmagic.engine import (  # noqa: F401 - so that they are there
        look_verbs,
        model_verbs,
        state_verbs,
        verbs,
        watch,
    )

    shell = get_ipython()
    assert shell is not None  # an engine is an IPython kernel
    control.install(shell.kernel)


def join(rank: int, world_size: int, meeting: Any, others: Any = ()) -> Any:
    """Make this engine a rank that shares its namespace with the user's ``%%px`` cells."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("LOCAL_RANK", "0" if os.environ.get("CUDA_VISIBLE_DEVICES") else str(rank))
    if meeting.host == "127.0.0.1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    from IPython import get_ipython

    from flexmagic.engine import verbs

    shell = get_ipython()
    assert shell is not None  # an engine is an IPython kernel
    return verbs.join(shell.user_ns, rank, world_size, meeting, others, _tell, _say)


def _say(text: str) -> None:
    """Say what the code of the call that is being worked on has printed by now."""
    from ipyparallel.datapub import publish_data

    publish_data({PRINTED: text})


def _tell(what: str, done: int, total: int, tokens: Any = None) -> None:
    """Say how far the call that is being worked on is, and which tokens it has made."""
    from ipyparallel.datapub import publish_data

    publish_data({PROGRESS: (what, done, total)} | ({} if tokens is None else {TOKENS: tokens}))
