"""Parameters edited in place by user code that sees them whole, and put back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from flexmagic.engine.code import HookSource, build, failure
from flexmagic.engine.distributed import local_part
from flexmagic.engine.draws import same_draws
from flexmagic.engine.exchange import Exchange
from flexmagic.engine.groups import Groups
from flexmagic.engine.private import come_to_rest, gathered
from flexmagic.engine.surveying import everyone
from flexmagic.engine.tensors import check_result, checksum
from flexmagic.engine.trainable import Trainables
from flexmagic.engine.tree import modules_of, parameters_of, unit_gathered
from flexmagic.errors import HookError, ModelError, RankFailure
from flexmagic.layout.assemble import split
from flexmagic.layout.layout import Layout
from flexmagic.layout.sites import layer_of


@dataclass(frozen=True)
class WeightEdit:
    """One edit as it travels: its code, the parameters and how each lies."""

    source: HookSource
    layouts: Mapping[str, Layout]
    seed: int = 0


@dataclass
class WeightEdits:
    """The edits of one model on one rank, with what this rank's parts were before each.

    ``made``: what they were, parameters and code as text; ``given``: as they came.
    """

    before: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    made: dict[int, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    given: dict[int, WeightEdit] = field(default_factory=dict)

    def apply(self, edit: WeightEdit, model: nn.Module, groups: Groups, namespace: dict[str, Any]) -> int:
        """Run the code on every parameter and write this rank's parts, on all ranks or on none.

        Returns the edit's number, one more than that of the last one in force.

        Raises :class:`HookError` on all ranks alike if it fails on any, or leaves other values there.
        """
        pieces = _parts(edit, model, groups, namespace)
        number = max(self.before, default=0) + 1
        kept = self.before.setdefault(number, {})
        self.made[number], self.given[number] = (tuple(edit.layouts), edit.source.text.strip()), edit
        for name, own in pieces.items():
            with held(model, name, write=True) as local:
                assert local is not None  # it was there before
                kept[name] = local.clone()
                local.copy_(own)
        return number

    def again(
        self, names: Collection[str], model: nn.Module, groups: Groups, namespace: dict[str, Any]
    ) -> None:
        """Make the edits of some parameters once more, which have the values that they were loaded with.

        All ranks call it together; raises :class:`HookError` as :meth:`apply` does.
        """
        for number in sorted(self.given):
            edit = self.given[number]
            layouts = {name: layout for name, layout in edit.layouts.items() if name in names}
            parts = _parts(replace(edit, layouts=layouts), model, groups, namespace) if layouts else {}
            for name, own in parts.items():
                with held(model, name, write=True) as local:
                    assert local is not None  # it was there before
                    local.copy_(own)

    def undo(self, number: int, model: nn.Module) -> None:
        """Put the parts back that an edit wrote; all ranks call it together."""
        come_to_rest(model)
        self.made.pop(number, None)
        self.given.pop(number, None)
        for name, before in self.before.pop(number, {}).items():
            with held(model, name, write=True) as local:
                if local is not None:
                    local.copy_(before)

    def originals(self) -> dict[str, torch.Tensor]:
        """What this rank had of all edited parameters before the first edit of each."""
        out: dict[str, torch.Tensor] = {}
        for number in sorted(self.before):
            out = {**self.before[number], **out}
        return out

    def restore(self, model: nn.Module) -> None:
        """Put back all parts as they were before the first edit."""
        for number in sorted(self.before, reverse=True):
            self.undo(number, model)


@contextlib.contextmanager
def held(model: nn.Module, name: str, *, write: bool = False) -> Iterator[torch.Tensor | None]:
    """A rank's part of a parameter, which may be written into with ``write``; ``None`` where it has none.

    All ranks that have one enter together. Raises :class:`ModelError` for what cannot be written.
    """
    found = parameters_of(model).get(name)
    if found is None:
        yield None
        return
    if found.is_meta:
        msg = f"{name} is kept on disk and cannot be edited. Load the model into memory."
        raise ModelError(msg)
    if hasattr(found, "ds_status"):
        msg = (
            f"{name} is shared out by DeepSpeed, which writes its parts itself. Edit a hook's value instead."
        )
        raise ModelError(msg)
    with unit_gathered(model, name, write=write), gathered(found), torch.no_grad():
        yield local_part(parameters_of(model)[name])


def _parts(
    edit: WeightEdit, model: nn.Module, groups: Groups, namespace: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """What an edit makes of this rank's parts of its parameters; the same errors on all ranks."""
    come_to_rest(model)
    call = build(edit.source, namespace)
    pieces: dict[str, torch.Tensor] = {}
    sums: dict[str, tuple[int, int]] = {}
    failures: list[RankFailure] = []
    for name, layout in edit.layouts.items():
        with held(model, name) as local:
            if local is None or layout.blocks[groups.place.rank] is None:
                continue
            exchange = Exchange(groups.own, groups.place.rank)
            whole = local.clone() if layout.replicated else exchange.joined(layout, local)
        try:
            new = _edited(call, whole, name, model, groups.place.rank, edit.seed)
        except BaseException as error:  # noqa: BLE001 - the user's code may raise anything; it becomes data
            found = failure(groups.place.rank, error, edit.source.filename, site=name, source=edit.source)
            failures.append(found)
            error.__traceback__ = None
            continue
        own = split(layout, groups.place.rank, new)
        assert own is not None  # this rank has a part
        pieces[name], sums[name] = own, checksum(new)
    _agree(everyone(groups, (failures, sums)), edit)
    return pieces


def _edited(  # noqa: PLR0917 - what one call of the user's code is given
    call: Callable[[dict[str, Any]], Any],
    whole: torch.Tensor,
    name: str,
    model: nn.Module,
    rank: int,
    seed: int,
) -> torch.Tensor:
    """What the code leaves of a whole parameter."""
    owner = modules_of(model)[name.rpartition(".")[0]]
    names = {"x": whole, "site": name, "index": layer_of(name), "step": 0, "ctx": {}}
    names |= {"module": owner, "rank": rank, "modules": Trainables(), "persistent": {}}
    with torch.no_grad(), same_draws(f"{seed}|{name}"):
        new = call(names)
    check_result(new, whole.shape, whole.dtype, whole.device)
    assert isinstance(new, torch.Tensor)  # checked
    return new


def _agree(said: list[tuple[list[RankFailure], dict[str, tuple[int, int]]]], edit: WeightEdit) -> None:
    failures = tuple(found for of_rank, _ in said for found in of_rank)
    if failures:
        msg = "the code failed"
        raise HookError(msg, failures)
    for name in edit.layouts:
        if len({sums[name] for _, sums in said if name in sums}) > 1:
            msg = (
                f"The code left different values of {name} on the ranks. It must do the same on every "
                "rank: do not branch on `rank`, and draw random numbers from torch. Nothing was changed."
            )
            raise HookError(msg)
