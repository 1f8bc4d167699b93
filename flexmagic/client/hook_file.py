"""Hooks as a text file: TOML, written to be read and edited by people.

::

    flexmagic-hooks = 1

    [[hook]]
    name = "damp"
    sites = ["model.layers.*.mlp"]
    token = "-1"
    code = '''
    x *= 0.5
    '''

Reading a file runs nothing of it. A hook made of a function has ``function``, its name, and as
``code`` the source that defines it.
"""

from __future__ import annotations

import ast
import builtins
import json
import textwrap
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmagic.engine.limits import Limits
from flexmagic.errors import FlexError, HookError, InputError

if TYPE_CHECKING:
    from flexmagic.client.hooks import HookVersion

FORMAT = "flexmagic-hooks"
VERSION = 1
_TEXTS = ("name", "code", "group", "function", "step", "row", "token", "when")


@dataclass(frozen=True)
class Entry:
    """One hook of a file; ``function``: the name of the function that ``code`` defines, if any."""

    name: str
    sites: list[str]
    code: str
    group: str | None = None
    local: bool = False
    enabled: bool = True
    function: str = ""
    limits: Limits = field(default_factory=Limits)

    def made(self) -> Callable[..., Any]:
        """The function that ``code`` defines; raises :class:`InputError` if it defines none."""
        found: dict[str, Any] = {}
        try:
            parsed = ast.parse(self.code)
            if not _only_defines(parsed):
                msg = "its code must define the function and nothing else: no decorators, no default values"
                raise InputError(f"hook {self.name!r}: {msg}.")
            # annotations stay text, as in this module: nothing of the file runs before the hook does
            code = compile(parsed, f"<hook {self.name}>", "exec")
            exec(code, found)  # noqa: S102 - the user's own function
        except SyntaxError as error:
            raise InputError(f"hook {self.name!r}: line {error.lineno} of its code: {error.msg}.") from None
        if not callable(found.get(self.function)):
            raise InputError(f"hook {self.name!r}: its code defines no function {self.function!r}.")
        made: Callable[..., Any] = found[self.function]
        return made


def entry_of(version: HookVersion, enabled: bool) -> Entry:  # noqa: FBT001 - one of the entry's fields
    """A hook as a file holds it; raises :class:`HookError` for a function that needs more than its source."""
    source = version.source
    code, function = source.text, ""
    if source.function is not None:
        code, function = _source_of(source.name, source.function, source.text), source.function.__name__
    sites = [str(pattern) for pattern in version.patterns]
    return Entry(source.name, sites, code, version.group, source.local, enabled, function, source.limits)


def _source_of(name: str, function: Callable[..., Any], text: str) -> str:
    def refused(why: str) -> HookError:
        return HookError(f"hook {name!r} cannot be written to a file: {why}. Give its code as text instead.")

    text = textwrap.dedent(text)
    try:
        body = ast.parse(text).body
    except SyntaxError:
        body = []
    if not body:
        raise refused("the source of its function is not known, or no statement of its own")
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or body[0].decorator_list:
        raise refused("it is no plain function, defined by def and without decorators")
    code = function.__code__
    around = [
        n for n in (*code.co_freevars, *code.co_names) if n in code.co_freevars or _is_its_own(function, n)
    ]
    if around or function.__defaults__ or function.__kwdefaults__:
        more = f": {', '.join(around)}" if around else ""
        raise refused(f"its function uses values from where it was defined{more}")
    return text


def _is_its_own(function: Callable[..., Any], name: str) -> bool:
    """Whether a name is something that the function's module has and an engine has not."""
    return name in function.__globals__ and not hasattr(builtins, name) and name != "torch"


def _only_defines(parsed: ast.Module) -> bool:
    """Whether a text defines one function, and running it does nothing else."""
    (node,) = parsed.body if len(parsed.body) == 1 else (None,)
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return False
    return not node.args.defaults and not any(node.args.kw_defaults)


