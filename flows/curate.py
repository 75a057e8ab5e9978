"""The main job: from a pool to a released dataset. One Prefect task a stage; the work is in workers."""

from __future__ import annotations

from typing import Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import show_outcome, shown
from flows.limits import TIMEOUT_SECONDS
from flows.train import train
from grape_service.config import Config
from grape_service.notify import ending_told
from workers import checking, jobs_api, stages, weighing
from workers.cluster import ray_for
from workers.publishing import Outcome
from workers.run import new_run
from workers.scoring import engines_of
from workers.trainers.jobs import checked_jobs

prepare = task(name="prepare", cache_policy=NO_CACHE)(stages.prepare)
score_target = task(name="score target", cache_policy=NO_CACHE)(stages.score_target)
select = task(name="select", cache_policy=NO_CACHE)(stages.select)
check = task(name="check", cache_policy=NO_CACHE)(checking.check)
score_policies = task(name="score policies", cache_policy=NO_CACHE)(weighing.score_policies)
weigh = task(name="weigh", cache_policy=NO_CACHE)(weighing.weigh)
release = task(name="release", cache_policy=NO_CACHE)(stages.release)
submit = task(name="submit", cache_policy=NO_CACHE)(jobs_api.run_as_job)

Until = Literal["score", "select", "release"]


@flow(name="curate", persist_result=False, timeout_seconds=TIMEOUT_SECONDS)
def curate(config: Config, until: Until = "release", force: bool = False) -> Outcome:
    """Score a pool with the model to be trained, keep what fits it best, weigh it, release it."""
    with ending_told(config) as told:
        if config.train is not None:
            checked_jobs(config.train, config.workers.ray_address)
        elsewhere = jobs_api.runs_elsewhere(config)
        outcome = do_elsewhere(config, until, force) if elsewhere else do_stages(config, until, force)
        if config.train is not None and until == "release" and not elsewhere:
            assert outcome.reference is not None
            outcome.training = train(outcome.reference, config.train, config.workers.ray_address, config.storage)
        show_outcome(config, outcome)
        told.append(outcome.to_json())
    return outcome


def do_elsewhere(config: Config, until: Until, force: bool) -> Outcome:
    """The stages as one job of another cluster."""
    with shown(config, config.name):
        return submit(config, until, force)


def do_stages(config: Config, until: Until, force: bool) -> Outcome:
    """The stages, one after the other, on a Ray of this run's own or on the cluster that it is a job of."""
    with (
        new_run(config) as run,
        shown(config, run.name, run.run_id),
        ray_for(config.workers),
        engines_of(run) as engines,
    ):
        prepared = prepare(run)
        scored = score_target(run, engines, prepared)
        if until == "score":
            return stages.outcome_of_scores(run, prepared, scored)
        kept = select(run, prepared)
        if until == "select":
            return stages.outcome_of_selection(run, prepared, scored, kept)
        checked = check(run, engines, prepared, kept)
        derivations = score_policies(run, engines, kept)
        engines.close()
        weighed = weigh(run, kept, derivations)
        return release(run, prepared, scored, kept, derivations, weighed, checked, force)
