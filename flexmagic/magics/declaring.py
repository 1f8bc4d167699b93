"""``--do``: what a hook without code does, from the words of a line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexmagic.errors import InputError
from flexmagic.magics.inputs import value_of

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.engine.declared import Declared


def declared(shell: InteractiveShell | None, text: str) -> Declared:
    """``scale 0.5`` or ``add direction 2``: a kind, then an expression of the notebook, then numbers.

    The expression is an array, a tensor, or an activation, which is fetched. Raises :class:`InputError`.
    """
    from flexmagic.engine.declared import KINDS, Declared

    kind, _, rest = text.strip().partition(" ")
    if kind not in KINDS:
        raise InputError(f"There is no {kind!r} to do at a site. There are: {', '.join(KINDS)}.")
    if KINDS[kind].values is False or not rest.strip():
        return Declared(kind, _numbers(kind, rest.split()))
    words, numbers = rest.split(), list[str]()
    while len(words) > 1 and len(numbers) < KINDS[kind].numbers[1] and _is_number(words[-1]):
        numbers.insert(0, words.pop())
    return Declared(kind, _numbers(kind, numbers), _values(value_of(shell, "--do", " ".join(words))))


def _numbers(kind: str, words: list[str]) -> tuple[float, ...]:
    if wrong := [word for word in words if not _is_number(word)]:
        raise InputError(f"{kind} takes numbers, not {wrong[0]!r}.")
    return tuple(map(float, words))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _values(found: Any) -> Any:
    import numpy as np
    import torch

    if hasattr(found, "numpy") and not isinstance(found, torch.Tensor):
        found = found.numpy()
    values = found.detach().cpu() if isinstance(found, torch.Tensor) else torch.as_tensor(np.array(found))
    return values if values.is_floating_point() else values.float()
