"""Looks at a captured activation beyond its values: rank by rank, and beside another one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flexmagic.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from flexmagic.client.activation import Activation, Origin
    from flexmagic.client.calls import Calls
    from flexmagic.client.derived import Derived
    from flexmagic.client.masking import MaskedActivation
    from flexmagic.layout.layout import Layout
    from flexmagic.view.source import Change, Listener, Share


class Looks:
    """What the viewer and the user ask of an activation beside its values."""

    layout: Layout
    _calls: Calls
    _origin: Origin
    _mask: Any = None

    def shares(self, edges: NDArray[np.float64]) -> tuple[Share, ...]:
        """What each rank that can be reached holds itself, counted into the bins between ``edges``."""
        from flexmagic.view.source import Share

        found = self._each("share", edges)
        return tuple(Share(rank, stats, counts) for rank, (stats, counts) in found.items())

    def digests(self) -> dict[int, str]:
        """A digest of the bytes of each rank that can be reached: equal ones mean equal bits."""
        return self._each("digest")

    def _each(self, verb: str, *more: Any) -> dict[int, Any]:
        run, site = self._origin.run, self._origin.site
        ranks = self._reachable()
        answers = self._calls.some({rank: (verb, (run, site, *more), {}) for rank in ranks})
        return {rank: answers[rank] for rank in ranks}

    def _reachable(self) -> Sequence[int]:
        gone = self._calls.gone(self._origin.lives)
        return [rank for rank in self.layout.ranks if rank not in gone]

    def held(self, rank: int) -> Derived:
        """What one rank holds as a tensor of its own: its summand, its copy or its piece.

        Raises :class:`~flexmagic.errors.InputError` for a rank that holds nothing of it.
        """
        from flexmagic.client.derived import held

        if rank not in self.layout.ranks:
            ranks = ", ".join(map(str, self.layout.ranks))
            msg = f"Rank {rank} holds nothing of {self._origin.site}; it is on rank {ranks}."
            raise InputError(msg)

        return held(self._calls, self._origin, self.layout, rank)

    def over(self, calls: Calls) -> Activation:
        """The same tensor, alone, as another connection to its engines reads it."""
        view: Any = copy.copy(self)
        origin = replace(self._origin, lives=tuple(calls.lives))
        vars(view).update(_calls=calls, _origin=origin, _moved=0, _siblings=dict, _steps=lambda: (None, {}))
        made: Activation = view
        return made

    def tell_of_endings(self, listener: Listener) -> None:
        """Let a view know when ranks of its session end; it is forgotten when nothing else holds it."""
        self._calls.ranks.endings.tell(listener)

    def masked(self, where: Any) -> MaskedActivation:
        """The same activation with some elements masked: shown as masked, and in no statistic.

        ``where``: an array of bools, True where masked, that broadcasts to the shape; or ``"causal"``,
        of a pattern ``[..., queries, keys]`` the keys that come after the query. Values stay as they are.
        Raises :class:`~flexmagic.errors.InputError` for anything else.
        """
        from flexmagic.client.masking import masked

        return masked(self, where)  # type: ignore[arg-type]  # mixed into an activation

    def change_to(self, other: Any) -> Change | None:
        """How another activation of the same layout differs from this one, counted on the engines.

        ``None`` where that cannot be told there: other layouts, sums, or ranks that are gone.
        """
        from flexmagic.view.reduce import merge_changes

        if not self._alike(other) or self.layout.partial:
            return None
        before, after = _key(self._origin), _key(other._origin)  # noqa: SLF001 - another of its kind
        ranks = self.layout.owners()
        answers = self._calls.some({rank: ("change", (before, after), {}) for rank in ranks})
        return merge_changes([answers[rank] for rank in ranks])

    def difference_to(self, other: Any) -> Derived | None:
        """Another activation minus this one, kept on the engines in the layout of both; ``None`` as above.

        The difference of two sums is a sum of differences.
        """
        from flexmagic.client.derived import difference

        if not self._alike(other):
            return None
        after = other._origin, other.layout  # noqa: SLF001 - another of its kind
        return difference(self._calls, (self._origin, self.layout), after)

    def _alike(self, other: Any) -> bool:
        """Whether two activations lie on the same ranks in the same way, and all of those answer."""
        if not isinstance(other, Looks) or self._calls is not other._calls:  # noqa: SLF001 - of its kind
            return False
        if self._mask is not None or other._mask is not None:  # noqa: SLF001 - of its kind
            return False
        mine, its = self.layout, other.layout
        lives = self._origin.lives, other._origin.lives  # noqa: SLF001 - of its kind
        whole = not any(self._calls.gone(each) for each in lives)
        return whole and replace(mine, dtype=its.dtype, how=its.how, dims=its.dims) == its

    def to_html(self: Activation, path: str | Path | None = None) -> str:  # type: ignore[misc]  # mixed into it
        """One self-contained HTML page with picture, header and numbers; written to ``path`` if given."""
        from flexmagic.view.html import to_html

        return to_html(self, path)

    def to_png(self: Activation, path: str | Path | None = None) -> bytes:  # type: ignore[misc]  # as above
        """The picture with header, limits and counts, at most 300 kB; written to ``path`` if given."""
        from pathlib import Path

        from flexmagic.view.png import to_png

        data = to_png(self)
        if path is not None:
            Path(path).write_bytes(data)
        return data

    def table(self: Activation) -> Any:  # type: ignore[misc]  # as above
        """Statistics and histograms by rank and of the whole, and whether replicas agree."""
        from flexmagic.view.table import rank_table

        return rank_table(self)


def _key(origin: Origin) -> tuple[Any, Any]:
    return origin.run, origin.site
