"""Text, PNG and HTML: what they hold, what they escape, how large they get."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from flexmagic.view import scale as colors
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.html import to_html
from flexmagic.view.picture import Look, compose
from flexmagic.view.pieces import split
from flexmagic.view.png import KEY, MOST_BYTES, to_png
from flexmagic.view.text import to_text

HOSTILE = ["</script>", "<img src=x onerror=alert(1)>", "\u202eevil", "a\nb", "x" * 10_000, "\U0001f600"]


def source(array, labels=None, **facts):
    return ArraySource(array, info_of(array, **facts), labels)


def activation(missing=(), tokens=HOSTILE):
    x = np.random.default_rng(0).normal(size=(1, 6, 63)).astype(np.float32)
    x[0, 0, 0], x[0, 1, 1], x[0, 2, 2] = np.nan, np.inf, -np.inf
    return source(
        x,
        {1: tokens},
        site="model.layers.3.mlp:output",
        dims=("batch", "seq", "hidden"),
        mesh="tp=4",
        placements=("tp: Shard(dim=2)",),
        pieces=split(x.shape, 2, (20, 20, 20, 3)),
        missing_ranks=missing,
        hook="after damp v2",
        run="run 3",
        warnings=("<b>bold</b>",),
    )


FORMS = {
    "0-d": np.array(3.25),
    "1-d": np.arange(5.0),
    "7-d": np.ones((3, 1, 2, 2, 2, 2, 3)),
    "empty": np.zeros((0, 3)),
    "bool": np.array([[True, False]]),
    "int": np.array([[2**60 + 1]]),
    "complex": np.array([[3 + 4j]]),
    "all NaN": np.full((3, 3), np.nan),
    "wide": np.zeros((1, 100_000), dtype=np.float32),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_tensor_has_every_static_form(name):
    one = source(FORMS[name])
    text = to_text(one)
    assert text.startswith("array\n")
    assert len(text) < 4000
    image = Image.open(io.BytesIO(to_png(one)))
    assert image.width == 2 * 824
    assert "<img" in to_html(one)
    assert ("empty" in text) == (name == "empty")


def test_text_has_header_statistics_and_values():
    text = to_text(activation(missing=(1,)))
    for part in (
        "model.layers.3.mlp:output",
        "(batch 1, seq 6, hidden 63) | float32 | tp=4 | tp: Shard(dim=2) | after damp v2 | run 3",
        "rank 3: hidden[60:63]",
        "rank 1: hidden[20:40] (missing)",
        "warning: rank 1 cannot answer",
        "NaN 1  +Inf 1  -Inf 1",
        "\\u202eevil",
    ):
        assert part in text, part
    assert "\u202e" not in text
    assert max(len(line) for line in text.splitlines()) < 400


def test_text_moves_only_what_it_shows():
    big = source(np.zeros((1000, 1000), dtype=np.float32))
    to_text(big)
    assert big.bytes_moved <= 4 * 30


def cell_color(png, picture, row, col):
    """Return the RGB in the middle of a cell of a two-pixels-per-CSS-pixel PNG."""
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    lay = picture.layout
    # The map stands at the same distance from the left in every page; find its top by the ribbon.
    x = 2 * (12 + lay.left) + (col + 0.5) / picture.codes.shape[1] * 2 * lay.map_width
    ribbon = (image[:, 2 * (12 + lay.left) + 4] == (0, 114, 178)).all(axis=-1)
    top = np.flatnonzero(ribbon)[-1] + 1 + 2 * 3
    y = top + (row + 0.5) / picture.codes.shape[0] * 2 * lay.map_height
    return tuple(int(c) for c in image[int(y), int(x)])


def test_png_shows_the_true_colours():
    one = activation()
    picture = compose(one, Look(width=800))
    png = to_png(one)
    table = colors.palette(picture.scale.kind)
    for row, col in ((3, 5), (5, 62), (4, 33), (0, 20)):
        expected = tuple(int(c) for c in table[picture.codes[row, col], :3])
        assert cell_color(png, picture, row, col) == expected, (row, col)
    nan = {(0, 0, 0), (255, 221, 51)}
    assert cell_color(png, picture, 0, 0) in nan


def test_png_is_small_and_carries_its_key():
    png = to_png(activation(), key="abc123")
    assert b"abc123" in png[:600]
    assert Image.open(io.BytesIO(png)).text[KEY] == "abc123"
    assert len(png) < 100_000


def test_png_of_noise_stays_below_the_cap():
    noise = np.random.default_rng(0).normal(size=(2048, 4096)).astype(np.float32)
    assert len(to_png(source(noise))) < MOST_BYTES


def test_missing_ranks_are_hatched_in_the_png():
    one = activation(missing=(1,))
    png = to_png(one)
    seen = {cell_color(png, compose(one, Look(width=800)), r, c) for r in (0, 1) for c in range(22, 26)}
    assert seen <= {(186, 186, 186), (110, 110, 110)}
    assert len(seen) == 2


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.attributes = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data


def test_html_shows_hostile_tokens_and_runs_none(tmp_path):
    path = tmp_path / "page.html"
    page = to_html(activation(), path)
    assert path.read_text("utf-8") == page
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert reader.tags.count("img") == 1
    assert not [name for name in reader.attributes if name.startswith("on")]
    for shown in (
        "</script>",
        "<img src=x onerror=alert(1)>",
        "\\u202eevil",
        "a\\nb",
        "<b>bold</b>",
        "\U0001f600",
    ):
        assert shown in reader.text, shown
    assert "\u2026(+9,800 characters)" in reader.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page)
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", page))
