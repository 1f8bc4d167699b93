"""Lessons in indirect objects: prompts of which only the last word, the name to say, is asked.

A model that merely reads such sentences among others needs long to find out that the name
said once is the one that follows. These lessons ask for nothing else. They begin with the
training names in the training sentences; then other words take the place of the names, so
that what is learnt is about words said once or twice and not about certain names; and random
words take the place of the sentence, so that it does not hang on a wording either. The
held-out names and templates have no part in any of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import ioi
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from words import HELD_OUT_NAMES, TRAIN_NAMES

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
"""No lesson takes a day for a person."""


@dataclass(frozen=True)
class Level:
    """How far a lesson goes beyond names and sentences; all shares are of the examples or words.

    ``any_word``: examples in which both names become other capitalised words, such as countries.
    ``noise``: one of these shares of the other words, drawn per example, becomes random words.
    ``before``: examples that begin with a few random words.
    """

    any_word: float = 0.0
    noise: tuple[float, ...] = (0.0,)
    before: float = 0.0


@dataclass(frozen=True)
class Lesson:
    """Prompts ``ids`` [rows, length] padded on the right, their ``last`` places and ``answers`` [rows]."""

    ids: Tensor
    last: Tensor
    answers: Tensor


class Teacher:
    """Draws lessons with a seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        held_out = {i for name in HELD_OUT_NAMES for i in (self._token(f" {name}"), self._token(name))}
        self.held_out = torch.tensor(sorted(i for i in held_out if i is not None))
        whole = {
            number: text[1:]
            for text, number in tokenizer.get_vocab().items()
            if text.startswith("Ġ") and text[1:].isalpha() and len(text) > 3 and number not in held_out
        }
        self.capitalised = sorted(n for n, text in whole.items() if text[0].isupper() and text not in DAYS)
        self.lower = sorted(set(whole) - set(self.capitalised))

    def _token(self, text: str) -> int | None:
        """The token of a text that is one, else ``None``."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids[0] if len(ids) == 1 else None

    def example(self, level: Level) -> tuple[list[int], int]:
        """One prompt as token ids and the id of the word that follows."""
        rng = self.rng
        receiver, giver = rng.sample(TRAIN_NAMES, 2)
        template = rng.choice(ioi.SCENES) + rng.choice(ioi.GIVINGS)
        ids = self.tokenizer(ioi.fill(rng, template, receiver, giver, abba=rng.random() < 0.5)).input_ids
        names = {self._token(receiver): 0, self._token(f" {receiver}"): 0}
        names |= {self._token(giver): 1, self._token(f" {giver}"): 1}
        answer = self._token(f" {receiver}")
        if answer is None:
            message = f"{receiver} is no single token"
            raise ValueError(message)
        pair = rng.sample(self.capitalised, 2) if rng.random() < level.any_word else None
        noise = rng.choice(level.noise)
        out = []
        for place, number in enumerate(ids):
            if number in names:
                out.append(pair[names[number]] if pair else number)
            else:
                out.append(rng.choice(self.lower) if place and rng.random() < noise else number)
        if rng.random() < level.before:
            out[1:1] = rng.sample(self.lower, rng.randint(1, 8))
        return out, pair[0] if pair else answer

    def lessons(self, level: Level, rows: int) -> Iterator[Lesson]:
        """Lessons of one level without end."""
        while True:
            made = [self.example(level) for _ in range(rows)]
            ids = torch.full((rows, max(len(row) for row, _ in made)), self.tokenizer.pad_token_id)
            for number, (row, _) in enumerate(made):
                ids[number, : len(row)] = torch.tensor(row)
            last = torch.tensor([len(row) - 1 for row, _ in made])
            yield Lesson(ids, last, torch.tensor([answer for _, answer in made]))
