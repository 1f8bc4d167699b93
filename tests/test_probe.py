"""What a rank notes of a forward: what the model writes into after a site was seen."""

import torch
from torch import nn

from flexmagic.engine.checkpoint import Checkpoint
from flexmagic.engine.probe import Notes, observe
from flexmagic.layout.sites import Site


class Writes(nn.Module):
    """Writes into what its layers gave: seen by torch's version counter, and unseen as collectives do."""

    def __init__(self):
        super().__init__()
        self.counted, self.uncounted, self.left = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        a, b = self.counted(x), self.uncounted(x)
        a.mul_(2)
        before = b._version
        b.data.mul_(2)
        assert b._version == before
        return self.left(a + b)


def test_a_write_shows_in_the_values_where_no_counter_tells():
    model, notes = Writes(), Notes({}, Checkpoint(None))
    observe(model, lambda: model(torch.randn(2, 4)), notes)
    assert notes.overwritten() == {Site("counted"), Site("uncounted")}
