"""The training mixture: stories, indirect objects, facts and repeated random tokens.

Everything is generated here from word lists with a seeded ``random.Random``; nothing
is downloaded and no text by other authors is used.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ioi
from stories import story

FACTS_FILE = Path(__file__).resolve().parent / "facts.json"


SHARES = (0.44, 0.40, 0.16)
"""Stories, indirect objects and facts among the documents."""


@dataclass(frozen=True)
class Fact:
    """One true statement as a prompt and the word that completes it."""

    relation: str
    subject: str
    answer: str
    prompt: str
    new_wording: str


@dataclass(frozen=True)
class Document:
    """A text and the character spans that weigh more in the loss."""

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)


def load_facts(path: Path = FACTS_FILE) -> list[Fact]:
    """Read the facts that the model is taught and measured on."""
    relations = json.loads(path.read_text(encoding="utf-8"))["relations"]
    return [
        Fact(
            relation=name,
            subject=subject,
            answer=answer,
            prompt=relation["prompt"].format(subject=subject),
            new_wording=relation["new_wording"].format(subject=subject),
        )
        for name, relation in relations.items()
        for subject, answer in relation["facts"].items()
    ]


def _statements(path: Path = FACTS_FILE) -> list[tuple[str, str, str]]:
    relations = json.loads(path.read_text(encoding="utf-8"))["relations"]
    return [
        (statement, subject, answer)
        for relation in relations.values()
        for subject, answer in relation["facts"].items()
        for statement in relation["statements"]
    ]


def fact_document(rng: random.Random, statements: list[tuple[str, str, str]]) -> Document:
    """State one to three facts, each answer marked where it ends its sentence."""
    text = ""
    spans = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        statement, subject, answer = rng.choice(statements)
        text += " " if text else ""
        start = len(text)
        sentence = statement.format(subject=subject, answer=answer)
        text += sentence
        if sentence.endswith(f" {answer}."):
            end = start + len(sentence) - 1
            spans.append((end - len(answer) - 1, end))
    return Document(text, spans)


def documents(seed: int, *, shares: tuple[float, float, float] = SHARES) -> Iterator[Document]:
    """Yield documents without end: shares of stories, indirect objects and facts."""
    rng = random.Random(seed)
    statements = _statements()
    story_share, ioi_share, _ = shares
    while True:
        draw = rng.random()
        if draw < story_share:
            yield Document(story(rng))
        elif draw < story_share + ioi_share:
            text, spans = ioi.training_document(rng)
            yield Document(text, spans)
        else:
            yield fact_document(rng, statements)


def held_out_stories(count: int) -> list[str]:
    """Stories from a seed that training never uses, for the perplexity."""
    rng = random.Random(987_654_321)
    return [story(rng) for _ in range(count)]
