"""What a recipe asks of a model: its own sites for standard names, and its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.errors import InputError
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.client.model import Model
    from flexmagic.client.session import Session
    from flexmagic.layout.heads import Heads

TOKENIZER = "globals().get('tokenizer')"


def depth(model: Model) -> int:
    """The number of layers; raises :class:`SiteError` for a model without any."""
    return len(model.standing_for(Site.parse("blocks.*")))


def place(model: Model, name: str) -> tuple[Site, Heads | None]:
    """The model's own site for a standard name, and the heads in it; :class:`SiteError` for none."""
    return model.standing_for(Site.parse(name))[0]


def module(model: Model, name: str) -> str:
    """The module that has a standard name, as a trace writes it: ``model.model.norm``."""
    parts = place(model, name)[0].path.split(".")
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)


def pipelined(model: Model) -> bool:
    """Whether the last layer is on some ranks only, as in a pipeline."""
    site, _ = place(model, f"blocks.{depth(model) - 1}.resid_post")
    return len(model.rules[site].ranks) < model.mesh.size


def texts_of(session: Session, ids: Sequence[int]) -> list[str]:
    """The text of each token; without a tokenizer its number."""
    wanted = [int(i) for i in ids]
    code = f"t = {TOKENIZER}\nNone if t is None else [t.decode([i]) for i in {wanted}]"
    found = session.run_cell(_apart(code)).value
    return [str(i) for i in wanted] if found is None else list(found)


def ids_of(session: Session, texts: Sequence[Any]) -> list[list[int]]:
    """The token ids of prompts, which may be ids already; raises :class:`InputError` without a tokenizer."""
    written = [text for text in texts if isinstance(text, str)]
    code = f"t = {TOKENIZER}\nNone if t is None else [list(i) for i in t({written!r}).input_ids]"
    found = session.run_cell(_apart(code)).value if written else []
    if found is None:
        raise InputError("This model has no tokenizer: give token ids.")
    encoded = iter(found)
    return [next(encoded) if isinstance(text, str) else [int(i) for i in text] for text in texts]


def token_of(session: Session, token: str | int) -> int:
    """The id of one token, given by its text; raises :class:`InputError` for a text of several."""
    if isinstance(token, int):
        return token
    code = f"t = {TOKENIZER}\nNone if t is None else t({token!r}, add_special_tokens=False).input_ids"
    found = session.run_cell(_apart(code)).value
    if found is None:
        raise InputError(f"This model has no tokenizer: give the id of {token!r}.")
    if len(found) != 1:
        parts = ", ".join(repr(text) for text in texts_of(session, found))
        hint = "" if token.startswith(" ") else f" Did you mean {' ' + token!r}, with a space before it?"
        raise InputError(f"{token!r} is {len(found)} tokens ({parts}), where one is needed.{hint}")
    return int(found[0])


def _apart(code: str) -> str:
    """Code whose names do not stay in the engines' namespace."""
    *lines, last = code.splitlines()
    body = "".join(f"    {line}\n" for line in [*lines, f"return {last}"])
    return f"def _asked():\n{body}\n_asked()"
