"""Calls of functions on engines: sent at once, answered whenever they have been worked on.

The one place that speaks ipyparallel's messages of calls. Its views do more than is needed here: what
they add to a call takes longer than all the rest of it in the notebook.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from typing import Any


class Answer:
    """What an engine will answer to one call."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def ready(self) -> bool:
        """Whether it is here."""
        return bool(self._future.done())

    def wait(self, seconds: float) -> None:
        """Wait for it, but not longer."""
        self._future.wait(seconds)

    def get(self) -> Any:
        """The value; raises what the engine raised, or that it ended."""
        value = self._future.result(0)
        if isinstance(value, Exception):
            raise value
        return value

    @property
    def heard(self) -> Mapping[str, Any]:
        """What the engine has published by now: ``data``, ``stdout`` and ``stderr``."""
        heard: Mapping[str, Any] = self._future.output.metadata
        return heard

    def wait_for_output(self, seconds: float) -> None:
        """Wait until all is here that was published, but not longer."""
        with suppress(NotYet):
            self._future.output.result(seconds)


class Mail:
    """Sends calls to the engines of a client, from any thread."""

    def __init__(self, client: Callable[[], Any]) -> None:
        self._client = client
        self._sending = threading.Lock()

    def send(self, engine: int, function: Callable[..., Any], *args: Any) -> Answer:
        """Have an engine call a function of a module that it can import."""
        client = self._client()
        with self._sending:
            (ident,), _ = client._build_targets(engine)  # noqa: SLF001 - see above
            return Answer(
                client.send_apply_request(client._mux_stream, _packed(function), args, ident=ident)  # noqa: SLF001
            )


@functools.cache
def _packed(function: Callable[..., Any]) -> Any:
    """A function as it travels, packed once."""
    from ipyparallel.serialize import PrePickled

    return PrePickled(function)
