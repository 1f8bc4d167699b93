"""Process groups as torch keeps them: listed, and made again under their names.

Meshes and sharded modules look their groups up by name, and torch gives names out by counting, so
that a group which is made again at the same count is found by what was made with the first.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d
from torch.nn.parallel import DistributedDataParallel

_world: Any = distributed_c10d._world  # noqa: SLF001 - torch's table of groups, the only one there is


@dataclass(frozen=True)
class GroupSpec:
    """What a process group is made with; ``ranks`` in the group's own order."""

    name: str
    ranks: tuple[int, ...]
    backend: str
    description: str

    @property
    def order(self) -> tuple[int, str]:
        """Groups with counted names in the order in which they were made, then the others."""
        return (int(self.name) if self.name.isdigit() else 1 << 62, self.name)


def known_groups() -> dict[GroupSpec, dist.ProcessGroup]:
    """All groups that this rank is in, in the order in which they were made; the default one first."""
    found = {}
    for group, name in _world.pg_names.items():
        placed = _world.pg_group_ranks[group]
        ranks = tuple(sorted(placed, key=placed.__getitem__))
        found[GroupSpec(str(name), ranks, _backend(group), group.group_desc)] = group
    return dict(sorted(found.items(), key=lambda item: item[0].order))


def _backend(group: dist.ProcessGroup) -> str:
    name: str = _world.pg_map[group][0]
    return name if name != "undefined" else _world.pg_backend_config[group]


def make_group(spec: GroupSpec) -> dist.ProcessGroup | None:
    """Make a group under its name; all ranks call it for the same groups in the same order.

    ``None`` on a rank that is not in it.
    """
    group: Any = None
    if dist.get_rank() in spec.ranks:
        with _named(spec.name):
            group = dist.new_group(
                list(spec.ranks), backend=spec.backend, group_desc=spec.description, sort_ranks=False,
                use_local_synchronization=True,
            )  # fmt: skip
    if spec.name.isdigit():  # what is made next is counted on
        _world.group_count = max(_world.group_count, int(spec.name) + 1)
    made: dist.ProcessGroup | None = group
    return made


def renew_reducers(modules: Iterable[Any]) -> None:
    """Hand the present groups to what reduces gradients in DDP, which keeps its own hold on them in C++."""
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            module._update_process_group(module.process_group)  # noqa: SLF001 - torch's way to change it


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Have torch give the groups made within the block this name, instead of one of its own."""
    module: Any = distributed_c10d
    usual = module._process_group_name  # noqa: SLF001 - names cannot be chosen otherwise
    module._process_group_name = lambda *_args, **_kwargs: name  # noqa: SLF001
    try:
        yield
    finally:
        module._process_group_name = usual  # noqa: SLF001


@contextlib.contextmanager
def made_groups() -> Iterator[list[str]]:
    """The names of the groups that are made within the block, in order, once it has ended, or failed."""
    before = set(_world.pg_names)
    names: list[str] = []
    try:
        yield names
    finally:
        names += [str(name) for group, name in _world.pg_names.items() if group not in before]


@contextlib.contextmanager
def handed_out(names: Sequence[str], lost: Collection[int]) -> Iterator[None]:
    """Within the block, groups that code asks for are those of these names instead of new ones.

    For ranks that come later: what the others made together is there already, in the order of its
    making. Groups among the ``lost`` ranks alone, which no other knew, are made again. Raises
    :class:`RuntimeError` for any other.
    """
    there = {spec.name: (spec, group) for spec, group in known_groups().items()}
    left = [name for name in names if name in there]
    usual = dist.new_group
    made = itertools.count()

    def given(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        wanted = tuple(range(dist.get_world_size())) if ranks is None else tuple(ranks)
        if dist.get_rank() not in wanted:
            return dist.GroupMember.NON_GROUP_MEMBER
        name = next((name for name in left if set(there[name][0].ranks) == set(wanted)), None)
        if name is not None:
            left.remove(name)
            return there[name][1]
        if not set(wanted) <= set(lost):
            msg = f"a process group of ranks {wanted} is asked for, which the other ranks do not have"
            raise RuntimeError(msg)
        with _named(f"{'_'.join(map(str, wanted))} again {next(made)}"):
            return usual(ranks, *args, **(kwargs | {"use_local_synchronization": True}))

    with _new_group(given):
        yield


@contextlib.contextmanager
def used_again(free: Sequence[GroupSpec]) -> Iterator[list[str]]:
    """Within the block, code that asks for a group gets a free one of the same ranks, if there is one.

    Yields the names of those that this rank got. ``free``: groups that nothing uses any more, the same
    on all ranks. Libraries keep what they computed for a mesh and find it by the mesh's form, so its
    groups cannot be destroyed; used again they do not pile up.
    """
    left, used = list(free), list[str]()
    there = {spec.name: group for spec, group in known_groups().items()}
    usual = dist.new_group

    def given(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        wanted = tuple(range(dist.get_world_size())) if ranks is None else tuple(ranks)
        special = args or any(kwargs.get(key) is not None for key in ("backend", "timeout", "pg_options"))
        found = None if special else next((spec for spec in left if spec.ranks == wanted), None)
        if found is None:
            return usual(ranks, *args, **kwargs)
        left.remove(found)
        if dist.get_rank() in wanted:
            used.append(found.name)
        return there[found.name] if dist.get_rank() in wanted else dist.GroupMember.NON_GROUP_MEMBER

    with _new_group(given):
        yield used


@contextlib.contextmanager
def _new_group(given: Callable[..., Any]) -> Iterator[None]:
    """Have code call this instead of ``new_group`` within the block."""
    usual = dist.new_group
    places: tuple[Any, ...] = (dist, distributed_c10d, device_mesh)
    for place in places:
        place.new_group = given
    try:
        yield
    finally:
        for place in places:
            place.new_group = usual
