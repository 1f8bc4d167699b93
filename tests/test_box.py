"""What a guest's code can do in its box, and what ends there."""

import contextlib
import io
import itertools
import os
import random
import select
import signal
import threading
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch

from flexmagic.engine import box as boxes
from flexmagic.engine.box import BoxedError, Boxes
from flexmagic.engine.box_walls import Room, available
from flexmagic.engine.box_words import DTYPES, BoxError, Placed, placed
from flexmagic.engine.code import failure, from_text
from flexmagic.errors import HookError

pytestmark = pytest.mark.skipif(bool(available()), reason=available() or "boxes can be made")


@pytest.fixture(scope="module")
def made():
    found = Boxes(Room(seconds=10, memory=256 << 20))
    yield found
    found.end()


@pytest.fixture
def run(made):
    """Run a hook's text in a box; returns what it left, what it saved, and what it printed."""
    names = {"site": "layers.0", "index": 0, "step": 0, "rank": 1}
    contexts = {}

    def running(text, x=None, *, owner="ann", run=1, name="h"):
        x = torch.arange(12.0).reshape(3, 4) if x is None else x
        source = from_text(name, abs(hash(text)), text, owner=owner)
        ctx, said = contexts.setdefault((owner, run), {}), io.StringIO()
        with contextlib.redirect_stdout(said):
            left = made.hook(source)({"x": x, "ctx": ctx, **names})
        return left, ctx, said.getvalue()

    return running


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_goes_in_and_comes_out(run, dtype):
    x = torch.arange(6).reshape(2, 3).to(DTYPES[dtype])
    before = x.clone()
    left, _, _ = run("x[0] = x[1].clone()", x)
    assert left.dtype == x.dtype
    assert left.tolist() == x[1].expand(2, 3).tolist()
    assert x.tolist() == before.tolist()  # a copy went in


@pytest.mark.parametrize(
    ("text", "made_of"),
    [
        ("x *= 2", lambda x: x * 2),
        ("return x + 1", lambda x: x + 1),
        ("x = x.flip(0)", lambda x: x.flip(0)),
        ("x = x.T.contiguous().T", lambda x: x),
        ("x = x.view(-1).roll(1).view(3, 4)", lambda x: x.view(-1).roll(1).view(3, 4)),
        ("x = torch.zeros_like(x).T.contiguous().T", torch.zeros_like),
    ],
)
def test_what_a_hook_leaves_is_what_it_leaves_outside(run, text, made_of):
    x = torch.randn(3, 4)
    assert torch.equal(run(text, x)[0], made_of(x))


def test_one_that_changes_nothing_gives_the_tensor_itself(run):
    x = torch.randn(2, 2)
    left, ctx, said = run("print('mean', float(x.mean()), site, rank); ctx['n'] = [1, 'two', None]", x)
    assert left is x
    assert ctx == {"n": [1, "two", None]}
    assert said == f"mean {float(x.mean())} layers.0 1\n"


def test_what_one_hook_saves_the_next_one_has_in_the_same_run_only(run):
    x = torch.randn(3, 4)
    _, ctx, _ = run("ctx['row'], ctx['low'] = x[1], x[0].bfloat16()", x, run=7)
    assert torch.equal(ctx["row"], x[1])
    assert torch.equal(ctx["low"], x[0].bfloat16())
    left, _, _ = run("x[0] = ctx['row']", x, run=7)
    assert torch.equal(left[0], x[1])
    with pytest.raises(BoxedError, match="row"):
        run("x[0] = ctx['row']", x, run=8)
    with pytest.raises(BoxedError, match="row"):
        run("x[0] = ctx['row']", x, run=7, owner="bob")


def test_random_numbers_are_those_that_the_engine_would_draw(run):
    code = "x = torch.rand(3, 4) + float(np.random.rand()) + random.random()"
    torch.manual_seed(5)
    first = run(f"import random\n{code}")[0]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - hooks may draw from it
    random.seed(5)
    assert torch.equal(first, torch.rand(3, 4) + float(np.random.rand()) + random.random())  # noqa: NPY002
    torch.manual_seed(6)
    assert not torch.equal(run(f"import random\n{code}")[0], first)


