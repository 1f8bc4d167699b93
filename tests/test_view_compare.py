"""Two tensors compared: counted exactly, drawn beside each other, nothing dropped."""

import math

import numpy as np
import pytest
import torch

from flexmagic import compare
from flexmagic.errors import InputError, SiteError
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.caption import sheet_caption
from flexmagic.view.compare import Compared
from flexmagic.view.differ import change_between, difference, relative, tiles
from flexmagic.view.display import table_html
from flexmagic.view.picture import Look
from flexmagic.view.pieces import split
from flexmagic.view.reduce import compute_stats, reduce_overview
from flexmagic.view.sheet import compose_sheet
from flexmagic.view.source import Source
from flexmagic.view.widget import TensorView


def source(array, **facts):
    return ArraySource(np.asarray(array), info_of(np.asarray(array), **facts))


def noise(shape=(5, 8), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Run:
    """What a run is to a comparison."""

    def __init__(self, **arrays):
        self.sites = list(arrays)
        self._arrays = arrays

    def __getitem__(self, site):
        if isinstance(self._arrays[site], Exception):
            raise self._arrays[site]
        return source(self._arrays[site], site=site)

    def __repr__(self):
        return "<Run>"


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 5, 7), (2, 1, 9, 2)])
@pytest.mark.parametrize("most", [1, 4, 10, 1000])
def test_tiles_cover_every_element_once(shape, most):
    seen = np.zeros(shape, int)
    for index in tiles(shape, most):
        assert seen[index].size <= max(most, 1)
        seen[index] += 1
    assert (seen == 1).all()


def test_a_change_is_counted_as_by_hand():
    a, b = noise(), noise()
    b[0, 0], b[1, 1], b[2, 2] = a[0, 0] + 1, np.nan, np.inf
    a[3, 3] = b[3, 3] = np.nan
    a[4, 4], b[4, 4] = 0.0, -0.0
    change = change_between(source(a), source(b))
    assert (change.n, change.same, change.odd) == (40, 36, 2)
    assert change.largest == pytest.approx(1, rel=1e-6)
    good = np.isfinite(a) & np.isfinite(b)
    truth = np.linalg.norm((b - a)[good].astype(float)) / np.linalg.norm(a[good].astype(float))
    assert relative(change) == pytest.approx(truth, rel=1e-6)


def test_missing_ranks_are_left_out_of_both():
    a, b = noise(), noise()
    b[:, 4:] += 1
    pieces = split(a.shape, 1, (4, 4))
    lost = source(b, pieces=pieces, missing_ranks=(1,))
    change = change_between(source(a, pieces=pieces), lost)
    assert (change.n, change.same) == (20, 20)
    delta = difference(source(a, pieces=pieces), lost)
    assert np.isnan(delta.read((slice(None), slice(4, 8)))).all()
    assert "B: rank 1 cannot answer" in delta.info.warnings[0]


def test_the_difference_is_a_source_with_true_reductions():
    a, b = noise((700, 900)), noise((700, 900), 1)
    delta = difference(source(a), source(b))
    assert isinstance(delta, Source)
    np.testing.assert_array_equal(delta.read((3, slice(None))), b[3] - a[3])
    assert delta.stats().std == pytest.approx(compute_stats(b - a).std)
    rows, cols = np.arange(0, 701, 50), np.arange(0, 901, 90)
    seen, truth = delta.overview(0, 1, {}, rows, cols), reduce_overview(b - a, rows, cols)
    np.testing.assert_allclose(seen.rms, truth.rms, rtol=1e-6)
    np.testing.assert_array_equal(seen.extremum, truth.extremum)
    assert [(p.row, p.col) for p in seen.peaks] == [(p.row, p.col) for p in truth.peaks]


