"""Learning rates, then all arms of a seed before the next: an experiment that was cut short compares whole seeds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch


class Named(Protocol):
    """An arm."""

    @property
    def name(self) -> str: ...


ArmT = TypeVar("ArmT", bound=Named)


class Experiment(Protocol[ArmT]):
    """A folder with learning rates that were tried, starts of seeds and results of arms; what is there is not made
    again."""

    folder: Path
    arms: Sequence[ArmT]

    def tried_rates(self, arms: Iterable[ArmT], /) -> Iterator[dict[str, Any]]: ...
    def start(self, seed: int) -> dict[str, Any]: ...
    def result(self, arm: ArmT, seed: int) -> dict[str, Any]: ...
    def digest(self, seed: int) -> str: ...


def run(experiment: Experiment[ArmT], published: Path, seeds: Sequence[int], names: list[str] | None) -> None:
    """Everything that has no result yet; without named arms, published results of the same pools count."""
    torch.set_num_threads(1)
    arms = [arm_named(experiment.arms, name) for name in names] if names else experiment.arms
    take_over(sorted(published.glob("rates/*.json")), experiment.folder)
    for tried in experiment.tried_rates(arms):
        print(json.dumps(tried), flush=True)
    for seed in seeds:
        if not names:
            take_over(of_the_same_pool(experiment, published, seed), experiment.folder)
        print(json.dumps(experiment.start(seed)), flush=True)
        for arm in arms:
            print(json.dumps(experiment.result(arm, seed)), flush=True)


def arm_named(arms: Sequence[ArmT], name: str) -> ArmT:
    """Of `arms`. Raises SystemExit."""
    for arm in arms:
        if arm.name == name:
            return arm
    raise SystemExit(f"there is no arm '{name}'; there are {', '.join(arm.name for arm in arms)}")


def of_the_same_pool(experiment: Experiment[ArmT], published: Path, seed: int) -> list[Path]:
    """Published results of a seed, which have to be of the pool and policies that this folder has, to the byte.

    Raises SystemExit where they are not: another kind of processor or other libraries made other policies.
    """
    found = sorted(published.glob(f"arms/*-{seed}.json"))
    if found:
        digest = experiment.digest(seed)
        others = {json.loads(path.read_text())["digest"] for path in found} - {digest}
        if others:
            raise SystemExit(
                f"seed {seed} is published with policies and a pool of digest {', '.join(sorted(others))}, and here "
                f"they came out as {digest}: continue where they are the same, or name --arms to run without those"
            )
    return found


def take_over(published: list[Path], work: Path) -> None:
    """Copy published files that `work` lacks."""
    for path in published:
        target = work / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(path, target)
