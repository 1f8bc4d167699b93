"""Masked elements: marked as such in every form, and in no count, statistic or colour limit."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flexmagic import compare, grid, lines, strip
from flexmagic.errors import InputError
from flexmagic.view import protocol
from flexmagic.view import scale as colors
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.caption import caption, probe
from flexmagic.view.html import to_html
from flexmagic.view.lines import curves_of
from flexmagic.view.masks import mask_for, mask_of
from flexmagic.view.pens import pattern
from flexmagic.view.picture import Look, compose
from flexmagic.view.pieces import split
from flexmagic.view.png import to_png
from flexmagic.view.reduce import compute_stats, merge_overviews, reduce_overview
from flexmagic.view.sheet import compose_sheet
from flexmagic.view.table import rank_table
from flexmagic.view.text import to_text

DIMS = ("batch", "heads", "seq", "seq")


def attention(seq=5, **facts):
    x = np.random.default_rng(0).random((1, 2, seq, seq)).astype(np.float32) + 1
    x[..., np.triu_indices(seq, 1)[0], np.triu_indices(seq, 1)[1]] = 1e6  # what must not be counted
    x[0, 0, 4, 0] = np.nan
    facts.setdefault("pieces", split(x.shape, 1, (1, 1)))
    return x, ArraySource(x, info_of(x, site="attn", dims=DIMS, **facts), masked="causal")


def test_a_causal_mask_is_about_the_last_positions_of_both_dims():
    assert mask_for("causal", (2, 3, 3))[0].tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert not mask_for("causal", (1, 4)).any()  # a later step's only query is the last position
    assert mask_for(torch.tensor([True, False]), (3, 2)).shape == (1, 2)


@pytest.mark.parametrize("where", ["acausal", [True] * 4, np.zeros((2, 3)), [1, 0, 1]])
def test_what_is_no_mask_is_refused(where):
    with pytest.raises(InputError, match="mask"):
        mask_for(where, (2, 3))
    with pytest.raises(InputError, match="queries, keys"):
        mask_for("causal", (3,))


def test_masked_cells_have_a_mark_and_change_no_limit_or_statistic():
    x, source = attention()
    picture = compose(source, Look(fixed={1: 0}))
    above = np.triu(np.ones((5, 5), dtype=bool), 1)
    assert ((picture.codes == colors.MASKED) == above).all()
    assert picture.scale.high < 3
    kept = x[:, :, ~above]
    stats = source.stats()
    assert (stats.n, stats.masked, stats.nan) == (30, 20, 1)
    assert stats.max == np.nanmax(kept)
    assert stats.mean == pytest.approx(np.nanmean(kept.astype(float)))
    assert "15 values" not in "".join(caption(picture))
    assert "masked 10" in caption(picture)[1]
    assert probe(source, picture, 0, 3).startswith(
        "batch 0, heads 0, seq 0, seq 3 = masked (1e+06) \u2014 rank 0 at"
    )
    table = rank_table(source)
    assert [row.stats.n for row in table.rows] == [30, 15, 15]
    assert sum(row.counts.sum() for row in table.rows[1:]) == 29


def test_heads_side_by_side_are_masked_too():
    _, source = attention()
    sheet = compose_sheet(source, Look())
    assert [int((pane.picture.codes == colors.MASKED).sum()) for pane in sheet.panes] == [10, 10]
    turned = compose(source, Look(rows=3, cols=2, fixed={1: 1}))
    assert (turned.codes == colors.MASKED).T.tolist() == (sheet.panes[1].picture.codes == 251).tolist()


def test_an_overview_leaves_masked_values_out_of_its_bins():
    x = np.random.default_rng(1).normal(size=(400, 400)).astype(np.float32)
    mask = np.zeros(x.shape, dtype=bool)
    mask[100:, :200], mask[7, 311] = True, True
    x[mask] = 1e5
    source = ArraySource(x, masked=mask)
    picture = compose(source, Look(width=300, tall=120))
    assert picture.overview is not None
    assert np.abs(picture.overview.extremum).max() < 10
    assert (picture.codes == colors.MASKED).sum() > 0.3 * picture.codes.size
    assert picture.counts.masked_values == mask.sum()
    assert picture.counts.values == (~mask).sum()
    row = int(np.searchsorted(picture.grid.row_edges, 7, side="right")) - 1
    col = int(np.searchsorted(picture.grid.col_edges, 311, side="right")) - 1
    assert "1 more are masked" in probe(source, picture, row, col)
    assert probe(source, picture, picture.codes.shape[0] - 1, 0).endswith("values, all masked")
    edges = np.array([0, 90, 400])
    halves = [
        reduce_overview(x[:, part], edges, np.array(cut), (0, part.start), mask[:, part])
        for part, cut in ((slice(0, 150), [0, 150, 150]), (slice(150, 400), [0, 0, 250]))
    ]
    whole = reduce_overview(x, edges, np.array([0, 150, 400]), masked=mask)
    merged = merge_overviews(halves)
    for name in ("n", "masked", "extremum"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))
    assert whole.masked.sum() == mask.sum()
    assert whole.mean[0, 0] == pytest.approx(x[:90, :150].astype(float).mean(), rel=1e-5)


def test_four_marks_are_four_patterns_without_any_colour():
    marks = [colors.NAN, colors.POSINF, colors.NEGINF, colors.MASKED, colors.HOLE]
    gray = [pattern(code, 16, 16, 1) for code in marks]
    striped = {(tile == tile[1, 0]).all(axis=-1).tobytes() for tile in gray}
    assert len(striped) == 5
    assert len({tile.tobytes() for tile in gray}) == 5


@pytest.mark.parametrize("make", ["numpy", "torch"])
def test_masked_arrays_of_numpy_and_torch_are_masked(make):
    data, hide = np.array([[1.0, 2, 3], [4, 5, 6]]), np.array([[0, 1, 0], [0, 0, 1]], dtype=bool)
    if make == "numpy":
        values = np.ma.masked_array(data, hide)
    else:
        values = torch.masked.masked_tensor(torch.tensor(data), torch.tensor(~hide))
    assert mask_of(values).tolist() == hide.tolist()
    made = grid(values, title="g")
    assert made.source.stats().masked == 2
    assert (compose(made.source, Look()).codes == colors.MASKED).tolist() == hide.tolist()
    found = compare(values, data + 1)
    assert found.rows[0].change.n == 4
    assert (compose(found["array"], Look()).codes == 251).tolist() == hide.tolist()


def test_masked_points_are_gaps_and_masked_tokens_say_so():
    values = np.ma.masked_array([1.0, 2, 3], [False, True, False])
    assert curves_of(compose(lines({"a": values}).source, Look())).values == ((1.0, None, 3.0),)
    assert "masked 1" in caption(compose(lines(values).source, Look()))[0]
    text = compose(strip(values, ["a", "b", "c"]).source, Look())
    assert text.codes[0, 1] == colors.MASKED


def test_every_static_form_says_what_is_masked():
    _, source = attention()
    assert "masked 20" in to_text(source)
    assert "--" in to_text(source)
    assert "<th>masked</th><td>20</td>" in to_html(source)
    image = np.asarray(Image.open(io.BytesIO(to_png(source))).convert("RGB")).reshape(-1, 3)
    seen = {tuple(int(part) for part in color) for color in np.unique(image, axis=0)}
    assert {colors.MARK_COLORS[colors.MASKED], (150, 150, 158)} <= seen
    content = protocol.about(source.info, source, source.stats())
    assert ["masked", "20"] in content["stats"]


def test_statistics_of_nothing_but_masked_values():
    stats = compute_stats(np.ones(3), np.ones(3, dtype=bool))
    assert (stats.n, stats.masked) == (0, 3)
    picture = compose(ArraySource(np.ones((2, 2)), masked=np.array(True)), Look())
    assert (picture.codes == colors.MASKED).all()
