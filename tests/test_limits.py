"""Where and when a hook acts: what is picked, cut out and written back."""

import pytest
import torch

from flexmagic.engine.limits import Limits, Picks
from flexmagic.errors import InputError
from flexmagic.layout.dims import Dim

BATCH, SEQ, WIDTH = Dim("batch"), Dim("seq"), Dim("feature", 2)
DIMS = (BATCH, SEQ, WIDTH)


@pytest.mark.parametrize(
    ("given", "text", "among_five"),
    [
        (3, "3", [3]),
        (-1, "-1", [4]),
        ("1:", "1:", [1, 2, 3, 4]),
        ("1:3", "1:3", [1, 2]),
        (slice(1, None, 2), "1::2", [1, 3]),
        (slice(None, -3), ":-3", [0, 1]),
        ([0, 2], "0,2", [0, 2]),
        ("4, 0:2", "4,0:2", [0, 1, 4]),
        (7, "7", []),
    ],
)
def test_positions_are_read_as_python_indexes(given, text, among_five):
    picks = Picks.read(given, "token")
    assert str(picks) == text
    assert picks.among(5) == among_five


@pytest.mark.parametrize("given", ["", "a", "1:2:3:4", "1.5", "::0", True, "1,,2"])
def test_what_names_no_positions_is_refused(given):
    with pytest.raises(InputError, match="names no positions"):
        Limits.read(token=given)


def test_steps_have_no_known_end():
    assert [n for n in range(6) if Picks("1:").covers(n)] == [1, 2, 3, 4, 5]
    assert [n for n in range(6) if Picks("1:3,5").covers(n)] == [1, 2, 5]
    with pytest.raises(InputError, match="how many there will be"):
        Limits.read(step=-1)


@pytest.mark.parametrize(
    ("row", "token"), [(0, -1), (1, "1:3"), ("0,2", "0,1,4"), (None, "::2"), ([0, 2], None), ("::2", "0,3,4")]
)
def test_a_window_is_cut_and_pasted_where_plain_indexing_would(row, token):
    limits = Limits.read(row=row, token=token)
    whole = torch.arange(30.0).reshape(3, 5, 2)
    rows = limits.row.among(3) if limits.row else [0, 1, 2]
    tokens = limits.token.among(5) if limits.token else [0, 1, 2, 3, 4]
    wanted = whole[rows][:, tokens]
    window = limits.window(DIMS, whole.shape, 0, strict=True)
    part = window.cut(whole)
    assert torch.equal(part, wanted)
    changed, marked = whole.clone(), torch.zeros_like(whole)
    window.paste(changed, part * -1 - 1)
    marked[torch.tensor(rows)[:, None], torch.tensor(tokens)] = 1
    assert torch.equal(changed, torch.where(marked.bool(), -whole - 1, whole))


def test_evenly_spaced_positions_are_a_view_that_can_be_written():
    whole = torch.zeros(1, 5, 2)
    Limits.read(token="1::2").window(DIMS, whole.shape, 0, strict=True).cut(whole).add_(1)
    assert whole[0, :, 0].tolist() == [0, 1, 0, 1, 0]


def test_tokens_count_from_the_start_of_the_row():
    limits, shape = Limits.read(token="3:"), (1, 1, 2)
    assert limits.window(DIMS, shape, 2, strict=False).empty
    assert not limits.window(DIMS, shape, 3, strict=False).empty
    assert Limits.read(token=-2).window(DIMS, shape, 3, strict=False).empty
    assert Limits.read(token=2).window(DIMS, shape, 9, strict=False).empty
    with pytest.raises(IndexError, match="no token 9: this tensor has 5"):
        Limits.read(token=9).window(DIMS, (1, 5, 2), 0, strict=True)
    with pytest.raises(IndexError, match="no row 1"):
        Limits.read(row=1).window(DIMS, (1, 5, 2), 0, strict=False)


@pytest.mark.parametrize(
    "dims", [(BATCH, WIDTH), (BATCH, Dim("heads", 4), SEQ, SEQ), (Dim("batch·seq"), WIDTH)]
)
def test_a_tensor_without_one_dim_of_tokens_is_refused(dims):
    with pytest.raises(InputError, match="seq dim"):
        Limits.read(token=0).window(dims, [5] * len(dims), 0, strict=True)


def test_a_condition_is_the_same_on_every_rank():
    limits = Limits.read(when="run % 2 == 0 and max(step, 1) < 3")
    names = {"run": 4, "step": 0, "ctx": {}, "site": "", "index": None, "seed": 0}
    assert limits.holds(names)
    assert not limits.holds(names | {"run": 5})
    assert not limits.asks_hooks
    assert Limits.read(when="any(k for k in ctx)").asks_hooks
    with pytest.raises(InputError, match="uses rank, torch"):
        Limits.read(when="rank == 0 or torch.rand(1) > 0")
    with pytest.raises(InputError, match="no expression"):
        Limits.read(when="run =")


def test_every_kth_run_and_the_texts():
    assert [n for n in range(1, 8) if Limits.read(every=3).meets(n)] == [3, 6]
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="1 or more"):
            Limits.read(every=wrong)
    limits = Limits.read(step="1:", token=-1, every=2, when=" run > 3 ")
    assert str(limits) == "step 1:, token -1, every 2, when run > 3"
    assert limits.options == {"step": "1:", "token": "-1", "every": "2", "when": "run > 3"}
    assert str(Limits()) == ""
