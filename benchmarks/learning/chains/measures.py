"""What the arms of an experiment are judged by: skill on test problems, held-out loss, and both along RL."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learning.chains.models import Model, Written, read, write
from benchmarks.learning.chains.policies import PASS_AT, write_whole
from benchmarks.learning.chains.task import Kind, Problem, is_right, problems
from benchmarks.learning.chains.training import RlSizes, grpo


@dataclass(frozen=True)
class EvaluationSizes:
    """How much is tested."""

    problems: int
    pass_problems: int  # of pass@8
    drift_answers: int
    max_tokens: int  # of an answer


@dataclass(frozen=True)
class Evaluation:
    """Problems that nothing was trained on."""

    kind: Kind
    sizes: EvaluationSizes


def skill(model: Model, test: Evaluation, before: Model | None) -> dict[str, float]:
    """Accuracy of the likeliest answers and pass@8; how far the model's own samples are from a model before, in nats a
    token: an estimate of the KL divergence."""
    sizes = test.sizes
    asked = problems(sizes.problems, 5000, test.kind, held_out=True)
    likeliest = write(model, [problem.prompt for problem in asked], sizes.max_tokens, 0.0)
    sampled = [problem for problem in asked[: sizes.pass_problems] for _ in range(PASS_AT)]
    prompts = [problem.prompt for problem in sampled]
    made = write(model, prompts, sizes.max_tokens, 1.0, torch.Generator().manual_seed(5000))
    right = np.array(_right(made, sampled)).reshape(-1, PASS_AT)
    found = {
        "accuracy": round(float(np.mean(_right(likeliest, asked))), 4),
        "pass_at_8": round(float(right.any(axis=1).mean()), 4),
        "sampled": round(float(right.mean()), 4),
        "length": round(float(np.mean([answer.length for answer in made])), 1),
    }
    if before is not None:
        some = slice(0, sizes.drift_answers)
        gaps = read(model, prompts[some], made[some]) - read(before, prompts[some], made[some])
        found["drift"] = round(float(gaps.mean()), 5)
    return found


def held_out_nll(model: Model, asked: Sequence[Problem], responses: Sequence[Written]) -> float:
    """Mean nll a token, unweighted, of right responses to problems that were not trained on."""
    prompts = [problem.prompt for problem in asked]
    return round(-float(read(model, prompts, responses).mean(dtype=np.float64)), 5)


def rl_along(
    model: Model,
    before: Model,
    asked: Sequence[Problem],
    seed: int,
    sizes: RlSizes,
    test: Evaluation,
    held_out: Callable[[Model], float],
) -> dict[str, Any]:
    """GRPO on the problems, and what the model can do along it, compared with the checkpoint `before` it."""
    along: list[dict[str, Any]] = []
    metrics = grpo(
        model,
        asked,
        seed,
        sizes,
        lambda step: along.append({"step": step, **skill(model, test, before), "held_out": held_out(model)}),
    )
    return {
        "along": along,
        "rewards": [round(one["reward"], 4) for one in metrics],
        "lengths": [round(one["length"], 1) for one in metrics][:: sizes.measure_every],
        "grad_norm": round(float(np.mean([one["grad_norm"] for one in metrics])), 4),
        "cpu_seconds": round(sum(one["seconds"] for one in metrics)),
    }


def summed(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Means over the steps of SFT, and the share of steps that the clip held."""
    found = {name: round(float(np.mean([one[name] for one in metrics])), 5) for name in metrics[0]}
    return {**found, "clipped_steps": round(float(np.mean([one["grad_norm"] > 1 for one in metrics])), 3)}


def made_once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a JSON file holds; where there is none, what `make` gives is written, whole or not at all."""
    if not path.exists():
        write_whole(path, json.dumps(make()) + "\n")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _right(answers: list[Written], asked: list[Problem]) -> list[bool]:
    return [answer.ended and is_right(answer.text, problem) for answer, problem in zip(answers, asked, strict=True)]
