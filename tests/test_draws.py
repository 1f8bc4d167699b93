"""What users draw is the same on all ranks, and disturbs nobody else's draws."""

import random

import numpy as np
import pytest
import torch

from flexmagic.engine.draws import cannot_draw, same_draws


def drawn():
    return torch.rand(2).tolist(), np.random.normal(), random.random()  # noqa: NPY002 - users draw from it


def test_draws_follow_from_what_they_are_for_and_leave_the_states_as_they_were():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    before = drawn()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    with same_draws("a site"):
        first = drawn()
    with same_draws("a site"):
        again = drawn()
    with same_draws("another site"):
        other = drawn()
    assert first == again
    assert first != other
    assert drawn() == before


@pytest.mark.parametrize(
    ("text", "cannot"),
    [
        ("x *= 0.5", True),
        ("x[:, -1] = 0", True),
        ("return x if 1 else -x", True),
        ("y = x[..., 3:]\ny[0] = y[1] @ x", True),
        ("x += torch.randn_like(x)", False),
        ("x.normal_()", False),
        ("x += noise", False),
        ("x[:, -1] = noise[0]", False),
        ("import mine", False),
        ("x = [1 for _ in x]", False),
        ("this is not Python", False),
    ],
)
def test_a_body_that_names_x_and_numbers_only_cannot_draw(text, cannot):
    assert cannot_draw(text) is cannot


def one_of_each():
    """One number of each generator; of numpy's also one of those that it makes in pairs."""
    numpy = np.random.randn(), np.random.rand()  # noqa: NPY002
    return (*numpy, random.random(), torch.rand(()).item())


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_the_generators_go_on_as_if_nothing_had_been_drawn(before):
    def begun():
        np.random.seed(before)  # noqa: NPY002
        random.seed(before)
        torch.manual_seed(before)
        return [np.random.randn() for _ in range(before)]  # noqa: NPY002

    def goes_on():
        return [one_of_each() for _ in range(4)]

    begun()
    alone = goes_on()
    begun()
    beside = []
    for _ in range(4):
        for inside in range(3):
            with same_draws("x"):
                [np.random.randn() for _ in range(inside)]  # noqa: NPY002
                one_of_each()
        beside.append(one_of_each())
    assert alone == beside


def test_another_kind_of_generator_is_put_back_too():
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.MT19937(7))
        with same_draws("x"):
            one_of_each()
        found = np.random.rand()  # noqa: NPY002
        np.random.set_bit_generator(np.random.MT19937(7))
        assert found == np.random.rand()  # noqa: NPY002
    finally:
        np.random.set_bit_generator(before)
