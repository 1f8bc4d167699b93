"""Where a recipe works: a site in some layers, whole or head by head, at positions alone or in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.errors import InputError
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import depth, place
from flexmagic.recipes.prompts import groups_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmagic.client.model import Model
    from flexmagic.layout.heads import Heads

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEADS = ("attn.z", "attn.q", "attn.k", "attn.v")
"""What is taken whole, and what head by head."""
Columns = tuple[int, int] | None
"""The first feature of a head in a site and the one after its last; ``None`` for all features."""
Target = tuple[str | None, str, Columns]
"""A site of the model, the columns of a head in it, and before both what is added to it, if a sum is meant.

``resid_mid`` is the sum of ``resid_pre`` and ``attn_out``. The site that it has is what the MLP gets, and an
edit there would not change what the MLP's result is added to; one of ``attn_out`` changes both.
"""


@dataclass(frozen=True)
class Where:
    """The places of one recipe: each target at each group of positions.

    ``shape``: ``(layers,)``, or ``(layers, heads)``, of the targets. ``each``: whether positions stand for
    themselves, ``named``: whether the user has named groups of them; else all are taken together.
    """

    layers: tuple[int, ...]
    targets: list[Target]
    shape: tuple[int, ...]
    groups: dict[str, list[int]]
    texts: tuple[str, ...]
    each: bool
    named: bool

    @classmethod
    def of(
        cls,
        model: Model,
        site: str,
        texts: Sequence[str],
        layers: Sequence[int] | None,
        positions: Mapping[str, Sequence[int]] | None,
    ) -> Where:
        """Raises :class:`InputError` for a site that is none of these, :class:`SiteError` for a missing one.

        ``texts``: the prompt's tokens.
        """
        if site not in (*SITES, *HEADS):
            raise InputError(f"{site!r} cannot be taken here: choose one of {', '.join((*SITES, *HEADS))}.")
        chosen = layers_of(model, layers)
        groups = groups_of(len(texts), positions, together=site in HEADS)
        targets, shape = _targets(model, site, chosen)
        each = positions is None and site not in HEADS
        return cls(chosen, targets, shape, groups, tuple(texts), each, positions is not None)

    def values(self, values: NDArray[Any], name: str) -> Named:
        """Numbers ``[target, group]`` by layer, head, and position or group where there are several."""
        along = "position" if self.each else "group" if self.named else None
        labels = {"group": ("positions", tuple(self.groups)), "position": ("token", self.texts)}
        dims = (*("layer", "head")[: len(self.shape)], *([along] if along else []))
        shape = (*self.shape, *values.shape[1:]) if along else self.shape
        shown = {along: labels[along]} if along else {}
        return Named(values.reshape(shape), dims, name, shown, {"layer": self.layers})


def layers_of(model: Model, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers that are asked for, all by default; raises :class:`InputError` for none."""
    chosen = tuple(range(depth(model))) if layers is None else tuple(int(n) for n in layers)
    if not chosen:
        raise InputError("Give a layer or more, such as layers=[0, 1].")
    return chosen


def columns_of(heads: Heads) -> list[tuple[int, int]]:
    """The columns of each head."""
    return [(start, start + heads.width) for start in heads.starts]


def edited(model: Model, layer: int, site: str) -> tuple[str | None, str]:
    """What is added to the site that is edited, if anything, and that site; see :data:`Target`."""
    own = str(place(model, f"blocks.{layer}.{site}")[0])
    if site != "resid_mid":
        return None, own
    base, added = (str(place(model, f"blocks.{layer}.{name}")[0]) for name in ("resid_pre", "attn_out"))
    return base, added


def _targets(model: Model, site: str, layers: Sequence[int]) -> tuple[list[Target], tuple[int, ...]]:
    """The sites, with the columns of each head where there are heads; and how many of each."""
    heads = [place(model, f"blocks.{n}.{site}")[1] for n in layers]
    counts = {0 if of is None else len(of.starts) for of in heads}
    if len(counts) > 1:
        raise InputError("The layers have different numbers of heads: give layers that are alike.")
    out: list[Target] = []
    for layer, of in zip(layers, heads, strict=True):
        base, own = edited(model, layer, site)
        out += [(base, own, columns) for columns in ([None] if of is None else columns_of(of))]
    count = counts.pop()
    return out, (len(layers), count) if count else (len(layers),)
