"""Weighing an existing release again: at a later checkpoint, or with other settings."""

from __future__ import annotations

from prefect import flow

from flows.artifacts import shown
from flows.one_run import as_one_run, start_again
from flows.secrets import restored
from flows.tasks import TIMEOUT_SECONDS, as_task, run_name, user_errors_are_final
from grape_service.config.schema import Config
from workers.outcome import Outcome
from workers.pipeline import reweigh


@flow(
    name="weigh",
    flow_run_name=run_name,
    persist_result=False,
    timeout_seconds=TIMEOUT_SECONDS,
    on_crashed=[start_again],
)
def weigh_release(reference: str, config: Config, force: bool = False) -> Outcome:
    """Make a new version with weights from the rows of an existing one, scoring only what is missing."""
    with user_errors_are_final(), as_one_run(config.name, restored(config).notify):
        return reweigh(reference, restored(config), force, as_task, shown)
