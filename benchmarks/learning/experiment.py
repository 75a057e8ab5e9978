"""The arms: which candidates are selected and how they are weighed, then SFT, then the same RL for all.

Each arm and seed is one JSON file of results; what is there is not done again, and an arm that was interrupted resumes
from its last checkpoint. Selection, weights, SFT and RL are those of the service: `grape run` and workers.training.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.learning.policies import RECIPES, SEPARATOR, ModelSize, answers, make_policy
from benchmarks.learning.task import ANSWER, Problem, problems
from grape_service.config.training import PromptSettings, RewardSettings, RlSettings, RlTask, SftSettings, SftTask
from workers.training.trainers.rewards import exact_match
from workers.training.trainers.rl import run_rl
from workers.training.trainers.sft import run_sft

ROOT = Path(__file__).resolve().parents[2]
POOL_SEED, RL_SEED, TEST_SEED = 100, 200, 300


@dataclass(frozen=True)
class Arm:
    """One way to make the training set."""

    select: str  # as select.method of the config
    level: str | None = None  # of PEAR; None is uniform

    @property
    def name(self) -> str:
        return f"{self.select.replace(':', '-')}+{self.level or 'uniform'}"


SELECTION_ARMS = [Arm("grape"), Arm("random"), Arm("longest"), Arm("source:words")]
WEIGHT_ARMS = [Arm(select, level) for select in ("grape", "random") for level in ("sequence", "token", "block")]
ARMS = [*SELECTION_ARMS, *WEIGHT_ARMS]
"""Uniform weights with and without GRAPE are the arms grape and random."""


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    model: ModelSize
    prompts: int  # in the pool
    candidates: int  # of each policy for a prompt
    max_tokens: int  # of a response
    sft: dict[str, Any]
    rl: dict[str, Any]
    test_problems: int
    sources: tuple[str, ...] = tuple(name for name in RECIPES if name != "target")  # who writes the pool


SMALL = Size(
    model=ModelSize(hidden=256, layers=6, heads=8, pretrain_steps=1500, batch_size=256),
    prompts=2000,
    candidates=2,
    max_tokens=96,
    sft={"batch_size": 64, "micro_batch_size": 64, "epochs": 3.0, "learning_rate": 2e-4, "warmup_steps": 10},
    rl={"steps": 40, "prompts_per_step": 32, "num_generations": 8, "micro_batch_size": 256, "learning_rate": 2e-5},
    test_problems=1000,
)
TINY = Size(
    model=ModelSize(hidden=32, layers=1, heads=2, pretrain_steps=40, batch_size=16, learning_rate=1e-2),
    prompts=12,
    candidates=1,
    max_tokens=24,
    sft={"batch_size": 4, "epochs": 1.0, "learning_rate": 1e-3},
    rl={"steps": 1, "prompts_per_step": 2, "num_generations": 2, "learning_rate": 1e-4},
    test_problems=8,
    sources=("own", "terse"),
)


class Experiment:
    """A folder with policies, pool, releases, trained models and results."""

    def __init__(self, folder: Path, size: Size):
        self.folder = folder.resolve()
        self.size = size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def prepare(self) -> None:
        """Policies, the pool, the prompts of RL, and the accuracy that all arms start from; once."""
        names = ("target", *self.size.sources)
        for name in names:
            make_policy(name, self.folder / "policies", self.size.model, self.device)
        pool = self.folder / "pool.jsonl"
        if not pool.exists():
            part = pool.with_suffix(".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in self._pool_rows()))
            part.rename(pool)
        prompts = "".join(
            json.dumps({"prompt": problem.prompt, "answer": str(problem.answer)}) + "\n"
            for problem in problems(self.size.prompts, RL_SEED)
        )
        (self.folder / "rl-prompts.jsonl").write_text(prompts)
        start = self.folder / "start.json"
        if not start.exists():
            start.write_text(json.dumps({name: self.accuracy(self._policy(name)) for name in names}))

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """The results of an arm and seed: from its file, or made now."""
        result = self.folder / "results" / f"{arm.name}-{seed}.json"
        if result.exists():
            return json.loads(result.read_text())
        started = time.monotonic()
        reference = self.release(arm, seed)
        output = self.folder / "arms" / f"{arm.name}-{seed}"
        sft = run_sft(
            SftTask(dataset=reference, output=str(output / "sft"), settings=SftSettings(**self.size.sft, seed=seed))
        )
        after_sft = self.accuracy(output / "sft" / "model")
        rl_settings = RlSettings(
            **self.size.rl,
            seed=seed,
            max_response_tokens=self.size.max_tokens,
            rewards=[RewardSettings(type="exact", pattern=ANSWER)],
            prompts=PromptSettings(path=str(self.folder / "rl-prompts.jsonl")),
            rollouts="transformers",
        )
        run_rl(
            RlTask(
                dataset=reference,
                checkpoint=str(output / "sft" / "model"),
                output=str(output / "rl"),
                settings=rl_settings,
            )
        )
        found = {
            "arm": arm.name,
            "select": arm.select,
            "weights": arm.level or "uniform",
            "seed": seed,
            "reference": reference,
            "rows": sft["rows"],
            "ess": sft["metrics"]["last"]["ess"],
            "after_sft": after_sft,
            "after_rl": self.accuracy(output / "rl" / "model"),
            "seconds": round(time.monotonic() - started, 1),
        }
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(found, indent=1))
        return found

    def release(self, arm: Arm, seed: int) -> str:
        """Reference of the arm's dataset version, made by `grape run`; scores are shared by all arms."""
        config = self.folder / "configs" / f"{arm.name}-{seed}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(self.config(arm, seed), sort_keys=False))
        ended = subprocess.run(
            [sys.executable, "-m", "grape_service.cli", "run", str(config), "--json"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return str(json.loads(ended.stdout)["reference"])

    def config(self, arm: Arm, seed: int) -> dict[str, Any]:
        """The service's config of an arm."""
        config: dict[str, Any] = {
            "name": arm.name.replace("+", "-"),
            "pool": {"path": str(self.folder / "pool.jsonl"), "max_reject_share": 1.0},
            "render": {"mode": "plain", "separator": SEPARATOR},
            "target": {"model": str(self._policy("target")), "dtype": "float32", "engine": "transformers"},
            "select": {"method": arm.select, "seed": seed},
            "output": {"path": str(self.folder / "datasets")},
        }
        if arm.level is not None:
            policies = {
                name: {"model": str(self._policy(name)), "dtype": "float32", "engine": "transformers"}
                for name in self.size.sources
            }
            config["behavior"] = {"sources": policies}
            config["weights"] = {"method": "pear", "level": arm.level}
        return config

    def accuracy(self, model: Path) -> float:
        """Share of the test problems that a model's most likely answer solves."""
        asked = problems(self.size.test_problems, TEST_SEED)
        found = answers(model, asked, self.size.max_tokens, self.device, temperature=0.0, seed=0)
        return sum(solved(text, problem) for (text, _), problem in zip(found, asked, strict=True)) / len(asked)

    def _policy(self, name: str) -> Path:
        return self.folder / "policies" / name

    def _pool_rows(self) -> list[dict[str, Any]]:
        asked = [problem for problem in problems(self.size.prompts, POOL_SEED) for _ in range(self.size.candidates)]
        rows = []
        for number, source in enumerate(self.size.sources):
            found = answers(self._policy(source), asked, self.size.max_tokens, self.device, 1.0, seed=number)
            for (text, ended), problem in zip(found, asked, strict=True):
                rows.append(
                    {
                        "prompt": problem.prompt,
                        "response": text,
                        "source": source,
                        "finish_reason": "stop" if ended else "length",
                        "answer": str(problem.answer),
                        "correct": bool(solved(text, problem)),
                    }
                )
        return rows


def solved(response: str, problem: Problem) -> float:
    """1 if a response's answer is right."""

    return exact_match(response, str(problem.answer), re.compile(ANSWER))
