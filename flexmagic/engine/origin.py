"""What a model was made from, so that the part of a rank that is lost can be made again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from torch import nn

from flexmagic.engine.code import HookSource
from flexmagic.engine.distributed import LoadSpec
from flexmagic.layout.mesh import Mesh


@dataclass(frozen=True)
class Origin:
    """Where a model came from: files, which each rank reads by itself, or a cell that runs on all ranks.

    ``groups``: the names of the process groups made while it was, in order. ``cell``: what
    :func:`~flexmagic.engine.model_verbs.build_model` was given.
    """

    spec: LoadSpec | None = None
    cell: tuple[HookSource, Mesh, Callable[[], nn.Module] | None] | None = None
    groups: tuple[str, ...] = ()

    @property
    def rerun(self) -> bool:
        """Whether all ranks must take part in making it."""
        return self.spec is None

    @property
    def source(self) -> str:
        """Where it came from, for the user."""
        return self.spec.source if self.spec is not None else "a cell"

    def with_groups(self, groups: tuple[str, ...]) -> Self:
        """The same, with the groups of all ranks."""
        return replace(self, groups=groups)


def versions_of(model: nn.Module) -> dict[str, int]:
    """How often each parameter of this rank was written into, by torch's documented counter."""
    return {name: p._version for name, p in model.named_parameters()}  # noqa: SLF001


def written_into(model: nn.Module, before: dict[str, int]) -> tuple[str, ...]:
    """The parameters of this rank that something wrote into since :func:`versions_of` said ``before``."""
    return tuple(name for name, n in versions_of(model).items() if before.get(name, n) != n)
