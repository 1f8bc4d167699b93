"""The rules of the house: who may import whom, how big a room may be, what is exported and said."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
    for base, package in ((ROOT, "flexmagic"), (ROOT / "kernel", "flexmagic_kernel"))
    for path in sorted((base / package).rglob("*.py"))
}
EVERY_MODULE = pytest.mark.parametrize("module", MODULES)

# --- imports run downward only -----------------------------------------------------------------------

BELOW = {
    "flexmagic.errors": set(),
    "flexmagic.layout": {"flexmagic.errors"},
    "flexmagic.engine": {
        "flexmagic.errors",
        "flexmagic.layout",
        "flexmagic.view.source",  # the seam: plain values that travel
        "flexmagic.view.reduce",  # numpy alone: a rank reduces its piece as any other source does
    },
    "flexmagic.view": {"flexmagic.errors"},
    "flexmagic.client": {
        "flexmagic.errors",
        "flexmagic.layout",
        "flexmagic.engine",
        "flexmagic.view.source",  # the seam: what anything that can be looked at offers, plain values
        "flexmagic.view.reduce",  # and joins what the ranks reduced
        "flexmagic.view.masks",  # what of it the user masked
    },
}
BELOW["flexmagic.workshop"] = {
    "flexmagic.errors",
    "flexmagic.layout",
    "flexmagic.engine",
    "flexmagic.client",
    "flexmagic.view.source",
}
BELOW["flexmagic.recipes"] = {"flexmagic", "flexmagic.errors", "flexmagic.layout", "flexmagic.client"}
BELOW["flexmagic.magics"] = BELOW["flexmagic.recipes"] | {
    "flexmagic.engine",
    "flexmagic.recipes",
    "flexmagic.view",
    "flexmagic.workshop",
}
BELOW["flexmagic_kernel"] = BELOW["flexmagic.magics"] | {"flexmagic.magics"}
BELOW["flexmagic.cli"] = BELOW["flexmagic_kernel"] | {"flexmagic_kernel"}
BELOW["flexmagic"] = BELOW["flexmagic.magics"] | {"flexmagic.magics"}

LAZILY = {
    # a handle shows itself when it is displayed or written, and only then is the viewer needed
    "flexmagic.client.activation": {"flexmagic.view.display"},
    "flexmagic.client.looks": {"flexmagic.view.html", "flexmagic.view.png", "flexmagic.view.table"},
    "flexmagic.workshop.collecting": {"flexmagic.view.forms"},
    "flexmagic.workshop.guest_activation": {
        "flexmagic.view.display",
        "flexmagic.view.html",
        "flexmagic.view.table",
    },
}

NOTEBOOK = {"IPython", "ipykernel", "ipywidgets", "anywidget", "jupyter_client"}
BANNED = {
    "flexmagic.errors": NOTEBOOK | {"ipyparallel", "torch", "numpy"},
    "flexmagic.layout": NOTEBOOK | {"ipyparallel", "transformers"},
    "flexmagic.engine": NOTEBOOK | {"ipyparallel"},
    "flexmagic.view": {"ipyparallel", "torch", "transformers"},
    "flexmagic.recipes": NOTEBOOK | {"ipyparallel"},
    "flexmagic.workshop": NOTEBOOK | {"ipyparallel"},
    "flexmagic.magics": {"ipyparallel"},
    "flexmagic_kernel": {"ipyparallel", "torch"},
    "flexmagic.cli": {"ipyparallel"},
}
"""Libraries that a room must not know, however late it imports them."""

WIDGETS = {
    f"flexmagic.view.{name}"
    for name in (
        "cancel",
        "display",
        "inserter",
        "panel",
        "panels",
        "rank_tabs",
        "said",
        "stream",
        "widget",
        "workshop_panel",
    )
}
"""The modules of the view that know notebooks; the rest of it, the view-model, does not."""


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports_of(module: str) -> Iterator[tuple[str, bool]]:
    """What a module imports, as full names, and whether it does so inside a function."""

    def walk(node: ast.AST, *, late: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
                parts = package.split(".")[: len(package.split(".")) - child.level + 1]
                source = ".".join([*parts, child.module or ""]).rstrip(".") if child.level else child.module
                for alias in child.names:
                    whole = f"{source}.{alias.name}"
                    yield (whole if whole in MODULES else source), late
            else:
                yield from walk(
                    child, late=late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
                )

    return walk(tree_of(module), late=False)


def room_of(module: str) -> str:
    """The room a module stands in: its package under flexmagic, or the kernel."""
    package, *parts = module.split(".")
    return ".".join([package, *parts[:1]]) if package == "flexmagic" else package


def is_ours(name: str) -> bool:
    return name.split(".", maxsplit=1)[0] in {"flexmagic", "flexmagic_kernel"}


def test_the_import_rules_see_this_house():
    assert {room_of(module) for module in MODULES} == set(BELOW)
    assert ("flexmagic.errors", False) in set(imports_of("flexmagic.layout.sites"))
    assert ("flexmagic_kernel", True) in set(imports_of("flexmagic.cli.main"))


@EVERY_MODULE
def test_imports_run_downward_only(module):
    room = room_of(module)
    for name, late in imports_of(module):
        if not is_ours(name) or ((name == room or name.startswith(f"{room}.")) and room != "flexmagic"):
            continue
        allowed = BELOW[room] | (LAZILY.get(module, set()) if late else set())
        assert any(
            name == below or (below != "flexmagic" and name.startswith(f"{below}.")) for below in allowed
        ), f"{module} imports {name}, which does not stand below it"


@EVERY_MODULE
def test_rooms_do_not_know_libraries_of_other_rooms(module):
    banned = BANNED.get(room_of(module), set())
    if room_of(module) == "flexmagic.view" and module not in WIDGETS:
        banned = banned | NOTEBOOK
    known = {name.split(".")[0] for name, _ in imports_of(module)}
    assert not known & banned


def test_importing_flexmagic_loads_nothing_heavy():
    heavy = ["torch", "transformers", "ipyparallel", "ipywidgets", "anywidget", "IPython", "numpy"]
    code = f"import sys, flexmagic; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- small rooms, each thing explained ---------------------------------------------------------------

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(module: str) -> Iterator[tuple[str, Definition]]:
    """Every function and class of a module with its dotted name, nested ones too."""

    def walk(node: ast.AST, path: str) -> Iterator[tuple[str, Definition]]:
        for child in ast.iter_child_nodes(node):
            inside = path
            if isinstance(child, Definition):
                inside = f"{path}.{child.name}"
                yield inside, child
            yield from walk(child, inside)

    return walk(tree_of(module), module)


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


@EVERY_MODULE
def test_rooms_are_small(module):
    lines = MODULES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{module} has {lines} lines: two concepts in one room?"
    for name, node in definitions(module):
        if isinstance(node, ast.ClassDef):
            methods = [d.name for d in node.body if isinstance(d, (ast.FunctionDef, ast.AsyncFunctionDef))]
            public = {method for method in methods if not method.startswith("_")}
            assert len(public) < 15, f"{name} has {len(public)} public methods"
        else:
            assert node.end_lineno - node.lineno < 60, f"{name} has more than 60 lines"


@EVERY_MODULE
def test_everything_public_is_explained(module):
    assert ast.get_docstring(tree_of(module)), f"{module} has no docstring"
    functions = [name for name, node in definitions(module) if not isinstance(node, ast.ClassDef)]
    for name, node in definitions(module):
        inside_a_function = any(name.startswith(f"{function}.") for function in functions)
        if is_public(name.removeprefix("flexmagic_kernel")) and not inside_a_function:
            assert ast.get_docstring(node), f"{name} has no docstring"


# --- what is exported --------------------------------------------------------------------------------

EXPORTED = [
    "Activation",
    "CellError",
    "ClusterError",
    "EngineError",
    "FlexError",
    "Hook",
    "HookError",
    "InputError",
    "LayoutError",
    "Model",
    "ModelError",
    "Run",
    "Session",
    "Shown",
    "SiteError",
    "StuckError",
    "compare",
    "grid",
    "lines",
    "strip",
]


def test_the_exported_names_are_these():
    import flexmagic

    assert sorted(flexmagic.__all__) == EXPORTED
    for name in EXPORTED:
        assert getattr(flexmagic, name).__name__ == name


def test_every_error_is_a_flex_error_and_stands_in_the_tree():
    from flexmagic import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert all(issubclass(c, errors.FlexError) for c in classes)
    drawn = set(re.findall(r"\w+Error", errors.__doc__))
    assert set(EXPORTED) & {c.__name__ for c in classes} <= drawn


# --- the product speaks of itself alone --------------------------------------------------------------

FOREIGN = {
    "a path of one machine": r"(?<![\w.~$}-])/(?:work|root|home|Users)/\w",
    "an issue's number": r"(?i)\bissues? #?\d|\bGH-\d",
    "a package registry's host": r"\b(?:pypi|pythonhosted|npmjs|anaconda|download\.pytorch)\.(?:org|com)\b",
    "a local package index": r"(?i)/opt/(?:wheels|pypi)",
}


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the checkout that git tracks or would, this one and the model's left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    files = [ROOT / name for name in listed] or [p for p in ROOT.rglob("*") if ".venv" not in p.parts]
    for path in files:
        if (
            path.is_file()
            and path != Path(__file__)
            and ROOT / "demo_notebooks" / "model" not in path.parents
        ):
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


@pytest.mark.parametrize("what", FOREIGN)
def test_the_product_speaks_of_itself_alone(what):
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for path, text in texts()
        for match in re.finditer(FOREIGN[what], text)
    ]
    assert not found, f"{what}: {found}"


def test_nothing_else_stands_at_the_top():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    top = {name.split("/")[0] for name in listed}
    expected = {"flexmagic", "kernel", "tests", "demo_notebooks", "pyproject.toml", "README.md", "Makefile"}
    assert {name for name in top if not name.startswith(".")} <= expected | {"LICENSE", "CHANGELOG.md"}


# --- the wheel asks for what it imports ----------------------------------------------------------------

EXTRAS = {"jinja2"}
"""What an extra brings along: nbconvert's pages are made with it."""


def test_all_that_is_imported_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = {re.split(r"[<>=\[;]", line)[0].replace("_", "-").lower() for lines in lists for line in lines}
    names = importlib.metadata.packages_distributions()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                named = [node.module]
            tops = {name.partition(".")[0] for name in named} - set(sys.stdlib_module_names) - EXTRAS
            for top in tops - {"flexmagic", "flexmagic_kernel"}:
                brings = {one.replace("_", "-").lower() for one in names.get(top, [top])}
                assert brings & asked, f"{module} imports {top}, which pyproject.toml does not ask for"
