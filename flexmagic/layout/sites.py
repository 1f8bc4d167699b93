"""Site names: a module path, a port, and the element of a nested value.

``model.layers.3.mlp:output`` is the output of that module; ``…self_attn:output[0]`` an element of
a tuple, ``:output.logits`` a field of what the root module returns. Without a port, ``output``.
What a path may be in a pattern, :mod:`flexmagic.layout.patterns` says.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexmagic.errors import SiteError
from flexmagic.layout.patterns import check_pattern, is_regex, missing, path_matches, starred

PORTS = ("input", "output", "grad_input", "grad_output", "grad")
"""``grad_*``: the gradient of a run's loss there; ``grad``: that of a parameter, whose name is the path."""
_SITE = re.compile(
    r"(?P<path>/.+/|[^:\s\[\]/]*(?:\{[^{}]*\}[^:\s\[\]/]*)*)"
    r"(?::(?P<port>[A-Za-z_]\w*)(?P<leaf>(?:\[\d+\]|\.\w+)*))?"
)

_INDEX = re.compile(r"(?<=\w)\[(\d+|\*)\](?=\.)|(?<=blocks|layers)\[(\d+|\*)\]$")


@dataclass(frozen=True, order=True)
class Site:
    """One place of a model where a tensor can be seen: ``path``, ``port`` and ``leaf``.

    ``leaf`` is ``""`` for a value that is a tensor itself, else the way into the nested value,
    e.g. ``[0]`` or ``.logits``. In a pattern, ``path`` may stand for several paths.
    """

    path: str
    port: str = "output"
    leaf: str = ""

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read ``path[:port[leaf]]``; raise :class:`SiteError` for anything else."""
        match = _SITE.fullmatch(_dotted(text.strip()))
        if match is None or not text.strip():
            msg = f"{text!r} is no site. A site is a module path and a port, e.g. model.layers.3.mlp:output"
            raise SiteError(msg)
        port = match["port"] or "output"
        if port not in PORTS:
            msg = f"{text!r}: there is no port {port!r}. Ports are {', '.join(PORTS)}."
            raise SiteError(msg)
        check_pattern(match["path"])
        return cls(match["path"], port, match["leaf"] or "")

    def seen_by(self, hook: str) -> Site:
        """The key of what a hook captured here between others, under the hook's name."""
        return Site(self.path, self.port, f"{self.leaf}@{hook}")

    @property
    def is_gradient(self) -> bool:
        """Whether the site holds a gradient, which only a run with a loss has."""
        return self.port.startswith("grad")

    def matches(self, other: Site) -> bool:
        """Whether ``other``, a site of one path, is meant by this pattern."""
        return (
            self.port == other.port and self.leaf in ("", other.leaf) and path_matches(self.path, other.path)
        )

    def __str__(self) -> str:
        """The name a user would type, port always shown."""
        return f"{self.path}:{self.port}{self.leaf}"


LOGITS = Site("", "output", ".logits")
"""The logits of a model that returns them under this name."""


def _dotted(text: str) -> str:
    """``layers[3].attn`` as ``layers.3.attn``; a regular expression and what follows a port stay.

    At the end only ``blocks[3]`` and ``layers[3]``: of another module it would be an element of its value.
    """
    if text.startswith("/"):
        return text
    path, colon, rest = text.partition(":")
    return _INDEX.sub(lambda match: f".{match[1] or match[2]}", path) + colon + rest


def layer_of(path: str) -> int | None:
    """The number of the layer that a module or parameter is in."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def resolve(pattern: Site, known: Iterable[Site]) -> list[Site]:
    """All known sites that a pattern names, in the model's order; empty if there are none."""
    exact = [site for site in known if pattern.matches(site)]
    return [s for s in exact if s.leaf == pattern.leaf] or exact


def check_paths(pattern: Site, paths: Sequence[str]) -> None:
    """Raise :class:`SiteError` with the nearest names if no module path fits the pattern.

    Each choice of braces must be there: a range beyond the last layer is an error.
    """
    absent = missing(pattern.path, list(paths))
    if absent is None:
        return
    near = nearest(absent, paths)
    hint = f"Did you mean {' or '.join(near)}?" if near else "Type %flexmodel to see the modules."
    kind = "parameter" if pattern.port == "grad" else "module"
    named = "that fits " if is_regex(absent) else ""
    inside = "" if absent == pattern.path else f", which {pattern.path!r} names"
    msg = f"The model has no {kind} {named}{absent!r}{inside}. {hint}"
    raise SiteError(msg)


def nearest(name: str, names: Sequence[str], most: int = 3) -> list[str]:
    """The names closest to a mistyped one, ``*`` kept where the user wrote it; none for a regex."""
    if is_regex(name):
        return []
    if "*" not in name:
        return difflib.get_close_matches(name, names, most, cutoff=0.6)
    wild = {starred(path) for path in names}
    return difflib.get_close_matches(name, sorted(wild), most, cutoff=0.6)


def one_of(text: str, known: Iterable[Site]) -> Site:
    """The one known site that ``text`` names.

    Raises :class:`SiteError` if there is none, or if a nested value leaves it open which of its
    tensors is meant.
    """
    pattern = Site.parse(text)
    all_known = list(known)
    found = resolve(pattern, all_known)
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(str(s) for s in found[:6]) + (", …" if len(found) > 6 else "")
        msg = f"{text} names {len(found)} tensors: {listed}. Name one of them."
        raise SiteError(msg)
    near = nearest(str(pattern), [str(s) for s in all_known])
    hint = f"Did you mean {' or '.join(near)}?" if near else ""
    msg = f"There is no site {text} here. {hint}".strip()
    raise SiteError(msg)
