"""One arm and seed after the other: a release, SFT on it, then the same RL for all.

Each arm and seed is one JSON file of results; what is there is not done again, and an arm that was interrupted resumes
from its last checkpoint. Selection and weights are those of `grape_service.run`, SFT and RL those of workers.training.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import grape_service
from benchmarks.learning.arms import CPU_ARMS, GPU_ARMS, SCORED, WEIGHTS, Arm
from benchmarks.learning.policies import SEPARATOR, ModelSize, answers, make_policy
from benchmarks.learning.task import ANSWER, Difficulty, Problem, problems, solved
from grape_service.config.training import PromptSettings, RewardSettings, RlSettings, RlTask, SftSettings, SftTask
from workers.training.trainers.rl import run_rl
from workers.training.trainers.sft import run_sft

POOL_SEED, RL_SEED, TEST_SEED = 100, 200, 300
PASS_AT = 8
STATISTICS = ("entropy", "rank", "top20_entropy")


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
    arms: list[Arm]
    sources: tuple[str, ...] = ("own", "words", "terse")  # who writes the pool
    only_right: bool = False  # whether wrong answers are filtered before scoring, as in the paper's experiments
    pass_problems: int = 0  # of pass@8; 0 leaves it out


SMALL = Size(
    model=ModelSize(hidden=256, layers=6, heads=8, pretrain_steps=1500, batch_size=256),
    prompts=2000,
    candidates=2,
    max_tokens=96,
    sft={"batch_size": 64, "micro_batch_size": 64, "epochs": 3.0, "learning_rate": 2e-4, "warmup_steps": 10},
    rl={"steps": 40, "prompts_per_step": 32, "num_generations": 8, "micro_batch_size": 256, "learning_rate": 2e-5},
    test_problems=1000,
    arms=GPU_ARMS,
)
CPU = Size(
    model=ModelSize(
        hidden=128,
        layers=3,
        heads=4,
        pretrain_steps=450,
        batch_size=32,
        learning_rate=2e-3,
        difficulty=Difficulty(shortest=3, longest=4, largest=9),
        problems=6000,
        target_steps=700,
        target_stops_at=0.4,
    ),
    prompts=300,
    candidates=1,
    max_tokens=80,
    sft={"batch_size": 32, "micro_batch_size": 32, "epochs": 2.0, "learning_rate": 3e-4, "warmup_steps": 5},
    rl={
        "steps": 10,
        "prompts_per_step": 16,
        "num_generations": 8,
        "micro_batch_size": 128,
        "learning_rate": 1e-4,
        "temperature": 0.7,
    },
    test_problems=400,
    arms=CPU_ARMS,
    sources=("own", "words", "terse", "verbose"),
    only_right=True,
    pass_problems=60,
)
TINY = Size(
    model=ModelSize(hidden=32, layers=1, heads=2, pretrain_steps=40, batch_size=16, learning_rate=1e-2),
    prompts=12,
    candidates=1,
    max_tokens=24,
    sft={"batch_size": 4, "epochs": 1.0, "learning_rate": 1e-3},
    rl={"steps": 1, "prompts_per_step": 2, "num_generations": 2, "learning_rate": 1e-4},
    test_problems=8,
    arms=CPU_ARMS,
    sources=("own", "terse"),
    pass_problems=2,
)
SIZES = {"cpu": CPU, "small": SMALL, "tiny": TINY}


class Experiment:
    """A folder with policies, pool, releases, trained models and results."""

    def __init__(self, folder: Path, size: Size):
        self.folder = folder.resolve()
        self.size = size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pool = self.folder / "pool.jsonl"

    def prepare(self) -> None:
        """Policies that are not there yet, the pool, the prompts of RL, the skill that all arms start from; once."""
        names = ("target", *self.size.sources)
        for name in names:
            self.make_policy(name)
        if not self._pool.exists():
            _write(self._pool, "".join(json.dumps(row) + "\n" for row in self._pool_rows()))
        prompts = "".join(
            json.dumps({"prompt": problem.prompt, "answer": str(problem.answer)}) + "\n"
            for problem in self.problems(self.size.prompts, RL_SEED)
        )
        _write(self.folder / "rl-prompts.jsonl", prompts)
        start = self.folder / "start.json"
        if not start.exists():
            _write(start, json.dumps({name: self.skill(self._policy(name)) for name in names}, indent=1))

    def make_policy(self, name: str) -> None:
        """Train a policy if it is not there."""
        make_policy(name, self.folder / "policies", self.size.model, self.device)

    def digest(self) -> str:
        """Of what all arms share (settings, target, pool, prompts of RL): results of one digest belong together."""
        found = hashlib.sha256(repr(self.size).encode())
        for path in (
            self._policy("target") / "model.safetensors",
            self.folder / "pool.jsonl",
            self.folder / "rl-prompts.jsonl",
        ):
            found.update(path.read_bytes())
        return found.hexdigest()

    def pool_counts(self) -> dict[str, dict[str, int]]:
        """Candidates of each source, and how many of them are right."""
        counts: dict[str, dict[str, int]] = {}
        for line in self._pool.read_text().splitlines():
            row = json.loads(line)
            count = counts.setdefault(row["source"], {"candidates": 0, "right": 0})
            count["candidates"] += 1
            count["right"] += row["correct"]
        return counts

    def keep(self, result: dict[str, Any]) -> None:
        """Store the result of an arm and seed."""
        _write(self._result(result["arm"], result["seed"]), json.dumps(result, indent=1))

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """The results of an arm and seed: from its file, or made now."""
        result = self._result(arm.name, seed)
        if result.exists():
            return json.loads(result.read_text())
        started = time.monotonic()
        reference = self.release(arm, seed)
        output = self.folder / "arms" / f"{arm.name}-{seed}"
        sft = run_sft(
            SftTask(dataset=reference, output=str(output / "sft"), settings=SftSettings(**self.size.sft, seed=seed))
        )
        after_sft = self.skill(output / "sft" / "model")
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
        weighed = grape_service.load(reference).manifest.statistics.get("weights")
        figures = weighed or {"effective_share": 1.0, "mean": 1.0}
        found = {
            "arm": arm.name,
            "select": arm.select,
            "weights": arm.weights,
            "seed": seed,
            "release": reference.rpartition("/")[2],  # without the folder: results are published
            "rows": sft["rows"],
            "steps": sft["steps"],
            "ess": figures["effective_share"],
            "weight_mean": figures["mean"],
            "grad_norm": _mean(_metrics(output / "sft", "grad_norm")),
            "rl_rewards": [round(reward, 4) for reward in _metrics(output / "rl", "reward")],
            "after_sft": after_sft,
            "after_rl": self.skill(output / "rl" / "model"),
            "seconds": round(time.monotonic() - started, 1),
        }
        self.keep(found)
        for checkpoint in output.glob("*/checkpoint-*"):
            shutil.rmtree(checkpoint)
        return found

    def release(self, arm: Arm, seed: int) -> str:
        """Reference of the arm's dataset version, made once by `grape_service.run`; scores are shared by all arms."""
        seed = seed if arm.depends_on_seed else 0
        made = self.folder / "releases" / f"{arm.name}-{seed}"
        if not made.exists():
            _write(made, grape_service.run(self.config(arm, seed)).reference)
        return made.read_text()

    def config(self, arm: Arm, seed: int) -> dict[str, Any]:
        """The service's config of an arm."""
        config: dict[str, Any] = {
            "name": arm.dataset,
            "pool": {"path": str(self._pool), "max_reject_share": 1.0},
            "render": {"mode": "plain", "separator": SEPARATOR},
            "target": {"model": str(self._policy("target")), "dtype": "float32", "engine": "transformers"},
            "select": {"method": arm.select, "seed": seed},
            "output": {"path": str(self.folder / "datasets")},
        }
        if self.size.only_right:
            config["pool"]["where"] = [{"column": "correct", "equals": True}]
        weights = WEIGHTS[arm.weights]
        if weights is not None:
            config["weights"] = weights
        if weights is not None or arm.select in SCORED:
            config["score"] = {"statistics": list(STATISTICS)}  # of all methods, so that each row is scored once
        if weights is not None and weights["method"] == "pear":
            policies = {
                name: {"model": str(self._policy(name)), "dtype": "float32", "engine": "transformers"}
                for name in self.size.sources
            }
            config["behavior"] = {"sources": policies}
        return config

    def accuracy(self, model: Path) -> float:
        """Share of the test problems that a model's most likely answer solves."""
        asked = self.problems(self.size.test_problems, TEST_SEED)
        found = answers(model, asked, self.size.max_tokens, self.device, temperature=0.0, seed=0)
        return sum(solved(text, problem) for (text, _), problem in zip(found, asked, strict=True)) / len(asked)

    def skill(self, model: Path) -> dict[str, float]:
        """Accuracy of the most likely answers, and pass@8: the share of problems of which one of 8 samples is right."""
        found = {"accuracy": self.accuracy(model)}
        if self.size.pass_problems:
            asked = self.problems(self.size.pass_problems, TEST_SEED)
            repeated = [problem for problem in asked for _ in range(PASS_AT)]
            made = answers(model, repeated, self.size.max_tokens, self.device, temperature=1.0, seed=0)
            right = [solved(text, problem) for (text, _), problem in zip(made, repeated, strict=True)]
            passed = sum(any(right[start : start + PASS_AT]) for start in range(0, len(right), PASS_AT))
            found["pass_at_8"] = passed / len(asked)
        return found

    def problems(self, number: int, seed: int) -> list[Problem]:
        """Problems of this size's difficulty."""
        return problems(number, seed, self.size.model.difficulty, held_out=seed == TEST_SEED)

    def _policy(self, name: str) -> Path:
        return self.folder / "policies" / name

    def _result(self, arm_name: str, seed: int) -> Path:
        return self.folder / "results" / f"{arm_name}-{seed}.json"

    def _pool_rows(self) -> list[dict[str, Any]]:
        asked = [
            problem for problem in self.problems(self.size.prompts, POOL_SEED) for _ in range(self.size.candidates)
        ]
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
                        "correct": solved(text, problem),
                    }
                )
        return rows


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.rename(path)


def _metrics(output: Path, key: str) -> list[float]:
    """Values of a metric over the steps of a job; a step that was done again after an interruption counts once."""
    by_step = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if key in entry:
            by_step[entry["step"]] = float(entry[key])
    return [value for _, value in sorted(by_step.items())]


def _mean(values: list[float]) -> float:
    return round(sum(values) / max(1, len(values)), 5)