def write(path: str | Path, entries: Sequence[Entry]) -> Path:
    """Write a hook file; raises :class:`InputError` if it cannot be."""
    target = Path(path).expanduser()
    parts = [
        f"# Hooks of flexmagic. Load them with %flexhook --import {target.name}",
        f"{FORMAT} = {VERSION}",
    ]
    try:
        target.write_text("\n".join([*parts, *map(_table, entries)]) + "\n", encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}.") from None
    return target


def _table(entry: Entry) -> str:
    lines = ["", "[[hook]]", f"name = {_string(entry.name)}"]
    lines.append(f"sites = [{', '.join(map(_string, entry.sites))}]")
    lines += [f"group = {_string(entry.group)}"] if entry.group else []
    lines += [f"{key} = {str(value).lower()}" for key, value in (("local", entry.local),) if value]
    lines += [] if entry.enabled else ["enabled = false"]
    for name, value in entry.limits.options.items():
        lines.append(f"{name} = {value if name == 'every' else _string(value)}")
    lines += [f"function = {_string(entry.function)}"] if entry.function else []
    lines.append(f"code = {_block(entry.code)}")
    return "\n".join(lines)


def _string(text: str) -> str:
    """A text on one line: JSON's escapes are TOML's too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _block(text: str) -> str:
    """A text of several lines as it stands, or with escapes where it cannot stand so."""
    plain = all(c in "\n\t" or (c.isprintable() or c == " ") for c in text)
    if plain and "'''" not in text and not text.endswith("'"):
        return f"'''\n{text}'''"
    return _string(text)


def read(path: str | Path) -> list[Entry]:
    """The hooks of a file; raises :class:`InputError` that says what is wrong with it and where."""
    source = Path(path).expanduser()
    try:
        raw = source.read_bytes()
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}.") from None
    text = raw.decode(errors="replace")
    if "\0" in text or "\ufffd" in text:
        msg = f"{source} is no hook file: it is binary. Hook files are text, as %flexhook --export writes it."
        raise InputError(f"{msg} Nothing of it was run.")
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source} is no hook file: {error}. %flexhook --export writes one.") from None
    if found.get(FORMAT) != VERSION:
        raise InputError(f"{source} is no hook file of a known kind: it does not say {FORMAT} = {VERSION}.")
    hooks = found.get("hook", [])
    if not isinstance(hooks, list) or not all(isinstance(table, dict) for table in hooks):
        raise InputError(f"{source}: hooks are tables, each under [[hook]].")
    entries = [_entry(table, f"{source}, hook {at}") for at, table in enumerate(hooks, 1)]
    doubled = {entry.name for entry in entries if [e.name for e in entries].count(entry.name) > 1}
    if doubled:
        raise InputError(f"{source} has several hooks named {', '.join(sorted(doubled))}.")
    return entries


def _entry(table: dict[str, Any], where: str) -> Entry:
    kinds: dict[str, type[Any]] = {
        **dict.fromkeys(_TEXTS, str),
        "sites": list,
        "every": int,
        "local": bool,
        "enabled": bool,
    }
    for key, value in table.items():
        if key not in kinds:
            raise InputError(f"{where}: there is no field {key!r}; fields are {', '.join(kinds)}.")
        if type(value) is not kinds[key] or (
            kinds[key] is list and not all(isinstance(s, str) for s in value)
        ):
            raise InputError(f"{where}: {key} = {value!r} is of the wrong kind.")
    absent = [key for key in ("name", "sites", "code") if key not in table]
    if absent:
        raise InputError(f"{where} has no {', '.join(absent)}.")
    picked = {key: table[key] for key in ("step", "row", "token", "every", "when") if key in table}
    rest = {key: value for key, value in table.items() if key not in picked}
    try:
        return Entry(**rest, limits=Limits.read(**picked))
    except FlexError as error:
        raise InputError(f"{where}: {error}") from None
