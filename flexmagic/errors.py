"""The one error tree.

::

    FlexError              anything flexmagic refuses or fails at; catch this one
    ├── ClusterError       the cluster of engines: not started, not reachable
    │   └── EngineError    an engine has ended
    ├── StuckError         ranks that could not meet, or took too long; all were freed
    ├── ModelError         a model that cannot be loaded, split or kept
    ├── InputError         a prompt, option or value the user gave that cannot be used
    ├── SiteError          a name that is no site, or a site without a value in this run
    ├── LayoutError        a site whose whole tensor cannot be established: refused, with the reason
    ├── HookError          the user's code in a hook, on one or more ranks
    └── CellError          the user's code in a cell that ran on the engines, on one or more ranks

Every message says what happened, where (rank and site), why, and what to type next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

READY = "All ranks were freed. The model and the engines are ready: mend the cell and run it again."
"""What an error says at its end when nothing is lost."""


class FlexError(Exception):
    """Base of every error flexmagic raises on purpose."""

    typed = ""
    """The line of the notebook that asked for what was refused, where the message has none of its own."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: the message, without frames of ours."""
        return [*quoted(self.typed, str(self)), f"{type(self).__name__}: {self}"]


def quoted(line: str, message: str) -> list[str]:
    """A user's line, and below it a caret under the first word in it that a message names in quotes.

    Nothing for a message that quotes lines itself.
    """
    if not line or "\n" in message:
        return []
    named = (word for word in re.findall(r"'([^']+)'", message) if word in line)
    word = next(named, "")
    return [line, f"{' ' * line.index(word)}{'^' * len(word)}"] if word else [line]


class ClusterError(FlexError):
    """The cluster of engines is missing, unreachable or broken."""


class EngineError(ClusterError):
    """Engines have ended; ``ranks`` says which."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class StuckError(FlexError):
    """A call was ended because its ranks could not meet any more, or because it took too long.

    ``verdict`` tells why and where each rank was; ``said``: the replies of the ranks that had one;
    ``after``: what state all is in now.
    """

    def __init__(self, verdict: Any, said: Mapping[int, Any] = MappingProxyType({}), after: str = "") -> None:
        self.after = after or READY
        super().__init__(f"{verdict}\n{self.after}")
        self.verdict = verdict
        self.said = said


class ModelError(FlexError):
    """A model cannot be loaded, split over the ranks, or kept."""


class InputError(FlexError):
    """A prompt, option or value given by the user cannot be used."""


class SiteError(FlexError):
    """A name is no site of the model, or the site has no value in this run."""


class LayoutError(FlexError):
    """The whole tensor of a site cannot be established, so the site is refused."""


@dataclass(frozen=True)
class RankFailure:
    """What went wrong in user code on one rank, as data that crosses processes.

    ``line`` counts from 1 in the user's own cell; ``text`` is that line, of which ``columns`` failed.
    ``step``: of a generation. ``cause`` is the original exception where it could be pickled, ``trace``
    the whole traceback as text.
    """

    rank: int
    kind: str
    message: str
    site: str = ""
    hook: str = ""
    line: int | None = None
    text: str = ""
    cause: BaseException | None = field(default=None, compare=False)
    columns: tuple[int, int] | None = None
    step: int | None = None
    trace: str = field(default="", compare=False)


class UserCodeError(FlexError):
    """User code failed on one or more ranks; ``failures`` has one entry per rank."""

    def __init__(self, message: str, failures: tuple[RankFailure, ...] = ()) -> None:
        super().__init__(message)
        self.failures = failures

    @property
    def cause(self) -> BaseException | None:
        """The original exception of the first failing rank, if it could cross processes."""
        return next((f.cause for f in self.failures if f.cause is not None), None)


class HookError(UserCodeError):
    """The user's code in a hook failed, or left a value the model cannot go on with."""


class CellError(UserCodeError):
    """The user's code in a cell that ran on the engines failed."""
