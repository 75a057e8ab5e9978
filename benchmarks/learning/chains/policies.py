"""The target and the teacher of a seed, and the pool that the teacher writes for it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.learning.chains.models import Model, Shape, Written, batch_of, log_probs_n, read, write
from benchmarks.learning.chains.task import Kind, Problem, is_right, problems, solution
from grape_service.rows.ragged import Int64s, offsets_from_lengths

PASS_AT = 8


@dataclass(frozen=True)
class Recipe:
    """How a policy is made: from right solutions that the task writes."""

    forms: Mapping[str, float]  # shares of the steps
    kind: Kind
    rows: int  # of a step of training
    steps: int  # at most
    stop_at: float | None = None  # pass@8 on problems of its own at which it ends
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Sizes:
    """How large everything before the arms is."""

    shape: Shape
    target: Recipe
    teacher: Recipe
    pool: Kind
    train_rows: int
    held_out_rows: int
    shortest: int  # tokens of a response
    longest: int
    probe: int  # problems on which the target's pass@8 is taken


SIZES = Sizes(
    shape=Shape(),
    target=Recipe({"short": 0.85, "columns": 0.15}, Kind((2, 3), 0.5), rows=32, steps=1000, stop_at=0.4),
    teacher=Recipe({"columns": 0.5, "words": 0.4, "short": 0.1}, Kind((3,), 0.2), rows=16, steps=700),
    pool=Kind((3,), 0.2),
    train_rows=6144,
    held_out_rows=256,
    shortest=100,
    longest=300,
    probe=64,
)
"""Of the experiment."""


@dataclass
class Setting:
    """All that the arms of a seed share: L tokens with loss of all rows, the rows for training first."""

    target: Model
    problems: list[Problem]
    responses: list[Written]
    target_logprobs: np.ndarray  # [L] float32
    behavior_logprobs: np.ndarray  # [L] float32
    facts: dict[str, object] = field(default_factory=dict)

    def offsets(self, rows: slice) -> Int64s:
        """[N + 1] where each of `rows` begins among their tokens."""
        return offsets_from_lengths(np.array([response.length for response in self.responses[rows]]))


def make_setting(folder: Path, seed: int, sizes: Sizes) -> Setting:
    """The setting of a seed, from `folder` where it is there."""
    target = made_policy(folder / "target.pt", sizes.target, sizes, 10 * seed + 1)
    teacher = made_policy(folder / "teacher.pt", sizes.teacher, sizes, 10 * seed + 2)
    path = folder / "pool.json"
    if not path.exists():
        written = _pool(teacher, seed, sizes)
        write_whole(path, json.dumps(written))
    pool = json.loads(path.read_text())
    asked = [Problem(start, tuple(changes)) for start, changes, _ in pool["rows"]]
    responses = [Written(text, True) for _, _, text in pool["rows"]]
    prompts = [problem.prompt for problem in asked]
    digest = hashlib.sha256()
    for name in ("target.pt", "teacher.pt"):
        for value in torch.load(folder / name).values():
            digest.update(value.numpy().tobytes())
    digest.update(path.read_bytes())
    return Setting(
        target,
        asked,
        responses,
        read(target, prompts, responses),
        read(teacher, prompts, responses),
        {"digest": digest.hexdigest()[:16], **pool["counts"]},
    )


def _pool(teacher: Model, seed: int, sizes: Sizes) -> dict[str, object]:
    """One response of the teacher's to a problem, at temperature 1, until enough are right and of the lengths asked."""
    wanted = sizes.train_rows + sizes.held_out_rows
    generator = torch.Generator().manual_seed(seed)
    counts = {"asked": 0, "right": 0}
    rows: list[tuple[int, tuple[int, ...], str]] = []
    everything = problems(8 * wanted, 1000 + seed, sizes.pool)
    while len(rows) < wanted:
        asked = everything[counts["asked"] : counts["asked"] + 256]
        assert asked, "the teacher is too weak to write a pool"
        counts["asked"] += len(asked)
        for problem, response in zip(
            asked, write(teacher, [problem.prompt for problem in asked], sizes.longest, 1.0, generator), strict=True
        ):
            right = response.ended and is_right(response.text, problem)
            counts["right"] += right
            if right and sizes.shortest <= response.length <= sizes.longest:
                rows.append((problem.start, problem.changes, response.text))
    return {"counts": counts, "rows": rows[:wanted]}


def made_policy(path: Path, recipe: Recipe, sizes: Sizes, seed: int, start: Model | None = None) -> Model:
    """A policy from its file, or trained now: from `start`, or from nothing."""
    torch.manual_seed(seed)
    model = Model(sizes.shape)
    if not path.exists():
        if start is not None:
            model.load_state_dict(start.state_dict())
        _pretrain(model, recipe, sizes, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(model.state_dict(), part)
        part.rename(path)
    model.load_state_dict(torch.load(path))
    return model


def _pretrain(model: Model, recipe: Recipe, sizes: Sizes, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(seed)
    pool = problems(20_000, 2000 + seed, recipe.kind)
    probe = problems(sizes.probe, 3000 + seed, sizes.pool)
    upcoming: list[list[tuple[str, Written]]] = []
    for step in range(1, recipe.steps + 1):
        if not upcoming:  # rows of about the same length stand together, so that little is padded
            drawn = [
                (problem.prompt, Written(solution(problem, recipe.forms, rng), True))
                for problem in rng.choices(pool, k=8 * recipe.rows)
            ]
            drawn.sort(key=lambda row: row[1].length)
            upcoming = [drawn[start : start + recipe.rows] for start in range(0, len(drawn), recipe.rows)]
            rng.shuffle(upcoming)
        prompts, responses = zip(*upcoming.pop(), strict=True)
        share = min(1.0, step / 50) * (1 - 0.9 * step / recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * share
        (-log_probs_n(model, batch_of(prompts, responses)).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        is_probed = recipe.stop_at is not None and step % 20 == 0 and step >= 200
        if is_probed and pass_at(model, probe, sizes.longest, seed) >= recipe.stop_at:
            return


def pass_at(model: Model, asked: list[Problem], max_tokens: int, seed: int) -> float:
    """Share of the problems of which one of 8 samples at temperature 1 is right."""
    prompts = [problem.prompt for problem in asked for _ in range(PASS_AT)]
    made = write(model, prompts, max_tokens, 1.0, torch.Generator().manual_seed(seed))
    right = [is_right(made[i].text, problem) for i, problem in enumerate(p for p in asked for _ in range(PASS_AT))]
    return float(np.array(right).reshape(-1, PASS_AT).any(axis=1).mean())


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.rename(path)
