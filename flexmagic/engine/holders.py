"""Putting new objects where a model and its libraries hold old ones.

A process group that was cut is never used again, but a module, a mesh or a closure may hold the
object itself. Whoever holds it is found the way Python's own garbage collector finds it, and by a
look at what that does not track: dicts in which nothing could be part of a cycle.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

OURS = 4
"""How often an old object is held while holders are counted: by its pair, a list, a variable and a call."""


def instances_of(*kinds: type) -> list[Any]:
    """All objects of these classes, but not of classes derived from them."""
    return [holder for holder in gc.get_referrers(*kinds) if type(holder) in kinds]


def replace_everywhere(pairs: Mapping[int, tuple[Any, Any]], likely: Sequence[Any] = ()) -> list[str]:
    """Replace each old object by its new one in all dicts, lists, sets, closures and attributes.

    ``pairs``: old and new by ``id`` of the old. ``likely``: objects that may keep some in dicts of their
    own; if they do, not all objects there are need to be looked through. Returns what still holds an old
    one: immutable objects, by the name of their type.
    """
    olds = [old for old, _ in pairs.values()]
    ours = {id(olds), id(pairs), *(id(pair) for pair in pairs.values())}
    found = gc.get_referrers(*olds) if olds else []
    found = [holder for holder in found if id(holder) not in ours]
    inside = gc.get_referents(*likely)
    found += _untracked([*inside, *gc.get_referents(*(part for part in inside if type(part) is dict))], pairs)
    if _hidden(olds, found):
        seen = set(map(id, found))
        everything = _untracked(gc.get_referents(*gc.get_objects()), pairs)
        found += [holder for holder in everything if id(holder) not in seen]
    holders = [holder for holder in found if not isinstance(holder, types.FrameType)]
    return [type(holder).__name__ for holder in holders if not _replace_in(holder, pairs)]


def _hidden(olds: list[Any], found: list[Any]) -> bool:
    """Whether anything but ``found`` holds an old object; to learn that takes little, to find it a lot."""
    seen = Counter(map(id, gc.get_referents(*found)))
    return any(sys.getrefcount(old) - OURS > seen[id(old)] for old in olds)


def _untracked(parts: Sequence[Any], pairs: Mapping[int, tuple[Any, Any]]) -> list[Any]:
    """The dicts among ``parts`` with an old object in them that the garbage collector does not track."""
    held = {id(part): part for part in parts if type(part) is dict and not gc.is_tracked(part)}
    old = pairs.keys()
    return [
        d for d in held.values()
        if not (old.isdisjoint(map(id, d.values())) and old.isdisjoint(map(id, d)))
    ]  # fmt: skip


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
