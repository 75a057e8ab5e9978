"""One way to select on one seed: three passes of SFT over what it keeps, then the same RL for all.

Seed 0 is the pilot, on which the learning rate is chosen; nothing else of it is compared. Each finished arm is one
JSON file in WORK/arms, each learning rate that was tried one in WORK/rates; what is there is not made again.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning.chains.measures import (
    Evaluation,
    EvaluationSizes,
    held_out_nll,
    made_once,
    rl_along,
    skill,
    summed,
)
from benchmarks.learning.chains.models import Model
from benchmarks.learning.chains.task import problems
from benchmarks.learning.chains.training import RlSizes, Rows, SftSizes, sft
from benchmarks.learning.selection.choosing import SCORED, STEP_END, kept
from benchmarks.learning.selection.pool import POOL, Pool, PoolSizes, make_pool
from grape_service.rows.ragged import Int64s

PILOT = 0


@dataclass(frozen=True)
class Arm:
    """What is kept of each problem's candidates: once, or again under the model that each pass of SFT starts from."""

    name: str
    method: str
    again: bool = False


RANDOM = Arm("random", "random")
ARMS = (
    RANDOM,
    Arm("grape", "grape"),
    Arm("steps", "steps"),
    Arm("local", "local"),
    Arm("rsr", "rsr"),
    Arm("all", "all"),
    Arm("grape-again", "grape", again=True),
    Arm("random-again", "random", again=True),
)


@dataclass(frozen=True)
class Plan:
    """Everything that plan-3.md fixes in numbers."""

    pool: PoolSizes
    sft: SftSizes
    passes: int
    rl: RlSizes
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    rl_problems: int
    tests: EvaluationSizes


PLAN = Plan(
    pool=POOL,
    sft=SftSizes(),
    passes=3,
    rl=RlSizes(steps=120),
    seeds=(1, 2, 3, 4, 5),
    rates=(3e-4, 1e-3, 3e-3),
    rl_problems=2000,
    tests=EvaluationSizes(problems=200, pass_problems=32, drift_answers=128, max_tokens=220),
)


