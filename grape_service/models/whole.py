"""Which folder of a model or an adapter is whole: a marker of our trainers, or what the files say of one another."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from typing import TypedDict

from grape_service.errors import StageError
from grape_service.json_types import JsonObject
from grape_service.storage.storage import Storage

MARKER = "complete.json"
"""The file of a checkpoint of our trainers that is written last, with what it was made from."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_PART = re.compile(r"(?P<before>.*-)\d{5}-of-(?P<number>\d{5})(?P<after>\.\w+)")


class CheckpointFile(TypedDict):
    """A file of a checkpoint; of a large one the size alone is known."""

    size: int
    sha256: str | None


class CheckpointFacts(TypedDict, total=False):
    """What a checkpoint of our trainers was made from; one of another trainer says nothing of itself."""

    stage: str  # sft, rl
    dataset: str  # reference of the release
    run: str | None
    model: str  # that it started from
    settings: JsonObject
    inputs: str  # digest of all that it depends on
    rows: int
    eval_rows: int
    prompts: int
    rows_too_long: int
    rows_without_loss: int
    rows_without_weight: int
    metrics: JsonObject  # of the first and the last step, and of the last evaluation
    step: int  # of a checkpoint on the way
    steps: int  # of the last one
    notes: list[str]
    tracking: JsonObject  # runs of trackers, by package
    files: dict[str, CheckpointFile]


class NoCheckpoint(StageError):
    """A folder holds nothing that might be a checkpoint."""


def check_whole(storage: Storage) -> CheckpointFacts:
    """The marker's facts if the checkpoint in this folder is whole; raises StageError that says what is missing, and
    NoCheckpoint where nothing is there.

    A folder without our marker (another trainer wrote it) is whole when it holds a model's config and
    weights, every safetensors file is as long as its header says, and every shard of an index, and of those that are
    numbered 00001-of-00003, is there.
    """
    if storage.exists(MARKER):
        facts: CheckpointFacts = storage.read_json(MARKER)
        if not isinstance(facts.get("files"), dict):
            raise StageError(f"the checkpoint {storage.root} is not whole: its {MARKER} names no files")
        present = {info.path: info.size for info in storage.list()}
        for name, expected in facts["files"].items():
            if present.get(name) != expected["size"]:
                found = "is missing" if name not in present else f"has {present[name]} bytes"
                raise StageError(f"the checkpoint {storage.root} is not whole: {name} {found}, not {expected['size']}")
            if expected["sha256"] and hashlib.sha256(storage.read(name)).hexdigest() != expected["sha256"]:
                raise StageError(f"the checkpoint {storage.root} is not whole: {name} has other contents than recorded")
        return facts
    _check_foreign(storage)
    return {}


def _check_foreign(storage: Storage) -> None:
    sizes = {info.path: info.size for info in storage.list() if "/" not in info.path}
    if not {"config.json", "adapter_config.json"} & set(sizes):
        raise NoCheckpoint(
            f"there is no checkpoint in {storage.root}: neither config.json nor adapter_config.json is there"
        )
    weights = [name for name in sizes if name.endswith(WEIGHT_SUFFIXES)]
    expected = {name for part in weights for name in _numbered(part)}
    for name in sizes:
        if name.endswith(".index.json"):
            expected |= set(storage.read_json(name).get("weight_map", {}).values())
    if not weights and not expected:  # the configuration of something else, or of a model that was never written
        raise NoCheckpoint(f"the checkpoint {storage.root} is not whole: its weights are missing")
    if lacking := sorted(expected - set(sizes)):
        raise StageError(f"the checkpoint {storage.root} is not whole: {', '.join(lacking)} are missing")
    for name in weights:
        if name.endswith(".safetensors") and sizes[name] != _safetensors_size(storage, name):
            raise StageError(f"the checkpoint {storage.root} is not whole: {name} is cut off at {sizes[name]} bytes")


def _numbered(name: str) -> list[str]:
    """All parts of which a file is one by its name."""
    found = _PART.fullmatch(name)
    if found is None:
        return []
    number = found["number"]
    return [f"{found['before']}{part:05d}-of-{number}{found['after']}" for part in range(1, int(number) + 1)]


def _safetensors_size(storage: Storage, name: str) -> int:
    """Length that a safetensors file should have by its header; -1 if the header itself is cut off or none."""
    with storage.open(name) as file:
        start = file.read(8)
        if len(start) < 8:
            return -1
        (length,) = struct.unpack("<Q", start)
        header = file.read(length) if length < 2**28 else b""
    if len(header) != length:
        return -1
    try:
        tensors = [value for key, value in json.loads(header).items() if key != "__metadata__"]
    except ValueError:
        return -1
    return int(8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0))
