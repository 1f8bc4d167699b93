import pytest

from flexmagic.errors import SiteError
from flexmagic.layout.patterns import path_matches
from flexmagic.layout.sites import Site, check_paths, nearest, one_of, resolve

KNOWN = [
    Site("model.layers.0.mlp"),
    Site("model.layers.0.self_attn", "output", "[0]"),
    Site("model.layers.0.self_attn", "output", "[1]"),
    Site("model.layers.1.mlp"),
    Site("model.layers.1.mlp", "input", "[0]"),
    Site("", "output", ".logits"),
]


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("model.layers.3.mlp", Site("model.layers.3.mlp", "output", "")),
        ("model.layers.3.mlp:input", Site("model.layers.3.mlp", "input", "")),
        ("a:output[0]", Site("a", "output", "[0]")),
        (":output.logits", Site("", "output", ".logits")),
        ("a.b:input.position_embeddings[1]", Site("a.b", "input", ".position_embeddings[1]")),
        ("  a.b  ", Site("a.b")),
    ],
)
def test_a_site_is_a_path_a_port_and_a_leaf(text, site):
    assert Site.parse(text) == site
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("layers[3].attn", "layers.3.attn"),
        ("a.layers[*].b[0].c", "a.layers.*.b.0.c"),
        ("blocks[2]", "blocks.2"),
    ],
)
def test_a_number_in_brackets_is_a_part_of_the_path(text, path):
    assert Site.parse(text) == Site(path)
    assert Site.parse(f"{text}:input[0]") == Site(path, "input", "[0]")


@pytest.mark.parametrize("text", ["", "   ", "a b", "a:output[x]", "a[0]", "a:outputs", "a:weight", "a::b"])
def test_what_is_no_site_is_refused_with_a_sentence(text):
    with pytest.raises(SiteError, match=r"site|port"):
        Site.parse(text)


def test_a_star_is_exactly_one_part_of_the_path():
    assert path_matches("model.layers.*.mlp", "model.layers.3.mlp")
    assert not path_matches("model.layers.*", "model.layers.3.mlp")
    assert not path_matches("*", "model.layers")
    assert not path_matches("model.*.mlp", "model.layers.3.mlp")


def test_a_pattern_resolves_to_all_its_sites_in_the_models_order():
    assert resolve(Site.parse("model.layers.*.mlp"), KNOWN) == [KNOWN[0], KNOWN[3]]
    assert resolve(Site.parse("model.layers.0.self_attn"), KNOWN) == KNOWN[1:3]
    assert resolve(Site.parse("model.layers.0.self_attn:output[1]"), KNOWN) == [KNOWN[2]]
    assert resolve(Site.parse("model.layers.7.mlp"), KNOWN) == []


def test_one_site_must_be_meant():
    assert one_of("model.layers.1.mlp", KNOWN) == KNOWN[3]
    assert one_of(":output.logits", KNOWN) == KNOWN[5]
    with pytest.raises(SiteError, match=r"2 tensors: .*\[0\].*\[1\]"):
        one_of("model.layers.0.self_attn", KNOWN)
    with pytest.raises(SiteError, match=r"Did you mean model\.layers\.1\.mlp"):
        one_of("model.layers.1.mpl", KNOWN)


def test_unknown_modules_come_with_near_names():
    paths = ["model", "model.layers.0.mlp", "model.layers.1.mlp"]
    check_paths(Site.parse("model.layers.*.mlp"), paths)
    with pytest.raises(SiteError, match=r"Did you mean model\.layers\.0\.mlp"):
        check_paths(Site.parse("model.layer.0.mlp"), paths)
    with pytest.raises(SiteError, match=r"%flexmodel"):
        check_paths(Site.parse("zzzzzz"), paths)
    assert nearest("model.layers.*.mpl", paths) == ["model.layers.*.mlp"]
