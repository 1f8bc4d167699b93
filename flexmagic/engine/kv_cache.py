"""What models of transformers call the cache of keys and values, among arguments and in outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values")
"""The name since transformers 5.24, and the one before it."""


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments; ``None`` if there is none."""
    given = (arguments.get(name) for name in NAMES)
    return next((value for value in given if hasattr(value, "get_seq_length")), None)


def tokens_in(arguments: Mapping[str, Any]) -> int:
    """How many tokens the cache among a forward's arguments has of each row; 0 without one."""
    cache = cache_in(arguments)
    return 0 if cache is None else int(cache.get_seq_length())


def name_in(output: Any) -> str | None:
    """Under which name an output has its cache; ``None`` if its kind has none."""
    return next((name for name in NAMES if hasattr(output, name)), None)