class Selections:
    """A folder with the policies and pools of the seeds, rates and results."""

    arms = ARMS

    def __init__(self, folder: Path, plan: Plan):
        self.folder = folder
        self.plan = plan
        self.evaluation = Evaluation(plan.pool.policies.pool, plan.tests)
        self._pool: tuple[int, Pool] | None = None

    def pool(self, seed: int) -> Pool:
        """What the arms of a seed share, made where it is not there."""
        if self._pool is None or self._pool[0] != seed:
            self._pool = (seed, make_pool(self.folder / f"seed-{seed}", seed, self.plan.pool))
        return self._pool[1]

    def digest(self, seed: int) -> str:
        """Of all that the arms of a seed share, and of what they are: results of one digest belong together."""
        shared = f"{self.plan!r} {ARMS!r} {STEP_END} {self.pool(seed).facts['digest']}"
        return hashlib.sha256(shared.encode()).hexdigest()[:16]

    def start(self, seed: int) -> dict[str, Any]:
        """What the target of a seed can do before any training, and what each method keeps of its pool."""
        return made_once(self.folder / "arms" / f"start-{seed}.json", lambda: self._start(seed))

    def tried_rates(self, _: Iterable[Arm] = ()) -> Iterator[dict[str, Any]]:
        """Every learning rate: all arms have the same."""
        return (self.tried_rate(rate) for rate in self.plan.rates)

    def tried_rate(self, rate: float) -> dict[str, Any]:
        """Held-out loss of one at random with a learning rate on the pilot."""
        return made_once(self.folder / "rates" / f"random-{rate:g}.json", lambda: self._tried_rate(rate))

    def rate(self) -> float:
        """The learning rate of all arms: that of the smallest held-out loss on the pilot."""
        return min(self.tried_rates(), key=lambda one: one["held_out"])["rate"]

    def result(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Results of an arm and seed: from its file, or made now."""
        return made_once(self.folder / "arms" / f"{arm.name}-{seed}.json", lambda: self._result(arm, seed))

    def _start(self, seed: int) -> dict[str, Any]:
        pool = self.pool(seed)
        prompts, texts = self._candidates(pool)
        of_each = len(self.plan.pool.teachers)
        chosen = {
            name: kept(name, pool.target, prompts, texts, of_each, np.random.default_rng(seed)) for name in SCORED
        }
        return {
            "seed": seed,
            **pool.facts,
            "digest": self.digest(seed),
            "skill": skill(pool.target, self.evaluation, None),
            "kept": {name: self._described(texts, rows) for name, rows in chosen.items()},
            "same_as_grape": {name: round(float((rows == chosen["grape"]).mean()), 4) for name, rows in chosen.items()},
        }

    def _tried_rate(self, rate: float) -> dict[str, Any]:
        model, found = self._sft(RANDOM, PILOT, rate)
        found = {"arm": RANDOM.name, "rate": rate, "held_out": self._held_out(model, PILOT), **found["sft"]}
        return {**found, "digest": self.digest(PILOT)}

    def _result(self, arm: Arm, seed: int) -> dict[str, Any]:
        started, rate = time.process_time(), self.rate()
        model, found = self._sft(arm, seed, rate)
        before, held_out = copy.deepcopy(model), partial(self._held_out, seed=seed)
        asked = problems(self.plan.rl_problems, 4000 + seed, self.plan.pool.policies.pool)
        return {
            "arm": arm.name,
            "seed": seed,
            "digest": self.digest(seed),
            "rate": rate,
            **found,
            "held_out": held_out(model),
            "after_sft": skill(model, self.evaluation, None),
            "rl": rl_along(model, before, asked, seed, self.plan.rl, self.evaluation, held_out),
            "cpu_seconds": round(time.process_time() - started),
        }

    def _candidates(self, pool: Pool) -> tuple[list[str], list[str]]:
        """Prompts and texts of all candidates for training."""
        of_each = len(self.plan.pool.teachers)
        number = self.plan.pool.train * of_each
        prompts = [problem.prompt for problem in pool.problems[: self.plan.pool.train] for _ in range(of_each)]
        return prompts, [response.text for response in pool.responses[:number]]

    def _sft(self, arm: Arm, seed: int, rate: float) -> tuple[Model, dict[str, Any]]:
        """Passes of one schedule each, so that arms that select again differ in what they select alone; `all` sees a
        part of its rows in each."""
        pool, plan = self.pool(seed), self.plan
        prompts, texts = self._candidates(pool)
        model, metrics, described = copy.deepcopy(pool.target), [], []
        rng = np.random.default_rng(seed)
        rows = np.empty(0, dtype=np.int64)
        for number in range(plan.passes):
            if number == 0 or arm.again:
                rows = kept(arm.method, model, prompts, texts, len(plan.pool.teachers), rng)
            part = np.array_split(rows, plan.passes)[number] if arm.method == "all" else rows
            described.append(self._described(texts, part))
            responses = [pool.responses[row] for row in part]
            ones = [np.ones(response.length) for response in responses]
            trained = Rows([prompts[row] for row in part], responses, ones, ones)
            metrics += sft(model, trained, None, rate, plan.passes * seed + number, plan.sft)
        return model, {"sft": summed(metrics), "kept": described}

    def _described(self, texts: list[str], rows: Int64s) -> dict[str, Any]:
        """Whose responses were kept, and how long they are."""
        names = [teacher.name for teacher in self.plan.pool.teachers]
        counts = Counter(names[row % len(names)] for row in rows.tolist())
        lengths = np.array([len(texts[row]) for row in rows])
        return {
            "shares": {name: round(counts[name] / len(rows), 4) for name in names},
            "tokens": round(float(lengths.mean()), 1),
        }

    def _held_out(self, model: Model, seed: int) -> float:
        """Over all teachers' responses to problems that were not trained on."""
        pool, of_each = self.pool(seed), len(self.plan.pool.teachers)
        asked = [problem for problem in pool.problems[self.plan.pool.train :] for _ in range(of_each)]
        return held_out_nll(model, asked, pool.responses[self.plan.pool.train * of_each :])
