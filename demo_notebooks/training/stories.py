"""A small grammar of plain English: stories, descriptions, talks and daily scenes.

A template holds choices in square brackets, ``[went|walked] home``, which may nest,
and named slots in braces, which are filled from one cast and scene per document, so
that people, pronouns and things agree from the first sentence to the last.
"""

from __future__ import annotations

import random
import re

import story_templates as t
import words as w

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def expand(rng: random.Random, template: str, slots: dict[str, str]) -> str:
    """Resolve every choice, innermost first, and then fill the slots."""
    while True:
        text = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template, count=1)
        if text == template:
            return text.format(**slots)
        template = text


def _person(rng: random.Random, tag: str, *, name: str, girl: bool) -> dict[str, str]:
    pronouns = ("she", "her", "her") if girl else ("he", "him", "his")
    subject, target, owner = pronouns
    return {
        tag: name,
        f"{tag}_he": subject,
        f"{tag}_He": subject.capitalize(),
        f"{tag}_him": target,
        f"{tag}_his": owner,
        f"{tag}_His": owner.capitalize(),
        f"{tag}_kid": "girl" if girl else "boy",
        f"{tag}_sib": "sister" if girl else "brother",
        f"{tag}_man": "woman" if girl else "man",
        f"{tag}_trait": rng.choice(w.TRAITS),
    }


def _slots(rng: random.Random) -> dict[str, str]:
    slots: dict[str, str] = {}
    taken: set[str] = set()
    for tag in ("A", "B"):
        girl = rng.random() < 0.5
        name = rng.choice([name for name in (w.GIRLS if girl else w.BOYS) if name not in taken])
        taken.add(name)
        slots.update(_person(rng, tag, name=name, girl=girl))
    things = rng.sample(w.OBJECTS, 2)
    places = rng.sample(w.PLACES, 2)
    animals = rng.sample(w.ANIMALS, 2)
    furs = rng.sample(w.FURS, 2)
    adjectives = rng.sample(w.QUALITIES, 2)
    looks = rng.choice((*w.COLORS, *w.SIZES, adjectives[0]))
    slots.update(
        thing=things[0],
        a_thing=w.with_article(things[0]),
        thing2=things[1],
        a_thing2=w.with_article(things[1]),
        adj=looks,
        an_adj=w.with_article(looks),
        adj2=adjectives[1],
        place=places[0],
        place2=places[1],
        animal=animals[0],
        an_animal=w.with_article(animals[0]),
        animal2=animals[1],
        color=rng.choice(w.COLORS),
        fur=furs[0],
        fur2=furs[1],
        size=rng.choice(w.SIZES),
        good=rng.choice(w.GOOD_MOODS),
        bad=rng.choice(w.BAD_MOODS),
        food=rng.choice(w.FOODS),
        drink=rng.choice(w.DRINKS),
        weather=rng.choice(w.WEATHER),
        time=rng.choice(w.TIMES),
        day=rng.choice(w.DAYS),
        season=rng.choice(w.SEASONS),
        job=rng.choice(w.JOBS),
        number=rng.choice(w.NUMBERS),
        game=rng.choice(w.GAMES),
    )
    slots["a_job"] = w.with_article(slots["job"])
    slots["an_other"] = w.with_article(slots["adj2"])
    return slots


def _tidy(text: str) -> str:
    """Drop the double spaces that empty choices leave behind."""
    return re.sub(r" +", " ", text).replace(" ,", ",").replace(" .", ".").strip()


def story(rng: random.Random) -> str:
    """Tell one document: a story of several parts, or one or two short scenes."""
    slots = _slots(rng)
    kind = rng.random()
    if kind < 0.45:
        plot = rng.choice(t.PLOTS)
        parts = (rng.choice(t.MEETINGS) + rng.choice(t.PURPOSES), *plot, rng.choice(t.ENDINGS))
        return _tidy(" ".join(expand(rng, part, slots) for part in parts))
    pool = t.DESCRIPTIONS if kind < 0.66 else t.TALKS if kind < 0.81 else t.DAYS
    return _tidy(expand(rng, rng.choice(pool), slots))
