"""Text that people read: hostile strings and numbers in their own precision."""

import unicodedata

import numpy as np
import pytest

from flexmagic.view.words import number, ranks, size, span, token, visible

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\u202eevil\u202c",
    "line\nbreak\r\ttab",
    "\x1b[31mred\x07\x00",
    "x" * 10_000,
    "\N{GRINNING FACE}\u200d\N{ROCKET}",
    "a" + "\u0301" * 50,
    "\ud800",
    "\u00a0\u2028\u3000",
    "back\\slash",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("form", [visible, token])
def test_nothing_invisible_and_nothing_long_gets_through(form, text):
    shown = form(text)
    assert len(shown) < 800
    for char in shown:
        assert char == " " or unicodedata.category(char)[0] not in "CZ", repr(char)
    shown.encode("utf-8")


def test_escapes_are_literal_and_cuts_are_counted():
    assert visible("\u202eabc\n") == "\\u202eabc\\n"
    assert visible("\x1b") == "\\x1b"
    assert visible("a\\n") == "a\\\\n"
    assert visible("x" * 10_000, 10) == "xxxxxxxxxx\u2026(+9,990 characters)"
    assert visible("\N{GRINNING FACE}") == "\N{GRINNING FACE}"


def test_spaces_at_either_end_of_a_token_are_seen():
    assert token(" Mary") == "\u2423Mary"
    assert token("a b ") == "a b\u2423"
    assert token("  ") == "\u2423\u2423"
    assert token("") == ""
    assert token("abcdef", 3) == "abc\u2026+3"


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (np.float32(0.1), "float32", "0.1"),
        (np.float32(0.1), "bfloat16", "0.1"),
        (np.float32(0.10009765625), "bfloat16", "0.1"),
        (np.float32(0.1005859375), "bfloat16", "0.1006"),
        (np.float64(0.1), "float64", "0.1"),
        (np.float16(0.1), "float16", "0.1"),
        (np.float32(1000), "bfloat16", "1000"),
        (np.float32(-0.0), "float32", "-0"),
        (np.float32(1e-42), "float32", "1e-42"),
        (np.float32(448), "float8_e4m3fn", "448"),
        (np.float32(0.001953125), "float8_e4m3fn", "0.002"),
        (np.float32(2**-130), "bfloat16", "7.3e-40"),
        (np.float32(1e30), "bfloat16", "1e+30"),
        (np.nan, "float32", "NaN"),
        (-np.inf, "float32", "-Inf"),
        (np.int64(2**60 + 1), "int64", "1152921504606846977"),
        (np.True_, "bool", "True"),
        (np.complex64(1 - 2j), "complex64", "1-2j"),
    ],
)
def test_numbers_are_shown_in_their_own_precision(value, dtype, text):
    assert number(value, dtype) == text


def test_numbers_tell_neighbours_apart():
    x = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    texts = [number(v, "float32") for v in x]
    assert (np.array(texts, dtype=np.float32) == x).all()
    bits = np.arange(0x3F00, 0x4100, dtype=np.uint32) << 16  # every bfloat16 from 0.5 to 8
    values = bits.view(np.float32)
    assert len({number(v, "bfloat16") for v in values}) == len(values)


def test_small_words():
    assert ranks([0, 1, 2, 5]) == "ranks 0\u20132, 5"
    assert ranks([3]) == "rank 3"
    assert ranks([0, 1]) == "ranks 0, 1"
    assert span(3, 4) == "3"
    assert span(3, 6) == "3:6"
    assert size(1_250_000) == "1.25 MB"
