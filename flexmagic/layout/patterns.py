"""Patterns of module paths: ``*`` for one part, ``{2..5}`` and ``{a,b}`` for a choice, ``/…/`` for a regex.

``*`` stands for one part of a path, or for some of its letters (``*_proj``). Braces hold texts and
ranges of whole numbers, both ends of which are meant; every choice must exist in the model. Between
slashes stands a regular expression that a whole path must fit.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable

from flexmagic.errors import SiteError

MOST = 10_000
"""Largest number of paths that one pattern's braces may name."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_regex(pattern: str) -> bool:
    """Whether a pattern is a regular expression between slashes."""
    return len(pattern) > 1 and pattern[0] == pattern[-1] == "/"


@functools.lru_cache(maxsize=1024)
def choices(pattern: str) -> tuple[str, ...]:
    """The patterns without braces that one with braces stands for, in the order it names them.

    Raises :class:`SiteError` for braces that are not closed or empty, and for a range that runs
    backwards.
    """
    if is_regex(pattern):
        return (pattern,)
    texts = _BRACES.split(pattern)  # what stands outside and inside of braces, in turns
    if any(c in text for text in texts[::2] for c in "{}"):
        raise SiteError(f"{pattern!r}: a brace is not closed. Write {{2..5}} or {{2,5}}.")
    inside = [tuple(_named(item, pattern)) for item in texts[1::2]]
    count = 1
    for found in inside:
        count *= len(found)
    if count > MOST:
        raise SiteError(f"{pattern!r} names {count:,} paths; {MOST:,} are the most.")
    return tuple(
        "".join(itertools.chain(*zip(texts[::2], (*picked, ""), strict=True)))
        for picked in itertools.product(*inside)
    )


def _named(text: str, pattern: str) -> list[str]:
    """What one pair of braces stands for."""
    out: list[str] = []
    for item in text.split(","):
        numbers = _RANGE.fullmatch(item.strip())
        if numbers is None:
            if not item.strip() or ".." in item:
                raise SiteError(f"{pattern!r}: {{{text}}} is no choice. Write {{2..5}} or {{2,5}}.")
            out.append(item.strip())
            continue
        first, last = int(numbers[1]), int(numbers[2])
        if last < first or last - first >= MOST:
            raise SiteError(f"{pattern!r}: {item.strip()} is no range; write the smaller number first.")
        out += [str(n) for n in range(first, last + 1)]
    return out


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern without braces as what a whole path is matched against; raises :class:`SiteError`."""
    if is_regex(pattern):
        try:
            return re.compile(pattern[1:-1])
        except re.error as error:
            raise SiteError(f"{pattern!r} is no regular expression: {error}.") from None
    parts = ("[^.]+" if p == "*" else re.escape(p).replace(r"\*", "[^.]*") for p in pattern.split("."))
    return re.compile(r"\.".join(parts))


def check_pattern(pattern: str) -> None:
    """Raise :class:`SiteError` for a pattern that cannot be read."""
    for choice in choices(pattern):
        _compiled(choice)


def path_matches(pattern: str, path: str) -> bool:
    """Whether a module path is meant by a pattern."""
    return any(_compiled(choice).fullmatch(path) is not None for choice in choices(pattern))


def missing(pattern: str, paths: list[str]) -> str | None:
    """The first choice of a pattern that no path fits; ``None`` if each of them exists."""
    known = set(paths)
    for choice in choices(pattern):
        if choice not in known and not any(_compiled(choice).fullmatch(path) for path in paths):
            return choice
    return None


def starred(path: str) -> str:
    """A path or pattern with ``*`` for every number and every choice."""
    return ".".join("*" if part.isdigit() else part for part in _BRACES.sub("*", path).split("."))


def listed(patterns: str | Iterable[str]) -> list[str]:
    """Patterns as a user gives them: several, or one text with commas, which is kept if it is empty."""
    return split_list(patterns) or [patterns] if isinstance(patterns, str) else list(patterns)


def split_list(text: str) -> list[str]:
    """The patterns of a list with commas; those inside braces and regular expressions separate nothing."""
    out, depth, start, regex = [], 0, 0, False
    for at, letter in enumerate(text):
        if letter == "/" and (at == start or regex):
            regex = not (regex and text[at + 1 : at + 2] in {"", ":", ","})
        elif not regex and letter in "{}":
            depth += 1 if letter == "{" else -1
        elif letter == "," and not regex and depth <= 0:
            out.append(text[start:at])
            start = at + 1
    return [part.strip() for part in (*out, text[start:]) if part.strip()]
