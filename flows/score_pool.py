"""Scoring the new rows of a growing pool, and nothing else: for the night."""

from __future__ import annotations

from prefect import flow

from flows.artifacts import show_outcome
from flows.curate import do_elsewhere, do_stages
from flows.limits import TIMEOUT_SECONDS
from grape_service.config import Config
from grape_service.notify import ending_told
from workers import jobs_api
from workers.publishing import Outcome


@flow(name="score-pool", persist_result=False, timeout_seconds=TIMEOUT_SECONDS)
def score_pool(config: Config) -> Outcome:
    """Score the rows of a pool that have no score yet under the target. An unchanged pool starts no engine."""
    with ending_told(config) as told:
        elsewhere = jobs_api.runs_elsewhere(config)
        outcome = do_elsewhere(config, "score", force=False) if elsewhere else do_stages(config, "score", force=False)
        show_outcome(config, outcome)
        told.append(outcome.to_json())
    return outcome
