"""The main job as a Prefect flow: from a pool to a released dataset, one Prefect task a stage."""

from __future__ import annotations

from prefect import flow

from flows.artifacts import show_outcome, shown
from flows.tasks import TIMEOUT_SECONDS, as_task
from flows.train import train
from grape_service.config.schema import Config
from workers.outcome import Outcome
from workers.pipeline import Until, run_pipeline


@flow(name="curate", persist_result=False, timeout_seconds=TIMEOUT_SECONDS)
def curate(config: Config, until: Until = "release", force: bool = False) -> Outcome:
    """Score a pool with the model to be trained, keep what fits it best, weigh it, release it."""
    outcome = run_pipeline(config, until, force, as_task, shown, train)
    show_outcome(config, outcome)
    return outcome
