"""What a line gives a run to work on: prompts in quotes, or an expression of the notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexmagic.errors import InputError
from flexmagic.magics.arguments import texts, unquoted

if TYPE_CHECKING:
    from argparse import Namespace

    from IPython.core.interactiveshell import InteractiveShell


def inputs_of(shell: InteractiveShell | None, args: Namespace, magic: str) -> Any:
    """The prompt or prompts, or the value of ``--inputs``; raises :class:`InputError` for neither or both."""
    prompts = texts(args.prompt)
    if bool(prompts) == bool(args.inputs):
        msg = f'Give a prompt or --inputs, one of them: {magic} "The capital of France is"'
        raise InputError(msg)
    if prompts:
        return prompts[0] if len(prompts) == 1 else prompts
    return value_of(shell, "--inputs", args.inputs)


def value_of(shell: InteractiveShell | None, option: str, text: str) -> Any:
    """The value of an expression in the notebook; raises :class:`InputError` if it has none."""
    assert shell is not None  # a magic is registered on one
    try:
        return shell.ev(unquoted(text))
    except Exception as error:  # noqa: BLE001 - the user's expression may raise anything
        msg = f"{option} {text}: {type(error).__name__}: {error}"
        raise InputError(msg) from None
