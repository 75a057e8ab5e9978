"""The main job as a Prefect flow: from a pool to a released dataset, one Prefect task a stage."""

from __future__ import annotations

from prefect import flow

from flows.artifacts import show_outcome, shown
from flows.one_run import as_one_run, start_again
from flows.secrets import restored
from flows.tasks import TIMEOUT_SECONDS, as_task, run_name, user_errors_are_final
from flows.train import train_hidden
from grape_service.config.schema import Config
from workers.outcome import Outcome
from workers.pipeline import Until, run_pipeline


@flow(
    name="curate",
    flow_run_name=run_name,
    persist_result=False,
    timeout_seconds=TIMEOUT_SECONDS,
    on_crashed=[start_again],
)
def curate(config: Config, until: Until = "release", force: bool = False) -> Outcome:
    """Score a pool with the model to be trained, keep what fits it best, weigh it, release it."""
    with user_errors_are_final(), as_one_run(config.name, restored(config).notify):
        outcome = run_pipeline(restored(config), until, force, as_task, shown, train_hidden)
    show_outcome(config, outcome)
    return outcome