def test_three_pictures_the_first_two_in_the_same_colours():
    a, b = noise(), noise()
    b[2, 3] += 0.001
    one = Compared(source(a), source(b))
    sheet = compose_sheet(one, Look())
    assert [pane.title for pane in sheet.panes] == ["A", "B", "B - A"]
    first, second, delta = (pane.picture for pane in sheet.panes)
    assert first.scale == second.scale
    assert delta.scale.high == pytest.approx(0.001, rel=0.01)
    np.testing.assert_array_equal(delta.tile, b - a)
    said = sheet_caption(sheet)
    assert said[1].startswith("A and B: colours")
    assert said[2].startswith("B - A: colours")
    assert "1 of 40 differ" in one.info.hook


def test_bit_equal_close_and_different_are_three_things():
    a = noise()
    said = [row.texts[-1] for b in (a.copy(), a * np.float32(1 + 1e-6), a + 1) for row in compare(a, b)]
    assert said[0] == "bit-equal"
    assert said[1].startswith("close, not bit-equal")
    assert said[2].startswith("different: 40 of 40")


def test_runs_are_listed_whole_the_most_changed_first():
    x = noise()
    a = Run(same=x, small=x, big=x, shape=x, only_a=x, dtype=x, refused=x)
    b = Run(
        same=x, small=x * np.float32(1.01), big=x * 2, shape=x[:2], only_b=x, dtype=x.astype(np.float64),
        refused=SiteError("run 2 was evicted"),
    )  # fmt: skip
    found = compare(a, b)
    by_site = {row.site: row.texts for row in found}
    assert len(by_site) == 8
    order = [row.site for row in found]
    assert set(order[:4]) == {"shape", "only_a", "only_b", "refused"}
    assert order[4:6] == ["big", "small"]
    assert by_site["shape"][-1] == "shapes differ: [5, 8] and [2, 8]"
    assert by_site["only_b"][-1] == "only in B"
    assert by_site["refused"][-1] == "run 2 was evicted"
    assert "dtypes differ: float32 and float64" in by_site["dtype"][-1]
    assert by_site["same"][-1] == "bit-equal"
    assert float(by_site["big"][1]) == 1
    np.testing.assert_array_equal(found["big"].read((0, slice(None))), x[0])
    with pytest.raises(InputError, match="shapes differ"):
        found["shape"]
    with pytest.raises(InputError, match="Sites: "):
        found["nothing"]


def test_from_zero_to_something_is_an_infinite_change():
    (row,) = compare(np.zeros(3), np.ones(3))
    assert row.relative == math.inf
    assert compare(np.zeros(3), np.zeros(3)).rows[0].relative == 0


def test_tensors_are_compared_by_their_values():
    a = torch.arange(6, dtype=torch.bfloat16)
    b = a.clone()
    b[3] = 3.5
    assert compare(a, b).rows[0].change.same == 5
    assert compare(a, a).rows[0].texts[-1] == "bit-equal"


def test_what_is_no_tensor_is_refused():
    with pytest.raises(InputError, match="no array of numbers"):
        compare(object(), np.zeros(3))


def test_hostile_names_are_escaped_in_the_table():
    a, b = Run(**{"<img src=x onerror=alert(1)>\u202e": noise()}), Run()
    assert "<img" not in table_html(compare(a, b))
    assert "\u202e" not in str(compare(a, b))


def test_the_view_reads_all_three_where_one_points():
    a, b = noise(), noise()
    b[1, 2] = 5
    view, answers = TensorView(Compared(source(a), source(b))), []
    view.send = lambda content, buffers=None: answers.append((content, buffers or []))
    view._answer(view, {"kind": "look", "view": "v", "id": 1, "width": 900}, [])
    content, buffers = answers[-1]
    assert len(buffers) == 6
    assert content["facets"] == []
    assert [pane["title"] for pane in content["panes"]] == ["A", "B", "B - A"]
    view._answer(
        view, {"kind": "probe", "view": "v", "id": 2, "picture": 1, "pane": 2, "row": 1, "col": 2}, []
    )
    said = answers[-1][0]["text"].split("\n")
    assert f"= {a[1, 2]!s}" in said[0]
    assert "= 5" in said[1]
    assert f"= {b[1, 2] - a[1, 2]!s}" in said[2]
