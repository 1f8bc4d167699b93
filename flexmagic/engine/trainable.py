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


class Taking:
    """The modules' gradients of one backward; ``wrong`` says afterwards why they are not taken."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self.early: dict[str, torch.Tensor] = {}
        self.wrong: list[str] = []

    def new(self) -> dict[str, torch.Tensor]:
        """The gradients there are now, and none from here on."""
        found = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        for parameter in self._parameters.values():
            parameter.grad = None
        return found

    def of_the_loss(self) -> None:
        """What there is comes from the loss itself, on all ranks alike; each pipeline stage adds its own."""
        self.early = self.new()


@contextlib.contextmanager
def taking_gradients(
    modules: Trainables, groups: Groups, mates: frozenset[int] | None = None
) -> Iterator[Taking]:
    """Add up the modules' gradients of one backward, the same bits on every rank, or leave them as they were.

    ``mates``: the ranks of this pipeline stage, which have the same. All ranks come here.
    """
    parameters = modules.trained()
    before = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    taking = Taking(parameters)
    new: dict[str, torch.Tensor] = {}
    try:
        yield taking
        found = taking.new()
        if mates is None:
            new, taking.wrong = _agreed(found, groups)
        else:
            new, taking.wrong = _summed(taking.early, found, groups, mates)
    finally:
        for name, parameter in parameters.items():
            added, kept = None if taking.wrong else new.get(name), before[name]
            parameter.grad = kept if added is None else added if kept is None else kept + added


def _summed(
    early: dict[str, torch.Tensor], found: dict[str, torch.Tensor], groups: Groups, mates: frozenset[int]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The gradients of the loss itself and of every pipeline stage, added up on all ranks."""
    total, wrong = _agreed(early, groups)
    for stage in dict.fromkeys(everyone(groups, tuple(sorted(mates)))):
        part, off = _agreed(found if groups.place.rank in stage else {}, groups, stage)
        wrong += off
        for name, gradient in part.items():
            total[name] = total[name] + gradient if name in total else gradient
    return total, wrong


def _agreed(
    gradients: dict[str, torch.Tensor], groups: Groups, among: tuple[int, ...] | None = None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The first rank's gradients on all, after those that have some saw that they differ by rounding only.

    ``among``: the ranks that have some, if not all. Also says what is wrong if they differ by more.
    """
    holders = among or tuple(range(groups.place.world_size))
    forms = everyone(groups, {name: (tuple(g.shape), g.dtype) for name, g in gradients.items()})
    used = {rank: list(forms[rank]) for rank in holders}
    if any(names != used[holders[0]] for names in used.values()):
        return {}, [f"the ranks did not use the same modules: {list(used.values())}"]
    out, off = {}, {}
    for name, (shape, dtype) in forms[holders[0]].items():
        mine = gradients.get(name)
        first = torch.empty(shape, dtype=dtype, device=groups.place.device)
        if groups.place.rank == holders[0]:
            first.copy_(gradients[name])
        dist.broadcast(first, holders[0], group=groups.own)
        if mine is not None:
            off[name] = float((first - mine).abs().max()) / (float(first.abs().max()) or 1.0)
        out[name] = first
    most = {name: max(of.get(name, 0.0) for of in everyone(groups, off)) for name in out}
    return out, [
        f"the ranks' gradients of modules.{name} differ by {most[name]:.2g} of the largest value, "
        "so they are not those of one process"
        for name in most
        if not most[name] <= SAME
    ]
