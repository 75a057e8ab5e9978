"""What a training job is made of: its result belongs to these inputs, and to no others.

A stage's inputs are the whole of its section, the content of the release, the model that it starts from and the word
that asks for another run; what is left out is listed with the reason. Their digest names the run, claims the output
folder before a job is started, and is compared before anything in that folder is taken for a result.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from grape_service.config.own_sources import sources_of
from grape_service.config.training import Job, RlJob, RlSettings, Stage
from grape_service.keys import NOT_READ, WithoutEffect, digest_of, files_of_key, settings_of
from grape_service.models.digests import content_digest, content_digests
from grape_service.models.files import ModelFiles, file_names
from grape_service.pool.files import with_digests
from grape_service.pool.listing import list_files
from grape_service.release.load import Release
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import Storage

FORMAT = 3
"""Raised when the same inputs come to give another result."""

SAME_RUN: WithoutEffect = {
    "after": "in which rounds there is RL, not what it makes of a checkpoint",
    "attempts": "how often a job is started says nothing of what it makes",
    "timeout_seconds": "a job that was stopped has no result",
    "resources.cpus": "where a job runs and what it waits for, not what it computes",
    "resources.memory_gb": "as resources.cpus",
    "resources.custom": "as resources.cpus",
}
"""Of a stage's section, what its result does not depend on. Of our own code, FORMAT says when it makes another result:
a model is not trained again for every new version of this package."""
COMPILED: WithoutEffect = {pattern: NOT_READ[pattern] for pattern in ("__pycache__/*", "*/__pycache__/*")}
"""Files of a job's working folder that its result does not depend on."""


def release_digest(release: Release) -> str:
    """Names a release's content: its whole manifest, which names every file's bytes."""
    return hashlib.sha256(release.manifest.to_json()).hexdigest()


def model_inputs(model: str, revision: str | None, options: StorageOptions) -> dict[str, Any]:
    """What is known of a model here: the content of a local folder, the listing of an s3:// one, a hub's revision."""
    if model.startswith("s3://"):
        return {"listing": [[info.path, info.size, info.etag] for info in Storage(model, options).list()]}
    folder = Path(model).expanduser()
    if folder.is_dir():
        return {"files": _contents(folder)}
    return {"hub": model, "revision": revision}


def resolved_model_inputs(files: ModelFiles) -> dict[str, Any]:
    """What names a model that is on this machine: a hub's commit, else the content of every file of its folder."""
    if files.revision is not None:
        return {"hub": files.name, "commit": files.revision}
    return {"files": _contents(Path(files.folder))}


def _contents(folder: Path) -> dict[str, str]:
    """Digest of each file of a model's folder, at any depth."""
    return content_digests(folder, files_of_key(file_names(folder), NOT_READ))


def stage_inputs(
    stage: Stage, job: Job, release: Release, model: tuple[str, str | None] | None, after: str | None, key: str | None
) -> str:
    """Digest of a stage's inputs. `model`: name and revision of what it starts from, where that is known; `after`: the
    digest of the stage whose checkpoint it takes."""
    return digest_of(
        {
            "format": FORMAT,
            "stage": stage,
            "section": settings_of(job, SAME_RUN),
            "working_dir": _folder_content(job.working_dir) if job.working_dir else None,
            "release": [release.reference, release_digest(release)],
            "model": model_inputs(*model, release.storage.options) if model else None,
            "after": after,
            "key": key,
            "rl": rl_inputs(job, job.working_dir, release.storage.options) if isinstance(job, RlJob) else None,
        }
    )


def rl_inputs(settings: RlSettings, working_dir: str | None, options: StorageOptions) -> dict[str, Any]:
    """What RL reads beside the release: the files of `prompts`, and the source of each reward's function, null where
    it is not on this machine."""
    files = with_digests(list_files(settings.prompts.path, options), options=options) if settings.prompts else []
    return {
        "prompts": [[file.url, file.size, file.digest or file.version] for file in files],
        "rewards": [sources_of(reward.function, working_dir) for reward in settings.rewards if reward.function],
    }


def _folder_content(path: str) -> Any:
    """Names and contents below a local folder, or of an archive; an address as it is."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = [file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()]
        return content_digests(place, files_of_key(files, COMPILED))
    return content_digest(place) if place.is_file() else path
