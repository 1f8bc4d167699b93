"""What a pattern of module paths names, and what is no pattern."""

import re

import pytest

from flexmagic.errors import SiteError
from flexmagic.layout.patterns import choices, path_matches, split_list
from flexmagic.layout.sites import Site, check_paths, resolve

INSIDE = ("", ".mlp", ".mlp.up_proj", ".self_attn")
PATHS = [
    "",
    "model",
    *(f"model.layers.{n}{inside}" for n in range(12) for inside in INSIDE),
]


def named(pattern):
    return [path for path in PATHS if path_matches(pattern, path)]


def test_a_range_has_both_its_ends():
    assert named("model.layers.{2..5}.mlp") == [f"model.layers.{n}.mlp" for n in (2, 3, 4, 5)]
    assert named("model.layers.{9..10}") == ["model.layers.9", "model.layers.10"]


def test_braces_hold_texts_numbers_and_ranges():
    assert named("model.layers.{1,4..5}.{mlp,self_attn}") == [
        f"model.layers.{n}.{inside}" for n in (1, 4, 5) for inside in ("mlp", "self_attn")
    ]
    assert choices("{a,b}.{0..1}") == ("a.0", "a.1", "b.0", "b.1")


def test_a_star_may_be_some_letters_of_a_part():
    assert named("model.layers.3.mlp.*_proj") == ["model.layers.3.mlp.up_proj"]
    assert named("model.layers.1*") == ["model.layers.1", "model.layers.10", "model.layers.11"]


def test_a_regular_expression_must_fit_a_whole_path():
    assert named(r"/model\.layers\.\d*[02468]\.mlp/") == [f"model.layers.{n}.mlp" for n in range(0, 12, 2)]
    assert named("/mlp/") == []
    assert named(r"/.*\.\d{2}/") == ["model.layers.10", "model.layers.11"]


@pytest.mark.parametrize(
    ("text", "path", "port", "leaf"),
    [
        ("a.{2..5}.mlp", "a.{2..5}.mlp", "output", ""),
        ("a.{2, 5}:input[0]", "a.{2, 5}", "input", "[0]"),
        (r"/a[0-9]: b/:output[1]", r"/a[0-9]: b/", "output", "[1]"),
        ("/a/", "/a/", "output", ""),
    ],
)
def test_patterns_are_read_with_port_and_element(text, path, port, leaf):
    assert Site.parse(text) == Site(path, port, leaf)
    assert Site.parse(str(Site.parse(text))) == Site.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.{2..5.mlp", "brace is not closed"),
        ("a.2..5}.mlp", "brace is not closed"),
        ("a.{5..2}.mlp", "smaller number first"),
        ("a.{}.mlp", "is no choice"),
        ("a.{2..}.mlp", "is no choice"),
        ("a.{0..99}.{0..999}", "100,000 paths"),
        ("/a(/", "no regular expression"),
        ("a/b", "is no site"),
    ],
)
def test_what_is_no_pattern_is_refused(text, said):
    with pytest.raises(SiteError, match=re.escape(said)):
        Site.parse(text)


def test_every_choice_must_exist():
    check_paths(Site.parse("model.layers.{0..11}.mlp"), PATHS)
    with pytest.raises(SiteError, match=r"no module 'model\.layers\.12\.mlp', which .*\{2\.\.14\}.* names"):
        check_paths(Site.parse("model.layers.{2..14}.mlp"), PATHS)
    with pytest.raises(SiteError, match=r"Did you mean model\.layers\.2\.mlp"):
        check_paths(Site.parse("model.layers.{2..5}.mpl"), PATHS)
    with pytest.raises(SiteError, match="that fits '/attention/'"):
        check_paths(Site.parse("/attention/"), PATHS)


def test_sites_come_in_the_models_order():
    known = [Site(path) for path in PATHS]
    found = resolve(Site.parse("model.layers.{5,2}"), known)
    assert found == [Site("model.layers.2"), Site("model.layers.5")]


def test_commas_inside_braces_and_expressions_separate_nothing():
    assert split_list("a.{2,5},b:input[0], c") == ["a.{2,5}", "b:input[0]", "c"]
    assert split_list(r"/a\.(1|2)\.b{1,2}/:output,b") == [r"/a\.(1|2)\.b{1,2}/:output", "b"]
    assert split_list("") == []
