"""What a user runs a model on, turned into the model's own arguments, checked before any forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from flexmagic.engine.twin import forward_options
from flexmagic.errors import InputError


@dataclass(frozen=True)
class Prepared:
    """Keyword arguments for the model, and the token texts per row where there is a tokenizer."""

    arguments: dict[str, Any]
    tokens: list[list[str]]
    ids: list[list[int]]


def prepare(
    inputs: Any, model: nn.Module, tokenizer: Any, device: torch.device, *, generating: bool = False
) -> Prepared:
    """Turn a text, texts, token ids or a dict of the model's own arguments into a forward's arguments.

    Ids are int64 ``[batch, seq]``. Raises :class:`InputError` for what the model cannot take; all
    ranks get the same input, so all raise alike. ``generating``: texts of a batch end together, and
    what is cached is the model's own choice.
    """
    if isinstance(inputs, dict):
        arguments = {name: _to_device(value, device) for name, value in inputs.items()}
        ids = arguments.get("input_ids")
    elif isinstance(inputs, str) or (isinstance(inputs, list) and inputs and isinstance(inputs[0], str)):
        side = "left" if generating else None
        arguments = _encode([inputs] if isinstance(inputs, str) else inputs, tokenizer, device, side)
        ids = arguments["input_ids"]
    else:
        ids = _as_ids(inputs, device)
        arguments = {"input_ids": ids}
    if isinstance(ids, torch.Tensor) and ids.ndim == 2:
        _check_ids(ids, model)
        rows = [[int(i) for i in row] for row in ids.tolist()]
    else:
        rows = []
    tokens = [[tokenizer.decode([i]) for i in row] for row in rows] if tokenizer is not None else []
    options = {k: v for k, v in forward_options(model).items() if k not in arguments and not generating}
    return Prepared({**arguments, **options}, tokens, rows)


def _encode(texts: list[str], tokenizer: Any, device: torch.device, side: str | None) -> dict[str, Any]:
    if tokenizer is None:
        msg = "This model has no tokenizer: pass token ids, or assign `tokenizer` in the %%flexmodel cell."
        raise InputError(msg)
    if not all(text.strip() for text in texts):
        msg = 'The prompt is empty. Type %flexrun "some text".'
        raise InputError(msg)
    if len(texts) > 1 and tokenizer.pad_token is None:
        msg = "The tokenizer has no padding token, so texts of different length cannot be one batch."
        raise InputError(msg)
    padding = {"padding": len(texts) > 1, **({} if side is None else {"padding_side": side})}
    encoded = tokenizer(texts, return_tensors="pt", **padding)
    out = {"input_ids": encoded["input_ids"].to(device)}
    if not bool(encoded["attention_mask"].all()):
        out["attention_mask"] = encoded["attention_mask"].to(device)
    return out


def _as_ids(inputs: Any, device: torch.device) -> torch.Tensor:
    try:
        ids = torch.as_tensor(np.asarray(inputs) if not isinstance(inputs, torch.Tensor) else inputs)
    except (TypeError, ValueError) as error:
        kind = type(inputs).__name__
        msg = f"{kind} is no input: pass a text, token ids, or a dict of the model's arguments."
        raise InputError(msg) from error
    if ids.is_floating_point() or ids.ndim not in (1, 2) or ids.numel() == 0:
        msg = (
            f"Token ids are whole numbers of shape [seq] or [batch, seq], got {ids.dtype} {list(ids.shape)}."
        )
        raise InputError(msg)
    return ids.to(device=device, dtype=torch.int64).reshape(-1, ids.shape[-1])


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _check_ids(ids: torch.Tensor, model: nn.Module) -> None:
    config = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and ids.shape[1] > context:
        msg = f"The prompt has {ids.shape[1]} tokens; the model's context is {context}. Shorten it."
        raise InputError(msg)
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        wrong = int(ids.max()) if int(ids.max()) >= vocabulary else int(ids.min())
        ids_are = f"ids are 0 to {vocabulary - 1}"
        msg = f"Token id {wrong} is outside the vocabulary of {vocabulary}: {ids_are}."
        raise InputError(msg)
