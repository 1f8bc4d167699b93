"""Process groups of models that are gone: found, so that the next model uses them again."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from flexmagic.engine.groups import Groups
from flexmagic.engine.private_groups import GroupSpec, made_groups, used_again
from flexmagic.engine.surveying import everyone


@dataclass
class Spent:
    """Which groups were made for which model of this rank; a user may keep a model that was let go of."""

    _made: list[tuple[weakref.ref[nn.Module] | None, tuple[str, ...]]] = field(default_factory=list)

    def note(self, model: nn.Module | None, names: Sequence[str]) -> None:
        """Groups that were made for a model, or for one that did not come to be."""
        if names:
            self._made.append((None if model is None else weakref.ref(model), tuple(names)))

    def free(self, groups: Groups) -> list[GroupSpec]:
        """The groups of models that no longer exist on any rank; all ranks must ask."""
        gc.collect()
        alive = {name for model, names in self._made if model is not None and model() for name in names}
        mine = {name for _, names in self._made for name in names} - alive
        specs = {spec.name: spec for spec in groups.specs()}
        said = everyone(groups, ({name: specs[name] for name in mine if name in specs}, sorted(specs)))
        free = {name: spec for named, _ in said for name, spec in named.items()}
        agreed = [
            spec for name, spec in free.items()
            if all(name in named for rank, (named, _) in enumerate(said) if rank in spec.ranks)
        ]  # fmt: skip
        return sorted(agreed, key=lambda spec: spec.order)

    @contextlib.contextmanager
    def making(self, groups: Groups) -> Iterator[list[str]]:
        """The names of all groups that a model is made with in the block, used again or made new.

        All ranks must enter it together. If the block fails, the groups are free.
        """
        names: list[str] = []
        with used_again(self.free(groups)) as used:
            try:
                with made_groups() as made:
                    yield names
            except BaseException:
                self.note(None, made)
                raise
        names += [*used, *made]
        self._made = [(model, tuple(n for n in of if n not in used)) for model, of in self._made]
