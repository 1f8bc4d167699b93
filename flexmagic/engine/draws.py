"""Random numbers that user code draws alike on every rank, without disturbing the model's own."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def same_draws(what: str) -> Iterator[None]:
    """Random numbers that depend on ``what`` and on nothing else, so that every rank draws the same.

    The generators' states are put back at the end.
    """
    seed = zlib.crc32(what.encode())
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - users draw from it
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
