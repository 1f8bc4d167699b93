"""Modules of the user's on one rank: called in hooks on whole tensors, trained alike on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flexmagic.engine.groups import Groups
from flexmagic.engine.surveying import everyone
from flexmagic.engine.tensors import checksum
from flexmagic.errors import InputError

SAME = 1e-3
"""Largest difference between the ranks' gradients of a module, relative to the largest value."""


class Trainables:
    """The modules of one session by name; in a hook, ``modules.probe(x)`` or ``modules["probe"](x)``.

    Each has an optimizer of its own once it is stepped. ``reason``: why none may be used here.
    """

    def __init__(self, reason: str = "") -> None:
        self._modules: dict[str, nn.Module] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._reason = reason

    def __getitem__(self, name: str) -> nn.Module:
        """The module of a name."""
        if self._reason:
            raise RuntimeError(self._reason)
        if name not in self._modules:
            known = ", ".join(self._modules) or "none yet"
            msg = (
                f'there is no module {name!r}. Modules: {known}. Register one: session.modules["{name}"] = …'
            )
            raise LookupError(msg)
        return self._modules[name]

    def __getattr__(self, name: str) -> nn.Module:
        """The module of a name."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._modules)

    def put(
        self, name: str, module: nn.Module, device: torch.device, optimizer: tuple[str, Any] | None = None
    ) -> None:
        """Register a module under a name, with the state of its optimizer if it had one."""
        self._modules[name] = module.to(device)
        self._optimizers.pop(name, None)
        if optimizer is not None:
            kind, state = optimizer
            self._optimizers[name] = getattr(torch.optim, kind)(self._parameters(name))
            self._optimizers[name].load_state_dict(state)

    def give(self, name: str) -> tuple[nn.Module, tuple[str, Any] | None]:
        """What :meth:`put` on another rank needs to be in the same state."""
        optimizer = self._optimizers.get(name)
        return self[name], None if optimizer is None else (type(optimizer).__name__, optimizer.state_dict())

    def drop(self, name: str) -> None:
        """Forget a module."""
        self._modules.pop(name, None)
        self._optimizers.pop(name, None)

    def _parameters(self, name: str) -> list[nn.Parameter]:
        return [p for p in self[name].parameters() if p.requires_grad]

    def step(self, names: Sequence[str], kind: str, options: Mapping[str, Any]) -> None:
        """One step of torch's optimizer of that class, and gradients forgotten; its state stays.

        Raises :class:`InputError` for an optimizer or option that torch has not.
        """
        for name in names:
            optimizer = self._optimizers.get(name)
            if type(optimizer).__name__ != kind:
                try:
                    optimizer = getattr(torch.optim, kind)(self._parameters(name), **options)
                except (TypeError, ValueError) as error:
                    msg = f"torch.optim.{kind} cannot be made like this: {error}"
                    raise InputError(msg) from None
                self._optimizers[name] = optimizer
            assert optimizer is not None  # made above
            for group in optimizer.param_groups:
                group.update(options)
            optimizer.step()
            optimizer.zero_grad()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for module in self._modules.values():
            module.zero_grad()

    def trained(self) -> dict[str, nn.Parameter]:
        """All parameters that may be trained, by module and name."""
        return {
            f"{name}.{path}": parameter
            for name, module in self._modules.items()
            for path, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def sums(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Exact sums over the state of every module: equal on ranks that have the same."""
        return {
            name: tuple(checksum(value) for value in module.state_dict().values())
            for name, module in self._modules.items()
        }


@contextlib.contextmanager
def taking_gradients(modules: Trainables, groups: Groups) -> Iterator[list[str]]:
    """Add up the modules' gradients of one backward, the same bits on every rank, or leave them as they were.

    Yields a list that afterwards says what is wrong if the ranks' gradients differ; all ranks come here.
    """
    parameters = modules.trained()
    before = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    wrong: list[str] = []
    new: dict[str, torch.Tensor] = {}
    try:
        yield wrong
        new = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        wrong += _agreed(new, groups)
    except BaseException:
        new = {}
        raise
    finally:
        for name, parameter in parameters.items():
            found, kept = None if wrong else new.get(name), before[name]
            parameter.grad = kept if found is None else found if kept is None else kept + found


def _agreed(gradients: dict[str, torch.Tensor], groups: Groups) -> list[str]:
    """Make every rank's gradients those of rank 0, after all saw that they are the same but for rounding."""
    said = everyone(groups, list(gradients))
    if any(names != said[0] for names in said):
        return [f"the ranks did not use the same modules: {said}"]
    off = {}
    for name, gradient in gradients.items():
        first = gradient.detach().contiguous().clone()
        dist.broadcast(first, 0, group=groups.own)
        scale = float(first.abs().max()) or 1.0
        off[name] = float((first - gradient).abs().max()) / scale
        gradient.copy_(first)
    most = {name: max(of[name] for of in everyone(groups, off)) for name in off}
    return [
        f"the ranks' gradients of modules.{name} differ by {most[name]:.2g} of the largest value, "
        "so they are not those of one process"
        for name in most
        if not most[name] <= SAME
    ]
