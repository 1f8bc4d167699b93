"""The live widget's Python side, asked without a browser."""

import time

import numpy as np
import pytest

from flexmagic.errors import ClusterError
from flexmagic.view import protocol
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.differ import difference
from flexmagic.view.picture import Look
from flexmagic.view.pieces import split
from flexmagic.view.widget import TensorView


def source(array, **facts):
    return ArraySource(array, info_of(array, **facts))


class Asked:
    """A view whose answers are kept instead of sent."""

    def __init__(self, *args):
        self.view = TensorView(*args)
        self.answers = []
        self.view.send = lambda content, buffers=None: self.answers.append((content, buffers or []))

    def ask(self, **question):
        self.view._answer(self.view, {"view": "v", "id": 1, **question}, [])
        return self.answers[-1]


def noise():
    return np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)


def test_a_look_is_answered_with_codes_and_a_palette():
    content, (codes, palette) = Asked(source(noise(), site="m:output")).ask(kind="look", width=800)
    assert content["kind"] == "picture"
    assert (content["view"], content["id"], content["asked"]) == ("v", 1, "look")
    assert content["panes"][0]["cells"] == [6, 20]
    assert len(codes) == 120
    assert len(palette) == 1024
    assert content["title"] == "m:output"
    assert dict(content["stats"])["values"] == "120"


def test_a_probe_reads_the_picture_its_view_shows_without_moving_data():
    one = source(noise())
    asked = Asked(one)
    asked.ask(kind="look", id=5, width=800)
    moved = one.bytes_moved
    content, _ = asked.ask(kind="probe", picture=5, row=2, col=3)
    assert f"= {noise()[2, 3]!s}" in content["text"]
    assert one.bytes_moved == moved
    assert asked.ask(kind="probe", picture=4, row=2, col=3)[0]["text"] == ""
    assert asked.ask(kind="probe", view="other", picture=5, row=2, col=3)[0]["text"] == ""


def test_a_failed_read_is_a_sentence_and_the_next_one_works():
    class Failing(ArraySource):
        broken = True

        def read(self, index):
            if self.broken:
                raise ClusterError("rank 1 died; %flexcluster recover brings it back\u202e")
            return super().read(index)

    one = Failing(noise())
    asked = Asked(one)
    content, buffers = asked.ask(kind="look", width=800)
    assert content["kind"] == "error"
    assert content["text"] == "rank 1 died; %flexcluster recover brings it back\\u202e"
    assert buffers == []
    one.broken = False
    assert asked.ask(kind="look", width=800)[0]["kind"] == "picture"


def test_a_question_that_waited_too_long_is_dropped():
    asked = Asked(source(noise()))
    asked.ask(kind="look", id=5)
    asked.ask(kind="look", id=3)
    assert len(asked.answers) == 1
    asked.ask(kind="look", id=1, view="another")
    assert len(asked.answers) == 2


def test_nonsense_is_answered_too():
    asked = Asked(source(noise()))
    assert asked.ask(kind="dance")[0]["kind"] == "error"
    asked.ask(kind="look", id=1)
    assert asked.ask(kind="probe", picture=1, row="x", col=None)[0]["kind"] == "error"
    assert asked.ask(kind="probe", picture=1, row=99, col=0)[0]["kind"] == "error"


def test_siblings_are_opened_when_chosen_and_once():
    opened = []

    def open_one():
        opened.append(1)
        return source(noise() * 2, site="other")

    asked = Asked(source(noise(), site="mine"), {"a": open_one, "b": None}, "b")
    assert asked.ask(kind="look")[0]["layers"] == ["a", "b"]
    assert opened == []
    for _ in range(2):
        assert asked.ask(kind="look", layer=0)[0]["title"] == "other"
    assert opened == [1]
    assert asked.ask(kind="look", layer=77)[0]["title"] == "mine"


def test_an_empty_tensor_is_a_sentence():
    content, buffers = Asked(source(np.zeros((0, 3)))).ask(kind="look")
    assert content["empty"] == "This tensor is empty (dim0 has size 0): there is nothing to draw."
    assert buffers == []


class OnRanks(ArraySource):
    """A tensor on ranks that may end."""

    def __init__(self, *args):
        super().__init__(*args)
        self.listeners = []

    def tell_of_endings(self, listener):
        self.listeners.append(listener)


def test_pages_hear_of_ranks_that_end_and_know_whether_they_show_something_of_them():
    x = noise()
    mine = OnRanks(x, info_of(x, pieces=split(x.shape, 1, [10, 0, 10]), missing_ranks=(2,)))
    asked = Asked(mine)
    assert mine.listeners == []
    content, _ = asked.ask(kind="look", width=800)
    assert set(mine.listeners) == {asked.view}
    assert content["ranks"] == [0, 1]
    mine.listeners[0].ranks_ended((1,))
    assert asked.answers[-1] == ({"kind": "ended", "ranks": [1]}, [])
    assert Asked(source(x, pieces=())).ask(kind="look", width=800)[0]["ranks"] is None


def test_both_sides_of_a_comparison_are_listened_to():
    x = noise()
    a, b = OnRanks(x, info_of(x)), OnRanks(x + 1, info_of(x))
    asked = Asked(difference(a, b))
    asked.ask(kind="look", width=800)
    assert set(a.listeners) == set(b.listeners) == {asked.view}


def test_no_trait_holds_data():
    view = TensorView(source(np.zeros((500, 500))))
    state = view.get_state()
    assert len(str({k: v for k, v in state.items() if k not in ("_esm", "_css")})) < 3000
    assert len(state["_esm"]) < 60_000
    assert "import " not in state["_esm"].replace("important", "")
    assert "http" not in state["_esm"]


@pytest.mark.parametrize("width", [None, -5, 10**9, "wide", float("nan")])
def test_a_look_from_a_browser_is_put_right(width):
    look = protocol.read_look(
        {
            "width": width,
            "rows": "x",
            "fixed": {"0": 3, "x": 1, "1": None},
            "row_window": [0.2, 7.5],
            "col_window": [1],
            "limits": [3, 1],
            "scale": "cubic",
        }
    )
    assert look.width in (protocol.NARROWEST, protocol.WIDEST)
    assert look == Look(fixed={0: 3}, row_window=(0, 8), width=look.width)


def test_tiles_stay_below_a_megabyte_and_answers_are_quick():
    big = source(np.random.default_rng(0).normal(size=(3000, 3000)).astype(np.float32))
    asked = Asked(big)
    for question in ({}, {"row_window": [0, 300], "col_window": [0, 700]}):
        before, start = big.bytes_moved, time.perf_counter()
        _, (codes, _) = asked.ask(kind="look", width=2400, **question)
        assert len(codes) <= 1_000_000
        assert big.bytes_moved - before <= 1_000_000
        assert time.perf_counter() - start < 5
