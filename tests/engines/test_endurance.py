"""Many faults, and many operations in any order: nothing grows, nothing is left behind, values stay right."""

import random
import re
import statistics
import tempfile
from pathlib import Path

import pytest
import torch

from flexmagic import HookError
from flexmagic.errors import StuckError

from .conftest import MODEL, relative
from .fault_cases import CASES, IDS, output

pytestmark = pytest.mark.engines

# --- nothing grows -----------------------------------------------------------------------------------


def resources(session):
    """Threads, open files and private memory in kB of every engine, as Linux tells them."""
    session._cluster.client[:].execute(TIDY, block=True)
    told = []
    for seat in session._calls.ranks.seats:
        process = Path(f"/proc/{seat.pid}")
        memory = re.search(r"RssAnon:\s+(\d+)", (process / "status").read_text())
        threads = len(list((process / "task").iterdir()))
        told.append((threads, len(list((process / "fd").iterdir())), int(memory[1])))
    return told


TIDY = "import ctypes, gc; gc.collect(); ctypes.CDLL(None).malloc_trim(0)"
LAST = 5
NOISE = 6144
"""What the allocator takes and gives in kB, however often groups are made again."""


@pytest.mark.parametrize(
    "cycles", [20, pytest.param(200, marks=[pytest.mark.full, pytest.mark.timeout(1800)])]
)
@pytest.mark.slow
def test_nothing_grows_over_many_cuts_and_rebuilds(session, tmp_path, cycles):
    session.load(MODEL, tp=2)
    before = output(session)
    case = CASES["interrupt: a collective on one rank"]
    seen = []
    for _ in range(cycles):
        assert isinstance(case.provoke(session, tmp_path), KeyboardInterrupt)
        assert torch.equal(output(session), before)
        seen.append(resources(session))
    middle = slice(cycles // 2, cycles // 2 + LAST)
    for rank in range(2):
        threads, files, memory = zip(*(told[rank] for told in seen), strict=True)
        assert max(threads[-LAST:]) <= max(threads[middle])
        assert max(files[-LAST:]) <= max(files[middle])
        assert statistics.median(memory[-LAST:]) - statistics.median(memory[middle]) < NOISE, memory


# --- any order ---------------------------------------------------------------------------------------

SEE = """
def _flex_state():
    import hashlib
    from flexmagic.engine.slot import Slot
    runtime, digest = Slot.runtime, hashlib.sha256()
    for name, parameter in runtime.model.named_parameters():
        local = parameter.detach()
        local = local.to_local() if hasattr(local, "to_local") else local
        digest.update(name.encode() + local.contiguous().view(-1).numpy().tobytes())
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    attached = sum(len(getattr(m, kind)) for m in runtime.model.modules() for kind in kinds)
    graded = sum(p.grad is not None for p in runtime.model.parameters())
    hooks = sorted(key[1:] for key in runtime.hooks)
    return hooks, attached, digest.hexdigest(), graded, runtime.groups.meeting.generation
"""
SITES = [
    "model.layers.0.mlp",
    "model.layers.1.mlp.up_proj",
    "model.layers.2",
    "model.layers.3.self_attn.q_proj",
]
EDITS = {
    "x *= 1.25": lambda x: x * 1.25,
    "x[..., 0] += 0.5": lambda x: torch.cat([x[..., :1] + 0.5, x[..., 1:]], -1),
    "x = x - x.mean(-1, keepdim=True)": lambda x: x - x.mean(-1, keepdim=True),
    "": lambda x: x,
}


class Story:
    """Random operations on a session, and what all of them must leave behind."""

    def __init__(self, session, seed, edited):
        self.session, self.random, self.edited = session, random.Random(seed), edited
        self.hooks, self.runs, self.known, self.said = {}, [], {}, []
        self.view = session._cluster.client[:]
        self.view.execute(SEE, block=True)
        self.load()

    def load(self):
        self.session.load(MODEL, tp=2)
        self.runs = []
        self.start = [state[1:4] for state in self.states()]

    def states(self):
        self.view.execute("_state = _flex_state()", block=True)
        return self.view["_state"]

    def check(self):
        states = self.states()
        assert len({str(state[0]) for state in states}) == 1, "the ranks have different hooks"
        assert len({state[4] for state in states}) == 1, "the ranks are of different generations"
        assert [state[1:4] for state in states] == self.start, (
            "hooks or gradients left, or parameters changed"
        )
        assert [hook.name for hook in self.session.hooks] == list(self.hooks)

    def register(self):
        name, site = self.random.choice("abc"), self.random.choice(SITES)
        body = self.random.choice(list(EDITS))
        self.session.hook(site, body, name=name)
        self.hooks[name] = site, body

    def remove(self):
        if self.hooks:
            name = self.random.choice(list(self.hooks))
            self.session.hooks.remove(name)
            del self.hooks[name]

    def run(self):
        run = self.session.run(IDS, capture=SITES[0])
        logits, key = run.logits.torch(), tuple(self.hooks.values())
        if key not in self.known:
            with self.edited(list(self.hooks.values())) as model:
                truth = model(IDS, use_cache=False).logits.detach()
            assert relative(logits, truth) <= 1e-5
            self.known[key] = logits
        assert torch.equal(logits, self.known[key])
        self.runs = [*self.runs, (run, logits, run[f"{SITES[0]}:output"].torch())][-5:]

    def look(self):
        if self.runs:
            run, logits, activation = self.random.choice(self.runs)
            row = self.random.randrange(len(IDS))
            assert torch.equal(torch.as_tensor(run.logits[row]), logits[row])
            assert torch.equal(torch.as_tensor(run[f"{SITES[0]}:output"][row]), activation[row])

    def fail(self):
        rank, site = self.random.randrange(2), self.random.choice(SITES)
        self.session.hook(site, f"if rank == {rank}: raise ValueError('mine')", name="bad")
        with pytest.raises(HookError, match="mine"):
            self.session.run(IDS)
        self.session.hooks.remove("bad")

    def refuse(self):
        with pytest.raises(HookError, match="syntax"):
            self.session.hook(self.random.choice(SITES), "x *=", name=self.random.choice("abc"))

    def part(self):
        assert isinstance(CASES["different collectives"].provoke(self.session, Path()), StuckError)

    def interrupt(self):
        name = self.random.choice(["endless loop on one rank", "endless loop on all", "sleep on one rank"])
        with tempfile.TemporaryDirectory() as folder:
            error = CASES[f"interrupt: {name}"].provoke(self.session, Path(folder))
        assert isinstance(error, KeyboardInterrupt)

    def detach(self):
        assert self.session.model.unwrap() == self.start[0][0] + self.start[1][0]
        self.load()


OPERATIONS = {
    Story.register: 25, Story.remove: 12, Story.run: 28, Story.look: 15, Story.fail: 12, Story.refuse: 3,
    Story.part: 1, Story.interrupt: 3, Story.detach: 1,
}  # fmt: skip


@pytest.fixture
def edited(one_process):
    """The one-process model under a list of (site, body), in the order in which they act."""

    class Under:
        def __init__(self, hooks):
            self.hooks = hooks

        def __enter__(self):
            self.handles = [
                one_process.get_submodule(site).register_forward_hook(
                    lambda _m, _a, out, e=EDITS[body]: e(out)
                )
                for site, body in self.hooks
            ]
            return one_process

        def __exit__(self, *exc):
            for handle in self.handles:
                handle.remove()

    return Under


@pytest.mark.parametrize(
    ("seed", "length"), [(0, 60), pytest.param(1, 2000, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
def test_any_order_of_operations_leaves_all_as_it_was(session, edited, seed, length):
    story = Story(session, seed, edited)
    start = story.start
    must = [Story.detach, Story.part, Story.interrupt]  # rare ones, at least once each
    chosen = must + story.random.choices(list(OPERATIONS), list(OPERATIONS.values()), k=length - len(must))
    story.random.shuffle(chosen)
    for number, operation in enumerate(chosen):
        story.said.append(operation.__name__)
        try:
            operation(story)
            story.check()
        except BaseException:
            print(f"operation {number} of seed {seed}:", *story.said[-10:])
            raise
    assert story.start == start, "the model that was loaded again is another"
