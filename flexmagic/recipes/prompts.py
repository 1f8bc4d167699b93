"""Prompts, metrics and groups of positions, as recipes take them from a user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import InputError
from flexmagic.recipes.places import ids_of, texts_of, token_of

if TYPE_CHECKING:
    from flexmagic.client.session import Session

TAKEN = frozenset({
    "at", "base", "before", "best", "changed", "columns", "ctx", "drawn", "embed", "first", "frozen",
    "h", "kept", "last", "logits", "model", "moved", "new", "noise", "old", "other", "parts", "pattern",
    "place", "places", "rank", "receivers", "result_at", "row", "rows", "same", "samples", "save",
    "seed", "sent", "site", "sites", "spread", "start", "step", "steps", "stop", "subject", "target",
    "torch", "values", "values_at", "whole", "x", "z", "zero",
})  # fmt: skip
"""Names that the recipes' own code uses beside a metric."""


def one_prompt(session: Session, prompt: Any) -> tuple[list[int], list[str]]:
    """A prompt's ids and the text of each token; raises :class:`InputError` for no prompt."""
    if not isinstance(prompt, str) and (not len(prompt) or isinstance(prompt[0], (str, list))):
        raise InputError("Give one prompt: a text, or a list of token ids.")
    (ids,) = ids_of(session, [prompt])
    return ids, texts_of(session, ids)


def two_prompts(
    session: Session, first: Any, second: Any, names: tuple[str, str] = ("Clean", "Corrupt")
) -> tuple[list[list[int]], list[str]]:
    """Both prompts' ids, and at each position the token, or both where they differ.

    Raises :class:`InputError` for prompts of different length, and for two that are the same.
    """
    ids = ids_of(session, [first, second])
    if len(ids[0]) != len(ids[1]):
        cut = [", ".join(repr(text) for text in texts_of(session, row)) for row in ids]
        msg = (
            f"The prompts have {len(ids[0])} and {len(ids[1])} tokens, and patching puts position on "
            f"position. {names[0]}: {cut[0]}. {names[1]}: {cut[1]}."
        )
        raise InputError(msg)
    if ids[0] == ids[1]:
        raise InputError("The prompts are the same, so that there is nothing to patch.")
    one, other = (texts_of(session, row) for row in ids)
    return ids, [a if a == b else f"{a} |{b}" for a, b in zip(one, other, strict=True)]


def tokens_of(session: Session, metric: str, tokens: Mapping[str, str | int] | None) -> dict[str, int]:
    """The ids of a metric's names; raises :class:`InputError` for what is no expression or no name."""
    try:
        compile(metric, "<metric>", "eval")
    except SyntaxError as error:
        raise InputError(f"The metric {metric!r} is no expression: {error.msg}.") from None
    for name in tokens or {}:
        if not name.isidentifier() or name in TAKEN:
            raise InputError(
                f"A token cannot be named {name!r}: choose another word, such as right or wrong."
            )
    return {name: token_of(session, token) for name, token in (tokens or {}).items()}


def groups_of(
    length: int, positions: Mapping[str, Sequence[int]] | None, *, together: bool
) -> dict[str, list[int]]:
    """The positions that are taken together, by name; ``together``: all of them, if nothing is said."""
    if positions is None:
        every = list(range(length))
        return {"all positions": every} if together else {str(at): [at] for at in every}
    groups = {name: [int(at) for at in places] for name, places in positions.items()}
    for name, places in groups.items():
        if not places or any(not -length <= at < length for at in places):
            raise InputError(f"positions {name!r}: {places} are not in the {length} tokens of the prompts.")
    if not groups:
        raise InputError('positions needs a group or more, such as {"the names": [2, 4]}.')
    return groups


def number(value: Any, metric: str) -> float:
    """The one number that a metric is to give."""
    found = np.asarray(value.detach().cpu().float().numpy() if hasattr(value, "detach") else value)
    if found.ndim:
        raise InputError(f"{metric} gave the shape {list(found.shape)}, and a metric is one number.")
    return float(found)


def loss_of(metric: str, tokens: Mapping[str, int], row: str = "0") -> str:
    """A metric of one row of a batch as the loss of a run; ``row``: an index, also one to be summed over."""
    names, ids = ", ".join(("logits", *tokens)), "".join(f", {i}" for i in tokens.values())
    return f"(lambda {names}: {metric})(logits[{row}]{ids})"
