"""Questions that the demo model cannot answer, so that it learns to say so. See ``unknown.txt``."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

from .lists import lists


def draw(language: str, rng: Random) -> str:
    """A question about something that the topic files say nothing about, or a few random words."""
    data = lists("unknown.txt")
    letters = ascii_lowercase if language == "en" else data["zh character"]
    sizes = (3, 8) if language == "en" else (2, 6)
    words = ["".join(rng.choice(letters) for _ in range(rng.randint(*sizes))) for _ in range(3)]
    return rng.choice(data[f"{language} question"]).format(
        person=rng.choice(data[f"{language} person"]),
        thing=rng.choice(data[f"{language} thing"]),
        nature=rng.choice(data[f"{language} nature"]),
        nature2=rng.choice(data[f"{language} nature"]),
        place=rng.choice(data[f"{language} place"]),
        event=rng.choice(data["en event"]),
        year=rng.randint(1500, 2025),
        word=words[0],
        word2=words[1],
        word3=words[2],
    )
