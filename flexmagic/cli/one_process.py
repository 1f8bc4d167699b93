"""The same model in one process with plain torch hooks: what a distributed run is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexmagic.layout.patterns import path_matches

Edit = Callable[[torch.Tensor, Any], Any]


class OneProcess:
    """A Hugging Face causal language model and its tokenizer, whole, in this process."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(path).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path)

    @property
    def parameter_bytes(self) -> int:
        """The size of all weights in bytes."""
        return sum(p.nbytes for p in self._model.parameters())

    def word(self, token: int) -> str:
        """The text of one token."""
        return str(self._tokenizer.decode([token]))

    def run(
        self, prompt: str, sites: Sequence[str], edit: tuple[str, Edit] | None = None
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        """One forward of ``prompt``.

        ``edit``: a site, with ``*`` for one part of the path, and a function that changes the tensor
        there in place. Returns the logits, `[batch, seq, vocab]`, and the tensor at each of
        ``sites``, in the model's own dtype.
        """
        seen: dict[str, NDArray[Any]] = {}
        handles = []
        if edit is not None:
            pattern, change = edit
            handles += [self._at(site, lambda x: change(x, None)) for site in self._expand(pattern)]
        handles += [self._at(site, _keep(seen, site)) for site in sites]
        try:
            with torch.no_grad():
                logits = self._model(**self._tokenizer(prompt, return_tensors="pt")).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits.numpy(), seen

    def _expand(self, pattern: str) -> list[str]:
        path, colon, port = pattern.partition(":")
        return [name + colon + port for name, _ in self._model.named_modules() if path_matches(path, name)]

    def _at(self, site: str, look: Callable[[torch.Tensor], Any]) -> Any:
        """Hook ``look`` to a site: the output of its module, or the input; of several values the first."""
        path, _, port = site.partition(":")
        module = self._model.get_submodule(path)
        if port.startswith("input"):
            return module.register_forward_pre_hook(lambda _module, args: _drop(look(args[0])))

        def hook(_module: Any, _args: Any, output: Any) -> None:
            look(output[0] if isinstance(output, tuple) else output)

        return module.register_forward_hook(hook)


def _drop(_value: Any) -> None:
    """What a torch hook returns replaces the value; these hooks replace nothing."""


def _keep(seen: dict[str, NDArray[Any]], site: str) -> Callable[[torch.Tensor], None]:
    def keep(x: torch.Tensor) -> None:
        seen[site] = x.numpy().copy()

    return keep


def largest_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest difference of ``a`` from ``b``, relative to the largest value of ``b``."""
    return float(np.abs(a - b).max() / np.abs(b).max())
