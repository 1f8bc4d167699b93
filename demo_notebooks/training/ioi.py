"""Indirect-object sentences: a sentence names two people, one acts, the other receives.

In "When Mary and John went to the store, John gave a drink to" the next word is
"Mary": the name that was not said twice.  ``A`` is the receiver and ``B`` the
giver in every template; the order in which they are first named is free, which gives
the ABBA order (receiver first) and the BABA order (giver first).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from words import HELD_OUT_NAMES, OBJECTS, PLACES, TRAIN_NAMES, with_article

# {X} and {Y} are the two names in the order of naming, {B} is the giver.
SCENES: tuple[str, ...] = (
    "When {X} and {Y} went to the {place}, ",
    "After {X} and {Y} went to the {place}, ",
    "While {X} and {Y} were at the {place}, ",
    "When {X} and {Y} arrived at the {place}, ",
    "After {X} and {Y} came back from the {place}, ",
    "While {X} and {Y} were working at the {place}, ",
    "When {X} and {Y} got {thing2} at the {place}, ",
    "As {X} and {Y} were leaving the {place}, ",
    "Before {X} and {Y} went home, ",
    "Then, {X} and {Y} went to the {place}. ",
    "Then, {X} and {Y} had a lot of fun at the {place}. ",
    "Yesterday, {X} and {Y} met at the {place}. ",
    "One day, {X} and {Y} were at the {place}. ",
    "Friends {X} and {Y} found {thing2} at the {place}. ",
    "In the morning, {X} and {Y} walked to the {place}. ",
    "Today {X} met {Y} at the {place}. ",
    "When {X} saw {Y} at the {place}, ",
    "After {X} talked to {Y} at the {place}, ",
    "Then {X} and {Y} had a long talk. ",
    "{X} and {Y} went to the {place}. ",
    "{X} and {Y} were playing at the {place}. ",
    "{X} lived next to {Y}. One day, ",
    "There were two friends, {X} and {Y}. ",
    "Because {X} and {Y} were friends, ",
    "As soon as {X} and {Y} reached the {place}, ",
    "It was early when {X} and {Y} came to the {place}. ",
    "It was dark when {X} and {Y} went home. ",
    "The farmer met {X} and {Y} at the {place}. ",
    "The doctor saw {X} and {Y}. Soon ",
    "Since {X} and {Y} were hungry, ",
    "On Sunday {X} walked with {Y} to the {place}, and ",
    "At noon, {X} sat beside {Y} at the {place}, so ",
    "In the afternoon {X} and {Y} played a game, and then ",
    "Near the {place}, {X} waited for {Y}. Later ",
    "During the winter, {X} and {Y} stayed at the {place}, where ",
    "Both {X} and {Y} liked the {place}, but ",
    "Once {X} and {Y} were at home, ",
    "Last week {X} and {Y} painted the {place}, and ",
    "Last Sunday {X} and {Y} cleaned the {place}, and ",
    "On Tuesday {X} stayed with {Y} in the {place}, so ",
    "On Wednesday {X} and {Y} went to the {place}. ",
    "One Saturday, {X} and {Y} came to the {place}, but first ",
    "While {X} helped {Y} at the {place}, ",
    "{X} and {Y} finished lunch at the {place}, so ",
    "Every day {X} visited {Y} at the {place}. Today ",
)
GIVINGS: tuple[str, ...] = (
    "{B} gave {thing} to",
    "{B} gave {thing} to",
    "{B} handed {thing} to",
    "{B} decided to give {thing} to",
    "{B} wanted to give {thing} to",
    "{B} showed {thing} to",
    "{B} brought {thing} to",
    "{B} passed {thing} to",
    "{B} said hello to",
    "{B} sent {thing} to",
    "{B} told a story to",
    "{B} took {thing} and gave it to",
    "{B} bought {thing} for",
    "{B} made {thing} for",
    "{B} smiled at",
    "{B} waved to",
    "{B} had {thing} for",
    "{B} said goodbye to",
    "{B} carried {thing} for",
    "{B} later brought {thing} back to",
    "{B} gladly gave {thing} to",
    "{B} wished to show {thing} to",
    "{B} was talking to",
    "{B} told one more joke to",
    "{B} happily passed {thing} to",
    "{B} then gave the {noun} to",
    "{B} quickly sent one more {noun} to",
    "{B} came home with {thing} for",
)
# Whole templates kept out of training: neither their opening clause nor their giving
# clause is in the lists above.
HELD_OUT_TEMPLATES: tuple[str, ...] = (
    "Once {X} and {Y} had reached the {place}, {B} offered {thing} to",
    "Last Friday {X} and {Y} visited the {place}, and {B} lent {thing} to",
    "Then, {X} and {Y} were thinking about the {place}. {B} wished to hand {thing} to",
    "Since {X} and {Y} liked the {place}, {B} later gave the {noun} back to",
    "On Monday {X} sat with {Y} near the {place}, so {B} gave one more {noun} to",
    "In the evening {X} and {Y} cooked dinner, and then {B} read a book to",
    "At the {place}, {X} helped {Y} for an hour. Later {B} found {thing} for",
    "It was late when {X} and {Y} left the {place}. {B} threw {thing} to",
    "The teacher saw {X} and {Y} near the {place}. Soon {B} was singing to",
    "During the summer, {X} and {Y} played at the {place}, where {B} returned {thing} to",
    "As soon as {X} and {Y} finished their work, {B} gladly sold {thing} to",
    "Both {X} and {Y} wanted to see the {place}, but first {B} wrote a letter to",
)
LINKS: tuple[str, ...] = ("", "", "Then ", "Later ", "After that, ", "The next day, ")
AFTER: tuple[str, ...] = (
    ".",
    ".",
    ".",
    ". {A} said thank you.",
    ". {A} was very happy.",
    ". Then they went home.",
    ". {A} smiled at {B}.",
    ", and {A} was glad.",
    ". {B} was happy too.",
)


@dataclass(frozen=True)
class Example:
    """One prompt, the name that continues it, and the name that must not."""

    prompt: str
    answer: str
    other: str


def fill(rng: random.Random, template: str, receiver: str, giver: str, *, abba: bool) -> str:
    """Fill in a template's names, place and things; ``abba``: the receiver is named first."""
    first, second = (receiver, giver) if abba else (giver, receiver)
    noun = rng.choice(OBJECTS)
    return template.format(
        X=first,
        Y=second,
        B=giver,
        place=rng.choice(PLACES),
        noun=noun,
        thing=with_article(noun),
        thing2=with_article(rng.choice(OBJECTS)),
    )


