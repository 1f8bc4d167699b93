"""What each guest of a class does: seeded work, what one process makes of it, and the loop that compares.

    python tests/benchmarks/class_work.py answers FOLDER GUESTS SEED
    python tests/benchmarks/class_work.py guests FOLDER ADDRESS FIRST LAST SEED

The first writes what the shipped model gives in one process for each guest's work, one file for each;
the second is light guests as threads of one process, until a line comes at its standard input.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MODEL = Path(__file__).parents[2] / "demo_notebooks" / "model"
TASKS, BLOCK = 24, 4
"""Different runs of one guest, which it makes again and again, and how many in a row have one hook."""

WRONG = 1e-5
"""Largest difference, relative to the largest value, that is right."""

NAMES = ("Mary", "John", "Anna", "Tom")
ENDS = ("", ", they", ", John gave a drink to", ", Anna wanted to give a book to her friend")
WITHOUT_CODE = {"scale 0.5": "x *= 0.5", "zero": "x *= 0", "clamp -0.1 0.1": "x.clamp_(-0.1, 0.1)"}
"""Hooks without code, and the code that does the same in the one process."""

CODE = (
    "x[:, -1] *= 0.5",
    "x -= x.mean(-1, keepdim=True)",
    "ctx['top'] = x.abs().max()\nx[:, 1:] = x[:, 1:].clamp(-0.2, 0.2)",
)


@dataclass(frozen=True)
class Task:
    """One run under one hook. ``do``: one without code, else ``body`` is sent as it is."""

    prompt: str
    site: str
    do: str
    body: str
    last: bool
    captures: bool

    @property
    def cell(self) -> str:
        """The hook as it is typed in a notebook."""
        if not self.do:
            return f"%%flexhook {self.site} --name mine\n{self.body}"
        token = " --token -1" if self.last else ""
        return f'%flexhook {self.site} --do "{self.do}" --name mine{token}'


def tasks(guest: int, seed: int) -> list[Task]:
    """The work of one guest: of eight hooks, one has code, and of four runs, one looks at a layer, too."""
    draw, out = random.Random(seed * 1000 + guest), list[Task]()
    while len(out) < TASKS:
        site = f"model.layers.{draw.randrange(4)}.{draw.choice(['mlp', 'self_attn.o_proj'])}"
        do, last = draw.choice(list(WITHOUT_CODE)), draw.random() < 0.3
        body = WITHOUT_CODE[do]
        if draw.random() < 1 / 8:
            do, last, body = "", False, draw.choice(CODE)
        for _ in range(BLOCK):
            first, second = draw.choice(NAMES), draw.choice(NAMES)
            prompt = f"When {first} and {second} went to the store{draw.choice(ENDS)}"
            out.append(Task(prompt, site, do, body, last, draw.random() < 1 / 4))
    return out


def write_answers(folder: Path, guests: int, seed: int) -> None:
    """What one process makes of all guests' work: logits ``[1, seq, vocab]``, and the site's value."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(MODEL).eval(),
        AutoTokenizer.from_pretrained(MODEL),
    )
    for guest in range(guests):
        out = {}
        for n, task in enumerate(tasks(guest, seed)):
            left, before = [], []

            def hook(_module, _args, value, task=task, left=left, before=before):
                before.append(float(value.abs().max()))
                value = value.clone()
                exec(task.body, {"x": value[:, -1:] if task.last else value, "ctx": {}})  # noqa: S102 - of above
                left.append(value)
                return value

            handle = model.get_submodule(task.site).register_forward_hook(hook)
            with torch.no_grad():
                out[f"logits{n}"] = model(**tokenizer(task.prompt, return_tensors="pt")).logits.numpy()
            handle.remove()
            out[f"site{n}"], out[f"largest{n}"] = left[0].numpy(), np.array(before[0])
        np.savez(folder / f"guest{guest}.npz", **out)


@dataclass
class Tally:
    """What came of one guest's work, compared with its answers; ``refused``: what was said, and how often."""

    answers: dict[str, np.ndarray]
    work: list[Task]
    right: int = 0
    wrong: int = 0
    looks: int = 0
    worst: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: str | Path, guest: int, seed: int) -> Tally:
        """That of a guest, with nothing done yet."""
        with np.load(Path(folder) / f"guest{guest}.npz") as found:
            return cls(dict(found), tasks(guest, seed))

    def check(self, run, n: int) -> None:
        """Look at what a run left, and compare it."""
        off = self._off(run.logits.numpy(), self.answers[f"logits{n}"])
        self.looks += 1
        if self.work[n].captures:
            largest = float(self.answers[f"largest{n}"])  # before the hook, which may leave little of it
            off = max(off, self._off(run[self.work[n].site].numpy(), self.answers[f"site{n}"], largest))
            self.looks += 1
        self.worst = max(self.worst, off)
        self.right, self.wrong = self.right + (off <= WRONG), self.wrong + (not off <= WRONG)

    @staticmethod
    def _off(got: np.ndarray, wanted: np.ndarray, largest: float = 0.0) -> float:
        if got.shape != wanted.shape:
            return float("inf")
        return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), largest, 1e-30))

    def refuse(self, error: object) -> None:
        """Something was refused or failed, which is none of the work."""
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        self.refused[said] = self.refused.get(said, 0) + 1

    def said(self) -> dict[str, object]:
        """As it is told to whoever sums up."""
        return {
            "right": self.right, "wrong": self.wrong, "looks": self.looks, "worst": self.worst,
            "refused": self.refused,
        }  # fmt: skip


def light_guest(address: str, guest: int, tally: Tally, over: threading.Event) -> None:
    """A guest without a notebook, until it is over."""
    from flexmagic import FlexError
    from flexmagic.engine.declared import Declared
    from flexmagic.workshop.guest import Guest

    me, n = Guest.join(address, f"light{guest}"), 0
    me.printer = lambda _said: None
    while not over.is_set():
        task = tally.work[n % TASKS]
        try:
            if n % BLOCK == 0:
                kind, *numbers = (task.do or "none").split()
                what = Declared(kind, tuple(map(float, numbers))) if task.do else task.body
                me.hook(task.site, what, name="mine", token="-1" if task.last else None)
            tally.check(me.run(task.prompt, capture=task.site if task.captures else ()), n % TASKS)
        except FlexError as error:
            tally.refuse(error)
        n += 1
    me.stop()


def light_guests(folder: Path, address: str, first: int, last: int, seed: int) -> None:
    """Guests from ``first`` to before ``last``; writes what came of it to a file."""
    over = threading.Event()
    tallies = {guest: Tally.of(folder, guest, seed) for guest in range(first, last)}
    threads = [
        threading.Thread(target=light_guest, args=(address, guest, tally, over))
        for guest, tally in tallies.items()
    ]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    over.set()
    for thread in threads:
        thread.join()
    said = {guest: tally.said() for guest, tally in tallies.items()}
    (folder / "light.json").write_text(json.dumps(said))


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "answers":
        write_answers(Path(where), *map(int, rest))
    else:
        light_guests(Path(where), rest[0], *map(int, rest[1:]))
