"""Where a process says it is, asked from a thread while its main thread works, waits or sleeps."""

import json
import socket
import subprocess
import sys

import pytest

from flexmagic.engine.watch import IDLE, MEETING, MODEL, OTHER, USER, Whereabouts

SCRIPT = """
import concurrent.futures, json, os, sys, threading, time
import torch
import torch.distributed as dist
from torch import nn

from flexmagic.engine import watch
from flexmagic.engine.captures import Captures
from flexmagic.engine.code import HookSource, build
from flexmagic.engine.distributed import Loaded
from flexmagic.engine.exchange import Exchange
from flexmagic.engine.groups import Groups, Meeting, Place
from flexmagic.engine.instrument import ActiveHook, Instrument
from flexmagic.engine.runtime import Runtime
from flexmagic.engine.slot import Slot, verb
from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site

groups = Groups(Place(0, 1, torch.device("cpu")), Meeting("127.0.0.1", int(sys.argv[1]), 1))
Slot.runtime = runtime = Runtime(groups, {})
said = []

class Gate:
    # waiting for it is no Python function, as little as waiting in C++ is
    def __init__(self):
        lock = threading.Lock()
        lock.acquire()
        self.wait, self.is_set, self.set = lock.acquire, lambda: not lock.locked(), lock.release

gate, event = Gate(), threading.Event()

class Waits(nn.Linear):
    def forward(self, x):
        INSIDE
        return super().forward(x)

model = nn.Sequential(nn.Linear(2, 2), Waits(2, 2))
runtime.loaded = Loaded(model, None, Mesh.of(tp=1), "a test")
site = Site("0")
rule = Rule(site, (Dim("batch"), Dim("feature", 2)), "float32", Mesh(("tp",), (1,)), ranks=(0,))

def hooked(body):
    source = HookSource("bad", 1, body, first_line=3)
    call = build(source, {"torch": torch, "dist": dist, "gate": gate, "event": event})
    instrument = Instrument(
        model, {site: rule}, Exchange(groups.own, 0), Captures(), run=("", 1), seed=0,
        hooks=[ActiveHook(source, call, frozenset([site]))], capture=frozenset(),
    )
    with instrument, torch.no_grad():
        model(torch.ones(1, 2))

def look():
    while True:
        place = watch.whereabouts(set())
        if WANTED:
            break
    said.append(place.plain() | {"text_": str(place), "blocked": place.blocked})
    gate.set()
    event.set()

@verb
def run(runtime):
    WORK

threading.Thread(target=look, daemon=True).start()
DO
print(json.dumps(said[-1]))
sys.stdout.flush()
import os; os._exit(0)
"""


