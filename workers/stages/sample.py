"""Samples that are missing are made: by the policies of a gather section, and by a judge that is one."""

from __future__ import annotations

from dataclasses import replace

from grape_service.config.gather import GatherConfig
from grape_service.config.policy import PolicyConfig
from grape_service.estimate.gathering import remember_rate
from grape_service.gather.missing import Sampling, Stored, stored_samples
from grape_service.progress.reporter import reporter
from grape_service.storage.storage import Storage
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.scoring.engines import Engines
from workers.scoring.failures import FailureLimit
from workers.scoring.queue import WorkQueue
from workers.scoring.work import ScoreTotals, Unit, Work


class Budget:
    """What a run may spend on sampling, and what it has."""

    def __init__(self, config: GatherConfig):
        self.limit = config.limit
        self.tokens = 0
        self.gpu_seconds = 0.0
        self.price = config.limit.gpu_hour_price or 0.0
        self.met = ""

    def allows(self, totals: ScoreTotals, gpus: int) -> bool:
        """Whether another unit may be given out."""
        tokens = self.tokens + totals.tokens
        hours = (self.gpu_seconds + gpus * totals.engine_seconds) / 3600
        if self.limit.tokens is not None and tokens >= self.limit.tokens:
            self.met = f"gather.limit.tokens is {self.limit.tokens:,}, and {tokens:,} were sampled"
        elif self.limit.gpu_hours is not None and hours >= self.limit.gpu_hours:
            self.met = f"gather.limit.gpu_hours is {self.limit.gpu_hours:g}, and {hours:.2f} were used"
        elif self.limit.cost is not None and hours * self.price >= self.limit.cost:
            self.met = f"gather.limit.cost is {self.limit.cost:g}, and {hours * self.price:.2f} was spent"
        return not self.met

    def spend(self, totals: ScoreTotals, gpus: int) -> None:
        """What a policy's samples took."""
        self.tokens += totals.tokens
        self.gpu_seconds += gpus * totals.engine_seconds


def sample_missing(
    run: Run,
    engines: Engines,
    stage: str,
    policy: PolicyConfig,
    sampling: Sampling,
    shards: list[tuple[str, str, int]],
    limit: FailureLimit,
    budget: Budget,
) -> ScoreTotals:
    """Make the samples that are missing; no sampler starts where none is. `shards` are (partition, path, number) of
    so many prompts, `stage` says for whom, in words.

    `reused` of what comes back are the samples that were there before, `rows` those that actors told of: of a unit that
    is tried again, what was made before its actor died may not be among them.

    Raises StageError as soon as more prompts have failed than `limit` allows.
    """
    units = [Unit(path, partition, 0, sampling.samples, check=True) for partition, path, _ in shards]
    found = list(
        run_tasks(
            look_for_missing,
            ({"shard": unit.path, "partition": unit.partition} for unit in units),
            run.config.workers,
            shared={"storage": run.workspace, "sampling": sampling},
            together=together(run.config.workers, len(units)),
        )
    )
    there = sum(one.samples for one in found)
    todo = [
        replace(unit, rows=one.missing, tokens=one.missing, check=one.samples > 0)
        for unit, one in zip(units, found, strict=True)
        if one.missing
    ]
    if not todo or budget.met:
        if not todo:
            run.event(f"{stage}: nothing is missing, no sampler is started")
        return ScoreTotals(reused=there)
    replicas = engines.of(policy, len(todo), sampling)
    reporter().begin(stage, sum(unit.rows for unit in todo), "samples")
    works = (Work(unit, sampling.sampler) for unit in todo)
    totals = replicas.score(
        WorkQueue(works, len(todo)),
        lambda samples: reporter().advance(stage, samples),
        limit.look,
        may_give=lambda so_far: budget.allows(so_far, replicas.gpus),
    )
    limit.look(totals)
    budget.spend(totals, replicas.gpus)
    reporter().end(stage)
    if totals.tokens and (described := replicas.descriptions()):
        figures = totals.rows, totals.tokens, totals.engine_seconds, described[0]["device"]
        remember_rate(run.workspace, sampling.sampler, *figures)
    totals.reused = there
    return totals


def look_for_missing(storage: Storage, shard: str, partition: str, sampling: Sampling) -> Stored:
    """stored_samples of a shard's prompts (a Ray task)."""
    return stored_samples(storage, [shard], partition, sampling)
