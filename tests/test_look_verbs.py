"""Two captures compared and subtracted on a rank, for every dtype, against plain numpy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flexmagic.engine import look_verbs
from flexmagic.engine.captures import Captures
from flexmagic.layout.sites import Site

BEFORE, AFTER, SITE = ("me", 1), ("me", 2), Site("m")
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def rank(a, b):
    runtime = SimpleNamespace(captures=Captures())
    runtime.captures.keep(BEFORE, SITE, a)
    runtime.captures.keep(AFTER, SITE, b)
    return runtime


def ask(verb, runtime, *args):
    """What a verb does on a rank, without the slot around it."""
    return verb.__wrapped__(runtime, *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_changed_element_is_one_changed_element(dtype):
    a = (torch.arange(12).reshape(3, 4) % 2).to(dtype)
    b = a.clone()
    b[1, 2] = 1  # it was 0
    runtime = rank(a, b)
    change = ask(look_verbs.change, runtime, (BEFORE, SITE), (AFTER, SITE))
    assert (change.n, change.same, change.odd, change.largest) == (12, 11, 0, 1)
    seen = SITE.seen_by("minus")
    ask(look_verbs.subtract, runtime, (BEFORE, SITE), (AFTER, SITE), seen)
    delta = runtime.captures.get(AFTER, seen).numpy()
    assert np.count_nonzero(delta) == 1
    assert abs(delta[1, 2]) == 1
    digest = [ask(look_verbs.digest, runtime, run, SITE) for run in (BEFORE, AFTER)]
    assert digest[0] != digest[1]


def test_a_transposed_piece_is_compared_by_position_not_by_memory():
    a = torch.arange(12.0).reshape(3, 4)
    change = ask(look_verbs.change, rank(a, a.T.contiguous().T), (BEFORE, SITE), (AFTER, SITE))
    assert change.same == 12


@pytest.mark.parametrize("shape", [(), (0, 3), (1,)])
def test_small_and_empty_pieces_are_compared_too(shape):
    change = ask(look_verbs.change, rank(torch.ones(shape), torch.ones(shape)), (BEFORE, SITE), (AFTER, SITE))
    assert (change.n, change.same) == (int(np.prod(shape)),) * 2


def test_a_share_is_counted_in_the_bins_that_were_asked_for():
    a = torch.tensor([0.0, 1.0, float("nan"), 5.0])
    stats, counts = ask(look_verbs.share, rank(a, a), BEFORE, SITE, np.array([0.0, 1.0, 2.0]))
    assert (stats.n, stats.nan, stats.max) == (4, 1, 5)
    assert counts.tolist() == [1, 1]
