"""Ways to ask: templates per kind of topic, synonyms, and the small accidents of typed text. See ``phrases.txt``."""

from __future__ import annotations

from random import Random

from .lists import lists


def phrases(language: str, name: str) -> tuple[str, ...]:
    """A list of ``phrases.txt``; empty if there is none of that name."""
    return lists("phrases.txt").get(f"{language} {name}", ())


def disturb(question: str, language: str, rng: Random) -> str:
    """``question`` as somebody else would type it: synonyms, remarks, case, punctuation, now and then a slip."""
    if rng.random() < 0.5:
        question = _synonym(question, language, rng)
    question = accompany(question, language, rng)
    if language == "en":
        words = question.split(" ")
        little = [i for i, word in enumerate(words) if word in phrases("en", "little words")]
        if len(words) > 3 and little and rng.random() < 0.15:
            del words[rng.choice(little)]
            question = " ".join(words)
    if rng.random() < 0.08:
        question = _slip(question, rng)
    if rng.random() < 0.1:
        question = _strange(question, language, rng)
    if rng.random() < 0.01:
        question = question.upper()
    return punctuate(question, language, rng)


def accompany(question: str, language: str, rng: Random) -> str:
    """``question``, now and then with words around it that say nothing of its topic: greetings, who asks, and why."""
    if rng.random() < 0.25:
        return rng.choice(phrases(language, "around")).replace("{x}", question)
    if rng.random() < 0.22:
        where = rng.randrange(5)  # before, before, both, behind, behind
        if where <= 2:
            question = rng.choice(phrases(language, "before")) + (" " if language == "en" else "") + question
        if where >= 2:
            question += rng.choice(phrases(language, "behind"))
    return question


def punctuate(question: str, language: str, rng: Random) -> str:
    """``question`` with some choice of capitals and final punctuation."""
    if language == "en":
        if rng.random() < 0.55:
            question = question[:1].upper() + question[1:].replace(" i ", " I ").replace(" i'm ", " I'm ")
        return question + rng.choice(("?", "?", "?", "?", "", "", "", "."))
    return question + rng.choice(("？", "？", "？", "", "", "", "。", "?"))


def _synonym(question: str, language: str, rng: Random) -> str:
    """``question`` with one group of words replaced by another of the same meaning."""
    space = " " if language == "en" else ""
    padded = f"{space}{question}{space}"
    groups = [group.split("|") for group in phrases(language, "synonyms")]
    found = [(member, group) for group in groups for member in group if f"{space}{member}{space}" in padded]
    if not found:
        return question
    member, group = rng.choice(found)
    return padded.replace(f"{space}{member}{space}", f"{space}{rng.choice(group)}{space}", 1).strip()


def _strange(question: str, language: str, rng: Random) -> str:
    """``question`` with one word or character that the model does not know from it: most words of others are such."""
    unit = " " if language == "en" else ""
    parts = question.split(" ") if unit else list(question)
    if len(parts) < 4:
        return question
    word = rng.choice(phrases(language, "strange words"))
    at = rng.randrange(len(parts))
    if rng.random() < 0.5:
        parts[at] = word
    else:
        parts.insert(at, word)
    return unit.join(parts)


def _slip(question: str, rng: Random) -> str:
    """One typing slip: a character left out, doubled or swapped with its neighbour."""
    if len(question) < 6:
        return question
    at = rng.randrange(1, len(question) - 2)
    kind = rng.randrange(3)
    if kind == 0:
        return question[:at] + question[at + 1 :]
    if kind == 1:
        return question[:at] + question[at] + question[at:]
    return question[:at] + question[at + 1] + question[at] + question[at + 2 :]
