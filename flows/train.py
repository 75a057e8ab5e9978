"""Train on a release: SFT, then RL on its checkpoint. One Prefect task a stage; the work is in workers."""

from __future__ import annotations

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from flows.deployments import PrefectDeployments
from flows.one_run import as_one_run, start_again
from flows.secrets import hidden, kept, restored
from flows.tasks import TIMEOUT_SECONDS, run_name, user_errors_are_final
from grape_service.config.training import TrainConfig
from grape_service.progress.reporter import Silent, reporter
from grape_service.storage.options import StorageOptions
from workers.stages.train import open_run
from workers.training.records import Record
from workers.training.runs import TrainingRun


@task(name="sft", cache_policy=NO_CACHE, persist_result=False)
def sft(run: TrainingRun) -> Record:
    """SFT on the release."""
    return run.do("sft")


@task(name="rl", cache_policy=NO_CACHE, persist_result=False)
def rl(run: TrainingRun) -> Record:
    """RL on the SFT checkpoint."""
    return run.do("rl")


@flow(
    name="train",
    flow_run_name=run_name,
    persist_result=False,
    timeout_seconds=TIMEOUT_SECONDS,
    on_crashed=[start_again],
)
def train(
    reference: str,
    config: TrainConfig,
    ray_address: str = "auto",
    storage_options: StorageOptions | None = None,
    key: str | None = None,
) -> Record:
    """Start the training jobs of a release one after the other; the run's record."""
    logger = get_run_logger()
    say = logger.info if isinstance(reporter(), Silent) else reporter().event
    with (
        user_errors_are_final(),
        as_one_run(run_name()),
        open_run(
            reference, restored(config, "train"), ray_address, storage_options, key, say, PrefectDeployments()
        ) as run,
    ):
        if "sft" in run.stages:
            sft(run)
        if "rl" in run.stages:
            rl(run)
    return run.record


def train_hidden(reference: str, config: TrainConfig, ray_address: str, storage_options: StorageOptions) -> Record:
    """`train` as a part of another flow, which keeps the secrets of its config out of Prefect."""
    with kept(config, "train"):
        return train(reference, hidden(config), ray_address, storage_options)
