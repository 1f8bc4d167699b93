"""Which elements are masked: by an array, by what attention may not see, or in masked arrays. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import InputError
from flexmagic.view.source import Masked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from flexmagic.view.source import Index, Source

CAUSAL = "causal"


def mask_for(where: Any, shape: Sequence[int]) -> NDArray[np.bool_]:
    """Return a mask, True where masked, with as many dims as ``shape``, each of its size or of size 1.

    ``where`` is an array of bools that broadcasts to the shape, or :data:`CAUSAL`: in a pattern
    ``[..., queries, keys]`` the keys that come after the query, the last of both being one position.
    Raises :class:`InputError` for anything else.
    """
    ndim = len(shape)
    if isinstance(where, str):
        if where != CAUSAL or ndim < 2:
            msg = f'A mask is an array of bools, or "{CAUSAL}" for [..., queries, keys]; this is {where!r}.'
            raise InputError(msg)
        queries, keys = shape[-2:]
        found = np.arange(keys) > np.arange(queries)[:, None] + (keys - queries)
    else:
        given = where.detach().cpu().numpy() if hasattr(where, "detach") else where
        found = np.asarray(given)
    if found.dtype != bool:
        raise InputError(f"A mask has bools, True where masked; this has {found.dtype}.")
    try:
        np.broadcast_to(found, shape)
    except ValueError:
        raise InputError(f"A mask of shape {list(found.shape)} does not fit {list(shape)}.") from None
    return found.reshape((1,) * (ndim - found.ndim) + found.shape)


def mask_of(values: Any) -> NDArray[np.bool_] | None:
    """Return what numpy's or torch's masked arrays hide, True where masked; None for anything else."""
    if isinstance(values, np.ma.MaskedArray):
        return np.ma.getmaskarray(values)
    if hasattr(values, "get_mask") and hasattr(values, "get_data"):  # torch's MaskedTensor: True is valid
        return ~np.asarray(values.get_mask().detach().cpu().numpy(), dtype=bool)
    return None


def masked_at(source: Source, index: Index) -> NDArray[np.bool_] | None:
    """Return which elements of ``source.read(index)`` are masked, in its shape; None where nothing is."""
    return source.masked_at(index) if isinstance(source, Masked) else None


def seen(source: Source, index: Index) -> NDArray[Any]:
    """Return what of ``source.read(index)`` is not masked, flat if anything is."""
    values, masked = source.read(index), masked_at(source, index)
    return values if masked is None else values[~masked]
