"""The one runtime of a process, and how a client's calls reach it.

A refusal is an answer, not an exception: every verb returns a :class:`Reply`, so that a client
waiting for all ranks hears from all of them.
"""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, Generic, ParamSpec, TypeVar

from flexmagic.engine.runtime import Runtime
from flexmagic.errors import FlexError, ModelError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Reply(Generic[T]):
    """A verb's result, or the error it ended with and where that came from."""

    value: T | None = None
    error: FlexError | None = None
    trace: str = ""


class Slot:
    """The one runtime of this process; the verb that it is working on, if any, and since when."""

    runtime: Runtime | None = None
    working: str = ""
    began: float = 0.0


def verb(function: Callable[Concatenate[Runtime, P], T]) -> Callable[P, Reply[T]]:
    """Make a function of the runtime callable by name from a client."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Reply[T]:
        if Slot.runtime is None:
            return Reply(error=ModelError("This engine has not joined a session."))
        Slot.working, Slot.began = function.__name__, time.monotonic()
        try:
            return _answer(lambda runtime: function(runtime, *args, **kwargs), Slot.runtime)
        finally:
            Slot.working = ""

    return call


def _answer(function: Callable[[Runtime], T], runtime: Runtime) -> Reply[T]:
    try:
        return Reply(value=function(runtime))
    except FlexError as error:
        return Reply(error=error)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the client must hear of anything
        trace = traceback.format_exc()
        traceback.clear_frames(error.__traceback__)
        return Reply(error=FlexError(f"{type(error).__name__}: {error}"), trace=trace)
