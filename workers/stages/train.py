"""The train stage: SFT on a release, then RL on its checkpoint, each a job that is started once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import grape_service
from grape_service.config.training import Job, SftJob, Stage, TrainConfig, require_train_extra
from grape_service.errors import UserError
from workers.cluster.jobs import IN_CLUSTER, PRIVATE, job_server
from workers.training.base_model import check_local_model
from workers.training.records import Record, RunRecords
from workers.training.request import with_target
from workers.training.runs import DONE, Deployments, TrainingRun, run_id_of


def train(
    reference: str,
    config: TrainConfig,
    ray_address: str = "auto",
    storage_options: dict[str, Any] | None = None,
    key: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    deployments: Deployments | None = None,
    target_model: str | None = None,
) -> Record:
    """Do all stages of `config` and return the run's record.

    `target_model`: what SFT trains where its section names no model; null: the release's target.

    `key`: another word makes another run of the same request. `say` gets a line for each change. Raises UserError
    for mistakes in the config, StageError with the end of the log for a job that failed or was cancelled.
    """
    with open_run(reference, config, ray_address, storage_options, key, say, deployments, target_model) as run:
        for stage in run.stages:
            run.do(stage)
    return run.record


@contextlib.contextmanager
def open_run(
    reference: str,
    config: TrainConfig,
    ray_address: str = "auto",
    storage_options: dict[str, Any] | None = None,
    key: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    deployments: Deployments | None = None,
    target_model: str | None = None,
) -> Iterator[TrainingRun]:
    """The run of a request, to do its stages one by one; arguments as for `train`."""
    jobs = checked_jobs(config, ray_address)
    release = grape_service.load(reference, storage_options)
    run = TrainingRun(release, config, jobs, key, say, deployments, target_model)
    sft = jobs.get("sft")
    here = ray_address == "auto" and IN_CLUSTER not in os.environ
    if isinstance(sft, SftJob) and sft.kind == "builtin" and here and run.record["stages"]["sft"]["state"] not in DONE:
        check_local_model(release, with_target(sft.own_settings(), target_model))
    with contextlib.ExitStack() as stack:
        stack.callback(run.give_back)
        kinds = {jobs[stage].kind for stage in jobs if run.record["stages"][stage]["state"] not in DONE}
        if kinds & {"builtin", "command"}:
            run.server = stack.enter_context(job_server(ray_address))
            stack.callback(run.stop_private_jobs)
        yield run


def checked_jobs(config: TrainConfig, ray_address: str) -> dict[Stage, Job]:
    """The jobs of a request. Raises UserError for what can be known before a release is there to train on."""
    jobs = config.jobs
    on_cluster = ray_address != "auto" or IN_CLUSTER in os.environ
    for stage, job in jobs.items():
        if job.kind != "builtin":
            continue
        if not on_cluster and not job.pip:
            require_train_extra()
        if on_cluster and job.resources.gpus is None:
            where = "the cluster" if ray_address == "auto" else ray_address
            raise UserError(f"train.{stage}.resources.gpus: say how many GPUs the job on {where} takes, or 0")
    return jobs


def read(
    reference: str, config: TrainConfig, storage_options: dict[str, Any] | None = None, key: str | None = None
) -> Record:
    """The record of the run of a request. Raises UserError if it was never started."""
    release = grape_service.load(reference, storage_options)
    return RunRecords(release.storage, release.name).read(run_id_of(release, config, key))


def cancel(
    reference: str,
    config: TrainConfig,
    ray_address: str = "auto",
    storage_options: dict[str, Any] | None = None,
    key: str | None = None,
) -> Record:
    """Cancel the run of a request. A job on a cluster is stopped here, others by the process that follows them."""
    release = grape_service.load(reference, storage_options)
    run_id = run_id_of(release, config, key)
    records = RunRecords(release.storage, release.name)
    records.read(run_id)

    def ask(record: Record) -> None:
        for stage in record["stages"].values():
            if stage["state"] in ("waiting", "running"):
                stage["cancel"] = True

    record = records.change(run_id, ask)
    for stage in record["stages"].values():
        address = stage.get("address")
        if stage["state"] == "running" and address and address != PRIVATE:
            with job_server(address if ray_address == "auto" else ray_address) as server:
                server.stop(stage["job_id"])
    return records.read(run_id)
