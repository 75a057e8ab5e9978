"""What Ray is asked to start for a stage: a built-in trainer with its settings file, or a user's command."""

from __future__ import annotations

from typing import Any

import orjson

from grape_service.config.training import Job, RlTask, SftJob, SftSettings, SftTask, Stage
from grape_service.release.load import Release
from grape_service.storage.storage import json_bytes
from workers.cluster.jobs import JobRequest, JobServer
from workers.training.base_model import resolved_model
from workers.training.records import RunRecords


def request_of(
    stage: Stage,
    job: Job,
    values: dict[str, str],
    job_id: str,
    run_id: str,
    release: Release,
    records: RunRecords,
    server: JobServer,
    target_model: str | None = None,
) -> JobRequest:
    """The job of a stage; `values` are the placeholders and what they stand for, `target_model` what SFT trains where
    its section names none."""
    resources = job.resources
    gpus = resources.gpus if resources.gpus is not None else server.num_gpus
    environment = {f"GRAPE_{name.upper()}": value for name, value in values.items()} | dict(job.environment)
    if job.kind == "command":
        assert job.command is not None
        command = [_filled(part, values) for part in job.command]
    else:
        assert gpus is not None, "checked_jobs has seen to that"
        environment["GRAPE_STORAGE_OPTIONS"] = orjson.dumps(release.storage.options).decode()
        python = "python" if job.pip else server.python
        task = _write_task(job, values, job_id, run_id, release, records, target_model)
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        command = [
            python,
            *(several if gpus > 1 else []),
            "-m",
            f"workers.training.trainers.{stage}",
            "--settings",
            task,
        ]
    return JobRequest(
        id=job_id,
        command=command,
        environment=environment,
        num_cpus=resources.cpus,
        num_gpus=gpus or None,
        memory_bytes=int(resources.memory_gb * 2**30) if resources.memory_gb else None,
        custom_resources=dict(resources.custom),
        pip=list(job.pip),
        working_dir=job.working_dir,
    )


def _write_task(
    job: Job,
    values: dict[str, str],
    job_id: str,
    run_id: str,
    release: Release,
    records: RunRecords,
    target_model: str | None,
) -> str:
    """The settings file of a built-in trainer; its address."""
    shared: dict[str, Any] = {
        "dataset": release.reference,
        "output": values["output"],
        "run": run_id,
        "storage": release.storage.options,
    }
    task: SftTask | RlTask
    if isinstance(job, SftJob):
        task = SftTask(**shared, settings=with_target(job.own_settings(), target_model))
    else:
        task = RlTask(**shared, checkpoint=values["checkpoint"], settings=job.own_settings())
    name = f"{run_id}/{job_id}.json"
    records.storage.write(name, json_bytes(task.model_dump(mode="json")))
    return records.storage.url(name)


def with_target(settings: SftSettings, target_model: str | None) -> SftSettings:
    """The settings with `target_model` where they name no model; a local folder by its full path."""
    model = settings.model or target_model
    return settings.model_copy(update={"model": resolved_model(model)}) if model else settings


def _filled(part: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        part = part.replace(f"{{{name}}}", value)
    return part
