"""Who runs a training job, and where: keys that `train.sft` and `train.rl` have in common."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from grape_service.config.base import Model
from grape_service.json_types import JsonObject

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
    parameters: JsonObject = {}
    """Further parameters for the deployment or keys for the webhook."""
    resources: Resources = Resources()
    """What the job takes of the cluster."""
    environment: dict[str, str] = {}
    """Environment variables of the job, such as MLFLOW_TRACKING_URI. Secrets belong into the cluster's own
    environment."""
    pip: list[str] = []
    """Requirements that Ray installs for the job."""
    working_dir: str | None = None
    """Folder or archive that Ray hands to the job as its working folder."""
    output: str | None = None
    """Folder of the job, local or s3://; null: runs/<id>/<stage> beside the release."""
    attempts: int = Field(1, ge=1)
    """How often the job is started before its stage fails; each resumes from the last checkpoint."""
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
