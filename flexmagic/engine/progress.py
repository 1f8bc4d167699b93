"""How far a rank is with what takes long, told to whoever asked for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Self

Token = tuple[str, float | None]
"""A generated token, and how likely the model held it; ``None`` where that is not known."""

Tell = Callable[..., None]
"""What is going on, how many parts of it are done, out of how many; and of a generation its :data:`Token`."""

EVERY = 0.1


class Counting:
    """Stands where a library would draw a progress bar, and tells how far that is instead."""

    def __init__(self, tell: Tell, items: Iterable[Any] | None, what: str, total: int) -> None:
        self._tell, self._items, self._what, self._total = tell, items, what, total
        self._done, self._told = 0, 0.0

    def update(self, n: int = 1) -> None:
        """Count some more parts; told a few times a second and at the end."""
        self._done += n
        now = time.perf_counter()
        if now - self._told > EVERY or self._done == self._total:
            self._told = now
            self._tell(self._what, self._done, self._total)

    def __iter__(self) -> Iterator[Any]:
        """The items, counted as they go."""
        for item in self._items or ():
            yield item
            self.update()

    def __enter__(self) -> Self:
        """Itself: a bar can be used in a ``with`` block."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is left to close."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Everything else that bars can do changes how they look, and does nothing here."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: None


@contextlib.contextmanager
def told(tell: Tell) -> Iterator[None]:
    """Have transformers' loader tell how far it is, for the length of a block."""
    from transformers.utils import logging

    def hook(_factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Counting:
        items = args[0] if args else kwargs.get("iterable")
        total = kwargs.get("total") or (len(items) if isinstance(items, Sized) else 0)
        return Counting(tell, items, str(kwargs.get("desc") or "loading").lower(), total)

    previous = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)
