"""Methods of interpretability, each built on :class:`flexmagic.Session`'s public functions alone.

Each is one function that takes a session, works on any model with standard names however it is split, and
returns a result that is displayed as a grid, has named dims, and gives tidy rows for a table.
"""

from __future__ import annotations

from flexmagic.recipes.ablation import Ablation, ablation
from flexmagic.recipes.attention import (
    Attention,
    AttentionEffect,
    attention,
    attention_knockout,
    attention_replacement,
)
from flexmagic.recipes.causal import CausalTracing, causal_tracing
from flexmagic.recipes.direct import LogitAttribution, logit_attribution
from flexmagic.recipes.gradients import (
    Attribution,
    Faithfulness,
    attribution_patching,
    faithfulness,
    gradient_times_activation,
)
from flexmagic.recipes.induction import Induction, induction
from flexmagic.recipes.integrated import Integrated, integrated_gradients
from flexmagic.recipes.interchange import Interchange, interchange
from flexmagic.recipes.lens import Lens, logit_lens
from flexmagic.recipes.named import Named
from flexmagic.recipes.patching import Patching, patching
from flexmagic.recipes.paths import PathPatching, path_patching
from flexmagic.recipes.probing import Probe, probe
from flexmagic.recipes.steering import Steering, steering, steering_vector
from flexmagic.recipes.tuned import TunedLens, divergence, tuned_lens

__all__ = [
    "Ablation",
    "Attention",
    "AttentionEffect",
    "Attribution",
    "CausalTracing",
    "Faithfulness",
    "Induction",
    "Integrated",
    "Interchange",
    "Lens",
    "LogitAttribution",
    "Named",
    "Patching",
    "PathPatching",
    "Probe",
    "Steering",
    "TunedLens",
    "ablation",
    "attention",
    "attention_knockout",
    "attention_replacement",
    "attribution_patching",
    "causal_tracing",
    "divergence",
    "faithfulness",
    "gradient_times_activation",
    "induction",
    "integrated_gradients",
    "interchange",
    "logit_attribution",
    "logit_lens",
    "patching",
    "path_patching",
    "probe",
    "steering",
    "steering_vector",
    "tuned_lens",
]
