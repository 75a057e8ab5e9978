"""Weighing an existing release again: at a later checkpoint, or with other settings."""

from __future__ import annotations

from prefect import flow

from flows.artifacts import shown
from flows.tasks import TIMEOUT_SECONDS, as_task
from grape_service.config.schema import Config
from workers.outcome import Outcome
from workers.pipeline import reweigh


@flow(name="weigh", persist_result=False, timeout_seconds=TIMEOUT_SECONDS)
def weigh_release(reference: str, config: Config, force: bool = False) -> Outcome:
    """Make a new version with weights from the rows of an existing one, scoring only what is missing."""
    return reweigh(reference, config, force, as_task, shown)
