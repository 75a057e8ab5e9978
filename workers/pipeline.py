"""The whole job on one screen, in the words of the design. No Prefect here: flows wrap the same functions as tasks.

Each stage takes the run and what the stage before it left, and returns counts: the driver never holds rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

from grape_service.config.schema import Config
from grape_service.prepare.groups import refuse_mistyped
from grape_service.release.load import load_training_set
from grape_service.release.pools import with_released_candidates
from grape_service.release.reference import parse_reference
from grape_service.webhooks import notify_when_done
from workers.cluster.ray import begin_ray, ray_for
from workers.cluster.submit import run_as_job, runs_elsewhere
from workers.engines.choose import refuse_missing_engines
from workers.gate import train_gated
from workers.outcome import Outcome, outcome_of
from workers.rounds import jobs_on, run_rounds
from workers.run import RoundOf, new_run
from workers.scoring.engines import engines_of
from workers.stages.check import check
from workers.stages.gather import gather
from workers.stages.prepare import prepare
from workers.stages.release import release
from workers.stages.reweigh import load_kept, release_reweighed
from workers.stages.score import score
from workers.stages.select import select
from workers.stages.train import checked_jobs, train
from workers.stages.unchanged import release_key, remember_release, unchanged_release
from workers.stages.weigh import score_behavior, weigh
from workers.stages.windows import score_windows
from workers.time_limit import time_limit

Until = Literal["gather", "score", "select", "release"]
Function = TypeVar("Function", bound=Callable[..., Any])
AsStage = Callable[[str, Function], Function]
Watch = Callable[..., contextlib.AbstractContextManager[Any]]


def directly(name: str, function: Function) -> Function:
    """Call a stage as it is."""
    return function


def unwatched(config: Config, name: str, run_id: str = "") -> contextlib.AbstractContextManager[Any]:
    """Progress goes where it went before."""
    return contextlib.nullcontext()


def limit_of(as_stage: AsStage) -> contextlib.AbstractContextManager[None]:
    """The run's time limit, which Prefect keeps for the stages of a flow."""
    return time_limit() if as_stage is directly else contextlib.nullcontext()


def run_pipeline(
    config: Config,
    until: Until = "release",
    force: bool = False,
    as_stage: AsStage = directly,
    watch: Watch = unwatched,
    train: Callable[..., Any] = train,
) -> Outcome:
    """Score a pool with the model to be trained, keep what fits it best, weigh it, release it, train on it.

    `as_stage(name, function)` wraps each stage, `watch(config, name, run_id)` surrounds the run, `train` trains on
    the release. Raises UserError for a user error, StageError for a stage that failed.
    """
    with notify_when_done(config) as done, limit_of(as_stage):
        if config.train is not None:
            checked_jobs(config.train, config.workers.ray_address, config.storage)
        if runs_elsewhere(config):
            with watch(config, config.name):
                outcome = as_stage("submit", run_as_job)(config, until, force)
        elif config.train is not None and config.train.rounds > 1 and until == "release":
            release_round = partial(run_round, force=force, as_stage=as_stage, watch=watch)
            outcome = run_rounds(config, train, release_round, partial(gather_alone, as_stage=as_stage, watch=watch))
        else:
            outcome = run_stages(config, until, force, as_stage, watch)
            if config.train is not None and outcome.reference is not None:
                jobs, samples = jobs_on(config.train, outcome), partial(gather_alone, as_stage=as_stage, watch=watch)
                outcome.training = train_gated(config, jobs, outcome.reference, train, samples)
        done.append(outcome.to_json())
    return outcome


def gather_alone(config: Config, as_stage: AsStage = directly, watch: Watch = unwatched) -> Outcome:
    """The gather stage of a config, on this machine or at workers.ray_address."""
    if runs_elsewhere(config):
        return as_stage("submit", run_as_job)(config, "gather", False)
    return run_stages(config, "gather", False, as_stage, watch)


def run_round(
    config: Config, round_: RoundOf, weighed_from: str | None, force: bool, as_stage: AsStage, watch: Watch
) -> Outcome:
    """The stages of a round of several: the whole job, or the weights alone of a release whose rows stay."""
    if weighed_from is not None:
        return reweigh_stages(weighed_from, config, force, as_stage, watch, round_)
    return run_stages(config, "release", force, as_stage, watch, round_)


