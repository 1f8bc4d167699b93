"""What edits and looks move between real processes: no more than is needed, by memory where they share it."""

import pytest
import torch

from flexmagic import HookError
from flexmagic.client import wire
from flexmagic.engine import segments

from .conftest import PROMPT, relative

pytestmark = pytest.mark.engines

UP = "model.layers.1.mlp.up_proj"

COUNT = """
from flexmagic.engine.exchange import Exchange
sent, was = [], Exchange._meet

def _meet(self, outgoing, incoming):
    sent.append(sum(tensor.nbytes for rank, tensor in outgoing.items() if rank != self.rank))
    return was(self, outgoing, incoming)

Exchange._meet = _meet
"""


@pytest.fixture
def moved(loaded):
    """Bytes of each message between the ranks, sent from rank 0, since the last question."""
    view = loaded._cluster.client[:]
    view.execute(COUNT, block=True)

    def bytes_sent():
        found = view["sent"]
        view.execute("sent.clear()", block=True)
        return found[0]

    yield bytes_sent
    view.execute("Exchange._meet = was", block=True)


def with_edit(edited, ids, edit):
    with edited({UP: edit}) as model, torch.no_grad():
        return model(ids).logits


def test_an_edit_exchanges_one_header_once_there_is_memory_for_the_pieces(loaded, edited, ids, moved):
    loaded._calls.rebuild()  # with the groups goes the memory that earlier runs have made
    loaded.hook(UP, "x[:, :, 100:300] *= -2")
    truth = with_edit(
        edited, ids, lambda x: torch.cat([x[..., :100], x[..., 100:300] * -2, x[..., 300:]], -1)
    )
    for _ in range(3):
        assert relative(loaded.run(PROMPT).logits.torch(), truth) < 1e-5
    sent = moved()
    header, piece = sent[:2]
    assert piece > 10 * header  # the first run sent it
    assert sent[-2:] == [header] * 2
    longer = torch.cat([ids] * 16, 1)  # more than there was room for
    truth = with_edit(
        edited, longer, lambda x: torch.cat([x[..., :100], x[..., 100:300] * -2, x[..., 300:]], -1)
    )
    for _ in range(3):
        assert relative(loaded.run(longer).logits.torch(), truth) < 1e-5


def test_an_edit_of_what_every_rank_has_exchanges_nothing(loaded, edited, ids, moved):
    loaded.hook("model.layers.1", "x[:, -1] *= -2")
    with (
        edited({"model.layers.1": lambda x: torch.cat([x[:, :-1], x[:, -1:] * -2], 1)}) as model,
        torch.no_grad(),
    ):
        truth = model(ids).logits
    assert relative(loaded.run(PROMPT).logits.torch(), truth) < 1e-5
    assert moved() == []
    loaded.hook("model.layers.1", "if rank == 1: 1 / 0", name="fails")
    with pytest.raises(HookError, match=r"on rank 1(?s:.)*ZeroDivisionError"):
        loaded.run(PROMPT)
    loaded.hook("model.layers.1", "x *= rank + 1", name="fails")
    with pytest.raises(HookError, match="different values on the ranks"):
        loaded.run(PROMPT)
    loaded.hook("model.layers.1", "x *= 1", name="fails")
    assert relative(loaded.run(PROMPT).logits.torch(), truth) < 1e-5


@pytest.mark.parametrize(
    ("limits", "index"),
    [
        ({"token": -1}, (slice(None), [-1])),
        ({"token": "1,3:5"}, (slice(None), [1, 3, 4])),
        ({"row": 0}, ([0],)),
    ],
)
def test_an_edit_of_tokens_exchanges_these_tokens_alone(  # noqa: PLR0917 - fixtures
    loaded, edited, ids, moved, limits, index
):
    def edit(x):
        out = x.clone()
        out[index] = x.flip(-1)[index] * 3
        return out

    loaded.hook(UP, "x = x.flip(-1) * 3", **limits)
    run = loaded.run(PROMPT)
    assert relative(run.logits.torch(), with_edit(edited, ids, edit)) < 1e-5
    seq, width = run[UP].shape[1:]
    tokens = len(index[1]) if len(index) > 1 else seq
    assert max(moved()) == tokens * width // 2 * 4


def test_a_large_activation_is_read_from_the_engines_memory_or_sent_by_them_or_comes_in_messages(
    loaded, one_process, ids, monkeypatch
):
    longer = torch.cat([ids] * 60, 0)
    run = loaded.run(longer)
    asked = []
    was = loaded._calls.some
    monkeypatch.setattr(
        loaded._calls,
        "some",
        lambda requests, *a: (asked.extend(r[0] for r in requests.values()), was(requests, *a))[1],
    )
    by_memory = run.logits.torch()
    assert set(asked) == {"lend"}
    assert by_memory.nbytes > wire.WORTH
    monkeypatch.setattr(wire, "SENT", 1 << 18)
    monkeypatch.setattr(segments, "machine", lambda: "elsewhere")
    asked.clear()
    told = []
    assert torch.equal(by_memory, run.logits.torch(progress=lambda here, total: told.append((here, total))))
    assert set(asked) == {"lend"}
    assert len(told) > 1
    assert not loaded._calls.unreachable
    monkeypatch.setattr(wire, "WORTH", 1 << 60)
    monkeypatch.setattr(wire, "MESSAGE", 1 << 20)
    told = []
    by_message = run.logits.torch(progress=lambda here, total: told.append((here, total)))
    assert len(told) > 1
    assert told[-1] == (by_message.nbytes, by_message.nbytes)
    assert torch.equal(by_memory, by_message)
    with torch.no_grad():
        assert relative(by_memory, one_process(longer).logits) < 1e-5
