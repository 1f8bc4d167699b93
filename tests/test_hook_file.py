"""Hook files: what is written is read back the same, and nothing else is a hook file."""

import pickle
import tomllib

import pytest
import torch

from flexmagic.client import hook_file
from flexmagic.client.hook_file import Entry
from flexmagic.client.hook_text import cell_of, difference
from flexmagic.client.hooks import HookVersion
from flexmagic.engine.code import from_function, from_text
from flexmagic.engine.limits import Limits
from flexmagic.errors import HookError, InputError
from flexmagic.layout.sites import Site

BODIES = [
    "",
    "x *= 0.5\n",
    "x *= 0.5",
    "if step:\n\tx[:, -1] = 'a' and \"b\" and 1  # × ü\n\n    \n",
    "s = '''three'''\nt = \"\"\"three\"\"\"\n",
    "s = r'C:\\new\\u0041'\n",
    "print('end')  # '",
    "x *= 1  # quote'",
    "s = 'bell \x07 and \x7f'\r\nx *= 2\n",
]


@pytest.mark.parametrize("code", BODIES)
def test_what_is_written_is_read_back(tmp_path, code):
    entries = [
        Entry("damp", ["model.layers.{2..5}.mlp", r"/a\.\d+/:input[0]"], code),
        Entry("ünï \"q\" 'x' \\", ["a"], code, "A, b", local=True, enabled=False),
        Entry("c", ["b:output"], code, limits=Limits.read("1:", 0, "-1,2", 3, "run > 1 and 'a' in ctx")),
        Entry("f", ["b:output"], "def f(x, h):\n    return x\n", function="f"),
    ]
    path = hook_file.write(tmp_path / "hooks.toml", entries)
    assert hook_file.read(path) == entries
    assert len(tomllib.loads(path.read_text())["hook"]) == 4


def test_a_file_is_for_people(tmp_path):
    entry = Entry("damp", ["model.layers.*.mlp"], "x *= 0.5\n", limits=Limits.read(token=-1))
    path = hook_file.write(tmp_path / "hooks.toml", [entry])
    assert path.read_text() == (
        "# Hooks of flexmagic. Load them with %flexhook --import hooks.toml\n"
        "flexmagic-hooks = 1\n\n[[hook]]\n"
        'name = "damp"\nsites = ["model.layers.*.mlp"]\ntoken = "-1"\n'
        "code = '''\nx *= 0.5\n'''\n"
    )


HEAD = "flexmagic-hooks = 1\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (pickle.dumps({"hook": []}), "it is binary.*Nothing of it was run"),
        (pickle.dumps({"hook": []}, protocol=0), "is no hook file"),
        (b"\x89PNG\r\n\x1a\n\x00", "it is binary"),
        (b"", "does not say flexmagic-hooks = 1"),
        (b"flexmagic-hooks = 2\n", "does not say"),
        (b"x *= 0.5", "is no hook file"),
        (f"{HEAD}hook = 3".encode(), "hooks are tables"),
        (f'{HEAD}[[hook]]\nname = "a"'.encode(), "hook 1 has no sites, code"),
        (f'{HEAD}[[hook]]\nname = "a"\nsites = "b"\ncode = ""'.encode(), "wrong kind"),
        (f'{HEAD}[[hook]]\nname = "a"\nsites = [1]\ncode = ""'.encode(), "wrong kind"),
        (f'{HEAD}[[hook]]\nname = "a"\nsites = ["b"]\ncode = ""\nevil = 1'.encode(), "no field 'evil'"),
        (f'{HEAD}[[hook]]\nname = "a"\nsites = ["b"]\ncode = ""\nstep = "x"'.encode(), "names no positions"),
        ((HEAD + 2 * '[[hook]]\nname="a"\nsites=["b"]\ncode=""\n').encode(), "several hooks named a"),
    ],
)
def test_what_is_no_hook_file_is_refused(tmp_path, text, said):
    path = tmp_path / "file"
    path.write_bytes(text)
    with pytest.raises(InputError, match=said):
        hook_file.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        hook_file.read(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot be written"):
        hook_file.write(tmp_path / "no" / "folder", [])


def version(code, name="h", **options):
    make = from_function if callable(code) else from_text
    return HookVersion(make(name, 1, code), (Site.parse("a.b"),), **options)


def own(x, h):
    return x * 2 + torch.ones_like(x) + len(h.ctx)


def test_a_function_that_stands_for_itself_is_written_with_its_source():
    entry = hook_file.entry_of(version(own), True)
    assert entry.function == "own"
    assert entry.code.startswith("def own(x, h):")
    with pytest.raises(NameError):  # torch is the engine's to give
        entry.made()(torch.ones(2), None)
    assert Entry("h", ["a"], "def f(x: 1 / 0, h) -> 1 / 0:\n    return x\n", function="f").made()(1, 2) == 1
    twice = Entry("h", ["a"], "def f(x, h):\n    return x * 2\n", function="f").made()
    assert twice(torch.ones(1), None).item() == 2


def test_other_functions_are_refused_with_the_reason():
    strength = 3

    def closes(x, h):
        return x * strength

    def with_default(x, h, scale=2):
        return x * scale

    def uses_a_global(x, h):
        return x * len(BODIES)

    namespace = {}
    exec("def typed(x, h):\n    return x", namespace)  # noqa: S102
    for function, why in (
        (closes, "where it was defined: strength"),
        (with_default, "where it was defined"),
        (uses_a_global, "where it was defined: BODIES"),
        (namespace["typed"], "the source of its function is not known"),
        ((lambda x, h: x), "no plain function|not known"),
    ):
        with pytest.raises(HookError, match=why):
            hook_file.entry_of(version(function), True)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1", "and nothing else"),
        ("def f(x, h=1 / 0): pass", "no default values"),
        ("@print\ndef f(x, h): pass", "no decorators"),
        ("def f(x, h): pass\nprint()", "and nothing else"),
        ("def g(x, h): pass", "no function 'f'"),
        ("def", "line 1"),
    ],
)
def test_code_that_defines_no_function_is_refused(code, said):
    with pytest.raises(InputError, match=said):
        Entry("h", ["a"], code, function="f").made()


def test_a_version_is_the_cell_that_makes_it_and_two_differ_by_lines():
    before = version("x *= 2\n", "my hook")
    assert cell_of(before) == "%%flexhook a.b:output --name 'my hook'\nx *= 2\n"
    after = version("x *= 3\n", "my hook", group="A")
    said = difference(before, after).splitlines()
    assert said[:2] == ["--- my hook v1", "+++ my hook v1"]
    assert "-x *= 2" in said
    assert "+x *= 3" in said
    assert "+%%flexhook a.b:output --name 'my hook' --group A" in said
    with pytest.raises(HookError, match="is a function"):
        cell_of(version(own))
