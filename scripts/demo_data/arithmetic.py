"""Small sums: addition and subtraction of one- and two-digit numbers, and the multiplication table.

Sums of two numbers of two digits are answered in two steps, tens first: ``47 + 38 = 70 + 15 = 85``.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .phrases import phrases

SIGNS = {"+": "+", "-": "-", "*": "×"}
_NAMES = {"+": "plus", "-": "minus", "*": "times"}


@dataclass(frozen=True)
class Sum:
    """``a sign b`` with sign one of +, - and *."""

    a: int
    sign: str
    b: int

    @property
    def value(self) -> int:
        """The result."""
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.sign]

    @property
    def held_out(self) -> bool:
        """Whether this pair of two-digit numbers is kept for the evaluation: one in sixteen.

        Tables up to ten are small enough to be learnt whole, so none of them is kept back.
        """
        if self.sign == "*" or min(self.a, self.b) < 10:
            return False
        return (self.a * 7919 + self.b * 104729 + ord(self.sign) * 31) % 16 == 0

    def answer(self, language: str) -> str:
        """The sentence that answers the question."""
        steps = f"{self.a} {SIGNS[self.sign]} {self.b} ="
        small, large = sorted((self.a, self.b))
        if self.sign == "+" and small >= 10:
            steps += f" {self.a // 10 * 10 + self.b // 10 * 10} + {self.a % 10 + self.b % 10} ="
        elif self.sign == "-" and small >= 10:
            rest = f"{large - small // 10 * 10} - {small % 10}"
            steps += f" {rest} =" if self.a >= self.b else f" -({rest}) ="
        return f"{steps} {self.value}" + ("." if language == "en" else "。")

    def thought(self) -> str:
        """The steps by which a pupil would solve it."""
        a, b = self.a, self.b
        if self.sign == "*":
            return f"{a} × {b} is in the multiplication table: {self.value}."
        if self.sign == "+":
            ones = a % 10 + b % 10
            carry = ones // 10
            steps = f"Ones: {a % 10} + {b % 10} = {ones}, carry {carry}. "
            steps += f"Tens: {a // 10} + {b // 10} + {carry} = {a // 10 + b // 10 + carry}."
            return f"{steps} Together {self.value}."
        if a < b:
            return f"{b} is larger than {a}. {b} - {a} = {b - a}, so the result is {self.value}."
        borrow = int(a % 10 < b % 10)
        steps = f"Ones: {a % 10 + 10 * borrow} - {b % 10} = {a % 10 + 10 * borrow - b % 10}, borrow {borrow}. "
        steps += f"Tens: {a // 10} - {b // 10} - {borrow} = {a // 10 - b // 10 - borrow}."
        return f"{steps} Together {self.value}."


def draw_sum(rng: Random, held_out: bool = False) -> Sum:
    """A random sum; with ``held_out`` one that training never sees, otherwise one that it may see."""
    while True:
        sign = rng.choice("++--*") if not held_out else rng.choice("+-")
        if sign == "*":
            candidate = Sum(rng.randint(0, 10), sign, rng.randint(0, 10))
        else:
            low, top = (10, 99) if held_out or rng.random() < 0.55 else rng.choice(((0, 99), (0, 10), (0, 10)))
            a, b = rng.randint(low, top), rng.randint(low, top)
            if sign == "-" and a < b and rng.random() < 0.8:
                a, b = b, a
            candidate = Sum(a, sign, b)
        if candidate.held_out == held_out:
            return candidate


def ask_sum(item: Sum, language: str, rng: Random, test: bool = False) -> str:
    """A question for ``item``; with ``test`` phrased as training never does."""
    body = rng.choice(phrases(language, _NAMES[item.sign])).format(a=item.a, b=item.b)
    question = rng.choice(phrases(language, "test sum" if test else "sum")).format(s=body)
    if language == "en" and rng.random() < 0.5:
        question = question[:1].upper() + question[1:]
    mark = {"en": ("?", "", ""), "zh": ("？", "", "")}[language]
    return question if question.endswith(("=", "?")) else question + rng.choice(mark)
