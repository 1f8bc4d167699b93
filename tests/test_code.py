"""Hook bodies and functions as code: what x is afterwards, and which line an error is on."""

import pytest
import torch

from flexmagic.engine.code import NAMES, HookSource, build, check, check_cell, failure
from flexmagic.errors import CellError, HookError


def run(text, x, namespace=None, **options):
    source = HookSource("h", 1, text, **options)
    names = dict.fromkeys(NAMES) | {"x": x, "ctx": {}, "rank": 0}
    return build(source, {"torch": torch} if namespace is None else namespace)(names)


@pytest.mark.parametrize(
    ("body", "result"),
    [
        ("x[:] = 7", [7.0, 7.0]),
        ("x = x + 1", [2.0, 2.0]),
        ("return x * 3", [3.0, 3.0]),
        ("x *= 2; return", [2.0, 2.0]),
        ("if x.sum() > 0:\n    return\nx *= 100", [1.0, 1.0]),
        ("def double(t):\n    return t * 2\nx = double(x)", [2.0, 2.0]),
        ("def nothing():\n    return\nassert nothing() is None", [1.0, 1.0]),
        ("x = torch.stack([v + i for i, v in enumerate(x)])", [1.0, 2.0]),
        ("x += 1  # one line with a comment, and ümläuts", [2.0, 2.0]),
        ("x += 1\r\nx += 1\r\n", [3.0, 3.0]),
        ("", [1.0, 1.0]),
        ("# only a comment", [1.0, 1.0]),
    ],
)
def test_what_is_in_x_at_the_end_is_the_value(body, result):
    assert run(body, torch.ones(2)).tolist() == result


def test_a_body_sees_the_engines_namespace_and_may_write_to_it():
    namespace = {"scale": 5.0}
    assert run("x *= scale", torch.ones(1), namespace).item() == 5
    run("global count\ncount = 3", torch.ones(1), namespace)
    assert namespace["count"] == 3
    assert "__flexhook__" not in namespace


def test_a_body_without_statements_only_captures():
    assert HookSource("h", 1, "").captures_only
    assert HookSource("h", 1, "\n# just look\n").captures_only
    assert not HookSource("h", 1, "x").captures_only
    assert not HookSource("h", 1, function=lambda x, h: None).captures_only


def test_a_syntax_error_shows_the_users_line_and_a_caret():
    with pytest.raises(HookError) as caught:
        check(HookSource("damp", 1, "y = 1\nx = x +", first_line=2))
    lines = str(caught.value).splitlines()
    assert "line 3" in lines[0]
    assert "nothing was sent" in lines[0]
    assert lines[1] == "    x = x +"
    assert lines[2].index("^") == 4 + len("x = x +")
    with pytest.raises(CellError, match="line 2"):
        check_cell(HookSource("model", 1, "model = (", first_line=2))


@pytest.mark.parametrize("body", ["break", "yield x\nreturn (", "nonlocal y"])
def test_what_only_the_compiler_notices_is_noticed_too(body):
    with pytest.raises(HookError):
        check(HookSource("h", 1, body))


def test_an_exception_is_data_with_the_users_line():
    source = HookSource("h", 1, "y = 2\nhelper(x)", first_line=2)

    def helper(_x):
        raise ValueError("no good")

    try:
        build(source, {"helper": helper})(dict.fromkeys(NAMES) | {"x": torch.ones(1)})
    except ValueError as error:
        found = failure(3, error, source.filename, site="a:output", source=source)
    assert (found.rank, found.line, found.text, found.kind) == (3, 3, "helper(x)", "ValueError")
    assert isinstance(found.cause, ValueError)
    assert found.cause.__traceback__ is None


def test_an_exception_that_cannot_travel_is_told_without_it():
    class OddError(Exception):
        def __init__(self, a, b):
            super().__init__("odd")

    found = failure(0, OddError(1, 2), "nowhere")
    assert found.cause is None
    assert found.message == "odd"


def test_a_function_gets_x_and_h_and_may_return_nothing():
    def edit(x, h):
        h.ctx["seen"] = h.site
        x += 1

    source = HookSource("h", 1, function=edit)
    ctx = {}
    names = dict.fromkeys(NAMES) | {"x": torch.zeros(1), "ctx": ctx, "site": "a:output"}
    assert build(source, {})(names).item() == 1
    assert ctx == {"seen": "a:output"}


def test_a_function_finds_what_it_did_not_bring_in_the_engines_namespace():
    namespace = {}
    exec("def edit(x, h):\n    return x * strength", namespace)  # noqa: S102
    call = build(HookSource("h", 1, function=namespace["edit"]), {"strength": 4.0})
    assert call(dict.fromkeys(NAMES) | {"x": torch.ones(1)}).item() == 4


LEFT = {
    "x *= 2\nreturn None": (3, "None was left in x, not a tensor: return the new tensor, or change x"),
    "if x.sum() > 99:\n    return x\nreturn x[:1]\nx = 3": (4, "x changed from .* shape and dtype must stay"),
    "x = print()\ny = 1": (2, "None was left in x"),
    "for x in [1, 2]:\n    pass\n": (2, "int was left in x"),
    "y = 1\nx = x.double()": (3, "to float64"),
    "return (\n    x.to('meta')\n)": (2, "moved from cpu to meta"),
}


@pytest.mark.parametrize("body", LEFT)
def test_what_cannot_replace_x_is_said_with_its_line(body):
    source = HookSource("h", 1, body, first_line=2)
    line, said = LEFT[body]
    with pytest.raises((TypeError, ValueError), match=said) as caught:
        run(body, torch.ones(2), first_line=2)
    found = failure(0, caught.value, source.filename, source=source)
    assert (found.line, found.text) == (line, body.splitlines()[line - 2])
