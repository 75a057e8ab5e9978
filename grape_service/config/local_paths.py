"""Local paths of a config that mean the same from every folder: for manifests, and for jobs that run elsewhere."""

from __future__ import annotations

import os
from typing import Any

import orjson

from grape_service.addresses import moving_checkpoint
from grape_service.config.schema import Config
from grape_service.json_types import JsonObject

SECTIONS_WITH_MODELS = ("target", "behavior", "gather", "train")
PATHS_OF_JOBS = ("output", "working_dir")


def with_absolute_paths(config: Config) -> JsonObject:
    """The values that a config was given, with absolute paths. A local path has to be the same folder wherever they are
    read: a shared file system."""
    values: JsonObject = orjson.loads(config.model_dump_json(exclude_unset=True))
    resolve_models(values)
    pool = values["pool"]
    for group in pool["path"] if isinstance(pool["path"], list) else [pool]:
        group["path"] = absolute(group["path"])
    values["output"]["path"] = absolute(values["output"]["path"])
    if values.get("workspace"):
        values["workspace"] = absolute(values["workspace"])
    train = values.get("train") or {}
    for job in (train.get("sft"), train.get("rl")):
        for key in PATHS_OF_JOBS:
            if job and job.get(key):
                job[key] = absolute(job[key])
        if job and job.get("prompts"):
            job["prompts"]["path"] = absolute(job["prompts"]["path"])
    if (train.get("gate") or {}).get("prompts"):
        train["gate"]["prompts"] = absolute(train["gate"]["prompts"])
    contamination = (values.get("checks") or {}).get("contamination")
    if isinstance(contamination, dict) and contamination.get("files"):
        contamination["files"] = [absolute(path) for path in contamination["files"]]
    return values


def resolve_models(values: JsonObject) -> None:
    """Models and adapters of a config's values become `resolved_model`, wherever they stand."""
    for section in SECTIONS_WITH_MODELS:
        _resolve(values.get(section))


def _resolve(value: Any) -> None:
    if not isinstance(value, dict):
        return
    for name, item in value.items():
        if name in ("model", "adapter") and isinstance(item, str):
            value[name] = resolved_model(item)
        else:
            _resolve(item)


def resolved_model(model: str) -> str:
    """A local folder, also the one of an address that moves, by its full path; a hub id or an s3:// folder as it is."""
    moving = moving_checkpoint(model)
    folder = moving[0] if moving is not None else model
    return absolute(model) if os.path.isdir(os.path.expanduser(folder)) else model


def absolute(path: str) -> str:
    """A local path from the root; an address as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
