"""What hooks find in every run of a session: its modules, and values that persist."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from flexmagic.engine.trainable import Trainables

PIECE = "a --local hook has a rank's own piece, and a module is trained on whole tensors: leave --local away"
UNKNOWN = "how gradients lie at this site is refused, so a module called here would be trained wrongly"


@dataclass
class Lasting:
    """A session's modules and persistent values on this rank; ``training``: whether a loss follows."""

    modules: Trainables = field(default_factory=Trainables)
    persistent: dict[str, Any] = field(default_factory=dict)
    training: bool = False

    def names(self, *, local: bool, differentiable: bool) -> dict[str, Any]:
        """``modules`` and ``persistent`` for a hook.

        ``local``: it has the rank's own piece; ``differentiable``: how gradients lie at its site is
        known. Without both, modules cannot be used in a run with a loss.
        """
        modules = self.modules
        if self.training and torch.is_grad_enabled() and (local or not differentiable):
            modules = Trainables(PIECE if local else UNKNOWN)
        return {"modules": modules, "persistent": self.persistent}
