"""The few functions that run inside ipyparallel's engines: they hand calls to the engine's verbs.

The one place where an engine meets IPython.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

PROGRESS = "flexmagic progress"
"""Under this key an engine publishes how far it is."""

PRINTED, SHOWN, BAR = "flexmagic printed", "flexmagic shown ", "flexmagic bar"
"""Under these keys an engine publishes what its code has printed, displayed, and draws as a bar."""

TOKENS = "flexmagic tokens"
"""Under this key an engine publishes the tokens that it has generated, with how likely each was."""


SMALL = 1 << 20
"""Bytes of the largest tensor that travels as an array; of larger ones several may share memory."""


def host_name() -> str:
    """The name of the engine's host."""
    return socket.gethostname()


def seat() -> Any:
    """Where this engine sits, if it has joined a session; ``None`` otherwise."""
    verbs = sys.modules.get("flexmagic.engine.verbs")
    return None if verbs is None else verbs.seat()


def offer_port(host: str) -> int:
    """A free port on this engine's host, for the store that rank 0 will serve."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def straight() -> tuple[str, str]:
    """The machine this engine is on, and the name at which it listens for notebooks there."""
    from IPython import get_ipython

    from flexmagic.engine.segments import machine

    shell = get_ipython()
    assert shell is not None  # an engine is an IPython kernel
    try:
        from flexmagic.client.straight_end import End

        end = getattr(shell, "_flexmagic_straight", None) or End(shell.kernel)
    except (AttributeError, ImportError, OSError, RuntimeError):  # another system, or another version
        return machine(), ""
    shell._flexmagic_straight = end  # noqa: SLF001 - once for all notebooks
    return machine(), end.name


def packed(args: Any, kwargs: Any = None) -> bytes:
    """Arguments of a verb as :func:`call` takes them."""
    out = io.BytesIO()
    _pickler()(out).dump((args, kwargs or {}))
    return out.getvalue()


@functools.cache
def _pickler() -> Any:
    """Pickles by value; plain tensors as arrays, as torch writes each of them as a file of its own."""
    import cloudpickle
    import torch

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
        def reducer_override(self, value: Any) -> Any:
            plain = type(value) is torch.Tensor and not value.requires_grad and not value.__dict__
            plain = plain and value.layout is torch.strided
            if plain and value.nbytes <= SMALL:
                try:
                    return torch.from_numpy, (value.numpy(),)
                except (RuntimeError, TypeError):  # on another device, or of a dtype that numpy has not
                    pass
            return super().reducer_override(value)

    return Pickler


def call(verb: str, payload: bytes) -> Any:
    """Run one of the engine's verbs with arguments pickled by value; ``several``: a list of such."""
    import cloudpickle

    args, kwargs = cloudpickle.loads(payload)
    if verb != "several":
        return _named(verb)(*args, **kwargs)
    from flexmagic.engine.slot import Reply

    return Reply([_named(one)(*args, **kwargs) for one, args, kwargs in args[0]])


def _named(verb: str) -> Callable[..., Any]:
    from flexmagic.engine import look_verbs, model_verbs, state_verbs, verbs, weight_marks

    room = next(
        room for room in (verbs, model_verbs, state_verbs, look_verbs, weight_marks) if hasattr(room, verb)
    )
    found: Callable[..., Any] = getattr(room, verb)
    return found


def prepare() -> None:
    """Import what takes long, and then answer on the control channel."""
    from IPython import get_ipython

    shell = get_ipython()
    assert shell is not None  # an engine is an IPython kernel
    _bars_as_text()
    from flexmagic.client import control
    from flexmagic.engine import (  # noqa: F401 - so that they are there
        look_verbs,
        model_verbs,
        state_verbs,
        verbs,
        watch,
    )

    control.install(shell.kernel)


def _bars_as_text() -> None:
    """Have tqdm choose text, as in a terminal: the widgets of each engine would all go to the notebook."""
    import tqdm.auto
    import tqdm.autonotebook

    tqdm.autonotebook.tqdm, tqdm.autonotebook.trange = tqdm.std.tqdm, tqdm.std.trange
    importlib.reload(tqdm.auto)  # ipyparallel has imported it, which takes an engine for a notebook


def join(rank: int, world_size: int, meeting: Any, others: Any = ()) -> Any:
    """Make this engine a rank that shares its namespace with the user's ``%%px`` cells."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("LOCAL_RANK", "0" if os.environ.get("CUDA_VISIBLE_DEVICES") else str(rank))
    if meeting.host == "127.0.0.1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as in a notebook

    from IPython import get_ipython

    from flexmagic.engine import verbs

    shell = get_ipython()
    assert shell is not None  # an engine is an IPython kernel
    displays = Displays(shell.display_pub)
    return verbs.join(shell.user_ns, rank, world_size, meeting, others, _tell, _say, displays)


def _say(said: Any) -> None:
    """Say what the code of the call that is being worked on has printed and displayed by now."""
    from ipyparallel.datapub import publish_data

    new = {f"{SHOWN}{number}": shown for number, shown in said.new.items()}
    publish_data({PRINTED: said.text, BAR: said.bar, **new})


def _tell(what: str, done: int, total: int, tokens: Any = None) -> None:
    """Say how far the call that is being worked on is, and which tokens it has made."""
    from ipyparallel.datapub import publish_data

    publish_data({PROGRESS: (what, done, total)} | ({} if tokens is None else {TOKENS: tokens}))


class Displays:
    """Takes what code displays in a block away from IPython's publisher: the innermost block has it."""

    def __init__(self, publisher: Any) -> None:
        self._publisher = publisher
        self._takers: list[Callable[[Any], None]] = []

    @contextlib.contextmanager
    def __call__(self, take: Callable[[Any], None]) -> Iterator[None]:
        """Have ``take`` called with what is displayed; figures that were drawn are displayed at the end."""
        self._takers.append(take)
        self._publisher.register_hook(self._hear)
        try:
            yield
            inline = sys.modules.get("matplotlib_inline.backend_inline")
            if inline is not None:
                inline.flush_figures()
        finally:
            self._publisher.unregister_hook(self._hear)
            self._takers.remove(take)

    def _hear(self, message: dict[str, Any]) -> dict[str, Any] | None:
        from flexmagic.engine.screen import Bundle

        kind, content = message["header"]["msg_type"], message["content"]
        if kind not in {"display_data", "update_display_data"}:
            return message
        where = str(content.get("transient", {}).get("display_id") or "")
        update = kind == "update_display_data"
        self._takers[-1](Bundle(content["data"], content["metadata"], where, update))
        return None
