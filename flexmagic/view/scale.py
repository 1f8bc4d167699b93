"""From values to colours: robust limits, codes of one byte, palettes. Pure, numpy alone.

A cell is one byte, so that a tile of a million cells is a million bytes: 0 lies below the limits,
1 to 249 inside, 250 above; masked cells, NaN, +Inf, -Inf and a hole have codes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flexmagic.view.words import short

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNDER, FIRST, LAST, OVER, MASKED, NAN, POSINF, NEGINF, HOLE = 0, 1, 249, 250, 251, 252, 253, 254, 255
SCALES = ("linear", "symlog")

QUANTILE = 0.995
HEADROOM = 1.5
"""Nothing is clipped unless it is half as large again as the 99.5 % quantile."""
NEAR_ZERO = 0.1
FEW_CLIPPED = 64
"""Up to so many clipped cells are drawn large enough to be found."""

Color = tuple[int, int, int]
# Blue and orange are told apart by every common form of colour blindness; both darken outwards.
_ORANGE: tuple[Color, ...] = (
    (246, 245, 241), (253, 216, 165), (247, 165, 85), (224, 110, 31), (176, 69, 8), (127, 46, 3),
)  # fmt: skip
_BLUE: tuple[Color, ...] = (
    (246, 245, 241), (186, 214, 237), (117, 174, 219), (55, 126, 190), (22, 82, 148), (10, 51, 106),
)  # fmt: skip
_ABOVE, _BELOW = (70, 16, 28), (30, 12, 74)
MARK_COLORS: dict[int, Color] = {
    MASKED: (224, 224, 228),
    NAN: (0, 0, 0),
    POSINF: (214, 0, 140),
    NEGINF: (0, 140, 110),
    HOLE: (186, 186, 186),
}


@dataclass(frozen=True)
class Scale:
    """How values map to colours: ``low`` to ``high``, ``linear`` or ``symlog``.

    ``knee`` is where symlog turns from linear to logarithmic, 0 for a linear scale. ``kind`` is
    ``signed`` (0 in the middle), ``positive`` or ``negative`` (pale at the end nearest 0).
    """

    low: float
    high: float
    kind: str
    mode: str = "linear"
    knee: float = 0.0

    @property
    def text(self) -> str:
        """The scale in words, limits included."""
        knee = f" (linear below {short(self.knee)})" if self.mode == "symlog" else ""
        return f"{self.mode}{knee} from {short(self.low)} to {short(self.high)}"


def fit(values: NDArray[np.float64], mode: str, held: tuple[float, float] | None = None) -> Scale:
    """Choose the scale of what is drawn, from its finite values (any shape).

    Limits are the extremes, but never beyond 1.5 times the 99.5 % quantile, so that one huge value
    cannot bleach all others (it is drawn as clipped, and counted); symlog needs no such cut.
    Signed data are symmetric around 0. ``held`` keeps given limits.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Scale(0.0, 1.0, "positive", "linear")
    least, most = float(finite.min()), float(finite.max())
    kind = "signed" if least < 0 < most else "negative" if least < 0 else "positive"
    magnitude = np.abs(finite)
    low, high = held or _limits(least, most, kind, magnitude, robust=mode != "symlog")
    if held is not None:
        kind = "signed" if low < 0 < high else "negative" if high <= 0 else "positive"
    knee = 0.0
    if mode == "symlog":
        nonzero = magnitude[magnitude > 0]
        knee = float(np.median(nonzero)) if nonzero.size else 0.0
    return Scale(low, high, kind, "symlog" if knee else "linear", knee)


def _limits(
    least: float, most: float, kind: str, magnitude: NDArray[np.float64], *, robust: bool
) -> tuple[float, float]:
    """Return (low, high) with low < high."""
    furthest = float(magnitude.max())
    if robust:
        furthest = min(furthest, HEADROOM * float(np.quantile(magnitude, QUANTILE, method="higher")))
    furthest = furthest or float(magnitude.max()) or 1.0  # mostly zeros: show what there is
    if kind == "signed":
        return -furthest, furthest
    near = min(abs(least), abs(most))
    near = 0.0 if near <= NEAR_ZERO * furthest or near >= furthest else near
    return (near, furthest) if kind == "positive" else (-furthest, -near)


def encode(values: NDArray[np.float64], scale: Scale) -> NDArray[np.uint8]:
    """Return one code per value, same shape. NaN and infinities get theirs; holes are not known here."""
    finite = np.isfinite(values)
    x = np.where(finite, values, scale.low)
    # Halved, so that the distance between the limits cannot overflow.
    low, high = _bend(np.array([scale.low, scale.high]), scale) / 2
    with np.errstate(over="ignore"):
        share = (_bend(x, scale) / 2 - low) / ((high - low) or 1.0)
    codes = FIRST + np.rint(np.clip(share, 0, 1) * (LAST - FIRST)).astype(np.uint8)
    codes[x < scale.low] = UNDER
    codes[x > scale.high] = OVER
    codes[np.isnan(values)] = NAN
    codes[values == np.inf] = POSINF
    codes[values == -np.inf] = NEGINF
    return codes


def _bend(x: NDArray[np.float64], scale: Scale) -> NDArray[np.float64]:
    if scale.mode == "linear":
        return x
    bent: NDArray[np.float64] = np.sign(x) * np.log1p(np.abs(x) / scale.knee)
    return bent


def value_at(share: float, scale: Scale) -> float:
    """Return the value whose colour lies at ``share`` (0 to 1) of the colour bar."""
    low, high = _bend(np.array([scale.low, scale.high]), scale)
    bent = low + share * (high - low)
    if scale.mode == "linear":
        return float(bent)
    return float(np.sign(bent) * np.expm1(abs(bent)) * scale.knee)


def palette(kind: str) -> NDArray[np.uint8]:
    """Return the colours of all codes, ``(256, 4)`` RGBA."""
    steps = LAST - FIRST + 1
    colors = np.zeros((256, 4), dtype=np.uint8)
    colors[:, 3] = 255
    if kind == "signed":
        ramp = np.concatenate([_ramp(_BLUE, steps // 2 + 1)[:0:-1], _ramp(_ORANGE, steps // 2 + 1)])
    else:
        ramp = _ramp(_ORANGE, steps) if kind == "positive" else _ramp(_BLUE, steps)[::-1]
    colors[FIRST : LAST + 1, :3] = ramp
    colors[UNDER, :3], colors[OVER, :3] = _BELOW, _ABOVE
    for code, color in MARK_COLORS.items():
        colors[code, :3] = color
    return colors


def _ramp(anchors: tuple[Color, ...], steps: int) -> NDArray[np.uint8]:
    """Interpolate between anchors in ``steps`` colours, ``(steps, 3)``."""
    at = np.linspace(0, len(anchors) - 1, steps)
    channels = np.array(anchors, dtype=float).T
    table = np.stack([np.interp(at, range(len(anchors)), channel) for channel in channels], axis=1)
    return np.rint(table).astype(np.uint8)
