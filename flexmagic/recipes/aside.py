"""What recipes that train put on a model for their own time, and the batches that they run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.errors import InputError
from flexmagic.recipes.places import ids_of

if TYPE_CHECKING:
    from flexmagic.client.session import Session

LOGITS = ":output.logits"


@contextlib.contextmanager
def hooked(
    session: Session, hooks: Mapping[str, tuple[Sequence[str], str]], **options: Any
) -> Iterator[list[str]]:
    """Hooks by name, each with its sites and its body, that are gone after a block; ``options`` of all.

    Yields the names of the user's own that are enabled: runs in the block say by ``only=`` which act.
    """
    own = [hook.name for hook in session.hooks.enabled]
    made = []
    try:
        for name, (sites, code) in hooks.items():
            made.append(session.hook(list(sites), code, name=name, **options))
        yield own
    finally:
        for hook in made:
            hook.remove()


@contextlib.contextmanager
def persistent(session: Session, *names: str) -> Iterator[None]:
    """Values that the hooks of a block keep from run to run, and that are forgotten after it."""
    try:
        yield
    finally:
        for name in {*names} & {*session.persistent}:
            del session.persistent[name]


@contextlib.contextmanager
def without_module(session: Session, name: str) -> Iterator[None]:
    """Let go of a module after a block, if it was registered in it."""
    try:
        yield
    finally:
        if name in session.modules:
            del session.modules[name]


def encoded(session: Session, texts: Sequence[Any]) -> list[list[int]]:
    """The ids of several texts, which may be ids already; :class:`InputError` for one text or none."""
    if isinstance(texts, str) or not len(texts):
        raise InputError("Give a list of texts, or of lists of token ids.")
    return ids_of(session, list(texts))


def batches(ids: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
    """Which texts run together: such of equally many tokens, ``rows`` at most, in their order."""
    if rows < 1:
        raise InputError(f"A batch has 1 row or more, not {rows}.")
    by_length: dict[int, list[int]] = {}
    for at, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(at)
    return [of[i : i + rows] for of in by_length.values() for i in range(0, len(of), rows)]
