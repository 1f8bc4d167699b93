"""What recipes that train compute without engines: modules, classifiers, batches, splits and results."""

import numpy as np
import pytest
import torch

from flexmagic.errors import InputError
from flexmagic.recipes import Named, Probe, Steering
from flexmagic.recipes.aside import batches
from flexmagic.recipes.probing import _keys, _labels, _tested, fitted
from flexmagic.recipes.trainable import Subspace, Translators


def test_batches_have_texts_of_equal_length_in_their_order():
    ids = [[1], [1, 2], [3], [4], [5, 6]]
    assert batches(ids, 2) == [[0, 2], [3], [1, 4]]
    with pytest.raises(InputError, match="1 row or more"):
        batches(ids, 0)


# --- the modules -------------------------------------------------------------------------------------


def test_translators_begin_as_the_identity_and_map_each_layer_by_itself():
    lens, h = Translators(2, 4), torch.randn(3, 4)
    assert torch.equal(lens(h, 0), h)
    with torch.no_grad():
        lens.weights[1].copy_(torch.eye(4))
        lens.biases[1].fill_(0.5)
    assert torch.equal(lens(h, 0), h)
    assert torch.allclose(lens(h, 1), 2 * h + 0.5)
    assert lens(h, 2) is h  # the last layer's own


def test_a_subspace_of_all_dims_is_the_source_and_what_is_outside_stays():
    torch.manual_seed(0)
    base, source = torch.randn(5, 6), torch.randn(5, 6)
    whole = Subspace(6, 6, boundless=False)
    assert torch.allclose(whole(base, source), source, atol=1e-5)
    part = Subspace(6, 2, boundless=False)
    found, basis = part(base, source), part.basis()
    assert torch.allclose(basis.T @ basis, torch.eye(2), atol=1e-6)
    assert torch.allclose(found @ basis, source @ basis, atol=1e-5)
    outside = torch.eye(6) - basis @ basis.T
    assert torch.allclose(found @ outside, base @ outside, atol=1e-5)
    assert not torch.allclose(found, base, atol=1e-2)


def test_a_boundary_takes_as_many_dims_as_it_says_once_it_is_sharp():
    module = Subspace(8, 8, boundless=True)
    assert module.mask(1e-3).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    soft = module.mask(10.0)
    assert (soft > 0).all()
    assert (soft < 1).all()
    assert (soft.diff() < 0).all()


@pytest.mark.parametrize("boundless", [False, True])
def test_the_gradient_of_a_subspace_is_the_measured_derivative(boundless):
    torch.manual_seed(0)
    module = Subspace(6, 6 if boundless else 2, boundless=boundless).double()
    base, source, along = torch.randn(4, 6).double(), torch.randn(4, 6).double(), torch.randn(4, 6).double()

    def loss():
        return (module(base, source, 0.7) * along).sum()

    loss().backward()
    for parameter in module.parameters():
        step = torch.randn_like(parameter) * 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step)
                values.append(float(loss()))
                parameter.sub_(sign * step)
        assert float((parameter.grad * step).sum()) == pytest.approx((values[0] - values[1]) / 2, rel=1e-5)


# --- the classifier of a probe -----------------------------------------------------------------------


def loss_of(weights, x, labels, penalty):
    said = torch.from_numpy(x) @ weights[:, :-1].T + weights[:, -1]
    loss = torch.nn.functional.cross_entropy(said, torch.from_numpy(labels))
    return loss + penalty / 2 * (weights[:, :-1] ** 2).sum()


def test_a_fitted_classifier_is_where_the_loss_is_least():
    draw = np.random.default_rng(0)
    x, labels = draw.standard_normal((40, 5)), draw.integers(0, 3, 40)
    found = torch.from_numpy(fitted(x, labels, 3, 0.1)).requires_grad_()
    loss = loss_of(found, x, labels, 0.1)
    loss.backward()
    assert float(found.grad.abs().max()) < 1e-7
    zero = loss_of(torch.zeros_like(found), x, labels, 0.1)
    assert float(zero) == pytest.approx(np.log(3))
    assert loss < zero
    for _ in range(5):
        assert loss_of(found.detach() + 1e-2 * torch.randn(3, 6).double(), x, labels, 0.1) > loss


