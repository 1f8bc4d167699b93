"""What recipes of causes and attributions work out in the notebook: subjects, windows, norms, patterns."""

import numpy as np
import pytest
import torch

from flexmagic.errors import InputError, ModelError
from flexmagic.recipes.attention import _pairs, _without
from flexmagic.recipes.causal import subject_of, windows_of
from flexmagic.recipes.final_norm import frozen_norm
from flexmagic.recipes.integrated import Integrated
from flexmagic.recipes.named import Named
from flexmagic.recipes.patching import Patching
from flexmagic.recipes.prompts import loss_of

TEXTS = ["<s>", "The", " capital", " of", " New", " Zea", "land", " is", " in", " New"]


def test_a_subject_is_every_token_that_it_touches():
    assert subject_of(TEXTS, "New Zealand") == (4, 5, 6)
    assert subject_of(TEXTS, " Zealand ") == (5, 6)
    assert subject_of(TEXTS, "New") == (9,)  # where it is said last
    assert subject_of(TEXTS, [-1, 4, 4]) == (4, 9)


@pytest.mark.parametrize("subject", ["France", "", [10], []])
def test_a_subject_that_is_not_there_is_refused(subject):
    with pytest.raises(InputError, match="not in the"):
        subject_of(TEXTS, subject)


def test_windows_are_around_their_layers_and_inside_the_model():
    assert windows_of([0, 3], 1, 4) == [(0,), (3,)]
    assert windows_of(range(4), 2, 4) == [(0,), (0, 1), (1, 2), (2, 3)]
    assert windows_of([0, 5, 11], 10, 12)[1] == tuple(range(10))
    with pytest.raises(InputError, match="0 to 3"):
        windows_of([4], 1, 4)


NORMS = {
    "layer norm": torch.nn.LayerNorm(6),
    "layer norm without weights": torch.nn.LayerNorm(6, elementwise_affine=False),
    "root mean square": torch.nn.RMSNorm(6, eps=1e-6),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", NORMS)
def test_a_frozen_norm_is_linear_and_adds_up(kind):
    generator = torch.Generator().manual_seed(0)
    norm = NORMS[kind].double()
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(6, generator=generator, dtype=torch.float64) + 1)
    parts = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64)
    x = parts.sum(0)
    own = (getattr(norm, name, None) for name in ("weight", "bias"))
    found = frozen_norm(x.numpy(), norm(x).numpy(), *(None if p is None else p.numpy() for p in own), 1e-9)
    direction = torch.randn(2, 6, generator=generator, dtype=torch.float64).numpy()
    shares = (parts.numpy() * found.onto(direction)).sum((-2, -1))
    offset = float((direction * found.offset).sum())
    assert shares.sum() + offset == pytest.approx(float((norm(x).numpy() * direction).sum()), rel=1e-9)
    assert found.centred == kind.startswith("layer")


def test_a_gain_may_be_one_more_than_its_weight_and_other_norms_are_refused():
    x = np.random.default_rng(0).standard_normal((2, 6))
    weight = np.linspace(-0.5, 0.5, 6)
    size = np.sqrt((x * x).mean(-1, keepdims=True))
    assert np.array_equal(frozen_norm(x, x / size * (1 + weight), weight, None, 1e-9).gain, 1 + weight)
    with pytest.raises(ModelError, match="neither"):
        frozen_norm(x, np.tanh(x), weight, None, 1e-3)


def test_a_cut_edge_leaves_its_weight_to_the_others():
    pattern = np.array([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.3, 0.2]])
    cut = _without(pattern, [(0, 0), (2, 0)])
    assert cut == pytest.approx(np.array([[0, 0, 0], [0.25, 0.75, 0], [0, 0.6, 0.4]]))
    assert not _without(pattern, None).any()
    assert _pairs("back", [(-1, 0), (1, -2)], 3) == [(2, 0), (1, 1)]
    with pytest.raises(InputError, match="look ahead"):
        _pairs("ahead", [(0, 1)], 3)
    with pytest.raises(InputError, match="3 tokens"):
        _pairs("far", [(3, 0)], 3)


def test_a_metric_is_the_loss_of_one_row_and_sums_over_several():
    logits = torch.arange(24.0).reshape(2, 3, 4)
    metric, tokens = "logits[-1, a] - logits[-1, b]", {"a": 3, "b": 1}
    names = {"logits": logits, "torch": torch}
    assert eval(loss_of(metric, tokens, "1"), names) == 2  # noqa: S307 - its own expression
    loss = f"sum({loss_of('logits[-1, a]', {'a': 3}, 'at')} for at in range(2))"
    assert eval(loss, names) == 11 + 23  # noqa: S307


def test_results_are_rows_and_pictures():
    effect = Named(np.array([[0.1, -0.9]]), ("layer", "position"), "effect", numbers={"layer": (2,)})
    metric = Named(np.array([[1.0, 2.0]]), ("layer", "position"), "metric", numbers={"layer": (2,)})
    found = Patching(effect, metric, 1.0, 0.0, denoising=True, site="resid_pre", tokens={}, estimated=True)
    assert found.largest(1) == [{"layer": 2, "position": 1, "effect": -0.9, "metric": 2.0}]
    assert "attribution patching" in repr(found.grid())
    value = Named(np.array([1.0, -3.0]), ("position",), "attribution", {"position": ("token", ("a", "b"))})
    shared = Integrated(value, metric=0.0, baseline=2.2, steps=4)
    assert shared.gap == pytest.approx(0.05)
    assert "gap 5.00%" in repr(shared)
    assert "integrated gradients" in repr(shared.strip())
