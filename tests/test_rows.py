"""Which rank works on which rows, and the batches that a survey makes out of the user's."""

import torch

from flexmagic.engine.checkpoint import Checkpoint
from flexmagic.engine.probe import Notes
from flexmagic.engine.rows import copies_of_a_row, rows_from, with_a_row_more
from flexmagic.layout.sites import Site

X = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
SITE = Site("layer")


def test_copies_and_runs_of_rows():
    given = {"x": X, "scale": 3, "table": torch.ones(5)}
    assert torch.equal(copies_of_a_row(given, 1, 3)["x"], X[[1, 1, 1]])
    assert torch.equal(with_a_row_more(given)["x"], X[[0, 1, 1]])
    assert torch.equal(rows_from(given, 0, 2)["x"], X)
    assert rows_from(given, 0, 3)["table"] is given["table"]
    assert rows_from(given, 0, 3)["scale"] == 3


def test_rows_that_are_not_there_are_made_of_values_that_are():
    one = {"x": X[:1], "ids": torch.tensor([[5, 6, 7, 8]])}
    made = rows_from(one, 0, 3)
    assert torch.equal(made["x"][0], X[0])
    assert len({tuple(row.flatten().tolist()) for row in made["x"]}) == 3
    assert len({float(row.float().mean()) for row in made["x"]}) == 3
    assert {int(i) for i in made["ids"].unique()} == {5, 6, 7, 8}
    assert len({tuple(row.tolist()) for row in made["ids"]}) == 3
    assert torch.equal(copies_of_a_row(one, 1, 2)["x"], made["x"][[1, 1]])


def steady(function):
    """Whether what a function of rows gives is seen to follow each row alone."""
    notes = Notes({}, Checkpoint(None))
    rows = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    notes(SITE, function(rows[[0, 0]]))
    return notes.begins_as(SITE, function(rows), 3)


def test_what_a_row_gives_is_compared_with_what_it_gave_among_others():
    assert steady(lambda x: x * 2)
    assert steady(lambda x: x.transpose(0, 1))
    assert steady(lambda x: x.flatten(0, 1))
    assert steady(lambda _: torch.ones(3))
    assert not steady(lambda x: x.flip(0))
    assert not steady(lambda x: torch.cat([x, x]))
    assert not steady(lambda x: x - x.mean(0))
    assert not steady(lambda x: x.transpose(0, 1).flatten(0, 1))
    assert not steady(lambda x: torch.tensor(float(len(x))))
    assert not steady(lambda x: x.sum())
