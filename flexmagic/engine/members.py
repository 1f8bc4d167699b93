"""What the names of a hook's body have inside, told while the rank is at work: for completing them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flexmagic.engine.runtime import Runtime
from flexmagic.engine.trainable import Trainables
from flexmagic.engine.tree import modules_of

MOST = 2_000
"""The largest number of names that is told."""


def members(runtime: Runtime, owner: str, path: str, names: Sequence[str]) -> list[str] | None:
    """What can follow a dotted name in the body of a session's hook at the module ``path``.

    ``names``: its parts. Without any, what the engine's namespace holds; of a mapping, its keys too,
    as ``["key"]``. Nothing is called, only looked up. ``None``: this rank does not know it.
    """
    if not names:
        return [name for name in runtime.namespace if not name.startswith("_")][:MOST]
    here = _root(runtime, owner, path, names[0])
    with contextlib.suppress(Exception):  # a user's attribute may fail in any way
        for name in names[1:]:
            here = getattr(here, name)
        if isinstance(here, Trainables):
            return list(here)
        keys = [f'["{key}"]' for key in here if isinstance(key, str)] if isinstance(here, Mapping) else []
        return None if here is None else [*keys, *dir(here)][:MOST]
    return None


def _root(runtime: Runtime, owner: str, path: str, name: str) -> Any:
    """The object that a name stands for; of ``x``, its class."""
    if name == "x":
        return torch.Tensor
    if name == "ctx":
        return runtime.captures.latest_context(owner)
    if name == "module":
        return None if runtime.loaded is None else modules_of(runtime.loaded.model).get(path)
    if name in {"modules", "persistent"}:
        return getattr(runtime.lasting.get(owner), name, None)
    return runtime.namespace.get(name)
