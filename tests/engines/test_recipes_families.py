"""Recipes by standard names: on models of other families, split, as on one engine that holds them whole."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexmagic import Session
from flexmagic.recipes import (
    attention_knockout,
    attribution_patching,
    causal_tracing,
    faithfulness,
    gradient_times_activation,
    induction,
    integrated_gradients,
    logit_attribution,
    logit_lens,
    patching,
    path_patching,
    steering,
)

from .conftest import relative
from .matrix.models import CHECKPOINTS, made

pytestmark = [pytest.mark.engines, pytest.mark.slow]

IDS = torch.randint(3, 200, (9,), generator=torch.Generator().manual_seed(0)).tolist()
OTHER = [*IDS[:4], IDS[4] + 1, *IDS[5:]]
METRIC = "logits[-1, a] - logits[-1, b]"
TOKENS = {"a": 5, "b": 7}
FAMILIES = {
    "GPT-2 by fsdp": ("GPT-2", {"fsdp": 2}),
    "Mixtral by tp": ("Mixtral", {"tp": 2}),
    "Mixtral by fsdp": ("Mixtral", {"fsdp": 2}),
    "Mixtral by pp": ("Mixtral", {"pp": 2}),
}


@pytest.fixture(scope="module")
def single():
    """One engine: the model in one process."""
    with Session.start(1, oversubscribe=True) as one:
        yield one


def numbers(session, *, generates, smooth):
    """What every recipe gives, by name."""
    pair = (session, IDS, OTHER, METRIC)
    lens = logit_lens(session, [IDS])
    found = {
        "lens": lens.logprobs.values,
        "induction": induction(session, period=6, rows=2).score.values,
        "induction loss": induction(session, period=6, rows=2).loss.values,
    }
    for site in ("resid_pre", "resid_mid", "attn_out", "mlp_out", "attn.z", "attn.q", "attn.k", "attn.v"):
        found[f"patching {site}"] = patching(*pair, site=site, tokens=TOKENS).metric.values
    found["noising"] = patching(*pair, tokens=TOKENS, denoising=False).metric.values
    everything = {"all": range(9), "before": range(4)}
    at_once = patching(*pair, tokens=TOKENS, layers=[0], positions=everything).effect.values
    assert at_once == pytest.approx(np.array([[1, 0]]), abs=1e-4)
    assert at_once[0, 1] == 0

    traced = causal_tracing(session, IDS, [4], samples=3, site="mlp_out", window=2)
    assert traced.clean > traced.corrupt
    found["causal tracing"] = traced.metric.values
    for senders in ("attn.z", "mlp_out"):
        path = path_patching(*pair, tokens=TOKENS, senders=senders, receivers="blocks.1.attn.v")
        assert path.effect.values[0].any()
        assert not path.effect.values[1].any()
        found[f"paths from {senders}"] = path.metric.values
    direct = path_patching(*pair, tokens=TOKENS, layers=[1])
    last = patching(*pair, tokens=TOKENS, site="attn.z", layers=[1], denoising=False)
    assert relative(direct.metric.values, last.metric.values) <= 1e-5

    for site in ("resid_post", "attn.v"):
        found[f"gradients at {site}"] = gradient_times_activation(
            session, IDS, METRIC, tokens=TOKENS, site=site
        ).value.values
    found["attribution"] = attribution_patching(*pair, tokens=TOKENS, site="attn.z").metric.values
    slope = faithfulness(*pair, tokens=TOKENS, step=0.001, layers=[1], positions={"all": range(9)})
    assert slope.off < 0.02
    integrated = integrated_gradients(session, IDS, METRIC, baseline=OTHER, tokens=TOKENS)
    assert (integrated.gap < 0.02) is smooth  # experts that change places are a jump, which no gradient sees
    found["integrated"] = integrated.value.values

    parts = logit_attribution(session, IDS, METRIC, tokens=TOKENS)
    assert parts.parts.values.sum() == pytest.approx(parts.metric, rel=1e-4)
    assert (
        relative(parts.heads.values.sum(-1) + parts.attention_bias.values, parts.parts.values[1:-2:2]) <= 1e-4
    )
    found |= {"parts": parts.parts.values, "heads": parts.heads.values}

    cut = attention_knockout(session, IDS, METRIC, tokens=TOKENS, edges={"back": [(-1, 0), (-1, 4)]})
    whole = attention_knockout(session, IDS, METRIC, tokens=TOKENS, together=True)
    found |= {"edges": cut.metric.values, "knock-out": whole.metric.values}
    if generates:
        vector = np.linspace(-1, 1, 64)
        steered = steering(session, [IDS], vector, scales=(0, 3), max_new_tokens=2)
        found["steering"] = steered.logits
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_gives_split_what_it_gives_on_one_engine(session, single, tmp_path, family):
    name, sizes = FAMILIES[family]
    kind, options = CHECKPOINTS[name]
    folder = made(AutoModelForCausalLM, kind, options, tmp_path)
    single.load(folder, attn="eager")
    session.load(folder, attn="eager", **sizes)
    kinds = {"generates": "pp" not in sizes, "smooth": name == "GPT-2"}
    truth = numbers(single, **kinds)
    for what, values in numbers(session, **kinds).items():
        assert np.abs(truth[what]).max() > 0, what
        assert relative(values, truth[what]) <= 1e-5, what
