"""One arm on one seed: SFT on the pool with its weights, then the same RL for all on two tasks.

Seed 0 is the pilot, on which learning rates are chosen by held-out loss; its arms see no RL and no test. Each
finished arm is one JSON file in WORK/arms, each learning rate that was tried one in WORK/rates; what is there is
not made again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learning.chains.models import Model, Written, read, write
from benchmarks.learning.chains.policies import PASS_AT, SIZES, Setting, Sizes, make_setting, write_whole
from benchmarks.learning.chains.task import Kind, Problem, is_right, problems
from benchmarks.learning.chains.training import RlSizes, Rows, SftSizes, grpo, sft
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


def arm_named(name: str) -> Arm:
    """Of ARMS. Raises SystemExit."""
    for arm in ARMS:
        if arm.name == name:
            return arm
    raise SystemExit(f"there is no arm '{name}'; there are {', '.join(arm.name for arm in ARMS)}")


class Trials:
    """A folder with the policies and pools of the seeds, rates and results."""

    def __init__(self, folder: Path, plan: Plan):
        self.folder = folder
        self.plan = plan
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
        path = self.folder / "arms" / f"start-{seed}.json"
        if not path.exists():
            setting = self.setting(seed)
            train = slice(0, self.plan.sizes.train_rows)
            offsets = setting.offsets(train)
            target, behavior = setting.target_logprobs[: offsets[-1]], setting.behavior_logprobs[: offsets[-1]]
            lengths = np.diff(offsets)
            write_result(
                path,
                {
                    "seed": seed,
                    **setting.facts,
                    "digest": self.digest(seed),
                    "tokens_a_row": [int(lengths.min()), round(float(lengths.mean()), 1), int(lengths.max())],
                    "target_nll": round(-float(target.mean()), 4),
                    "teacher_nll": round(-float(behavior.mean()), 4),
                    "skills": {name: self.skill(setting.target, kind, None) for name, kind in self._kinds()},
                    "weights": {
                        arm.name: spread(weights_of(arm, target, behavior, offsets, seed), offsets, target, behavior)
                        for arm in ARMS
                        if not arm.online
                    },
                },
            )
        return json.loads(path.read_text())

    def tried_rate(self, arm: Arm, rate: float) -> dict[str, Any]:
        """Held-out loss of an arm with a learning rate on the pilot."""
        path = self.folder / "rates" / f"{arm.name}-{rate:g}.json"
        if not path.exists():
            model, metrics = self._sft(arm, PILOT, rate)
            found = {"arm": arm.name, "rate": rate, "held_out": self._held_out(model, PILOT), **_summed(metrics)}
            write_result(path, {**found, "digest": self.digest(PILOT)})
        return json.loads(path.read_text())

    def rate(self, arm: Arm) -> float:
        """The arm's learning rate: that of the smallest held-out loss on the pilot."""
        return min((self.tried_rate(arm, rate) for rate in self.plan.rates), key=lambda one: one["held_out"])["rate"]

    def result(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Results of an arm and seed: from its file, or made now."""
        path = self.folder / "arms" / f"{arm.name}-{seed}.json"
        if path.exists():
            return json.loads(path.read_text())
        started = time.process_time()
        rate = self.rate(arm)
        model, metrics = self._sft(arm, seed, rate)
        found: dict[str, Any] = {
            "arm": arm.name,
            "seed": seed,
            "digest": self.digest(seed),
            "rate": rate,
            "sft": _summed(metrics),
            "held_out": self._held_out(model, seed),
            "after_sft": {name: self.skill(model, kind, None) for name, kind in self._kinds()},
        }
        for name, kind in self._kinds():
            found[f"rl_{name}"] = self._rl(copy.deepcopy(model), model, name, kind, seed)
        found["cpu_seconds"] = round(time.process_time() - started)
        write_result(path, found)
        return found

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

    def _rl(self, model: Model, before: Model, name: str, kind: Kind, seed: int) -> dict[str, Any]:
        along: list[dict[str, Any]] = []
        metrics = grpo(
            model,
            problems(self.plan.rl_problems, 4000 + seed, kind),
            seed,
            self.plan.rl,
            lambda step: along.append(
                {"step": step, **self.skill(model, kind, before), "held_out": self._held_out(model, seed)}
            ),
        )
        return {
            "along": along,
            "rewards": [round(one["reward"], 4) for one in metrics],
            "lengths": [round(one["length"], 1) for one in metrics][:: self.plan.rl.measure_every],
            "grad_norm": round(float(np.mean([one["grad_norm"] for one in metrics])), 4),
            "cpu_seconds": round(sum(one["seconds"] for one in metrics)),
        }

    def skill(self, model: Model, kind: Kind, before: Model | None) -> dict[str, float]:
        """Accuracy of the likeliest answers and pass@8 on problems that nothing was trained on; how far the model's own
        samples are from a model before, in nats a token: an estimate of the KL divergence."""
        plan = self.plan
        asked = problems(plan.test_problems, 5000, kind, held_out=True)
        likeliest = write(model, [problem.prompt for problem in asked], plan.rl.max_tokens, 0.0)
        sampled = [problem for problem in asked[: plan.pass_problems] for _ in range(PASS_AT)]
        prompts = [problem.prompt for problem in sampled]
        made = write(model, prompts, plan.rl.max_tokens, 1.0, torch.Generator().manual_seed(5000))
        right = np.array(_right(made, sampled)).reshape(-1, PASS_AT)
        found = {
            "accuracy": round(float(np.mean(_right(likeliest, asked))), 4),
            "pass_at_8": round(float(right.any(axis=1).mean()), 4),
            "sampled": round(float(right.mean()), 4),
            "length": round(float(np.mean([answer.length for answer in made])), 1),
        }
        if before is not None:
            some = slice(0, plan.drift_answers)
            gaps = read(model, prompts[some], made[some]) - read(before, prompts[some], made[some])
            found["drift"] = round(float(gaps.mean()), 5)
        return found

    def _held_out(self, model: Model, seed: int) -> float:
        """Mean nll a token, unweighted, of the teacher's right responses to problems that were not trained on."""
        setting = self.setting(seed)
        rows = slice(self.plan.sizes.train_rows, None)
        prompts = [problem.prompt for problem in setting.problems[rows]]
        return round(-float(read(model, prompts, setting.responses[rows]).mean(dtype=np.float64)), 5)


def _right(answers: list[Written], asked: list[Problem]) -> list[bool]:
    return [answer.ended and is_right(answer.text, problem) for answer, problem in zip(answers, asked, strict=True)]


def _summed(metrics: list[dict[str, float]]) -> dict[str, float]:
    found = {name: round(float(np.mean([one[name] for one in metrics])), 5) for name in metrics[0]}
    return {**found, "clipped_steps": round(float(np.mean([one["grad_norm"] > 1 for one in metrics])), 3)}


def write_result(path: Path, found: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    write_whole(path, json.dumps(found) + "\n")
