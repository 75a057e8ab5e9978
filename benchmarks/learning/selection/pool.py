"""The pool of a seed: of each problem one right response of each of four teachers, two of the target's own family.

P problems for training and H held out, in the order of their responses: a problem's one after the other, as in
`TEACHERS`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.chains.models import Model, Written, write
from benchmarks.learning.chains.policies import SIZES, Recipe, Sizes, made_policy, write_whole
from benchmarks.learning.chains.task import Kind, Problem, is_right, problems


@dataclass(frozen=True)
class Teacher:
    """Who writes candidates."""

    name: str
    recipe: Recipe
    of_target: bool = False  # trained further from the target


@dataclass(frozen=True)
class PoolSizes:
    """How large everything before the arms is."""

    policies: Sizes
    teachers: tuple[Teacher, ...]
    train: int  # problems
    held_out: int
    asked: int
    tries: int  # samples of a teacher for a problem, at most
    batch: int = 256


THREE = Kind((3,), 0.2)
TEACHERS = (
    Teacher("family-columns", Recipe({"columns": 0.9, "short": 0.1}, THREE, 16, 250, None, 1e-3), of_target=True),
    Teacher("family-mixed", Recipe({"columns": 0.5, "words": 0.5}, THREE, 16, 400, None, 1e-3), of_target=True),
    Teacher("mixed", Recipe({"columns": 0.5, "words": 0.4, "short": 0.1}, THREE, 16, 700)),
    Teacher("words", Recipe({"words": 0.9, "columns": 0.1}, THREE, 16, 700)),
)
"""All write steps of 40 to 50 tokens; the family's begin where the target does."""
POOL = PoolSizes(SIZES, TEACHERS, train=2048, held_out=64, asked=4096, tries=6)


@dataclass
class Pool:
    """What the arms of a seed share: [P + H] problems, [(P + H) * teachers] responses."""

    target: Model
    problems: list[Problem]
    responses: list[Written]
    facts: dict[str, Any]


def make_pool(folder: Path, seed: int, sizes: PoolSizes) -> Pool:
    """The pool of a seed, from `folder` where it is there. Raises SystemExit where not all teachers solve enough."""
    policies = sizes.policies
    target = made_policy(folder / "target.pt", policies.target, policies, 10 * seed + 1)
    teachers = []
    for place, teacher in enumerate(sizes.teachers):
        start = target if teacher.of_target else None
        path = folder / f"teacher-{teacher.name}.pt"
        teachers.append(made_policy(path, teacher.recipe, policies, 10 * seed + 3 + place, start))
    path = folder / "selection-pool.json"
    if not path.exists():
        write_whole(path, json.dumps(_written(teachers, seed, sizes)))
    stored = json.loads(path.read_text())
    digest = hashlib.sha256(path.read_bytes())
    for value in target.state_dict().values():
        digest.update(value.numpy().tobytes())
    return Pool(
        target,
        [Problem(start, tuple(changes)) for start, changes, _ in stored["rows"]],
        [Written(text, True) for *_, texts in stored["rows"] for text in texts],
        {"digest": digest.hexdigest()[:16], **stored["counts"]},
    )


def _written(teachers: list[Model], seed: int, sizes: PoolSizes) -> dict[str, Any]:
    """Right responses at temperature 1 of the lengths that are asked; a teacher is asked only what those before it
    have solved."""
    generator = torch.Generator().manual_seed(seed)
    asked = problems(sizes.asked, 1000 + seed, sizes.policies.pool)
    found: list[dict[Problem, str]] = []
    shares = {}
    for teacher, model in zip(sizes.teachers, teachers, strict=True):
        solved, written, right = {}, 0, 0
        for _ in range(sizes.tries):
            for some in _batches([problem for problem in asked if problem not in solved], sizes.batch):
                texts = write(model, [p.prompt for p in some], sizes.policies.longest, 1.0, generator)
                for problem, response in zip(some, texts, strict=True):
                    is_one = response.ended and is_right(response.text, problem)
                    written, right = written + 1, right + is_one
                    if is_one and sizes.policies.shortest <= response.length <= sizes.policies.longest:
                        solved[problem] = response.text
        asked = [problem for problem in asked if problem in solved]
        found.append(solved)
        shares[teacher.name] = round(right / max(1, written), 4)
    wanted = sizes.train + sizes.held_out
    if len(asked) < wanted:
        raise SystemExit(f"all teachers solved {len(asked)} problems, and {wanted} are wanted: {shares}")
    rows = [(p.start, p.changes, [solved[p] for solved in found]) for p in asked[:wanted]]
    return {"counts": {"solved_by_all": len(asked), "asked": sizes.asked, "right": shares}, "rows": rows}


def _batches(items: list[Problem], size: int) -> list[list[Problem]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