def run_stages(
    config: Config, until: Until, force: bool, as_stage: AsStage, watch: Watch, round_: RoundOf | None = None
) -> Outcome:
    """The stages one after the other, on a private Ray or on the cluster that this process is a job of."""
    refuse_missing_engines(config)
    config.check_methods()
    config, candidates = with_released_candidates(config, proven=True)
    refuse_mistyped(config)
    with (
        new_run(config, candidates=candidates, round_=round_) as run,
        watch(config, run.name, run.run_id),
        ray_for(config.workers),
        engines_of(run) as engines,
    ):
        asked, key = run.config, release_key(run) if until == "release" else None
        if key is not None and not force and (unchanged := unchanged_release(run, key)) is not None:
            return unchanged
        if config.gather is not None:
            gathered = as_stage("gather", gather)(run, engines)
            run.config = gathered.config
            run.gathered = gathered.counts
            key = key if gathered.is_whole else None
            if until == "gather":
                counts: dict[str, Any] = {"gather": gathered.counts, "candidates": gathered.released}
                return outcome_of(run, counts=counts, **gathered.outcome())
        if until != "score":  # which may find that all is there
            begin_ray()
        prepared = as_stage("prepare", prepare)(run, engines)
        scored = as_stage("score", score)(run, engines, prepared)
        if config.select.windows is not None:
            scored = as_stage("score windows", score_windows)(run, engines, prepared, scored)
        counts = {"pool": prepared.counts()}
        if until == "score":
            return outcome_of(
                run,
                prompts=prepared.prompts,
                rows=prepared.rows,
                rejected=prepared.rejects.total,
                failed=scored.failed,
                scored=scored.rows,
                reused=scored.reused,
                counts=counts,
            )
        kept = as_stage("select", select)(run, prepared)
        if until == "select":
            return outcome_of(
                run,
                prompts=kept.counts.kept_prompts,
                rows=kept.counts.kept_rows,
                rejected=prepared.rejects.total,
                failed=scored.failed,
                scored=scored.rows,
                reused=scored.reused,
                counts={**counts, "select": kept.counts.to_json()},
            )
        checked = as_stage("check", check)(run, engines, prepared, kept)
        policy_scores = as_stage("score behavior", score_behavior)(run, engines, kept)
        engines.close()
        weighed = as_stage("weigh", weigh)(run, kept, policy_scores)
        released = as_stage("release", release)(run, prepared, scored, kept, policy_scores, weighed, checked, force)
        if key is not None:
            remember_release(run, key, asked, prepared, released)
        return released


def reweigh(
    reference: str, config: Config, force: bool = False, as_stage: AsStage = directly, watch: Watch = unwatched
) -> Outcome:
    """Make a new version with weights from the rows of an existing release, scoring only what is missing.

    Like `run_pipeline` it runs at workers.ray_address and notifies. Raises UserError, StageError.
    """
    name = parse_reference(reference).name
    with notify_when_done(config, name) as done, limit_of(as_stage):
        if runs_elsewhere(config):
            with watch(config, name):
                outcome = as_stage("submit", run_as_job)(config, "weigh", force, reference)
        else:
            outcome = reweigh_stages(reference, config, force, as_stage, watch)
        done.append(outcome.to_json())
    return outcome


def reweigh_stages(
    reference: str, config: Config, force: bool, as_stage: AsStage, watch: Watch, round_: RoundOf | None = None
) -> Outcome:
    """The stages of `reweigh`, on a private Ray or on the cluster that this process is a job of."""
    old = load_training_set(reference, config.storage)
    with (
        new_run(config, parse_reference(reference), round_) as run,
        watch(config, run.name, run.run_id),
        ray_for(config.workers),
        engines_of(run) as engines,
    ):
        kept = as_stage("load kept rows", load_kept)(run, old)
        policy_scores = as_stage("score behavior", score_behavior)(run, engines, kept)
        engines.close()
        weighed = as_stage("weigh", weigh)(run, kept, policy_scores)
        return as_stage("release", release_reweighed)(run, old, kept, policy_scores, weighed, force)
