"""Objects that were replaced are found wherever Python code may keep them."""

import gc
import types
from dataclasses import dataclass

import pytest

from flexmagic.engine.holders import instances_of, replace_everywhere

Group = object
"""As torch's groups, its instances are of no interest to the garbage collector."""


class Plain:
    pass


class Slotted:
    __slots__ = ("group", "unset")


class Derived(Slotted):
    __slots__ = ("more",)


@dataclass(frozen=True)
class Frozen:
    group: Group
    size: int = 1


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    group: Group


def replaced(old):
    new = Group()
    left = replace_everywhere({id(old): (old, new)})
    return new, left


def test_dicts_whether_tracked_or_not_by_key_and_by_value_in_order():
    old = Group()
    bare, tracked, keyed = {"a": 1, "g": old, "z": 2}, {"g": old, "l": []}, {1: 1, old: "old", 2: 2}
    somewhere = [bare, keyed]
    assert not gc.is_tracked(old)
    assert not gc.is_tracked(bare)
    new, left = replaced(old)
    assert left == []
    assert (bare, tracked) == ({"a": 1, "g": new, "z": 2}, {"g": new, "l": []})
    assert somewhere == [bare, keyed]
    assert list(keyed.items()) == [(1, 1), (new, "old"), (2, 2)]


def test_lists_and_sets():
    old = Group()
    listed, kept = [1, old, [old]], {old, 2}
    same = listed
    new, left = replaced(old)
    assert left == []
    assert same == [1, new, [new]]
    assert kept == {new, 2}


def test_closures():
    old = Group()

    def outer(group):
        return lambda: group

    inner = outer(old)
    new, left = replaced(old)
    assert left == []
    assert inner() is new


@pytest.mark.parametrize("kind", [Plain, Slotted, types.SimpleNamespace])
def test_attributes_again_and_again(kind):
    old = Group()
    holder = kind()
    holder.group = old
    for _ in range(3):  # Python keeps attributes in another way once they were asked for
        new, left = replaced(holder.group)
        assert left == []
        assert holder.group is new


def test_slots_of_a_base_class_and_unset_ones():
    old = Group()
    holder = Derived()
    holder.group = holder.more = old
    new, left = replaced(old)
    assert left == []
    assert holder.group is holder.more is new
    assert not hasattr(holder, "unset")


@pytest.mark.parametrize("kind", [Frozen, FrozenSlots])
def test_frozen_dataclasses(kind):
    old = Group()
    holder = kind(old)
    new, left = replaced(old)
    assert left == []
    assert holder.group is new


def test_what_cannot_be_changed_is_told_by_its_kind():
    old = Group()
    pair, frozen = ([], old), frozenset([old])
    _, left = replaced(old)
    assert sorted(left) == ["frozenset", "tuple"]
    assert pair[1] is old
    assert old in frozen


def test_several_at_once_and_none():
    a, b = Group(), Group()
    holder = [a, b, a]
    new_a, new_b = Group(), Group()
    assert replace_everywhere({id(a): (a, new_a), id(b): (b, new_b)}) == []
    assert holder == [new_a, new_b, new_a]
    assert replace_everywhere({}) == []


def test_variables_of_running_functions_are_neither_replaced_nor_told():
    old = Group()
    same = old
    new, left = replaced(old)
    assert left == []
    assert same is old is not new


class Mesh:
    def __init__(self, group):
        self.groups = {"tp": group}


@pytest.mark.parametrize("asked", [False, True])
def test_likely_holders_spare_the_search_through_everything(monkeypatch, asked):
    meshes = [Mesh(Group()), Mesh(Group())]
    if asked:
        assert vars(meshes[0])  # Python keeps attributes in another way from now on
    kept = [mesh.groups["tp"] for mesh in meshes]
    pairs = {id(group): (group, Group()) for group in kept}
    assert not any(gc.is_tracked(mesh.groups) for mesh in meshes)
    assert set(map(id, instances_of(Mesh))) == set(map(id, meshes))
    with monkeypatch.context() as patch:
        patch.setattr(gc, "get_objects", lambda: pytest.fail("all was looked through"))
        assert replace_everywhere(pairs, instances_of(Mesh)) == []
    new = [new for _, new in pairs.values()]
    assert [mesh.groups["tp"] for mesh in meshes] == kept == new


def test_what_the_likely_holders_do_not_have_is_searched_for():
    mesh = Mesh(Group())
    elsewhere = [{"tp": mesh.groups["tp"]}]
    pairs = {id(mesh.groups["tp"]): (mesh.groups["tp"], Group())}
    assert replace_everywhere(pairs, [mesh]) == []
    (_, new) = next(iter(pairs.values()))
    assert mesh.groups["tp"] is elsewhere[0]["tp"] is new
