"""The final norm as a linear map: with the scale that it had in a run, found by what it did there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flexmagic.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """``norm(x) = scale · gain · (x - its mean, if centred) + offset``.

    ``scale``: ``[position, 1]``; ``gain`` and ``offset``: ``[d_model]``.
    """

    scale: NDArray[np.float64]
    gain: NDArray[np.float64]
    offset: NDArray[np.float64]
    centred: bool

    def onto(self, direction: NDArray[np.float64]) -> NDArray[np.float64]:
        """What a part of the norm's input is multiplied by to get its share along ``[position, d_model]``."""
        back = direction * self.scale * self.gain
        return back - back.mean(-1, keepdims=True) if self.centred else back


def frozen_norm(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    weight: NDArray[np.float64] | None,
    bias: NDArray[np.float64] | None,
    close: float,
) -> FrozenNorm:
    """The norm that made ``after`` of ``before``, both ``[position, d_model]``, up to ``close``.

    Root-mean-square and layer norms are tried, with the weight as gain or one more than it. Raises
    :class:`ModelError` if none of them did it.
    """
    one = np.ones(before.shape[-1])
    offset = np.zeros_like(one) if bias is None else bias
    found: list[tuple[float, FrozenNorm]] = []
    for centred in (False, True):
        x = before - before.mean(-1, keepdims=True) if centred else before
        for gain in [one] if weight is None else [weight, 1 + weight]:
            shaped, wanted = x * gain, after - offset
            size = np.maximum((shaped * shaped).sum(-1, keepdims=True), np.finfo(np.float64).tiny)
            scale = (shaped * wanted).sum(-1, keepdims=True) / size
            off = float(np.abs(scale * shaped - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))
            found.append((off, FrozenNorm(scale, gain, offset, centred)))
    off, best = min(found, key=lambda pair: pair[0])
    if off > close:
        msg = (
            f"The final norm is neither a layer norm nor a root-mean-square norm of its input ({off:.1%} "
            "off), so that what parts of the residual stream add to the logits cannot be told."
        )
        raise ModelError(msg)
    return best
