"""The `train` section of a config: which job trains, with what, and the trainer's own settings beside it.

Importing this module imports neither torch nor Ray nor Prefect.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from grape_service.config import Model, TrainConfig
from grape_service.config_file import explain
from grape_service.errors import UserError
from workers.trainers.settings import RlSettings, SftSettings

PLACEHOLDERS = ("dataset_path", "dataset_version", "checkpoint", "output")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


class Resources(Model):
    """What a job takes of the Ray cluster."""

    cpus: float | None = Field(None, ge=0)
    """CPU cores; null: one."""
    gpus: int | None = Field(None, ge=0)
    """GPUs of one node; the built-in trainers run a process on each. null: those of this machine on a private Ray;
    on a cluster the number has to be said."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory that Ray reserves."""
    custom: dict[str, float] = {}
    """Custom resources of the cluster, such as an accelerator's name."""


class JobSettings(Model):
    """Who trains, and where."""

    trainer: Literal["builtin", "command", "webhook", "deployment"] | None = None
    """builtin unless command, webhook or deployment is given."""
    command: list[str] | None = None
    """Run this as a Ray job. {dataset_path}, {dataset_version}, {checkpoint} and {output} are filled in, and are in
    the environment as GRAPE_DATASET_PATH, GRAPE_DATASET_VERSION, GRAPE_CHECKPOINT and GRAPE_OUTPUT."""
    webhook: str | None = None
    """POST the same values as JSON to this URL. The answer may hold a status_url, which is then followed."""
    deployment: str | None = None
    """Run this Prefect deployment, flow/name, with the same values as parameters."""
    parameters: dict[str, Any] = {}
    """Further parameters for the deployment or keys for the webhook."""
    resources: Resources = Resources()
    """What the job takes of the cluster."""
    environment: dict[str, str] = {}
    """Environment variables of the job. Secrets belong into the cluster's own environment."""
    pip: list[str] = []
    """Requirements that Ray installs for the job."""
    working_dir: str | None = None
    """Folder or archive that Ray hands to the job as its working folder."""
    output: str | None = None
    """Folder of the job, local or s3://; null: runs/<id>/<stage> beside the release."""
    attempts: int = Field(1, ge=1)
    """How often the job is started before its stage fails; each goes on from the last checkpoint."""
    timeout_seconds: float | None = Field(None, gt=0)
    """A job that takes longer is stopped and has failed."""

    @model_validator(mode="after")
    def _one_trainer(self) -> JobSettings:
        given = [name for name in ("command", "webhook", "deployment") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"there can be one of command, webhook and deployment, not {' and '.join(given)}")
        if self.trainer not in (None, *given) and not (self.trainer == "builtin" and not given):
            raise ValueError(f"trainer: {self.trainer} does not fit: give its own key, or leave trainer out")
        for part in self.command or []:
            unknown = [name for name in _PLACEHOLDER.findall(part) if name not in PLACEHOLDERS]
            if unknown:
                known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
                raise ValueError(f"command: '{{{unknown[0]}}}' is not filled in; known are {known}")
        if self.parameters and not (self.webhook or self.deployment):
            raise ValueError("parameters belong to a webhook or a deployment")
        if self.deployment is not None and self.deployment.count("/") != 1:
            raise ValueError(f"deployment: '{self.deployment}' is not flow/name")
        return self

    @property
    def kind(self) -> Literal["builtin", "command", "webhook", "deployment"]:
        """Who trains."""
        if self.command:
            return "command"
        if self.webhook:
            return "webhook"
        return "deployment" if self.deployment else "builtin"


class SftJob(SftSettings, JobSettings):
    """`train.sft`: the job's keys and the SFT trainer's."""

    @model_validator(mode="after")
    def _only_its_own(self) -> SftJob:
        _refuse_trainer_keys(self, SftSettings)
        return self

    def own_settings(self) -> SftSettings:
        """The trainer's part."""
        return SftSettings(**{key: getattr(self, key) for key in SftSettings.model_fields})


class RlJob(RlSettings, JobSettings):
    """`train.rl`: the job's keys and the RL trainer's."""

    @model_validator(mode="after")
    def _only_its_own(self) -> RlJob:
        _refuse_trainer_keys(self, RlSettings)
        return self

    def own_settings(self) -> RlSettings:
        """The trainer's part."""
        return RlSettings(**{key: getattr(self, key) for key in RlSettings.model_fields})


Job = SftJob | RlJob
Stage = Literal["sft", "rl"]
STAGES: tuple[Stage, ...] = ("sft", "rl")
_JobType = TypeVar("_JobType", SftJob, RlJob)


def _refuse_trainer_keys(job: SftJob | RlJob, settings: type[SftSettings] | type[RlSettings]) -> None:
    foreign = sorted(job.model_fields_set & set(settings.model_fields))
    if job.kind != "builtin" and foreign:
        raise ValueError(f"'{foreign[0]}' is for the built-in trainer and has no effect on a {job.kind}: remove it")


def train_jobs(config: TrainConfig) -> dict[Stage, Job]:
    """The jobs of a train section, SFT first. Raises UserError that names the key that is wrong."""
    jobs: dict[Stage, Job] = {}
    if config.sft is not None:
        jobs["sft"] = _parse(config.sft, SftJob, "train.sft")
    if config.rl is not None:
        jobs["rl"] = _parse(config.rl, RlJob, "train.rl")
    if not jobs:
        raise UserError("train: there is nothing to do: give it an sft or an rl section")
    return jobs


def _parse(values: dict[str, Any], job_type: type[_JobType], where: str) -> _JobType:
    try:
        return job_type.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, job_type)}") from None
