"""Hooks that may act anywhere: attached only where they wait, and told of all else that a forward passes.

A trace asks for one site after the other. To put a hook on every module for it would cost each run more
than a small model itself, so there are two for all modules of the process, which only note what has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from flexmagic.engine.active_hook import ActiveHook, Place
from flexmagic.layout.sites import Site

Attach = Callable[[str, str, Callable[[], bool]], None]
"""Puts a hook on the module of a path, at a port; the last says there that it may go on without a look."""


class Roaming:
    """The hooks of one run that may act anywhere, in ``modules`` by path, until :meth:`stop`.

    ``looked_at``: where hooks are attached already. ``idle``: whether what runs is not the run's own forward.
    """

    def __init__(
        self,
        hooks: Sequence[ActiveHook],
        modules: Mapping[str, nn.Module],
        looked_at: set[Place],
        attach: Attach,
        idle: Callable[[], bool],
    ) -> None:
        self._hooks = [hook for hook in hooks if hook.places]
        self._paths = {module: path for path, module in modules.items()} if self._hooks else {}
        self._looked_at = looked_at
        self._attach = attach
        self._idle = idle
        self._handles: list[Any] = []
        if self._hooks:
            self._handles = [
                register_module_forward_pre_hook(lambda module, _args: self._pass(module, "input")),
                register_module_forward_hook(lambda module, _args, _output: self._pass(module, "output")),
            ]
        for hook in self._hooks:
            hook.follow(self.reach)

    def reach(self, site: Site) -> None:
        """A hook begins to wait for a site: look there from now on.

        That is in time also where the module runs already: with hooks for all modules, torch asks for a
        module's own after it ran.
        """
        place = site.path, site.port
        if place in self._looked_at or not any(place in hook.places for hook in self._hooks):
            return
        self._looked_at.add(place)
        self._attach(*place, lambda: self._passed(place))

    def stop(self) -> None:
        """No longer listen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _pass(self, module: nn.Module, port: str) -> None:
        path = self._paths.get(module)
        if path is not None and (path, port) not in self._looked_at:
            self._passed((path, port))

    def _passed(self, place: Place) -> bool:
        """Whether nothing waits at a place; all hear that it has passed then."""
        if self._idle():
            return True
        return not [hook for hook in self._hooks if not hook.passes(hook.places.get(place, ()))]
