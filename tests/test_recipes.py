"""Named values: places, tidy rows and grids."""

import numpy as np
import pytest

from flexmagic.errors import InputError
from flexmagic.recipes import Named

EFFECT = Named(
    np.arange(6.0).reshape(2, 3), ("layer", "position"), "effect", {"position": ("token", ("a", "b", "b"))}
)


def test_rows_say_where_each_value_is():
    assert EFFECT.rows()[4] == {"layer": 1, "position": 1, "token": "b", "effect": 4.0}
    assert len(EFFECT.rows()) == 6


def test_a_place_is_taken_by_name():
    row = EFFECT.at(layer=-1)
    assert row.dims == ("position",)
    assert row.values.tolist() == [3, 4, 5]
    assert row.rows()[0] == {"position": 0, "token": "a", "effect": 3.0}
    assert EFFECT.at(position=2).labels == {}


@pytest.mark.parametrize(("place", "said"), [({"head": 0}, "no dim 'head'"), ({"layer": 2}, "has 0 to 1")])
def test_a_place_that_is_not_there_is_said(place, said):
    with pytest.raises(InputError, match=said):
        EFFECT.at(**place)


def test_places_have_the_numbers_that_they_were_given():
    some = Named(np.arange(2.0), ("layer",), "effect", numbers={"layer": (2, 5)})
    assert some.rows() == [{"layer": 2, "effect": 0.0}, {"layer": 5, "effect": 1.0}]
    assert some.at(layer=5).values == 1
    with pytest.raises(InputError, match="layer 0 is not there"):
        some.at(layer=0)


def test_a_grid_has_two_dims():
    assert "effect" in repr(EFFECT.grid())
    with pytest.raises(InputError, match="two dims"):
        EFFECT.at(layer=0).grid()
