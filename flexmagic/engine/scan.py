"""Every site's whole shape for one input, without computing anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexmagic.engine.inputs import Prepared
from flexmagic.engine.rows import extent_of
from flexmagic.engine.runtime import Runtime
from flexmagic.engine.twin import shapes_of
from flexmagic.errors import ModelError
from flexmagic.layout.rule import Extent, Rule
from flexmagic.layout.sites import Site


@dataclass(frozen=True)
class Scanned:
    """A whole tensor as a run would have it; ``how`` tells from what this is known."""

    shape: tuple[int, ...]
    dtype: str
    how: str


def scan(runtime: Runtime, prepared: Prepared) -> dict[Site, Scanned]:
    """Shapes from the unsharded form on fake tensors, for other sites from the surveyed layouts.

    Raises :class:`ModelError` for a model that has neither.
    """
    assert runtime.loaded is not None  # the client has a model
    dtype = next((p.dtype for p in runtime.model.parameters() if p.is_floating_point()), torch.float32)
    fake = shapes_of(runtime.model, runtime.loaded.unsharded, prepared.arguments, dtype)
    extent = extent_of(prepared.arguments, shared_out=True)
    known = {site: rule for site, rule in runtime.rules.items() if not site.is_gradient}
    if not fake and not known:
        raise ModelError(
            "Nothing is known of this model without running it: assign `unsharded` in its cell, a function "
            "that makes it undistributed, or run it once with %flexrun --inputs."
        )
    found = {}
    for site in [*known, *(site for site in fake if site not in known)]:
        rule = known.get(site)
        shape = None if rule is None else _followed(rule, extent)
        if site in fake:
            found[site] = Scanned(*fake[site], "fake tensors")
        elif rule is not None and shape is not None:
            found[site] = Scanned(shape, rule.dtype, "the survey")
    return found


def _followed(rule: Rule, extent: Extent) -> tuple[int, ...] | None:
    """A surveyed shape for an input of this extent; ``None`` where it follows the input in another way."""
    rows, seq = extent.rows, extent.seq
    both = None if rows is None or seq is None else rows * seq
    lengths = {"batch": rows, "seq": seq, "batch·seq": both}
    out = []
    for dim in rule.dims:
        length = dim.size
        if length is None:
            length = dim.per_row * rows if dim.per_row and rows is not None else lengths.get(dim.name)
        if length is None:
            return None
        out.append(length)
    return tuple(out)
