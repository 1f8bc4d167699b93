"""A version of a hook as the cell that makes it."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from flexmagic.engine.declared import declares
from flexmagic.errors import HookError

if TYPE_CHECKING:
    from flexmagic.client.hooks import HookVersion


def cell_of(version: HookVersion) -> str:
    """The text of a ``%%flexhook`` cell, or of a line with ``--do``.

    Raises :class:`HookError` for a hook made of a function, or without code but with values.
    """
    if declares(version.source):
        if "[" in version.source.text:
            msg = f"hook {version.source.name!r} has values, which no cell holds: {version.source.text}."
            raise HookError(msg)
        return f"%{_head(version)} --do {_quoted(version.source.text)}"
    if version.source.function is not None:
        msg = (
            f"hook {version.source.name!r} is a function: edit it where it is defined and register it again."
        )
        raise HookError(msg)
    return _text(version)


def difference(before: HookVersion, after: HookVersion) -> str:
    """A unified diff of two versions, options and body."""
    old, new = (_text(version).splitlines() for version in (before, after))
    labels = [f"{version.source.name} v{version.source.version}" for version in (before, after)]
    return "\n".join(difflib.unified_diff(old, new, labels[0], labels[1], lineterm=""))


def _text(version: HookVersion) -> str:
    return f"%%{_head(version)}\n{version.source.text}"


def _head(version: HookVersion) -> str:
    """The name of the magic and all options."""
    source = version.source
    words = ["flexhook", *(_quoted(str(pattern)) for pattern in version.patterns)]
    words += [f"--name {_quoted(source.name)}"]
    words += [f"--group {_quoted(version.group)}"] if version.group else []
    words += ["--local"] if source.local else []
    for name, value in source.limits.options.items():
        text = _quoted(value)
        words.append(f"--{name}{'=' if text.startswith('-') else ' '}{text}")
    return " ".join(words)


def _quoted(text: str) -> str:
    """A word of a magic's line, in quotes if it needs them."""
    if text and not any(c.isspace() or c in "\"'#" for c in text):
        return text
    return repr(text) if "'" in text else f"'{text}'"