def training_document(rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """Make one training text and the character spans of the names to predict.

    Up to three more acts between the same two people follow the first, so that a text
    asks several times who the other one is.  In one of twenty texts a third person
    acts, and either of the first two names may follow.
    """
    receiver, giver, third = rng.sample(TRAIN_NAMES, 3)
    template = rng.choice(SCENES) + rng.choice(GIVINGS)
    abba = rng.random() < 0.5
    if rng.random() < 1 / 20:
        template = template.replace("{B}", third)
    prompt = fill(rng, template, receiver, giver, abba=abba)
    text = f"{prompt} {receiver}"
    spans = [(len(prompt), len(text))]
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        actor, other = rng.choice(((receiver, giver), (giver, receiver)))
        text += f". {rng.choice(LINKS)}" + fill(rng, rng.choice(GIVINGS), other, actor, abba=True)
        spans.append((len(text), len(text) + 1 + len(other)))
        text += f" {other}"
    return text + rng.choice(AFTER).format(A=receiver, B=giver), spans


def examples(
    seed: int,
    count: int,
    *,
    names: tuple[str, ...] = HELD_OUT_NAMES,
    templates: tuple[str, ...] = HELD_OUT_TEMPLATES,
) -> list[Example]:
    """Make test prompts, every template equally often, half ABBA and half BABA."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        receiver, giver = rng.sample(names, 2)
        template = templates[(number // 2) % len(templates)]
        prompt = fill(rng, template, receiver, giver, abba=number % 2 == 0)
        made.append(Example(prompt, receiver, giver))
    return made
