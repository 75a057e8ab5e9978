"""Weighing an existing release again: at a later checkpoint, or with other settings."""

from __future__ import annotations

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import shown
from grape_service.config import Config
from grape_service.releases.load import load
from grape_service.releases.reference import parse_reference
from workers import reweigh, weighing
from workers.cluster import ray_for
from workers.publishing import Outcome
from workers.run import new_run
from workers.scoring import engines_of

reopen = task(name="reopen", cache_policy=NO_CACHE)(reweigh.reopen)
score_policies = task(name="score policies", cache_policy=NO_CACHE)(weighing.score_policies)
weigh = task(name="weigh", cache_policy=NO_CACHE)(weighing.weigh)
release = task(name="release", cache_policy=NO_CACHE)(reweigh.release_again)


@flow(name="weigh", persist_result=False)
def weigh_release(reference: str, config: Config, force: bool = False) -> Outcome:
    """Make a new version with weights from the rows of an existing one, scoring only what is missing."""
    old = load(reference, config.storage)
    with (
        new_run(config, parse_reference(reference)) as run,
        shown(config, run.name, run.run_id),
        ray_for(config.workers),
        engines_of(run) as engines,
    ):
        kept = reopen(run, old)
        derivations = score_policies(run, engines, kept)
        engines.close()
        weighed = weigh(run, kept, derivations)
        return release(run, old, kept, derivations, weighed, force)
