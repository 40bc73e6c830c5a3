"""Worked arithmetic in words and digits, made from a seed: the demo's "math" text."""

from __future__ import annotations

import random
from collections.abc import Callable

from loramix.demo.split import is_held_out

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Iris", "Jon", "Kim", "Lea")
_THINGS = ("apples", "books", "coins", "stamps", "marbles", "shells", "tickets", "pencils")
_PLACES = ("ones", "tens", "hundreds", "thousands")

Problem = tuple[str, tuple[int, ...], str]
"""Kind, operands (equal ones make two problems equal), and the worked text."""


def worked_problems(seed: int, count: int = 8) -> str:
    """`count` worked problems: each a question, its steps and its answer, with an empty line between them.

    A held-out seed gives only held-out problems (by kind and operands), another seed only others: no problem occurs on
    both sides, with other names and things either.
    """
    rng = random.Random(seed)
    wanted = is_held_out(f"seed {seed}")
    texts: list[str] = []
    while len(texts) < count:
        kind, operands, text = rng.choice(_KINDS)(rng)
        if is_held_out(f"{kind} {operands}") == wanted:
            texts.append(text)
    return "\n".join(texts)


def _column_addition(a: int, b: int) -> str:
    lines: list[str] = []
    x, y, carry, place = a, b, 0, 0
    while x or y:
        total = x % 10 + y % 10 + carry
        carried = f" + {carry}" if carry else ""
        new_carry = total // 10
        tail = f", carry {new_carry}" if new_carry else ""
        digits = f"{x % 10} + {y % 10}{carried} = {total}"
        lines.append(f"{_PLACES[place].capitalize()}: {digits}, write {total % 10}{tail}.")
        x, y, carry, place = x // 10, y // 10, new_carry, place + 1
    if carry:
        lines.append(f"Write the last carry {carry}.")
    return "\n".join(lines)


def _addition(rng: random.Random) -> Problem:
    a, b = rng.randint(12, 999), rng.randint(12, 999)
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    question = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?"
    return "addition", (a, b), f"Question: {question}\n{_column_addition(a, b)}\nAnswer: {a} + {b} = {a + b} {thing}.\n"


def _subtraction(rng: random.Random) -> Problem:
    a = rng.randint(40, 999)
    b = rng.randint(11, a - 1)
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    tens = b // 10 * 10
    steps = (
        f"Take away {tens} first: {a} - {tens} = {a - tens}.\nThen take away {b % 10}: {a - tens} - {b % 10} = {a - b}."
    )
    question = f"{name} has {a} {thing} and gives {b} away. How many {thing} are left?"
    return "subtraction", (a, b), f"Question: {question}\n{steps}\nAnswer: {a} - {b} = {a - b} {thing}.\n"


def _multiplication(rng: random.Random) -> Problem:
    a, b = rng.randint(12, 99), rng.randint(3, 9)
    tens, ones = a // 10 * 10, a % 10
    steps = (
        f"Split {a} into {tens} and {ones}.\n{tens} * {b} = {tens * b}.\n{ones} * {b} = {ones * b}.\n"
        f"Add the parts: {tens * b} + {ones * b} = {a * b}."
    )
    thing = rng.choice(_THINGS)
    question = f"There are {b} boxes with {a} {thing} in each. How many {thing} are there?"
    return "multiplication", (a, b), f"Question: {question}\n{steps}\nAnswer: {a} * {b} = {a * b} {thing}.\n"


def _division(rng: random.Random) -> Problem:
    b, quotient = rng.randint(3, 12), rng.randint(4, 25)
    rest = rng.randint(0, b - 1)
    a = b * quotient + rest
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    left = f"{rest} left over" if rest else "nothing left over"
    steps = f"{b} * {quotient} = {b * quotient}.\n{a} - {b * quotient} = {rest}."
    question = f"{name} shares {a} {thing} among {b} friends. How many does each friend get?"
    return "division", (a, b), f"Question: {question}\n{steps}\nAnswer: {a} / {b} = {quotient}, {left}.\n"


def _equation(rng: random.Random) -> Problem:
    a, x, b = rng.randint(2, 12), rng.randint(2, 30), rng.randint(1, 60)
    c = a * x + b
    steps = f"Subtract {b}: {a} * x = {c} - {b} = {c - b}.\nDivide by {a}: x = {c - b} / {a} = {x}."
    return "equation", (a, b, c), f"Question: Solve {a} * x + {b} = {c} for x.\n{steps}\nAnswer: x = {x}.\n"


def _percentage(rng: random.Random) -> Problem:
    p, a = rng.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75)), rng.randint(2, 45) * 20
    steps = f"One percent of {a} is {a} / 100 = {a / 100:g}.\n{p} percent is {p} * {a / 100:g} = {p * a / 100:g}."
    return "percentage", (p, a), f"Question: What is {p} percent of {a}?\n{steps}\nAnswer: {p * a / 100:g}.\n"


def _sequence(rng: random.Random) -> Problem:
    start, step = rng.randint(1, 60), rng.randint(2, 25)
    terms = [start + step * i for i in range(5)]
    shown = ", ".join(map(str, terms[:4]))
    steps = (
        f"{terms[1]} - {terms[0]} = {step}, so each number is {step} more than the one before.\n"
        f"{terms[3]} + {step} = {terms[4]}."
    )
    return "sequence", (start, step), f"Question: Which number comes next: {shown}?\n{steps}\nAnswer: {terms[4]}.\n"


_KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    _addition,
    _subtraction,
    _multiplication,
    _division,
    _equation,
    _percentage,
    _sequence,
)