def test_an_error_has_the_guests_own_line(run):
    with pytest.raises(BoxedError, match="undefined") as caught:
        run("x *= 2\nx += undefined + 1")
    source = from_text("h", 1, "x *= 2\nx += undefined + 1")
    found = failure(0, caught.value, source.filename, site="layers.0", source=source)
    assert (found.kind, found.line, found.text) == ("NameError", 2, "x += undefined + 1")
    assert found.text[slice(*found.columns)] == "undefined"
    assert "NameError" in found.trace
    with pytest.raises(BoxedError, match=r"x changed from float32\[3, 4\]"):
        run("x = x[:2]")
    with pytest.raises(BoxedError, match=r"SystemExit|7"):
        run("raise SystemExit(7)")
    assert torch.equal(run("x *= 2")[0], torch.arange(12.0).reshape(3, 4) * 2)


@pytest.mark.parametrize(
    "text",
    [
        "import os\nif os.system('true'): raise PermissionError",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.fork()",
        "import os\nos.execv('/bin/true', ['true'])",
        "import threading\nthreading.Thread(target=print).start()",
        "import socket\nsocket.socket()",
        "open('/etc/hostname')",
        "open('left', 'w')",
        "import os\nos.listdir('/')",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.memfd_create('m')",
        "import os\nos.stat('/etc/hostname')",
        "import ctypes\nif ctypes.CDLL(None).ptrace(0, 0, 0, 0) < 0: raise PermissionError",
        "import ctypes\nif ctypes.CDLL(None).socket(2, 1, 0) < 0: raise PermissionError",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import os\nos.setuid(0)",
        "import os\nos.ftruncate(int(next(f for f in range(3, 50) if _open(f))), 0)",
        "import tensorflow",
        "module.weight",
        "modules['a']",
        "persistent['a'] = 1",
    ],
)
def test_what_code_in_a_box_may_not_do(run, text):
    with pytest.raises(BoxedError):
        run(text)
    assert torch.equal(run("x += 1")[0], torch.arange(12.0).reshape(3, 4) + 1)


