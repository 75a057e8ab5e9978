"""Policies, releases, then arms and seeds, several at the same time; what is there is not made again."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.arms import Arm
from benchmarks.learning.experiment import SIZES, Experiment
from benchmarks.learning.policies import LONGEST_FIRST
from benchmarks.learning.summary import write_documents, write_raw
from grape_service.config.schema import WorkersConfig
from workers.cluster.ray import need_ray, ray_for


def run(
    work: Path, size_name: str, seeds: int | None, names: list[str] | None, processes: int | None, published: Path
) -> None:
    """Every arm and seed that has no result yet; arms that fail are named at the end. All arms of a seed come before
    the next seed, so that an experiment that was cut short compares whole seeds."""
    size = SIZES[size_name]
    seeds = seeds or (3 if size_name == "small" else 5)
    arms = [arm for arm in size.arms if names is None or arm.name in names]
    one_thread()
    experiment = Experiment(work, size)
    count = processes or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    failed = []
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        missing = [name for name in LONGEST_FIRST if name in size.sources]
        for made in [pool.submit(policy, str(work), size_name, name) for name in missing]:
            made.result()
        experiment.prepare()
        adopt(experiment, size_name, published)
        make_releases(experiment, arms, seeds)
        jobs = [(str(work), size_name, arm.name, seed) for seed in range(seeds) for arm in arms]
        futures = {pool.submit(one, *job): job for job in jobs}
        for done in as_completed(futures):
            error = done.exception()
            if error is not None:
                failed.append(f"{futures[done][2]} seed {futures[done][3]}: {type(error).__name__}: {error}")
                print(f"failed: {failed[-1]}", flush=True)
                continue
            print(json.dumps(done.result()), flush=True)
            raw = collected(experiment, size_name)
            write_raw(raw, work / "results.json")
            write_documents(raw, work)
    if failed:
        raise SystemExit("\n".join(f"failed: {line}" for line in failed))


def make_releases(experiment: Experiment, arms: list[Arm], seeds: int) -> None:
    """One after the other, each a run of the service that uses all cores, on one private Ray."""
    with ray_for(WorkersConfig()):
        need_ray()
        for arm in arms:
            for seed in range(seeds if arm.depends_on_seed else 1):
                experiment.release(arm, seed)


def adopt(experiment: Experiment, size_name: str, published: Path) -> None:
    """Take published results that were made with the same target, pool and settings, to the byte."""
    if not published.exists():
        return
    raw = json.loads(published.read_text())
    if (raw["size"], raw["digest"]) == (size_name, experiment.digest()):
        for result in raw["results"]:
            experiment.keep(result)


def policy(work: str, size_name: str, name: str) -> None:
    """A policy, in a process of the pool."""
    one_thread()
    Experiment(Path(work), SIZES[size_name]).make_policy(name)


def one(work: str, size_name: str, arm_name: str, seed: int) -> dict[str, Any]:
    """An arm and seed, in a process of the pool."""
    one_thread()
    size = SIZES[size_name]
    arm = next(arm for arm in size.arms if arm.name == arm_name)
    return Experiment(Path(work), size).run(arm, seed)


def one_thread() -> None:
    """On a CPU several processes run at the same time."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def collected(experiment: Experiment, size_name: str) -> dict[str, Any]:
    """All results of a folder, arms in the order of the size, and what they started from."""
    order = {arm.name: place for place, arm in enumerate(experiment.size.arms)}
    results = [json.loads(path.read_text()) for path in (experiment.folder / "results").glob("*.json")]
    results.sort(key=lambda result: (order[result["arm"]], result["seed"]))
    return {
        "size": size_name,
        "digest": experiment.digest(),
        "start": json.loads((experiment.folder / "start.json").read_text()),
        "pool": experiment.pool_counts(),
        "results": results,
    }
