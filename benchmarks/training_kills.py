"""SFT and RL on a tiny model, killed again and again with SIGKILL: metrics and model are those of a run that was not.

    python benchmarks/training_kills.py --kills 20

Each attempt is a process of its own that the training code is forked into, killed after a random time: while it reads
rows, loads the model, takes a step, writes a checkpoint or the final model. The next one goes on in the same output.
After the last kill one attempt is left alone, and a job that ended before it was killed is followed by another. Ends
with status 1 where a step of the metrics is missing, stands twice or has another figure, or where a weight of the final
model differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import workers.training.trainers.grpo
import workers.training.trainers.weighted  # noqa: F401  # what an attempt would import, once
from grape_service.config.training import RewardSettings, RlSettings, RlTask, SftSettings, SftTask
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from workers.training.trainers.rl import run_rl
from workers.training.trainers.sft import run_sft

TIMES = ("step_time", "runtime", "per_second")
"""Ends of the names of figures that tell of time and of nothing that was trained."""


def share_of_letters(prompt: Any, response: str, row: dict[str, Any]) -> float:
    """A reward that a random policy can earn."""
    return sum(character.isalpha() for character in response) / max(1, len(response))


def attempt(work: Callable[[Any], Any], task: Any, log: Path) -> None:
    """What a child does: one attempt, its words in a file."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(task)


def run_once(work: Callable[[Any], Any], task: Any, seconds: float | None) -> bool:
    """One attempt, killed after some seconds if it has not ended by then; whether it was killed."""
    log = Path(f"{task.output}.log")
    log.parent.mkdir(exist_ok=True)
    child = multiprocessing.get_context("fork").Process(target=attempt, args=(work, task, log))
    child.start()
    child.join(seconds)
    is_killed = child.is_alive()
    if is_killed:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    if not is_killed and child.exitcode != 0:
        tail = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"an attempt that was not killed ended with {child.exitcode}:\n{tail}")
    return is_killed


def run_killed(
    work: Callable[[Any], Any], task: Any, straight: Path, kills: int, seconds: float, dice: random.Random
) -> tuple[int, list[str]]:
    """Attempts until `kills` of them were killed, and the one that ends the last job: how many jobs came to their end,
    and what differed. A job that ends before it is killed is compared, and another begins."""
    found: list[str] = []
    jobs = killed = 0
    while killed < kills or jobs == 0:
        is_last = killed == kills
        if run_once(work, task, None if is_last else dice.uniform(0.05, 1.0) * seconds):
            killed += 1
            if killed < kills:
                continue
            run_once(work, task, None)
        jobs += 1
        found += differences(straight, Path(task.output))
        shutil.rmtree(task.output)
    return jobs, found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a job's metrics without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(TIMES)} for line in lines]


def differences(straight: Path, killed: Path) -> list[str]:
    """What is not the same in two outputs, in words."""
    found = []
    one, other = metrics(straight), metrics(killed)
    if [line["step"] for line in one] != [line["step"] for line in other]:
        found.append(f"steps {[line['step'] for line in other]}, not {[line['step'] for line in one]}")
    found += [f"metrics of step {a['step']}: {b} and not {a}" for a, b in zip(one, other, strict=False) if a != b]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (straight, killed)]
    return found + (["the model's weights"] if weights[0] != weights[1] else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=("sft", "rl"), default=["sft", "rl"])
    options = parser.parse_args()
    dice = random.Random(options.seed)
    failed = False
    with tempfile.TemporaryDirectory(prefix="training-kills-") as name:
        folder = Path(name)
        os.environ["GRAPE_CACHE"] = str(folder / "cache")
        model = make_model(folder / "model")
        reference = write_release(folder / "out", make_rows(24), {"target": {"model": model}})
        shared: dict[str, Any] = {"device": "cpu", "save_steps": 1, "learning_rate": 1e-2}
        sft = SftSettings(batch_size=4, micro_batch_size=2, epochs=2, eval_share=0.2, eval_steps=5, **shared)
        reward = RewardSettings(type="function", function="benchmarks.training_kills:share_of_letters")
        rl = RlSettings(
            steps=6, prompts_per_step=2, num_generations=2, max_response_tokens=8, rewards=[reward], **shared
        )
        for stage in options.stages:
            work: Callable[[Any], Any] = run_sft if stage == "sft" else run_rl

            def task(output: Path, stage: str = stage) -> SftTask | RlTask:
                given = {"dataset": reference, "output": str(output)}
                return (
                    SftTask(**given, settings=sft) if stage == "sft" else RlTask(**given, checkpoint=model, settings=rl)
                )

            straight = folder / stage / "straight"
            started = time.monotonic()
            run_once(work, task(straight), None)
            seconds = time.monotonic() - started
            jobs, found = run_killed(work, task(folder / stage / "killed"), straight, options.kills, seconds, dice)
            steps = len({line["step"] for line in metrics(straight)})
            print(
                f"{stage}: {options.kills} kills in {jobs} jobs of {steps} steps, {time.monotonic() - started:.0f} s: "
                + ("; ".join(found) or "metrics and model are those of the run that was not killed"),
                flush=True,
            )
            failed = failed or bool(found)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