def test_one_example_of_each_of_two_classes_has_a_known_solution():
    """At ``±1`` the margin ``m`` solves ``m · penalty = 2 sigmoid(-m)``, the weights being ``±m / 2``."""
    weights = fitted(np.array([[1.0], [-1.0]]), np.array([0, 1]), 2, 0.2)
    margin = weights[0, 0] - weights[1, 0]
    assert weights[0, 0] == pytest.approx(-weights[1, 0])
    assert margin / 2 * 0.2 == pytest.approx(1 / (1 + np.exp(margin)), rel=1e-6)


def test_labels_are_one_for_each_text_or_one_for_each_token():
    ids = [[5, 6], [5, 7, 8]]
    assert _labels(ids, ["a", "b"]) == (["a", "b"], False)
    assert _labels(ids, [[0, 1], [0, 1, 1]]) == ([0, 1, 0, 1, 1], True)
    assert _keys(ids, each=True) == [5, 6, 5, 7, 8]
    assert _keys(ids, each=False) == [(5, 6), (5, 7, 8)]
    with pytest.raises(InputError, match="2 texts and 1 labels"):
        _labels(ids, ["a"])
    with pytest.raises(InputError, match="Text 1 has 3 tokens and 2 labels"):
        _labels(ids, [[0, 1], [0, 1]])


def test_a_text_is_held_out_with_all_its_tokens_and_its_doubles():
    ids = [[1, 2], [3, 4], [1, 2], [5, 6], [7, 8]]
    tested = _tested(ids, [], np.random.default_rng(0), 0.5, each=True)
    assert tested.shape == (10,)
    assert (tested[::2] == tested[1::2]).all()
    assert tested[0] == tested[4]
    assert 0 < tested.sum() < 10
    with pytest.raises(InputError, match="leaves none"):
        _tested(ids[:1], ["a"], np.random.default_rng(0), 0.5, each=False)


def test_every_class_is_held_out_alike():
    ids, labels = [[n] for n in range(12)], ["a"] * 8 + ["b"] * 4
    tested = _tested(ids, labels, np.random.default_rng(0), 0.25, each=False)
    assert tested[:8].sum() == 2
    assert tested[8:].sum() == 1


def probe_of(scores, control):
    numbers = {"layer": (2, 3)}
    maps = np.zeros((2, 2, 4))
    maps[1, 0, 0], maps[1, 1, 0] = 1.0, -1.0
    return Probe(
        Named(np.array(scores), ("layer",), "accuracy", numbers=numbers),
        Named(np.array(control), ("layer",), "control", numbers=numbers),
        0.5, maps, np.array([1.0, 2.0]), ("yes", "no"), "resid_post",
    )  # fmt: skip


def test_a_probe_says_where_it_is_best_and_predicts():
    probe = probe_of([0.6, 0.9], [0.5, 0.4])
    assert probe.selectivity.values == pytest.approx([0.1, 0.5])
    assert probe.rows()[1] == {"layer": 3, "accuracy": 0.9, "control": 0.4, "chance": 0.5}
    assert "90.0% in layer 3" in repr(probe)
    assert probe.predict([[1.0, 0, 0], [-1.0, 0, 0]], 3) == ["yes", "no"]
    assert "control task" in probe.lines().to_html()


# --- steering ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "metric", "monotonic"),
    [((-1, 0, 1), (0, 1, 2), True), ((1, -1, 0), (0, 2, 1), True), ((-1, 0, 1), (0, 1, 1), False)],
)
def test_a_sweep_of_scales_is_monotonic_or_not(scales, metric, monotonic):
    values = Named(np.array(metric, dtype=float), ("scale",), "metric")
    steered = Steering(("a", "b", "c"), values, np.zeros((3, 2)), scales)
    assert steered.monotonic is monotonic
    assert ("not monotonic" in steered.lines().to_html()) is not monotonic
