"""Grids, coloured text and lines: made in the notebook, drawn by the same canvas, hostile text and all."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flexmagic import grid, lines, strip
from flexmagic.errors import InputError
from flexmagic.view import protocol
from flexmagic.view.caption import caption, probe
from flexmagic.view.lines import INKS, curves_of, round_ticks
from flexmagic.view.picture import Look, compose
from flexmagic.view.sheet import compose_sheet

HOSTILE = ["</script>", "<img src=x onerror=alert(1)>", "\u202eevil", "a\nb", "x" * 10_000, "\U0001f600"]


def lens():
    values = np.random.default_rng(0).random((3, 6))
    texts = [[HOSTILE[c] for c in range(6)] for _ in range(3)]
    notes = [[[(HOSTILE[c], 0.5), ("b", 0.25)] for c in range(6)] for _ in range(3)]
    made = grid(values, [f"layer {n}" for n in range(3)], HOSTILE, title="lens", texts=texts, notes=notes)
    return values, made


def test_a_grid_has_labels_words_in_its_cells_and_notes_read_out():
    values, made = lens()
    sheet = compose_sheet(made.source, Look())
    picture = sheet.lead
    np.testing.assert_array_equal(picture.tile, values)
    assert picture.row_labels[2] == "layer 2"
    said = probe(made.source, picture, 1, 0)
    assert (
        said
        == f"layer 1 \"layer 1\", seq 0 \"</script>\" = {values[1, 0]!s} \u2014 '</script>' 0.5, 'b' 0.25"
    )
    message = protocol.describe(sheet, 1)
    assert message["panes"][0]["texts"][0][0] == "</script>"
    assert "\u202e" not in str(message)
    assert "\\u202e" in message["panes"][0]["texts"][0][2]


def test_windows_of_a_grid_take_their_words_along():
    _, made = lens()
    picture = compose(made.source, Look(col_window=(2, 4)))
    assert picture.texts.tolist() == [HOSTILE[2:4]] * 3
    turned = compose(made.source, Look(rows=1, cols=0))
    assert turned.texts.shape == (6, 3)
    assert turned.texts[1, 0] == HOSTILE[1]


def test_a_strip_is_text_with_a_value_per_token():
    made = strip(torch.arange(6, dtype=torch.bfloat16), HOSTILE)
    message = protocol.describe(compose_sheet(made.source, Look()), 1)["panes"][0]
    assert message["form"] == "strip"
    assert message["cells"] == [1, 6]
    assert message["labels"]["cols"][2] == "\\u202eevil"
    assert "= 3" in probe(made.source, compose(made.source, Look()), 0, 3)


def test_a_long_text_keeps_one_colour_per_token():
    made = strip(np.arange(3000.0), [f" t{i}" for i in range(3000)])
    message = protocol.describe(compose_sheet(made.source, Look()), 1)["panes"][0]
    assert message["cells"] == [1, 3000]
    assert len(message["labels"]["cols"]) == 3000


def test_lines_keep_gaps_and_count_them():
    loss = [3.0, 2.0, np.nan, 1.0, np.inf]
    made = lines({"loss": loss, "other": [1, 2, 3, 4, 5]}, x=[10, 20, 30, 40, 50], title="training")
    picture = compose(made.source, Look())
    found = curves_of(picture)
    assert found.values == ((3.0, 2.0, None, 1.0, None), (1.0, 2.0, 3.0, 4.0, 5.0))
    assert found.names == ("loss", "other")
    assert found.low < 1
    assert found.high > 5
    assert caption(picture)[0].startswith(
        "2 lines over step, 5 points each; values from 1 to 5; NaN 1, +Inf 1"
    )
    assert 'series 0 "loss", step 3 "40" = 1' in probe(made.source, picture, 0, 3)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-12.97, 3.96), (1e-9, 2e-9), (-1e30, 1e30), (5, 5)])
def test_ticks_are_round_few_and_inside(low, high):
    found = round_ticks(low, high)
    assert all(low <= at <= high for at in found)
    assert (2 <= len(found) <= 8) == (low < high)


@pytest.mark.parametrize(
    "made", [lens()[1], strip([1.0, np.nan, 2], HOSTILE[:3]), lines([[1, 2, 3], [2, 1, 0]])]
)
def test_every_form_is_written_as_page_and_picture(made, tmp_path):
    png = made.to_png(tmp_path / "a.png")
    assert Image.open(io.BytesIO(png)).width == 2 * 824
    assert (tmp_path / "a.png").read_bytes() == png
    page = made.to_html(tmp_path / "a.html")
    assert "<script" not in page
    assert page.count("<img") == 1


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: grid(np.zeros(3)), "1 dims"),
        (lambda: grid(np.zeros((2, 3)), ["a"]), "1 labels for 2"),
        (lambda: grid(np.zeros((2, 3)), notes=[["a"]]), "notes need the shape"),
        (lambda: strip(np.zeros((2, 2)), ["a"]), "2 dims"),
        (lambda: strip(np.zeros(2), ["a"]), "1 labels for 2"),
        (lambda: lines({"a": [1], "b": [1, 2]}), "one length"),
        (lambda: lines([]), "shape"),
        (lambda: lines(["a"]), "no array of numbers"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, why):
    with pytest.raises(InputError, match=why):
        make()


@pytest.mark.parametrize("paper", ["#ffffff", "#111111"])
def test_lines_are_seen_on_light_and_dark_paper(paper):
    def light(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for ink in INKS:
        low, high = sorted((light(ink), light(paper)))
        assert (high + 0.05) / (low + 0.05) >= 3, ink
