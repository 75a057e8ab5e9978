"""What Ray is asked to start for a stage: a built-in trainer with its settings file, or a user's command."""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

from grape_service.config.local_paths import absolute, resolved_model
from grape_service.config.training import Job, RlJob, RlSettings, RlTask, SftJob, SftSettings, SftTask, Stage
from grape_service.errors import UserError
from grape_service.release.load import Release
from grape_service.storage.storage import json_bytes
from workers.cluster.jobs import JobRequest, JobServer
from workers.training.base_model import base_model, base_revision
from workers.training.records import RunRecords


class Target(NamedTuple):
    """The model of the config that asks; a section of its own that names one goes first."""

    model: str | None = None
    revision: str | None = None


NO_TARGET = Target()


def request_of(
    stage: Stage,
    job: Job,
    values: dict[str, str],
    job_id: str,
    run_id: str,
    release: Release,
    records: RunRecords,
    server: JobServer,
    target: Target = NO_TARGET,
) -> JobRequest:
    """The job of a stage; `values` are the placeholders and what they stand for, `target` what SFT trains where its
    section names no model."""
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
        task = _write_task(job, values, job_id, run_id, release, records, target)
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
        working_dir=absolute(job.working_dir) if job.working_dir else None,
    )


def _write_task(
    job: Job,
    values: dict[str, str],
    job_id: str,
    run_id: str,
    release: Release,
    records: RunRecords,
    target: Target,
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
        task = SftTask(**shared, settings=with_target(job.own_settings(), *target))
    else:
        settings, model = _with_whole_path(job.own_settings()), _model_of_rl(release, job, target)
        if model is not None and values["checkpoint"] == model[0]:  # and no checkpoint of SFT
            settings = settings.model_copy(update={"revision": model[1]})
        task = RlTask(**shared, checkpoint=values["checkpoint"], settings=settings)
    name = f"{run_id}/{job_id}.json"
    records.storage.write(name, json_bytes(task.model_dump(mode="json")))
    return records.storage.url(name)


def with_target(settings: SftSettings, target_model: str | None, target_revision: str | None = None) -> SftSettings:
    """The settings with the target's model and revision where they name no model; a local folder by its full path."""
    model, revision = (settings.model, settings.revision) if settings.model else (target_model, target_revision)
    return settings.model_copy(update={"model": resolved_model(model), "revision": revision}) if model else settings


def _with_whole_path(settings: RlSettings) -> RlSettings:
    """The settings with local prompts by their full path: the job has another working folder than whoever starts it."""
    if settings.prompts is None:
        return settings
    prompts = settings.prompts.model_copy(update={"path": absolute(settings.prompts.path)})
    return settings.model_copy(update={"prompts": prompts})


def starting_model(release: Release, job: Job, target: Target) -> tuple[str, str | None] | None:
    """Name and revision of the model that the first stage starts from; None where nothing says it.

    Raises UserError where a trainer of ours would not know it.
    """
    released = release.manifest.config.get("target") or {}
    if isinstance(job, SftJob):
        if job.kind != "builtin" and not target.model and not released.get("model"):
            return None
        settings = with_target(job.own_settings(), *target)
        return base_model(release, settings), base_revision(release, settings)
    found = _model_of_rl(release, job, target)
    if found is None and job.kind == "builtin":
        raise UserError("train.rl.model: without an sft section, say which model RL starts from")
    return found


def _model_of_rl(release: Release, job: RlJob, target: Target) -> tuple[str, str | None] | None:
    if job.model:
        return resolved_model(job.model), job.revision
    if target.model:
        return resolved_model(target.model), target.revision
    released = (release.manifest.config.get("target") or {}).get("model")
    return (resolved_model(str(released)), base_revision(release, SftSettings())) if released else None


def _filled(part: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        part = part.replace(f"{{{name}}}", value)
    return part
