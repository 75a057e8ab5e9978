"""The main job: from a pool to a released dataset. One Prefect task a stage; the work is in workers."""

from __future__ import annotations

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from grape_service.config import Config
from workers import stages
from workers.cluster import ray_for
from workers.run import new_run

prepare = task(stages.prepare, name="prepare", cache_policy=NO_CACHE)
score_target = task(stages.score_target, name="score target", cache_policy=NO_CACHE)
select = task(stages.select, name="select", cache_policy=NO_CACHE)
score_policies = task(stages.score_policies, name="score behavior", cache_policy=NO_CACHE)
weigh = task(stages.weigh, name="weigh", cache_policy=NO_CACHE)
release = task(stages.release, name="release", cache_policy=NO_CACHE)


@flow(name="curate")
def curate(config: Config) -> stages.Outcome:
    """Score a pool with the model to be trained, keep what fits it best, weigh it, release it."""
    with new_run(config) as run, ray_for(config.workers), stages.engines(run) as engines:
        prepared = prepare(run)
        score_target(run, engines, prepared)
        kept = select(run, prepared)
        score_policies(run, engines, prepared, kept)
        weighed = weigh(run, prepared, kept)
        return release(run, prepared, kept, weighed)
