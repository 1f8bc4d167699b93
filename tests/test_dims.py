"""Dims are named by how they follow the input."""

from flexmagic.layout.dims import Dim, follow_rows, name_dims

NAMES = {"vocab": 50, "hidden": 16, "heads": 4}


def test_dims_are_named_by_how_they_follow_the_input():
    first, second = (2, 4, 5, 5), (3, 4, 7, 7)
    assert [d.name for d in name_dims(first, second, NAMES)] == ["batch", "heads", "seq", "seq"]
    assert name_dims((10, 16), (21, 16), NAMES) == (Dim("batch·seq"), Dim("hidden", 16))
    assert name_dims((1, 5, 50), (1, 7, 50), NAMES)[0] == Dim("one", 1)
    assert name_dims((2, 9), (3, 9), NAMES)[1] == Dim("feature", 9)
    assert name_dims((2, 4), (3, 4), NAMES)[1] == Dim("feature", 4)  # heads are never the last dim
    assert name_dims((), (), NAMES) == ()


def test_shapes_that_follow_the_input_in_another_way_have_no_names():
    assert name_dims((2, 6), (3, 8), NAMES) is None
    assert name_dims((2,), (3, 8), NAMES) is None
    assert name_dims((5, 2), (5, 3), NAMES) == (Dim("dim0", 5), Dim("batch"))
    assert name_dims((4, 5), (6, 7), NAMES) is None


def test_dims_that_follow_the_number_of_rows():
    assert follow_rows((2, 5, 8), (3, 5, 8), 2, 3) == (Dim("batch"), Dim("dim1", 5), Dim("feature", 8))
    assert follow_rows((10, 8), (15, 8), 2, 3) == (Dim("batch·seq", per_row=5), Dim("feature", 8))
    assert follow_rows((2, 8), (4, 8), 2, 3) is None
    assert follow_rows((3, 8), (4, 8), 2, 3) is None
    assert follow_rows((2,), (2, 1), 2, 3) is None
    assert follow_rows((), (), 2, 3) == ()
