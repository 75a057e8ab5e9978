"""Learning rates, then all arms of a seed before the next: an experiment that was cut short compares whole seeds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from benchmarks.learning.chains.calibrate import calibrate
from benchmarks.learning.chains.summary import PUBLISHED
from benchmarks.learning.chains.trial import PLAN, Plan, Trials, arm_named
from benchmarks.learning.chains.weights import ARMS


def calibrate_pilot(work: Path) -> None:
    """What the plan's numbers rest on."""
    torch.set_num_threads(1)
    calibrate(Trials(work, PLAN))


def run(work: Path, seeds: list[int] | None, names: list[str] | None, plan: Plan = PLAN) -> None:
    """Everything that has no result yet in `work`; without named arms, published results of the same pools count."""
    torch.set_num_threads(1)
    arms = [arm_named(name) for name in names] if names else list(ARMS)
    trials = Trials(work, plan)
    take_over(sorted(PUBLISHED.glob("rates/*.json")), work)
    for arm in arms:
        for rate in plan.rates:
            print(json.dumps(trials.tried_rate(arm, rate)), flush=True)
    for seed in plan.seeds if seeds is None else seeds:
        if not names:
            take_over(of_the_same_pool(trials, seed), work)
        print(json.dumps(trials.start(seed)), flush=True)
        for arm in arms:
            print(json.dumps(trials.result(arm, seed)), flush=True)


def of_the_same_pool(trials: Trials, seed: int) -> list[Path]:
    """Published results of a seed, which have to be of the pool and policies that this folder has, to the byte.

    Raises SystemExit where they are not: another kind of processor or other libraries made other policies.
    """
    published = sorted(PUBLISHED.glob(f"arms/*-{seed}.json"))
    if published:
        digest = trials.digest(seed)
        others = {json.loads(path.read_text())["digest"] for path in published} - {digest}
        if others:
            raise SystemExit(
                f"seed {seed} is published with policies and a pool of digest {', '.join(sorted(others))}, and here "
                f"they came out as {digest}: continue where they are the same, or name --arms to run without those"
            )
    return published


def take_over(published: list[Path], work: Path) -> None:
    """Copy published files that `work` lacks."""
    for path in published:
        target = work / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(path, target)
