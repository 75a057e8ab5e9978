"""One arm on one seed: SFT on the pool with its weights, then the same RL for all on two tasks.

Seed 0 is the pilot, on which learning rates are chosen by held-out loss; its arms see no RL and no test. Each
finished arm is one JSON file in WORK/arms, each learning rate that was tried one in WORK/rates; what is there is
not made again.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from benchmarks.learning.chains.policies import SIZES, Setting, Sizes, make_setting
from benchmarks.learning.chains.task import Kind, problems
from benchmarks.learning.chains.training import RlSizes, Rows, SftSizes, sft
from benchmarks.learning.chains.weights import ARMS, Arm, spread, weights_of

PILOT = 0


@dataclass(frozen=True)
class Plan:
    """Everything that plan-2.md fixes in numbers."""

    sizes: Sizes
    sft: SftSizes
    rl: RlSizes
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    rl_problems: int
    test_problems: int
    pass_problems: int
    drift_answers: int
    shifted: Kind

    def kinds(self) -> dict[str, Kind]:
        """RL's two tasks: as in SFT's pool, and shifted from it."""
        return {"same": self.sizes.pool, "shifted": self.shifted}


PLAN = Plan(
    sizes=SIZES,
    sft=SftSizes(),
    rl=RlSizes(),
    seeds=(1, 2, 3, 4, 5),
    rates=(3e-4, 1e-3, 3e-3),
    rl_problems=2000,
    test_problems=200,
    pass_problems=32,
    drift_answers=128,
    shifted=Kind((3,), 0.8),
)


class Trials:
    """A folder with the policies and pools of the seeds, rates and results."""

    arms = ARMS

    def __init__(self, folder: Path, plan: Plan):
        self.folder = folder
        self.plan = plan
        self.tests = EvaluationSizes(plan.test_problems, plan.pass_problems, plan.drift_answers, plan.rl.max_tokens)
        self._setting: tuple[int, Setting] | None = None

    def setting(self, seed: int) -> Setting:
        """What the arms of a seed share, made where it is not there."""
        if self._setting is None or self._setting[0] != seed:
            self._setting = (seed, make_setting(self.folder / f"seed-{seed}", seed, self.plan.sizes))
        return self._setting[1]

    def digest(self, seed: int) -> str:
        """Of all that the arms of a seed share, and of what they are: results of one digest belong together."""
        shared = f"{self.plan!r} {ARMS!r} {self.setting(seed).facts['digest']}"
        return hashlib.sha256(shared.encode()).hexdigest()[:16]

    def start(self, seed: int) -> dict[str, Any]:
        """What the target of a seed can do before any training, and what its pool and weights are like."""
        return made_once(self.folder / "arms" / f"start-{seed}.json", lambda: self._start(seed))

    def tried_rates(self, arms: Iterable[Arm]) -> Iterator[dict[str, Any]]:
        """Every learning rate of each of the arms."""
        return (self.tried_rate(arm, rate) for arm in arms for rate in self.plan.rates)

    def tried_rate(self, arm: Arm, rate: float) -> dict[str, Any]:
        """Held-out loss of an arm with a learning rate on the pilot."""
        return made_once(self.folder / "rates" / f"{arm.name}-{rate:g}.json", lambda: self._tried_rate(arm, rate))

    def rate(self, arm: Arm) -> float:
        """The arm's learning rate: that of the smallest held-out loss on the pilot."""
        return min(self.tried_rates([arm]), key=lambda one: one["held_out"])["rate"]

    def result(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Results of an arm and seed: from its file, or made now."""
        return made_once(self.folder / "arms" / f"{arm.name}-{seed}.json", lambda: self._result(arm, seed))

    def _start(self, seed: int) -> dict[str, Any]:
        setting = self.setting(seed)
        train = slice(0, self.plan.sizes.train_rows)
        offsets = setting.offsets(train)
        target, behavior = setting.target_logprobs[: offsets[-1]], setting.behavior_logprobs[: offsets[-1]]
        lengths = np.diff(offsets)
        return {
            "seed": seed,
            **setting.facts,
            "digest": self.digest(seed),
            "tokens_a_row": [int(lengths.min()), round(float(lengths.mean()), 1), int(lengths.max())],
            "target_nll": round(-float(target.mean()), 4),
            "teacher_nll": round(-float(behavior.mean()), 4),
            "skills": {name: self.skill(setting.target, kind) for name, kind in self._kinds()},
            "weights": {
                arm.name: spread(weights_of(arm, target, behavior, offsets, seed), offsets, target, behavior)
                for arm in ARMS
                if not arm.online
            },
        }

    def _tried_rate(self, arm: Arm, rate: float) -> dict[str, Any]:
        model, metrics = self._sft(arm, PILOT, rate)
        found = {"arm": arm.name, "rate": rate, "held_out": self._held_out(model, PILOT), **summed(metrics)}
        return {**found, "digest": self.digest(PILOT)}

    def _result(self, arm: Arm, seed: int) -> dict[str, Any]:
        started = time.process_time()
        rate = self.rate(arm)
        model, metrics = self._sft(arm, seed, rate)
        found: dict[str, Any] = {
            "arm": arm.name,
            "seed": seed,
            "digest": self.digest(seed),
            "rate": rate,
            "sft": summed(metrics),
            "held_out": self._held_out(model, seed),
            "after_sft": {name: self.skill(model, kind) for name, kind in self._kinds()},
        }
        for name, kind in self._kinds():
            found[f"rl_{name}"] = self._rl(copy.deepcopy(model), model, kind, seed)
        return {**found, "cpu_seconds": round(time.process_time() - started)}

    def _kinds(self) -> list[tuple[str, Kind]]:
        return list(self.plan.kinds().items())

    def _sft(self, arm: Arm, seed: int, rate: float) -> tuple[Model, list[dict[str, float]]]:
        setting = self.setting(seed)
        train = slice(0, self.plan.sizes.train_rows)
        offsets = setting.offsets(train)
        target, behavior = setting.target_logprobs[: offsets[-1]], setting.behavior_logprobs[: offsets[-1]]
        weights = weights_of(arm, target.astype(np.float64), behavior.astype(np.float64), offsets, seed)
        rows = Rows(
            [problem.prompt for problem in setting.problems[train]],
            setting.responses[train],
            np.split(weights, offsets[1:-1]),
            np.split(behavior, offsets[1:-1]),
        )
        model = copy.deepcopy(setting.target)
        return model, sft(model, rows, arm.config if arm.online else None, rate, seed, self.plan.sft)

    def _rl(self, model: Model, before: Model, kind: Kind, seed: int) -> dict[str, Any]:
        asked = problems(self.plan.rl_problems, 4000 + seed, kind)
        test = Evaluation(kind, self.tests)
        return rl_along(model, before, asked, seed, self.plan.rl, test, lambda one: self._held_out(one, seed))

    def skill(self, model: Model, kind: Kind) -> dict[str, float]:
        """What a model can do on the test problems of a kind."""
        return skill(model, Evaluation(kind, self.tests), None)

    def _held_out(self, model: Model, seed: int) -> float:
        setting = self.setting(seed)
        rows = slice(self.plan.sizes.train_rows, None)
        return held_out_nll(model, setting.problems[rows], setting.responses[rows])
