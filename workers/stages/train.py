"""The train stage: SFT on a release, then RL on its checkpoint, each a job that is started once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial

from grape_service.config.training import Job, SftJob, Stage, TrainConfig
from grape_service.errors import StageError
from grape_service.release.load import load_training_set
from grape_service.storage.options import StorageOptions
from workers.cluster.jobs import IN_CLUSTER, PRIVATE, job_server
from workers.training.attempts import Deployments, cancel_job, problem_of
from workers.training.base_model import check_local_model
from workers.training.checks import (
    refuse_outputs,
    refuse_prompts,
    refuse_release,
    refuse_resources_of,
    refuse_settings,
)
from workers.training.records import Record, RunRecords, StageRecord, is_followed, settled, update_stage
from workers.training.request import with_target
from workers.training.runs import TrainingRun, inputs_of, run_id_of, target_of


def train(
    reference: str,
    config: TrainConfig,
    ray_address: str = "auto",
    storage_options: StorageOptions | None = None,
    key: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    deployments: Deployments | None = None,
    target_model: str | None = None,
    target_revision: str | None = None,
) -> Record:
    """Do all stages of `config` and return the run's record.

    `target_model`, `target_revision`: what is trained where no section names a model; null: the release's target.

    `key`: another word makes another run of the same request. `say` gets a line for each change. Raises UserError
    for mistakes in the config, StageError with the end of the log for a job that failed or was cancelled.
    """
    with open_run(
        reference, config, ray_address, storage_options, key, say, deployments, target_model, target_revision
    ) as run:
        for stage in run.stages:
            run.do(stage)
    return run.record


@contextlib.contextmanager
def open_run(
    reference: str,
    config: TrainConfig,
    ray_address: str = "auto",
    storage_options: StorageOptions | None = None,
    key: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    deployments: Deployments | None = None,
    target_model: str | None = None,
    target_revision: str | None = None,
) -> Iterator[TrainingRun]:
    """The run of a request, to do its stages one by one; arguments as for `train`."""
    jobs = checked_jobs(config, ray_address, storage_options)
    release = load_training_set(reference, storage_options)
    refuse_release(jobs, release)
    sft = jobs.get("sft")
    here = ray_address == "auto" and IN_CLUSTER not in os.environ
    if isinstance(sft, SftJob) and sft.kind == "builtin" and here:
        target = target_of(release, target_model, target_revision)
        check_local_model(release, with_target(sft.own_settings(), *target))
    run = TrainingRun(release, config, jobs, key, say, deployments, target_model, target_revision)
    with contextlib.ExitStack() as stack:
        stack.callback(run.give_back)
        kinds = {jobs[stage].kind for stage in jobs if not run.is_done(stage)}
        if kinds & {"builtin", "command"}:
            server = stack.enter_context(job_server(ray_address))
            refuse_resources_of(server, jobs)
            run.use(server)
            stack.callback(run.stop_private_jobs)
        yield run


def checked_jobs(
    config: TrainConfig, ray_address: str, storage_options: StorageOptions | None = None
) -> dict[Stage, Job]:
    """The jobs of a request. Raises UserError for what can be known before a release is there to train on."""
    jobs = config.jobs
    where = "the cluster" if ray_address == "auto" else ray_address
    on_cluster = ray_address != "auto" or IN_CLUSTER in os.environ
    refuse_settings(jobs, on_cluster, where)
    refuse_outputs(jobs, on_cluster, storage_options or {})
    return jobs


def check_prompts(config: TrainConfig, pool: list[str], options: StorageOptions) -> None:
    """Raises UserError where a pool lacks the prompts or the right answers that RL reads."""
    if config.rl is not None and config.rl.kind == "builtin":
        refuse_prompts(config.rl, [config.rl.prompts.path] if config.rl.prompts else pool, options)


def check_cluster(config: TrainConfig, ray_address: str) -> None:
    """Raises UserError where the cluster at an address has no node for a job."""
    if ray_address != "auto":
        with job_server(ray_address) as server:
            refuse_resources_of(server, config.jobs)


def read(
    reference: str,
    config: TrainConfig,
    storage_options: StorageOptions | None = None,
    key: str | None = None,
    target_model: str | None = None,
    target_revision: str | None = None,
    deployments: Deployments | None = None,
) -> Record:
    """The record of the run of a request, in which nothing runs that has ended. Raises UserError if there is none."""
    release = load_training_set(reference, storage_options)
    run_id = run_id_of(inputs_of(release, config.jobs, key, target_of(release, target_model, target_revision)))
    return settled(RunRecords(release.storage, release.name), run_id, partial(problem_of, deployments=deployments))


def cancel(
    reference: str,
    config: TrainConfig,
    ray_address: str = "auto",
    storage_options: StorageOptions | None = None,
    key: str | None = None,
    target_model: str | None = None,
    target_revision: str | None = None,
    deployments: Deployments | None = None,
) -> Record:
    """Cancel the run of a request; its record then.

    A job on a Ray cluster or of Prefect is ended here, whether or not a process follows it; a private Ray's and a
    webhook's by that process. Raises StageError where a job that nobody follows could not be ended; the record says
    the same.
    """
    release = load_training_set(reference, storage_options)
    inputs = inputs_of(release, config.jobs, key, target_of(release, target_model, target_revision))
    run_id = run_id_of(inputs)
    records = RunRecords(release.storage, release.name)
    records.read(run_id)
    for id_ in dict.fromkeys([inputs["sft"][:16] if "sft" in inputs else run_id, run_id]):
        record = records.change(id_, _ask_to_end)
        for stage, entry in record["stages"].items():
            address = entry.get("address")
            if not _may_run(entry) or entry.get("run", id_) != id_ or address == PRIVATE:
                continue
            if entry["kind"] == "webhook" and is_followed(record):
                continue
            where = ray_address if address and ray_address != "auto" else address
            values = cancel_job(stage, entry, where, deployments)
            if values["state"] == "cancelled" or not is_followed(record):
                records.change(id_, partial(update_stage, stage=stage, values=values))
    record = settled(records, run_id, partial(problem_of, deployments=deployments))
    unended = [entry["error"] for entry in record["stages"].values() if entry.get("lost") and entry.get("cancel")]
    if unended:
        raise StageError(unended[0])
    return record


def _may_run(entry: StageRecord) -> bool:
    """Whether a stage has a job that has not ended, as far as is known."""
    return entry["state"] == "running" or bool(entry.get("lost"))


def _ask_to_end(record: Record) -> None:
    for entry in record["stages"].values():
        if entry["state"] == "waiting" or _may_run(entry):
            entry["cancel"] = True
