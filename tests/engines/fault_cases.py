"""What can go wrong on engines, as data: tests provoke each case, a script times it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexmagic import Session
from flexmagic.client.watching import TimeLimits
from flexmagic.errors import FlexError, HookError, ModelError, StuckError

from .stages import SHARDED, cell

MODEL = Path(__file__).parents[2] / "demo_notebooks" / "model"
IDS = torch.randint(10, 1700, (4, 9), generator=torch.Generator().manual_seed(0))
LOSS = "logits[:, -1].log_softmax(-1)[:, 5].sum()"
MLP, OWN = "model.layers.1.mlp", "model.layers.1.mlp.up_proj"
"""Sites of a tensor-parallel model: one that all ranks have alike, and one of which each has a part."""

LONELY, SHORT = 7, 8
"""First tokens at which the model of :data:`ODD` fails on the last rank, or hands on less there."""

LLAMA = f"""
import torch
from torch import nn
from transformers import LlamaForCausalLM

class Odd(LlamaForCausalLM):
    def forward(self, input_ids=None, **options):
        last = rank == world_size - 1
        self.short = last and int(input_ids[0, 0]) == {SHORT}
        if last and int(input_ids[0, 0]) == {LONELY}:
            raise ValueError("an odd token")
        return super().forward(input_ids=input_ids, **options)

