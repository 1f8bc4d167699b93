"""What a layer adds to the residual stream, measured: which tensors sum up to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.layout.standard import Look, Meaning, Structure

TOKENS = 3
SIDE_BY_SIDE = "its layers compute attention and MLP side by side, from the same input"
UNKNOWN = "no tensors between its modules add up to what a layer returns"


def residual(
    structure: Structure, look: Look, block: str, attention: str | None, mlp: str | None
) -> dict[str, Meaning]:
    """``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out`` and ``mlp_out`` of a layer."""
    from flexmagic.layout.standard import TENSORS, Meaning

    out = {f".{name}": Meaning(missing=UNKNOWN) for name in TENSORS}
    into = next(
        (s for s in structure.dims if (s.path, s.port) == (block, "input") and structure.width(s)), None
    )
    width = None if into is None else structure.width(into)
    post = None if width is None else structure.first(block, "output", width)
    if into is None or post is None or width is None:
        return out
    out[".resid_pre"] = Meaning(block, "input", into.leaf)
    out[".resid_post"] = Meaning(block, "output", post.leaf)
    inner = [s for s in structure.dims if s.path.startswith(f"{block}.") and structure.width(s) == width]
    values = look([into, post, *inner], TOKENS, None)
    if not {into, post} <= set(values):
        return out
    sums = _Sums(values, into, post, width)
    adds = [s for s in inner if s.port == "output" and s in values]
    first = sorted((s for s in adds if not _within(s, mlp)), key=lambda s: _outermost(s, block, attention))
    second = sorted((s for s in adds if not _within(s, attention)), key=lambda s: _outermost(s, block, mlp))
    middles = [s for s in inner if s.port == "input" and s in values and not _within(s, attention)]
    for middle in (s for s in middles if s.path in structure.children(block)):
        added = next((s for s in first if sums.fits(middle, into, (s,))), None)
        if added is not None:
            out[".resid_mid"] = Meaning(middle.path, "input", middle.leaf)
            out[".attn_out"] = Meaning(added.path, "output", added.leaf)
            last = next((s for s in second if sums.fits(post, middle, (s,))), None)
            if last is not None:
                out[".mlp_out"] = Meaning(last.path, "output", last.leaf)
            return out
    pairs = ((a, b) for a in first for b in second if a != b and _apart(a, b))
    found = next((pair for pair in pairs if sums.fits(post, into, pair)), None)
    if found is not None:
        out[".resid_mid"] = Meaning(missing=SIDE_BY_SIDE)
        for name, site in zip((".attn_out", ".mlp_out"), found, strict=True):
            out[name] = Meaning(site.path, "output", site.leaf)
    return out


class _Sums:
    """Whether values add up, as far as their dtype can tell."""

    def __init__(self, values: Mapping[Site, torch.Tensor], into: Site, post: Site, width: int) -> None:
        self._values = {s: v.double().reshape(-1, width) for s, v in values.items()}
        scale = max(float(self._values[s].abs().max()) for s in (into, post))
        self._close = 8 * torch.finfo(values[into].dtype).eps * scale

    def fits(self, total: Site, before: Site, added: Sequence[Site]) -> bool:
        """Whether ``total`` is ``before`` plus what was added, none of which is too small to be told."""
        parts = [self._values[site] for site in added]
        wanted = self._values[total] - self._values[before]
        if any(part.shape != wanted.shape or float(part.abs().max()) < 4 * self._close for part in parts):
            return False
        return float((wanted - torch.stack(parts).sum(0)).abs().max()) <= self._close


def _within(site: Site, module: str | None) -> bool:
    return module is not None and (site.path == module or site.path.startswith(f"{module}."))


def _apart(one: Site, other: Site) -> bool:
    return not (_within(one, other.path) or _within(other, one.path))


def _outermost(site: Site, block: str, module: str | None) -> tuple[bool, int]:
    """The module itself first, then those that stand highest in the layer."""
    return site.path != module, site.path[len(block) :].count(".")
