"""Whose an output folder is: claimed for a job before it starts, so that nothing of another job is its result."""

from __future__ import annotations

from typing import Any

from grape_service.errors import StageError
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import Storage, json_bytes
from workers.training.trainers import checkpoints

CLAIM = "job.json"
"""Names the job that an output folder belongs to; written by create-if-absent."""


def claimed_output(output: str, inputs: str, facts: dict[str, Any], options: StorageOptions) -> str:
    """The folder of the job of these inputs: `output`, or where that is another job's, a folder of its own below it.

    `facts` are written beside the inputs for people. Raises StageError where that folder is another's too.
    """
    claim = json_bytes({**facts, "inputs": inputs})
    for place in (Storage(output, options), Storage(output, options).sub(inputs[:16])):
        if not place.exists(CLAIM) and (place.root != Storage(output, options).root or not _has_result(place)):
            place.create_if_absent(CLAIM, claim)
        if place.exists(CLAIM) and place.read_json(CLAIM).get("inputs") == inputs:
            return place.root
    raise StageError(f"{output} and its folder {inputs[:16]} belong to other training jobs: give another output")


def _has_result(storage: Storage) -> bool:
    """Whether a folder that nobody claimed holds what may be taken for a job's result."""
    there = set(storage.folders()) & {"model", "adapter"} or checkpoints.step_folders(storage)
    return bool(there) or storage.exists("config.json") or storage.exists("adapter_config.json")