def seen(wanted, work="pass", inside="pass", do="reply = run()\nassert reply.error is None, reply"):
    """The first look that is ``wanted``, at a process whose main thread does as told until then."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    code = SCRIPT.replace("WANTED", wanted).replace("INSIDE", inside).replace("WORK", work)
    code = code.replace("DO\n", f"{do}\n")
    done = subprocess.run(
        [sys.executable, "-c", code, str(port)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("body", ["y = 1\nevent.wait()", "y = 1\nwhile not gate.is_set(): pass"])
def test_user_code_is_named_with_hook_line_and_site(body):
    place = seen("place.line == 4", f"hooked({body!r})")
    assert place["kind"] == USER
    assert (place["hook"], place["line"], place["site"]) == ("bad", 4, "0:output")
    assert place["text"] == body.splitlines()[1]
    assert place["text_"] == "in hook 'bad', line 4, at 0:output"
    assert not place["blocked"]


def test_a_lock_in_a_module_of_the_model_is_a_wait_for_others():
    place = seen("place.site == '1' and place.locked", "model(torch.ones(1, 2))", "gate.wait()")
    assert place["kind"] == MODEL
    assert place["what"] == "run"
    assert place["blocked"]
    assert place["text_"] == "in the model at 1"


@pytest.mark.parametrize(
    "wait",
    ["event.wait()", "concurrent.futures.ThreadPoolExecutor().submit(event.wait).result()"],
)
def test_a_wait_for_a_thread_of_its_own_in_a_module_is_no_wait_for_others(wait):
    place = seen("place.site == '1' and place.asleep", "model(torch.ones(1, 2))", wait)
    assert place["kind"] == MODEL
    assert not place["blocked"]


@pytest.mark.parametrize("wait", ["time.sleep(0.5)", "os.read(pipe, 1)"])
def test_a_sleep_or_a_read_in_a_module_is_no_wait_for_others(wait):
    pipe = "import os; pipe, other = os.pipe(); threading.Timer(0.5, os.write, (other, b'x')).start(); "
    place = seen("place.site == '1'", "model(torch.ones(1, 2))", pipe + wait)
    assert not place["blocked"]


def test_cpu_time_of_other_threads_is_told_of_one_that_sleeps():
    hashing = (
        "threading.Thread(target=lambda: [sum(range(10**5)) for _ in iter(gate.is_set, True)]).start(); "
    )
    place = seen(
        "place.site == '1' and place.beside > 0.1", "model(torch.ones(1, 2))", hashing + "gate.wait()"
    )
    assert place["asleep"]
    assert place["seconds"] > 0


def test_work_in_a_module_is_no_wait():
    place = seen("place.site == '1'", "model(torch.ones(1, 2))", "while not gate.is_set(): pass")
    assert place["site"] == "1"
    assert not place["blocked"]


def test_a_lock_outside_of_the_model_is_no_wait_for_others():
    place = seen("place.kind == watch.MODEL and place.locked", "gate.wait()")
    assert (place["site"], place["what"]) == ("", "run")
    assert not place["blocked"]
    assert place["text_"] == "working on run"


def test_gradients_on_their_way_back_are_no_module():
    work = (
        "x = torch.ones(1, 2, requires_grad=True)\n"
        "    y = model(x)\n"
        "    y.register_hook(lambda gradient: gate.wait() and None)\n"
        "    y.sum().backward()"
    )
    place = seen("place.site == watch.BACKWARD and place.locked", work)
    assert place["site"] == "the backward"
    assert place["blocked"]


def test_what_is_no_verb_is_other_code_by_its_line():
    place = seen("place.kind == watch.OTHER and place.locked", do="gate.wait()")
    assert place["what"].startswith("<string>, line ")
    assert not place["blocked"]


MEET = """
import json, sys, threading
import torch
import torch.distributed as dist
from flexmagic.engine import sockets, watch
from flexmagic.engine.groups import Groups, Meeting, Place
from flexmagic.engine.runtime import Runtime
from flexmagic.engine.slot import Slot, verb

rank, port = map(int, sys.argv[1:])
groups = Groups(Place(rank, 2, torch.device("cpu")), Meeting("127.0.0.1", port, 1))
Slot.runtime = Runtime(groups, {})
told = [None, None]
dist.all_gather_object(told, sockets.endpoints())
ranks = set(told[0]) | set(told[1])

@verb
def run(runtime):
    dist.barrier()

def look():
    places = []
    while len(places) < 3:
        place = watch.whereabouts(ranks)
        places = [*places, place] if place.kind == watch.MEETING and place.locked else []
    same = len({place.moved for place in places}) == 1
    print(json.dumps(places[-1].plain() | {"same": same, "shut": sockets.shut(ranks, port)}), flush=True)

if rank == 0:
    looking = threading.Thread(target=look)
    looking.start()
    reply = run()
    looking.join()
    print(json.dumps(str(reply.error)), flush=True)
else:
    sys.stdin.readline()
import os; os._exit(0)
"""


def test_a_barrier_without_the_other_is_a_meeting_and_a_cut_ends_it():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    zero, one = (
        subprocess.Popen(
            [sys.executable, "-c", MEET, str(rank), str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    )  # fmt: skip
    out, _ = zero.communicate(timeout=120)
    one.communicate("\n", timeout=120)
    place, error = map(json.loads, out.splitlines())
    assert (place["kind"], place["what"]) == (MEETING, "barrier")
    assert place["moved"] > 0
    assert place["same"]
    assert place["shut"] > 0
    assert "RuntimeError" in error


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Whereabouts(IDLE), "idle"),
        (Whereabouts(MEETING, "broadcast"), "waiting for other ranks in broadcast"),
        (
            Whereabouts(MEETING, "recv", "a:output", "h", 2),
            "in hook 'h', line 2, at a:output (waiting for other ranks in recv)",
        ),
        (Whereabouts(OTHER, "cell.py, line 3"), "in cell.py, line 3"),
    ],
)
def test_places_read_as_sentences(place, text):
    assert str(place) == text
