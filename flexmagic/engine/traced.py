"""The names in a trace: ``model`` as the user writes it, its modules with ``input`` and ``output``."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from flexmagic.engine.trace import Trace
from flexmagic.engine.whole import Whole
from flexmagic.errors import SiteError
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site, one_of

PORTS = ("input", "output")
NAMES = ("input", "inputs", "output")
"""What a module has in a trace: the first tensor it takes, all that it takes, and what it returns."""


class Names:
    """The names that there are in a model as it was surveyed; the same for all traces of it.

    ``held``: by path and port the sites of which this rank has something.
    """

    def __init__(self, rules: Mapping[Site, Rule], modules: Iterable[str], rank: int) -> None:
        self.rules = rules
        self.sites = [site for site in rules if site.port in PORTS]
        self.everywhere = frozenset(self.sites)
        ends = [site.path.split(".") for site in self.sites]  # also modules that other pipeline stages have
        known = [".".join(parts[:depth]) for parts in ends for depth in range(1, len(parts) + 1)]
        self.modules = dict.fromkeys([*known, *modules])
        self.children: dict[str, list[str]] = {}
        for path in filter(None, self.modules):
            parent, _, name = path.rpartition(".")
            self.children.setdefault(parent, []).append(name)
        self.leaves: dict[tuple[str, str], list[str]] = {}
        self.held: dict[tuple[str, str], list[Site]] = {}
        for site in self.sites:
            self.leaves.setdefault((site.path, site.port), []).append(site.leaf)
            if rules[site].refused or rank in rules[site].ranks:
                self.held.setdefault((site.path, site.port), []).append(site)


class View:
    """What all names of one trace share: the coroutine, the whole model and the names there are."""

    def __init__(self, trace: Trace, whole: Whole, names: Names) -> None:
        self.trace, self.whole, self._names = trace, whole, names
        self._parameters: dict[str, torch.Tensor] = {}
        self.sites, self.modules = names.sites, names.modules

    def of(self, trace: Trace) -> View:
        """The same for another trace."""
        return View(trace, self.whole, self._names)

    def module(self, path: str) -> nn.Module | None:
        """What this rank has of a module, ``None`` if it is another pipeline stage's."""
        return self.whole.modules.get(path)

    def children(self, path: str) -> list[str]:
        """The names of the modules right inside one."""
        return self._names.children.get(path, [])

    def leaves(self, path: str, port: str) -> list[str]:
        """The ways to the tensors of a module's input or output; raises :class:`SiteError` for none."""
        found = self._names.leaves.get((path, port))
        if not found:
            raise SiteError(f"No tensor was seen at {Site(path, port)} in the survey.")
        return found

    def place(self, path: str, name: str) -> tuple[str, str, str]:
        """The path, port and leaf that one of :data:`NAMES` stands for."""
        if name != "input":
            return path, name.removesuffix("s"), ""
        leaves = self.leaves(path, name)
        return path, name, "[0]" if "[0]" in leaves else leaves[0]

    def value(self, path: str, port: str, leaf: str) -> Any:
        """The tensor behind a name, or the names inside where it is a nested value."""
        if leaf in self.leaves(path, port):
            return self.trace.read(Site(path, port, leaf))
        return Nested(self, path, port, leaf)

    def assign(self, path: str, port: str, leaf: str, new: Any) -> None:
        """Give a name another tensor."""
        leaves = self.leaves(path, port)
        if leaf not in leaves:
            raise SiteError(several(path, port, leaf, leaves))
        self.trace.write(Site(path, port, leaf), new)

    def parameter(self, name: str) -> torch.Tensor:
        """A whole parameter, read once."""
        if name not in self._parameters:
            found = self.trace.ask(name, lambda: self.whole.parameter(name))
            self._parameters[name] = found
            why = f"{name}, as a trace has it, is a copy: writing into it changes nothing. {EDITED}"
            self.trace.watch(found, why)
        return self._parameters[name]

    def call(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a module makes of whole tensors."""
        for given in (*args, *kwargs.values()):
            if isinstance(given, (Traced, Nested)):
                raise TypeError(f"{path} was given {given!r}. Give it a tensor, such as an .output")
        if not any(isinstance(given, torch.Tensor) for given in (*args, *kwargs.values())):
            raise TypeError(f"{path or 'the model'} was given no tensor")
        return self.trace.ask(f"{path}(...)", lambda: self.whole.call(path, args, kwargs))


EDITED = "Weights are edited with %%flexweights, or model.edit(...)."


def several(path: str, port: str, leaf: str, leaves: list[str]) -> str:
    """That a name means no single tensor, and which there are."""
    inside = [str(Site(path, port, each)) for each in leaves if each.startswith(leaf)]
    if not inside:
        there = ", ".join(str(Site(path, port, each)) for each in leaves)
        return f"There is no {Site(path, port, leaf)}. There are: {there}."
    return f"{Site(path, port, leaf)} is no tensor, it holds some: name one of {', '.join(inside)}."


class Traced:
    """A module in a trace: modules inside it by name or number, its ``input``, ``inputs`` and ``output``."""

    __slots__ = ("_path", "_view")

    def __init__(self, view: View, path: str = "") -> None:
        object.__setattr__(self, "_view", view)
        object.__setattr__(self, "_path", path)

    def _inside(self, name: str) -> Traced | None:
        """A module of this name; at the root also those of the module ``model``, as sites are named."""
        view, path = self._view, self._path
        starts = [f"{path}." if path else "", *(["model."] if not path else [])]
        found = next((start + name for start in starts if start + name in view.modules), None)
        return None if found is None else Traced(view, found)

    def __getattr__(self, name: str) -> Any:
        """A module inside, the ``input`` or ``output``, or the model's ``config``."""
        if name.startswith("__"):
            raise AttributeError(name)
        view, path = self._view, self._path
        if (inside := self._inside(name)) is not None:
            return inside
        if name in NAMES:
            return view.value(*view.place(path, name))
        if name == "steps" and not path:
            return Steps(view.trace)
        if (parameter := view.whole.parameter_name(path, name)) is not None:
            return view.parameter(parameter)
        module = view.module(path)
        if name == "config" and module is not None and hasattr(module, name):
            return module.config
        raise AttributeError(self._absent(name, module))

    def _absent(self, name: str, module: nn.Module | None) -> str:
        shown, names = self._path or "the model", self._view.children(self._path)
        if name.startswith("grad"):
            return f"gradients are not read in a trace: give the run a loss and capture {shown}:grad_output"
        if module is not None and hasattr(module, name):
            return (
                f"{shown} has a {name!r}, but a rank's own may be only a piece: a trace has the inputs, "
                "outputs and parameters of modules, whole."
            )
        near = difflib.get_close_matches(name, [*names, *NAMES], 3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"It has {', '.join([*names[:12], *NAMES])}."
        return f"{shown} has no module {name!r}. {hint}"

    def __setattr__(self, name: str, new: Any) -> None:
        """Assign the ``input`` or ``output``."""
        if name not in NAMES or self._inside(name) is not None:
            shown = self._path or "model"
            known = self._view.whole.parameter_name(self._path, name)
            how = f"assign {shown}.output or {shown}.input" if known is None else EDITED
            raise AttributeError(f"{shown}.{name} cannot be assigned in a trace: {how}")
        self._view.assign(*self._view.place(self._path, name), new)

    def __getitem__(self, key: int | slice | str) -> Any:
        """A numbered module or several, or the tensor of a site by its name: ``model["lm_head:input"]``."""
        if isinstance(key, str):
            site = one_of(key, self._view.sites)
            return self._view.value(site.path, site.port, site.leaf)
        numbered = sorted((name for name in self._view.children(self._path) if name.isdigit()), key=int)
        if isinstance(key, slice):
            return [self[int(name)] for name in numbered[key]]
        at = key + len(numbered) if key < 0 else key
        inside = self._inside(str(at))
        if inside is None:
            shown = self._path or "the model"
            had = f"numbers {numbered[0]} to {numbered[-1]}" if numbered else "no numbered modules"
            raise IndexError(f"{shown} has {had}; there is no {key}")
        return inside

    def __setitem__(self, key: str, new: Any) -> None:
        """Assign the tensor of a site by its name."""
        site = one_of(key, self._view.sites)
        self._view.assign(site.path, site.port, site.leaf, new)

    def __iter__(self) -> Iterator[Any]:
        """The numbered modules inside, in order."""
        return iter(self[:])

    def __len__(self) -> int:
        """How many numbered modules there are inside."""
        return len(self[:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module makes of whole tensors, apart from the forward: ``model.lm_head(h)``."""
        return self._view.call(self._path, args, kwargs)

    def __repr__(self) -> str:
        """The path."""
        return f"<{self._path or 'model'} in a trace>"


class Steps:
    """The forwards of a generation: ``for step in model.steps[2:4]`` goes on in each of these.

    Step 0 sees the whole prompt, each later one a token. Steps with an end must come, without one all that
    do are taken.
    """

    def __init__(self, trace: Trace, wanted: slice = slice(None)) -> None:
        self._trace, self._wanted = trace, wanted

    def __getitem__(self, at: slice | int) -> Steps:
        """Some of them; raises :class:`SiteError` for what is no slice counted from the start."""
        if isinstance(at, int) and at >= 0:
            raise SiteError(f"steps are gone through: for step in model.steps[{at}:{at + 1}]")
        if (
            not isinstance(at, slice)
            or any(n is not None and n < 0 for n in (at.start, at.stop, at.step))
            or at.step == 0
        ):
            raise SiteError("steps are counted from the start of the generation: model.steps[2:4]")
        return Steps(self._trace, at)

    def __iter__(self) -> Iterator[int]:
        """Go on to each, and give its number."""
        start, stop, by = self._wanted.start or 0, self._wanted.stop, self._wanted.step or 1
        for step in itertools.count(start, by):
            if stop is not None and step >= stop:
                return
            if not self._trace.go_to(step, needed=stop is not None):
                return
            yield step


class Nested:
    """A value that is no tensor but holds some: ``model.layers[2].self_attn.output[0]``."""

    __slots__ = ("_leaf", "_path", "_port", "_view")

    def __init__(self, view: View, path: str, port: str, leaf: str) -> None:
        for name, value in (("_view", view), ("_path", path), ("_port", port), ("_leaf", leaf)):
            object.__setattr__(self, name, value)
        leaves = view.leaves(path, port)
        if not any(each.startswith(leaf) for each in leaves):
            raise SiteError(several(path, port, leaf, leaves))

    def __getitem__(self, at: int | str) -> Any:
        """An element of a tuple, or of a mapping."""
        return self._view.value(self._path, self._port, self._leaf + _step(at, self))

    def __setitem__(self, at: int | str, new: Any) -> None:
        """Assign an element."""
        self._view.assign(self._path, self._port, self._leaf + _step(at, self), new)

    def __getattr__(self, name: str) -> Any:
        """A field."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self._view.value(self._path, self._port, f"{self._leaf}.{name}")

    def __setattr__(self, name: str, new: Any) -> None:
        """Assign a field."""
        self._view.assign(self._path, self._port, f"{self._leaf}.{name}", new)

    def _no_tensor(self, *_: Any, **__: Any) -> Any:
        raise SiteError(repr(self))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = _no_tensor
    __iadd__ = __isub__ = __imul__ = __itruediv__ = __neg__ = __len__ = __iter__ = _no_tensor

    @classmethod
    def __torch_function__(cls, _function: Any, _types: Any, args: Any = (), _kwargs: Any = None) -> Any:
        """Refuse, as functions of tensors do not take it."""
        raise SiteError(
            next((repr(arg) for arg in args if isinstance(arg, cls)), "a nested value is no tensor")
        )

    def __repr__(self) -> str:
        """What there is to choose from."""
        return several(self._path, self._port, self._leaf, self._view.leaves(self._path, self._port))


def _step(at: Any, nested: Nested) -> str:
    if isinstance(at, str):
        return f".{at}"
    if not isinstance(at, int) or at < 0:
        raise SiteError(repr(nested))
    return f"[{at}]"


class Save:
    """What a trace saves, by name: the run's context, of which ``run.context`` has it."""

    __slots__ = ("_context",)

    def __init__(self, context: dict[str, Any]) -> None:
        object.__setattr__(self, "_context", context)

    def __setattr__(self, name: str, value: Any) -> None:
        """Save a value; of a tensor without what its gradient would need."""
        import torch

        self._context[name] = value.detach() if isinstance(value, torch.Tensor) else value

    def __getattr__(self, name: str) -> Any:
        """What was saved in this run, also by a hook in ``ctx``."""
        try:
            return self._context[name]
        except KeyError:
            raise AttributeError(f"nothing was saved as {name!r} in this run") from None
