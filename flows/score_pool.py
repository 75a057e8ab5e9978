"""Scoring the new rows of a growing pool, and nothing else: for the night."""

from __future__ import annotations

from prefect import flow

from flows.artifacts import show_outcome, shown
from flows.one_run import as_one_run, start_again
from flows.secrets import restored
from flows.tasks import TIMEOUT_SECONDS, as_task, run_name, user_errors_are_final
from grape_service.config.schema import Config
from workers.outcome import Outcome
from workers.pipeline import run_pipeline


@flow(
    name="score-pool",
    flow_run_name=run_name,
    persist_result=False,
    timeout_seconds=TIMEOUT_SECONDS,
    on_crashed=[start_again],
)
def score_pool(config: Config) -> Outcome:
    """Score the rows of a pool that have no score yet under the target. An unchanged pool starts no engine."""
    with user_errors_are_final(), as_one_run(config.name, restored(config).notify):
        outcome = run_pipeline(restored(config), until="score", as_stage=as_task, watch=shown)
    show_outcome(config, outcome)
    return outcome
