"""The task: chains of two-digit sums, each step written down with its intermediate results, made and checked here.

A problem is "37+8-5+9=": from left to right, modulo 100, so that a state always has two digits. A step can be written
in three forms; a response is its steps and "#" with the answer, and may change its form from step to step:

    short     37+8=45;
    columns   37+8: 7+8=15, write 5 carry 1, 3+1=4, get 45.
    words     add 8 to 37: ones 15 leave 5, tens 4, so 45.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

END = "\n"
"""What begins a prompt and ends a response."""
ALPHABET = END + "0123456789+-=;:,.# abcdefghijklmnopqrstuvwxyz"
"""A token is one of these characters, its id the place."""
FORMS = ("short", "columns", "words")
DRAWS = 100_000
"""So many that give no new problem are the end of a search."""


@dataclass(frozen=True)
class Problem:
    """A number from 10 to 99 and signed digits that are added to it one after the other."""

    start: int
    changes: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"{self.start}{''.join(f'{change:+d}' for change in self.changes)}="

    @property
    def answer(self) -> str:
        return f"{(self.start + sum(self.changes)) % 100:02d}"


@dataclass(frozen=True)
class Kind:
    """What problems are like."""

    steps: tuple[int, ...]  # how many a problem can have
    minus: float  # share of them that subtract
    largest: int = 5  # digit


def problems(number: int, seed: int, kind: Kind, held_out: bool = False) -> list[Problem]:
    """Different problems, the same ones for the same arguments: of the fifth that is for tests, or of the rest.

    Raises ValueError where a long search finds no more.
    """
    rng = random.Random(f"{seed} {kind} {held_out}")
    found: dict[Problem, None] = {}
    in_vain = 0  # since the newest one
    while len(found) < number:
        in_vain += 1
        if in_vain > DRAWS:
            raise ValueError(f"{number} problems of {kind}: {DRAWS} draws gave none beyond {len(found)}")
        changes = (
            rng.randint(1, kind.largest) * (-1 if rng.random() < kind.minus else 1)
            for _ in range(rng.choice(kind.steps))
        )
        problem = Problem(rng.randint(10, 99), tuple(changes))
        if (zlib.crc32(problem.prompt.encode()) % 5 == 0) == held_out and problem not in found:
            found[problem] = None
            in_vain = 0
    return list(found)


def step_text(state: int, change: int, form: str) -> str:
    """The right text of one step from a state of 0 to 99."""
    sign, digit = ("+" if change > 0 else "-"), abs(change)
    tens, ones = divmod(state, 10)
    after, raw = (state + change) % 100, ones + change
    carry = abs(raw // 10)
    if form == "short":
        return f"{state:02d}{sign}{digit}={after:02d};"
    if form == "columns":
        return (
            f"{state:02d}{sign}{digit}: {ones}{sign}{digit}={raw}, write {raw % 10} carry {carry}, "
            f"{tens}{sign}{carry}={after // 10}, get {after:02d}. "
        )
    verb, joint = ("add", "to") if change > 0 else ("take", "from")
    return f"{verb} {digit} {joint} {state:02d}: ones {raw} leave {raw % 10}, tens {after // 10}, so {after:02d}. "


def solution(problem: Problem, shares: Mapping[str, float], rng: random.Random) -> str:
    """A right response whose steps take their forms by their shares."""
    state, parts = problem.start, []
    for change in problem.changes:
        parts.append(step_text(state, change, rng.choices(list(shares), list(shares.values()))[0]))
        state = (state + change) % 100
    return f"{''.join(parts)}#{problem.answer}"


def is_right(response: str, problem: Problem) -> bool:
    """Whether a response is right in each of its steps and intermediate results, and in its answer: an answer alone
    would be guessed too often."""
    state = problem.start
    for change in problem.changes:
        texts = (step_text(state, change, form) for form in FORMS)
        written = next((text for text in texts if response.startswith(text)), None)
        if written is None:
            return False
        response = response[len(written) :]
        state = (state + change) % 100
    return response == f"#{problem.answer}"
