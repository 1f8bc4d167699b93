"""Tensors that are made in the notebook, in forms of their own: grids, text with values, lines.

What comes back is a :class:`Shown`: displayed it is the viewer's canvas, with all that belongs to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import InputError
from flexmagic.view.arrays import ArraySource, info_of, numbers_of
from flexmagic.view.masks import mask_of
from flexmagic.view.source import LINES, STRIP

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from flexmagic.view.arrays import Labels

MAP_DIMS = 2


@dataclass(frozen=True)
class Shown:
    """A tensor in one of the viewer's forms, to be displayed or written to a file."""

    source: ArraySource

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one self-contained page; written to ``path`` if given."""
        from flexmagic.view.html import to_html

        return to_html(self.source, path)

    def to_png(self, path: str | os.PathLike[str] | None = None) -> bytes:
        """Return the picture; written to ``path`` if given."""
        from pathlib import Path

        from flexmagic.view.png import to_png

        data = to_png(self.source)
        if path is not None:
            Path(path).write_bytes(data)
        return data

    def _ipython_display_(self) -> None:
        from flexmagic.view.display import show

        show(self.source)

    def __repr__(self) -> str:
        """Name and shape."""
        return f"<{self.source.info.form} {self.source.info.site} {list(self.source.info.shape)}>"


def grid(
    values: Any,
    rows: Sequence[str] | None = None,
    cols: Sequence[str] | None = None,
    *,
    title: str = "grid",
    dims: tuple[str, str] = ("layer", "seq"),
    texts: Any = None,
    notes: Any = None,
) -> Shown:
    """Show ``values [rows, cols]`` as a labelled grid, such as layers by positions of a lens.

    ``texts`` (the same shape, texts) are written into the cells where there is room, such as the
    likeliest token; ``notes`` (the same shape) are read out with the value, such as the likeliest five
    with their probabilities: texts, or lists of ``(token, value)``. What a masked array hides is drawn
    as masked. Raises :class:`InputError`.
    """
    array = numbers_of(values)
    if array.ndim != MAP_DIMS:
        raise InputError(f"A grid has rows and columns; these values have {array.ndim} dims.")
    labels: Labels = {d: [str(t) for t in found] for d, found in ((0, rows), (1, cols)) if found is not None}
    _check_labels(array.shape, labels)
    said = _texts_of(array.shape, notes, "notes")
    written = _texts_of(array.shape, texts, "texts")
    note = None if said is None else lambda at: str(said[at])
    info = info_of(array, site=title, dims=dims, pieces=())
    return Shown(ArraySource(array, info, labels, note=note, texts=written, masked=mask_of(values)))


def strip(values: Any, tokens: Sequence[str], *, title: str = "tokens") -> Shown:
    """Show a text with one value per token, ``values [seq]``, as colours. Raises :class:`InputError`."""
    array = numbers_of(values)
    if array.ndim != 1:
        raise InputError(f"A text has one value per token; these values have {array.ndim} dims.")
    labels: Labels = {0: [str(token) for token in tokens]}
    _check_labels(array.shape, labels)
    info = info_of(array, site=title, dims=("seq",), pieces=(), form=STRIP)
    return Shown(ArraySource(array, info, labels, masked=mask_of(values)))


def lines(
    values: Mapping[str, Any] | Any,
    x: Sequence[Any] | None = None,
    *,
    title: str = "lines",
    over: str = "step",
) -> Shown:
    """Show series as lines over ``over``: one series, ``[series, n]``, or a dict of series by name.

    ``x`` labels the points. Raises :class:`InputError`.
    """
    names: list[str] | None = None
    masked = mask_of(values)
    if hasattr(values, "items"):
        names = [str(name) for name in values]
        each = [numbers_of(series).astype(np.float64) for series in values.values()]
        if len({series.shape for series in each}) != 1:
            raise InputError("Lines share their points: give series of one length.")
        array = np.stack(each)
        hidden = [mask_of(series) for series in values.values()]
        if any(one is not None for one in hidden):
            masked = np.stack([np.zeros(array.shape[1], bool) if one is None else one for one in hidden])
    else:
        array = np.atleast_2d(numbers_of(values))
    if array.ndim != MAP_DIMS or 0 in array.shape:
        raise InputError(f"Lines need series of numbers; these have the shape {list(array.shape)}.")
    labels: Labels = {} if names is None else {0: names}
    if x is not None:
        labels[1] = [str(at) for at in x]
    _check_labels(array.shape, labels)
    info = replace(info_of(array, site=title, dims=("series", over), form=LINES), pieces=())
    return Shown(ArraySource(array, info, labels, masked=masked))


def _check_labels(shape: tuple[int, ...], labels: Labels) -> None:
    for dim, texts in labels.items():
        if len(texts) != shape[dim]:
            raise InputError(f"{len(texts)} labels for {shape[dim]} positions.")


def _texts_of(shape: tuple[int, ...], given: Any, what: str) -> np.ndarray[Any, Any] | None:
    """Return texts in an array of a shape; lists of ``(token, value)`` as ``token value, …``."""
    if given is None:
        return None
    out = np.empty(shape, dtype=object)
    rows = list(given)
    if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
        raise InputError(f"{what} need the shape {list(shape)} of the values.")
    for r, c in np.ndindex(*shape):
        one = rows[r][c]
        out[r, c] = (
            one if isinstance(one, str) else ", ".join(f"{token!r} {value:.4g}" for token, value in one)
        )
    return out
