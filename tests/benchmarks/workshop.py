"""A class on one model: is everything right, is it fair, and what does sharing forwards bring?

    python tests/benchmarks/workshop.py --guests 30 --seconds 300

Guests are threads of this process that reach the gateway over its socket, as notebooks do. Each makes runs
of random prompts under random hooks without code, for as long as told, first with each run in a forward of
its own, then with up to ``--together`` in one. Every guest's logits are compared with the same model and
hooks in this process. Printed are runs per minute, Jain's index of runs done, the largest relative
difference, wrong runs (more than 1e-4 off) and refusals.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexmagic import FlexError, Session
from flexmagic.engine.declared import Declared
from flexmagic.workshop.guest import Guest
from flexmagic.workshop.opening import open_workshop
from flexmagic.workshop.rota import jain

MODEL = Path(__file__).parents[2] / "demo_notebooks" / "model"
NAMES = ("Mary", "John", "Anna", "Tom")
WRONG = 1e-4
LIMITS = "runs=1000000 requests=1000000 captured=1GB moved=100GB"


@dataclass
class Tally:
    """What one guest did."""

    runs: int = 0
    worst: float = 0.0
    wrong: int = 0
    refused: list[str] = field(default_factory=list)


class Truth:
    """The same model in this process, one at a time; answers are kept."""

    def __init__(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self._lock, self._known = threading.Lock(), {}

    def logits(self, prompt: str, layer: int, what: Declared) -> torch.Tensor:
        """Logits ``[1, seq, vocab]`` with one hook on a layer's mlp."""
        key = prompt, layer, str(what)
        with self._lock, torch.no_grad():
            if key not in self._known:
                act = what.function()
                module = self._model.get_submodule(f"model.layers.{layer}.mlp")
                handle = module.register_forward_hook(lambda _m, _a, out: act(out, None))
                self._known[key] = self._model(**self._tokenizer(prompt, return_tensors="pt")).logits
                handle.remove()
            return self._known[key]


def work(address: str, seed: int, end: float, tally: Tally, truth: Truth) -> None:
    """One guest until the end: hook, run, look, compare."""
    draw = random.Random(seed)
    guest = Guest.join(address, f"guest{seed}")
    while time.monotonic() < end:
        prompt = f"When {draw.choice(NAMES)} and {draw.choice(NAMES)} went to the store" + draw.choice(
            ("", ", they", ", John gave a drink to")
        )
        layer, what = (
            draw.randrange(4),
            Declared(*draw.choice([("scale", (0.5,)), ("zero", ()), ("clamp", (-0.1, 0.1))])),
        )
        try:
            guest.hook(f"model.layers.{layer}.mlp", what, name="mine")
            got = guest.run(prompt).logits.torch()
        except FlexError as error:
            tally.refused.append(str(error))
            continue
        wanted = truth.logits(prompt, layer, what)
        off = float((got - wanted).abs().max() / wanted.abs().max())
        tally.runs += 1
        tally.worst, tally.wrong = max(tally.worst, off), tally.wrong + (off > WRONG)
    guest.stop()


def measured(session: Session, args: argparse.Namespace, together: int, truth: Truth) -> float:
    """One line of the table; returns runs per minute."""
    with tempfile.TemporaryDirectory() as folder:
        server = open_workshop(
            session.cluster_name,
            guests=args.guests,
            limits=LIMITS,
            together=together,
            journal=Path(folder) / "log",
        )
        address = server.lines[""].split()[-1]
        tallies = [Tally() for _ in range(args.guests)]
        end = time.monotonic() + args.seconds
        threads = [
            threading.Thread(target=work, args=(address, n, end, tally, truth))
            for n, tally in enumerate(tallies)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.close()
        lines = [json.loads(line) for line in (Path(folder) / "log").read_text().splitlines()]
    shared = [line["together"] for line in lines if line["what"] == "run"]
    rate = sum(t.runs for t in tallies) * 60 / args.seconds
    fair = jain([float(t.runs) for t in tallies])
    refused, mean = sum(len(t.refused) for t in tallies), sum(shared) / max(len(shared), 1)
    print(
        f"{together:8} {rate:8.0f} {fair:6.3f} {max(t.worst for t in tallies):9.1e} "
        f"{sum(t.wrong for t in tallies):5} {refused:7} {mean:7.1f}",
        flush=True,
    )
    for text in sorted({text for t in tallies for text in t.refused}):
        print(f"         refused: {text.partition(chr(10))[0]}")
    return rate


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guests", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--together", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    truth = Truth()
    with Session.start(2, oversubscribe=True) as session:
        session.load(MODEL, tp=2)
        print(f"{args.guests} guests, {args.seconds:g} s each; 2 engines, tensor parallel")
        heads = ("together", "runs/min", "jain", "largest", "wrong", "refused", "shared")
        print("{:>8} {:>8} {:>6} {:>9} {:>5} {:>7} {:>7}".format(*heads))
        alone = measured(session, args, 1, truth)
        shared = measured(session, args, args.together, truth)
        print(f"sharing forwards brings {shared / max(alone, 1e-9):.1f} times the runs")


if __name__ == "__main__":
    main()
