"""The magics: a thin skin over :class:`flexmagic.Session`. Each parses, calls the session, displays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flexmagic.magics.causes import CauseMagics
from flexmagic.magics.cell_form import TRANSFORMS, NearNames
from flexmagic.magics.cells import CellsMagics, EngineCells
from flexmagic.magics.cluster import ClusterMagics
from flexmagic.magics.compare import CompareMagics
from flexmagic.magics.completion import Completion
from flexmagic.magics.config import SettingsMagics
from flexmagic.magics.desk import Desk, Helper
from flexmagic.magics.hook import HookMagics
from flexmagic.magics.inspection import Inspection
from flexmagic.magics.learned import LearnedMagics
from flexmagic.magics.loss import LossMagics
from flexmagic.magics.model import ModelMagics
from flexmagic.magics.news import News
from flexmagic.magics.owners import OwnersMagics
from flexmagic.magics.panel import PanelMagics
from flexmagic.magics.recipes import RecipeMagics
from flexmagic.magics.restart import Restart
from flexmagic.magics.run import RunMagics
from flexmagic.magics.scan import ScanMagics
from flexmagic.magics.settings import FlexMagic
from flexmagic.magics.trace import TraceMagics
from flexmagic.magics.traceback import TracebackMagics
from flexmagic.magics.weights import WeightsMagics
from flexmagic.magics.workshop import WorkshopMagics

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

FAMILIES = (
    ClusterMagics, ModelMagics, HookMagics, RunMagics, TraceMagics, ScanMagics, LossMagics, WeightsMagics,
    CompareMagics, PanelMagics, RecipeMagics, LearnedMagics, CauseMagics,
    CellsMagics, SettingsMagics, TracebackMagics, WorkshopMagics,
)  # fmt: skip
"""One class per family; the names of their magics all start with ``flex``."""

HELPERS: tuple[Callable[[InteractiveShell, Desk], Helper], ...]
HELPERS = (Completion, Inspection, EngineCells, OwnersMagics, NearNames, Restart, News)
"""What stands beside the magics in a shell."""

_DESK = "_flexmagic_desk"


def load(shell: InteractiveShell) -> None:
    """Register all magics on a shell, once."""
    if getattr(shell, _DESK, None) is not None:
        return
    setattr(shell, _DESK, desk := Desk(shell))
    for family in FAMILIES:
        shell.register_magics(family(shell, desk))
    shell.input_transformers_cleanup.extend(TRANSFORMS)
    configurables: list[Any] = shell.configurables
    configurables.append(desk.settings)
    desk.helpers = tuple(helper(shell, desk) for helper in HELPERS)
    for helper in desk.helpers:
        helper.add()


def desk_of(shell: InteractiveShell) -> Desk:
    """The desk of a shell on which the magics are loaded."""
    desk: Desk = getattr(shell, _DESK)
    return desk


def unload(shell: InteractiveShell) -> None:
    """Remove the magics and end the session they hold; IPython is as it was before."""
    desk: Desk | None = getattr(shell, _DESK, None)
    if desk is None:
        return
    desk.leave()
    for family in FAMILIES:
        for kind, names in family.magics.items():
            for name in names:
                shell.magics_manager.magics[kind].pop(name, None)
        del shell.magics_manager.registry[family.__name__]
    _forget_parallel_magics(shell, desk.magics_before)
    for transform in TRANSFORMS:
        shell.input_transformers_cleanup.remove(transform)
    configurables: list[Any] = shell.configurables
    configurables[:] = [one for one in configurables if not isinstance(one, (FlexMagic, *FAMILIES))]
    for helper in desk.helpers:
        helper.remove()
    delattr(shell, _DESK)


def _forget_parallel_magics(shell: InteractiveShell, before: set[tuple[str, str]]) -> None:
    """Remove ``%px`` and its kin, which a connection to the engines has registered."""
    manager = shell.magics_manager
    for name in [name for name in manager.registry if name == "ParallelMagics"]:
        if ("registry", name) not in before:
            configurables: list[Any] = shell.configurables
            configurables.remove(manager.registry.pop(name))
    for kind, magics in manager.magics.items():
        for name, magic in list(magics.items()):
            owner = type(getattr(magic, "__self__", None)).__module__
            if owner.startswith("ipyparallel.") and (kind, name) not in before:
                del magics[name]