whole = Odd.from_pretrained({str(MODEL)!r}).eval()
whole.model.norm.register_forward_hook(lambda module, args, out: out[:, :-1] if whole.short else out)
"""
ODD = LLAMA + SHARDED + "model = whole\n"
DDP = LLAMA + 'model = nn.parallel.DistributedDataParallel(whole, process_group=mesh["dp"].get_group())\n'
FSDP1 = LLAMA + (
    "from torch.distributed.fsdp import FullyShardedDataParallel\n"
    "model = FullyShardedDataParallel(whole, device_id=torch.device('cpu'), use_orig_params=True)\n"
)

MODELS: dict[str, Callable[[Session], Any]] = {
    "tp": lambda session: session.load(MODEL, tp=session.world_size),
    "fsdp": lambda session: session.load(MODEL, fsdp=session.world_size),
    "pp": lambda session: session.load(MODEL, pp=session.world_size),
    "odd tp": lambda session: session.load_cell(ODD, tp=session.world_size),
    "stages": lambda session: session.load_cell(cell(2), pp=session.world_size),
    "ddp": lambda session: session.load_cell(DDP, dp=session.world_size),
    "fsdp1": lambda session: session.load_cell(FSDP1, fsdp=session.world_size),
    "tp x dp": lambda session: session.load(MODEL, tp=2, dp=2),
    "tp x fsdp": lambda session: session.load(MODEL, tp=2, fsdp=2),
}


def output(session: Session) -> torch.Tensor:
    """What the model returns for the sound input, whole."""
    run = session.run(IDS)
    whole = run[":output.logits" if ":output.logits" in run.sites else ":output"].torch()
    run.release()
    return whole


@dataclass(frozen=True)
class Case:
    """A run that goes wrong: a hook's body at a site, and the error that must come of it.

    ``entered``: the ranks that say in files that they are in the body; once all have, the notebook's
    own process is interrupted. ``first``: the first token of the input. ``alone``: seconds that ranks
    may be in user code while others wait. ``ranks``: those that fail; ``cause``: what the first fails with.
    ``tokens``: how many to generate, instead of one forward.
    """

    body: str = ""
    error: type[BaseException] = HookError
    said: str = ""
    site: str = MLP
    local: bool = False
    backward: str | None = None
    first: int = 10
    alone: float = 1.0
    entered: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    cause: type[BaseException] | None = None
    model: str = "tp"
    tokens: int = 0

    def provoke(self, session: Session, folder: Path) -> BaseException:
        """Make the run and return what it raised."""
        ids = IDS.clone()
        ids[0, 0] = self.first
        mark = folder / "entered"
        sign = f"open({str(mark)!r} + str(rank), 'w').close()\n" if self.entered else ""
        if self.body:
            session.hook(self.site, sign + self.body, name="bad", local=self.local)
        before = session._calls.waiting.limits
        session._calls.waiting.limits = TimeLimits(alone=self.alone)
        try:
            with interrupted_when([mark.with_name(f"entered{rank}") for rank in self.entered]):
                if self.tokens:
                    session.generate(ids, self.tokens)
                else:
                    session.run(ids, backward=self.backward)
        except (FlexError, KeyboardInterrupt) as error:
            return error
        finally:
            session._calls.waiting.limits = before
            if self.body:
                session.hooks.remove("bad")
        msg = "the run went well"
        raise AssertionError(msg)


@contextlib.contextmanager
def interrupted_when(signs: list[Path]) -> Iterator[None]:
    """Interrupt this process, as Ctrl-C does, once all of some files are there."""
    if not signs:
        yield
        return

    def interrupt() -> None:
        while not all(path.exists() for path in signs):
            time.sleep(0.01)  # polling for the engines' own sign, not waiting a fixed time
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        for path in signs:
            path.unlink()


SKIPPED = "import torch.distributed as dist\nif rank == 0: dist.barrier()"
CROSSED = (
    "import torch.distributed as dist\nif rank == 0: dist.barrier()\nelse: dist.recv(torch.zeros(3), src=0)"
)
LOOP = "while rank == 1: pass"
SLEEP = "import time\nif rank == 1: time.sleep(60)"

CASES: dict[str, Case] = {
    "hook raises on rank 0": Case(
        "if rank == 0: raise ValueError('mine')", said="line 1, on rank 0", ranks=(0,), cause=ValueError
    ),
    "hook raises on the last rank": Case(
        "\nif rank == 1: {}['mine']", said="line 2, on rank 1", ranks=(1,), cause=KeyError
    ),
    "hook raises on its own piece": Case(
        "if rank == 1: 1 / 0", said="on rank 1", site=OWN, local=True, ranks=(1,), cause=ZeroDivisionError
    ),
    "all ranks fail differently": Case(
        "raise (ValueError, IndexError, KeyError, OSError)[rank]('mine')",
        said=r"(?s)rank 0.*ValueError: mine.*rank 1.*IndexError: mine",
        ranks=(0, 1),
        cause=ValueError,
    ),
    "hook raises in the backward": Case(
        "if rank == 1: raise ValueError('mine')",
        said="grad_output.*on rank 1",
        site=f"{MLP}:grad_output",
        backward=LOSS,
        ranks=(1,),
        cause=ValueError,
    ),
    "the model raises on one rank": Case(
        error=ModelError, said=r"(?s)on rank 1: ValueError: an odd token.*rank 0: waiting for other ranks",
        first=LONELY, model="odd tp",
    ),
    "the model hands on less on one rank": Case(
        "x.mul_(1)", FlexError, "lm_head", site="lm_head", first=SHORT, model="odd tp"
    ),
    "a collective on one rank": Case(SKIPPED, StuckError, r"(?s)2.*barrier.*rank 1: (waiting|has ended)"),
    "different collectives": Case(CROSSED, StuckError, r"(?s)in barrier.*in recv"),
    "endless loop on one rank": Case(LOOP, StuckError, r"(?s)wait for rank 1.*rank 1: in hook 'bad', line 1"),
    "sleep on one rank": Case(SLEEP, StuckError, r"(?s)wait for rank 1.*rank 1: in hook 'bad', line 2"),
    "interrupt: a collective on one rank": Case(SKIPPED, KeyboardInterrupt, "barrier", entered=(0, 1)),
    "interrupt: different collectives": Case(CROSSED, KeyboardInterrupt, "recv", entered=(0, 1)),
    "interrupt: endless loop on one rank": Case(LOOP, KeyboardInterrupt, "rank 1: in hook", entered=(0, 1)),
    "interrupt: endless loop on all": Case("while True: pass", KeyboardInterrupt, "in hook", entered=(0, 1)),
    "interrupt: sleep on one rank": Case(SLEEP, KeyboardInterrupt, "rank 1: in hook", entered=(0, 1)),
    "interrupt: loop in the backward": Case(
        LOOP, KeyboardInterrupt, "rank 1: in hook", site=f"{MLP}:grad_output", backward=LOSS, entered=(0, 1)
    ),
}  # fmt: skip

STAGE_CASES: dict[str, Case] = {
    "the first stage raises": Case("raise IndexError(3)", said="on rank 0", ranks=(0,), cause=IndexError),
    "the last stage raises": Case(
        "raise ValueError('mine')", said="on rank 1", site="model.layers.3.mlp", ranks=(1,), cause=ValueError
    ),
    "a collective in the first stage": Case(SKIPPED, StuckError, r"(?s)in barrier.*rank 1: (in the|wait)"),
    "a collective in the last stage": Case(
        SKIPPED.replace("0:", "1:"), StuckError, r"(?s)in barrier", site="model.layers.3.mlp"
    ),
    "endless loop in a stage": Case("while True: pass", StuckError, "wait for rank 0"),
    "interrupt: a stage sleeps": Case(
        "import time; time.sleep(60)", KeyboardInterrupt, "rank 0: in hook", entered=(0,)
    ),
}  # fmt: skip
"""What goes wrong in the stages of a pipeline, each of which runs only the hooks at its own layers."""

GENERATION_CASES: dict[str, Case] = {
    "hook raises in step 2": Case(
        "if step == 2 and rank == 1: raise ValueError('mine')",
        said="on rank 1", ranks=(1,), cause=ValueError, tokens=4,
    ),
    "a collective on one rank in step 2": Case(
        SKIPPED.replace("if ", "if step == 2 and "), StuckError, r"(?s)line 2.*barrier", tokens=4
    ),
    "endless loop on one rank in step 2": Case(
        "while step == 2 and rank == 1: pass", StuckError, "wait for rank 1", tokens=4
    ),
}  # fmt: skip
"""What goes wrong in the middle of a generation, when earlier steps have cached keys and values."""
