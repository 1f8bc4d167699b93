"""How many traces share a forward, whose rows are whose, and when values count as the same."""

from types import SimpleNamespace

import pytest
import torch

from flexmagic.client.sweep import Batches, cells_at_once, ends_of, same_values
from flexmagic.engine.sweeping import NoRows, Rows, rows_dim
from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site

IDS = [[1] * 10] * 2


def rule(path, *dims, **more):
    return Rule(Site(path), dims, "float32", Mesh(("tp",), (1,)), (0,), **more)


TOKENS = (Dim("batch"), Dim("seq"))
RULES = {
    r.site: r
    for r in (
        rule("", *TOKENS, Dim("vocab", 100)),
        rule("layers.0", *TOKENS, Dim("feature", 8)),
        rule("layers.0.mlp", *TOKENS, Dim("feature", 32)),
        rule("layers.1", *TOKENS, Dim("feature", 8)),
    )
}


def test_as_many_traces_share_a_forward_as_fit():
    outputs, layer = 2 * 10 * 100 * 4, 2 * 10 * 40 * 4
    one = 2 * max(outputs, layer) + outputs
    assert cells_at_once(RULES, IDS, 5 * one) == 5
    assert cells_at_once(RULES, IDS, 5 * one - 1) == 4
    assert cells_at_once(RULES, IDS, 0) == 1
    assert cells_at_once(RULES, [], 1 << 30) == 1
    meets = {Site("moe"): rule("moe", Dim("batch·seq"), Dim("feature", 8), together=True)}
    assert cells_at_once(RULES | meets, IDS, 1 << 30) == 1


@pytest.mark.parametrize(
    ("sizes", "most", "ends"),
    [
        ((3, 20), 34, [0, 20, 40, 60]),
        ((3, 20), 16, [0, 10, 20, 30, 40, 50, 60]),
        ((2, 7), 4, [0, 3, 7, 10, 14]),
        ((7, 5), 12, [0, 10, 20, 30, 35]),
        ((3, 7), 100, [0, 21]),
        ((9, 7), 100, [0, 21, 42, 63]),
        ((3, 20), 100, [0, 20, 40, 60]),
        ((3,), 1, [0, 1, 2, 3]),
    ],
)
def test_a_forward_ends_where_the_first_names_have_other_values(sizes, most, ends):
    assert ends_of({str(n): range(size) for n, size in enumerate(sizes)}, most) == ends


def test_traces_share_forwards_up_to_their_ends():
    made = []

    def shared(cells, _reuse):
        made.append([cell["n"] for cell in cells])
        return [SimpleNamespace(context={"n": cell["n"]}) for cell in cells], 0

    cells = [{"n": n} for n in range(12)]
    first = SimpleNamespace(context={"n": 0})
    runs = Batches(lambda _cell: first, shared, 5, [0, 4, 8, 12]).run(cells, first)
    assert made == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [run.context["n"] for run in runs] == list(range(12))


@pytest.mark.parametrize("groups", [(2,), (2, 1), (1, 1, 1)])
@pytest.mark.parametrize("per_row", [1, 7])
def test_each_trace_has_its_rows_of_each_data_group(groups, per_row):
    count = 4
    rows = Rows(count, groups)
    whole = torch.cat([torch.tensor([(g, cell)] * n) for g, n in enumerate(groups) for cell in range(count)])
    whole = whole.repeat_interleave(per_row, 0)
    for cell in range(count):
        own = torch.cat([whole[part] for part in rows.parts(len(whole), cell)])
        assert own[:, 1].tolist() == [cell] * sum(groups) * per_row
        assert own[:, 0].tolist() == [g for g, n in enumerate(groups) for _ in range(n * per_row)]


def test_rows_are_along_one_dim_or_there_are_none():
    assert rows_dim(rule("a", *TOKENS)) == 0
    assert rows_dim(rule("a", Dim("dim0", 3), Dim("batch·seq"))) == 1
    assert rows_dim(rule("a", Dim("one", 1), Dim("seq"))) is None
    with pytest.raises(NoRows):
        rows_dim(rule("a", Dim("batch"), Dim("batch")))
    with pytest.raises(NoRows):
        rows_dim(rule("a", *TOKENS, together=True))


X = torch.tensor([1.0, -1000.0])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": X}, {"a": X + 0.009}, True),
        ({"a": X}, {"a": X + 0.02}, False),
        ({"a": X}, {"b": X}, False),
        ({"a": X}, {"a": X.double()}, False),
        ({"a": X}, {"a": X[:1]}, False),
        ({"a": X}, {"a": 3}, False),
        ({"a": torch.tensor([1, 2])}, {"a": torch.tensor([1, 3])}, False),
        ({"a": torch.tensor([torch.nan, 1.0])}, {"a": torch.tensor([torch.nan, 1.0])}, True),
        ({"a": torch.tensor([torch.inf])}, {"a": torch.tensor([1.0])}, False),
        ({"a": 3}, {"a": 3.0}, False),
        ({"a": "x"}, {"a": "x"}, True),
        ({"a": X.bfloat16()}, {"a": (X * 1.01).bfloat16()}, True),
    ],
)
def test_values_are_the_same_up_to_what_their_dtype_can_tell(one, other, same):
    runs = SimpleNamespace(context=one), SimpleNamespace(context=other)
    assert same_values(*runs) is same
