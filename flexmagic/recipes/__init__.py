"""Methods of interpretability, each built on :class:`flexmagic.Session`'s public functions alone.

Each is one function that takes a session, works on any model with standard names however it is split, and
returns a result that is displayed as a grid, has named dims, and gives tidy rows for a table.
"""

from __future__ import annotations

from flexmagic.recipes.ablation import Ablation, ablation
from flexmagic.recipes.induction import Induction, induction
from flexmagic.recipes.interchange import Interchange, interchange
from flexmagic.recipes.lens import Lens, logit_lens
from flexmagic.recipes.named import Named
from flexmagic.recipes.patching import Patching, patching
from flexmagic.recipes.probing import Probe, probe
from flexmagic.recipes.steering import Steering, steering, steering_vector
from flexmagic.recipes.tuned import TunedLens, divergence, tuned_lens

__all__ = [
    "Ablation",
    "Induction",
    "Interchange",
    "Lens",
    "Named",
    "Patching",
    "Probe",
    "Steering",
    "TunedLens",
    "ablation",
    "divergence",
    "induction",
    "interchange",
    "logit_lens",
    "patching",
    "probe",
    "steering",
    "steering_vector",
    "tuned_lens",
]
