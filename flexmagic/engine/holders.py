"""Putting new objects where a model and its libraries hold old ones.

A process group that was cut is never used again, but a module, a mesh or a closure may hold the
object itself. Whoever holds it is found the way Python's own garbage collector finds it, and by a
look at what that does not track: dicts in which nothing could be part of a cycle.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any


def replace_everywhere(pairs: Mapping[int, tuple[Any, Any]]) -> list[str]:
    """Replace each old object by its new one in all dicts, lists, sets, closures and attributes.

    ``pairs``: old and new by ``id`` of the old. Returns what still holds an old one: immutable
    objects, by the name of their type.
    """
    olds = [old for old, _ in pairs.values()]
    ours = {id(olds), id(pairs), *(id(pair) for pair in pairs.values())}
    left = []
    for holder in [*gc.get_referrers(*olds), *_untracked(pairs)] if olds else []:
        if id(holder) in ours or isinstance(holder, types.FrameType):
            continue
        if not _replace_in(holder, pairs):
            left.append(type(holder).__name__)
    return left


def _untracked(pairs: Mapping[int, tuple[Any, Any]]) -> list[Any]:
    """The dicts with an old object in them that the garbage collector does not track."""
    held = [part for part in gc.get_referents(*gc.get_objects()) if type(part) is dict]
    plain = itertools.filterfalse(gc.is_tracked, held)
    old = pairs.keys()
    return [d for d in plain if not (old.isdisjoint(map(id, d.values())) and old.isdisjoint(map(id, d)))]


def _replace_in(holder: Any, pairs: Mapping[int, tuple[Any, Any]]) -> bool:
    """Whether all that ``holder`` held could be replaced."""

    def new(value: Any) -> Any:
        return pairs[id(value)][1] if id(value) in pairs else value

    if isinstance(holder, tuple | frozenset | types.BuiltinFunctionType | types.MethodType):
        return False
    if isinstance(holder, dict):
        if any(id(key) in pairs for key in holder):
            items = [(new(key), new(value)) for key, value in holder.items()]
            holder.clear()
            holder.update(items)
        else:
            holder.update({key: new(value) for key, value in holder.items() if id(value) in pairs})
    elif isinstance(holder, list):
        holder[:] = [new(value) for value in holder]
    elif isinstance(holder, set):
        kept = [new(value) for value in holder]
        holder.clear()
        holder.update(kept)
    elif isinstance(holder, types.CellType):
        holder.cell_contents = new(holder.cell_contents)
    else:
        return _replace_attributes(holder, new)
    return True


def _replace_attributes(holder: Any, new: Callable[[Any], Any]) -> bool:
    """Replace attributes of an object; Python names it itself as the holder until its dict is asked for."""
    names = {name for kind in type(holder).__mro__ for name in getattr(kind, "__slots__", ())}
    found = False
    for name in [*names, *getattr(holder, "__dict__", ())]:
        with contextlib.suppress(AttributeError):
            value = getattr(holder, name)
            if new(value) is not value:
                object.__setattr__(holder, name, new(value))  # frozen dataclasses too
                found = True
    return found