def test_nothing_of_the_engine_is_in_there(run, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_ENGINE", "1")
    _, ctx, _ = run("import os\nctx['e'] = list(os.environ)\nctx['u'] = [os.getuid(), os.getgid()]")
    assert set(ctx["e"]) == set(boxes.ENVIRONMENT)
    if os.geteuid() == 0:
        assert ctx["u"] == [65534, 65534]


@pytest.mark.parametrize(
    "text",
    [
        "held = [bytearray(50 << 20) for _ in range(100)]",
        "torch.ones(1 << 40)",
        "x = torch.ones(1 << 28) * 2",
    ],
)
def test_a_flood_of_memory_is_an_error_of_the_hook(run, text):
    with pytest.raises(BoxedError, match=r"(?i)memory|allocat|^$"):
        run(text)
    run("x += 1")


def test_a_crash_ends_the_box_and_the_next_hook_has_a_new_one(run):
    run("kept = 1\nglobals()['kept'] = 1")
    with pytest.raises(BoxedError, match="its process ended"):
        run("import ctypes\nctypes.string_at(0)")
    assert torch.equal(run("x += 1")[0], torch.arange(12.0).reshape(3, 4) + 1)


def test_endless_code_is_ended():
    own = Boxes(Room(seconds=0.5))
    names = {"ctx": {}, "site": "a", "index": 0, "step": 0, "rank": 0, "x": torch.zeros(2)}
    try:
        with pytest.raises(BoxedError, match=r"longer than 0\.5 s: a loop without end"):
            own.hook(from_text("h", 1, "while True: pass", owner="a"))(names)
        assert torch.equal(own.hook(from_text("h", 2, "x += 1", owner="a"))(names), torch.ones(2))
    finally:
        own.end()


def test_an_interrupt_while_a_hook_runs_leaves_no_answer_for_the_next(made):
    names = {"ctx": {}, "site": "a", "index": 0, "step": 0, "rank": 0, "x": torch.zeros(2)}
    made.hook(from_text("h", 1, "x += 1", owner="cut"))(names)

    def interrupt():
        box = made._boxes["cut"]
        while not box._link:
            pass
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    hook = made.hook(from_text("h", 2, "while True: pass", owner="cut"))
    timer = threading.Timer(0.5, interrupt)
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        hook(names)
    timer.join()
    assert time.monotonic() - started < made.room.seconds
    assert torch.equal(made.hook(from_text("h", 3, "x += 3", owner="cut"))(names), torch.full((2,), 3.0))


def test_a_flood_of_print_is_cut(run):
    _, _, said = run("for _ in range(100_000): print('x' * 100)")
    assert len(said) < 21_000
    assert "cut off" in said


ELSEWHERE = """
import json
where, was = [1 << 20, [1 << 40], "float32"], json.dumps
json.dumps = lambda said: was({"printed": "", "edited": True, "saved": {"a": {"tensor": where}}})
"""


@pytest.mark.parametrize(
    "lie",
    [
        "o.sendall(b'\\xff' * 100)",
        "o.sendall(b'\\x02\\x00\\x00\\x00{}')",
        "o.sendall(b'\\x01\\x00\\x00\\x00{')",
        "o.close()",
        "import json\njson.dumps = lambda said: '[' * 100_000",
        'import json\njson.dumps = lambda said: \'{"printed": "", "edited": true, "saved": {"a": 1}}\'',
        ELSEWHERE,
        "import json\nwas = json.dumps\njson.dumps = lambda said: was({'printed': '', 'error': {'kind': 1}})",
    ],
)
def test_a_box_that_says_what_is_none_is_ended(run, lie):
    code = f"import gc\nfor o in gc.get_objects():\n    if type(o).__name__ == 'socket': break\n{lie}"
    with pytest.raises(BoxedError, match="the box of this hook was ended"):
        run(code, owner="liar")
    assert torch.equal(run("x += 1", owner="liar")[0], torch.arange(12.0).reshape(3, 4) + 1)


@pytest.mark.parametrize(
    "said",
    [
        None, [], [0, [1]], [0, 1, "float32"], [0, [1], "object"], [-4, [1], "float32"], [0, [-1], "float32"],
        [0, [True], "float32"], [0, [1.5], "float32"], [2, [1], "float32"], [0, [257], "float32"],
        [1 << 60, [1], "uint8"], [0, [1] * 20, "uint8"],
    ],
)  # fmt: skip
def test_a_tensor_elsewhere_is_none(said):
    with pytest.raises(BoxError):
        Placed.checked(said, 1024)
    assert Placed.checked([4, [2, 3], "float32"], 1024).nbytes == 24


def test_tensors_are_placed_beside_each_other():
    tensors = [torch.zeros(3), torch.zeros(5, 2, dtype=torch.bfloat16), torch.zeros(())]
    found = list(placed(tensors, 10))
    assert all(p.start % 64 == 0 for p in found)
    assert all(a.start + a.nbytes <= b.start for a, b in itertools.pairwise(found))


def test_gradients_and_functions_do_not_go_in(made, run):
    with pytest.raises(BoxedError, match="gradients do not pass"):
        run("x += 1", torch.zeros(2, requires_grad=True))
    function = from_text("h", 1, "x += 1")
    with pytest.raises(HookError, match="not a function"):
        made.hook(type(function)(**{**asdict(function), "limits": function.limits, "function": print}))


def test_guests_have_boxes_of_their_own_which_end_with_them(run, made):
    run("globals()['mine'] = 5", owner="ann")
    run("x *= mine", owner="ann")
    with pytest.raises(BoxedError, match="mine"):
        run("x *= mine", owner="bob")
    made.end("ann")
    with pytest.raises(BoxedError, match="mine"):
        run("x *= mine", owner="ann")
    own = Boxes()
    own.hook(from_text("h", 1, "x += 1", owner="a"))(
        {"ctx": {}, "site": "a", "index": 0, "step": 0, "rank": 0, "x": torch.zeros(2)}
    )
    process = os.dup(own._boxes["a"]._process)
    own.end()
    assert select.select([process], [], [], 30)[0]  # readable once it has ended
    os.close(process)
