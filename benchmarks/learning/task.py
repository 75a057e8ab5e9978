"""The task: chains of additions and subtractions, and four ways to write a solution down.

A problem is "7+15-4+9=" and its answer 27. Each style ends with "#" and the answer, so that all are judged alike.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

from workers.training.trainers.rewards import exact_match

ANSWER = r"#(-?\d+)"
"""What a response's answer is: the last match counts."""

DRAWS = 100_000
"""So many that give no new problem are the end of a search."""
STYLES = ("steps", "words", "verbose", "terse")


@dataclass(frozen=True)
class Problem:
    """Numbers and signs, from left to right."""

    numbers: tuple[int, ...]
    signs: tuple[int, ...]  # one less than numbers

    @property
    def prompt(self) -> str:
        signs = "".join(f"{'+' if sign > 0 else '-'}{n}" for sign, n in zip(self.signs, self.numbers[1:], strict=True))
        return f"{self.numbers[0]}{signs}="

    @property
    def answer(self) -> int:
        return self.numbers[0] + sum(sign * n for sign, n in zip(self.signs, self.numbers[1:], strict=True))


@dataclass(frozen=True)
class Difficulty:
    """What problems are made of."""

    shortest: int = 3  # numbers in a problem
    longest: int = 5
    largest: int = 29  # number


def problems(
    number: int, seed: int, difficulty: Difficulty = Difficulty(), held_out: bool | None = None
) -> list[Problem]:
    """Different problems, the same ones for the same arguments: of the fifth that is held out for the test, of the
    rest, or of both (None). Raises ValueError where a long search finds no more."""
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    in_vain = 0  # since the newest one
    while len(found) < number:
        in_vain += 1
        if in_vain > DRAWS:
            raise ValueError(f"{number} problems of {difficulty}: {DRAWS} draws gave none beyond {len(found)}")
        length = rng.randint(difficulty.shortest, difficulty.longest)
        numbers = tuple(rng.randint(1, difficulty.largest) for _ in range(length))
        signs = tuple(rng.choice((1, -1)) for _ in range(length - 1))
        problem = Problem(numbers, signs)
        if (held_out is None or is_held_out(problem) == held_out) and problem.prompt not in found:
            found[problem.prompt] = problem
            in_vain = 0
    return list(found.values())


def is_held_out(problem: Problem) -> bool:
    """Whether a problem is for the test alone."""
    return zlib.crc32(problem.prompt.encode()) % 5 == 0


def solution(problem: Problem, style: str) -> str:
    """A right solution: running sums (steps), sentences (words), long ones (verbose), or the answer alone (terse)."""
    if style == "terse":
        return f"#{problem.answer}"
    total, lines = problem.numbers[0], []
    for sign, n in zip(problem.signs, problem.numbers[1:], strict=True):
        after = total + sign * n
        operator, verb = ("+", "add") if sign > 0 else ("-", "take")
        line = {
            "steps": f"{total}{operator}{n}={after};",
            "words": f", {verb} {n}: {after}",
            "verbose": f"now {verb} {n} and get {after}. ",
        }
        lines.append(line[style])
        total = after
    start = {"steps": "", "words": f"{problem.numbers[0]}", "verbose": f"we have {problem.numbers[0]}. "}
    return f"{start[style]}{''.join(lines)}#{total}"


def solved(response: str, problem: Problem) -> bool:
    """Whether a response's answer is right."""
    return exact_match(response, str(problem.answer), re.compile(ANSWER)) > 0
