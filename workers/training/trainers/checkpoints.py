"""Checkpoints that are whole or not there: a marker file, written last, lists every file and its size.

Trainers work in a local folder. Where the output is on S3, each whole checkpoint is copied there, marker last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

from grape_service.errors import StageError, UserError
from grape_service.storage.storage import Storage, json_bytes

MARKER = "complete.json"
PROGRESS_FILE = "progress.json"
"""Where a job of our own trainers is: step, steps, loss, ess, reward, seconds_left, time."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
DIGEST_LIMIT = 64 * 2**20
"""Files up to this size are listed with their sha256; of larger ones the size is checked."""


def mark_whole(folder: Path, facts: dict[str, Any]) -> None:
    """Write the marker of a checkpoint folder: its files and `facts` (what it was made from)."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARKER:
            size = path.stat().st_size
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if size <= DIGEST_LIMIT else None
            files[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    Storage(str(folder)).write(MARKER, json_bytes({**facts, "files": files}))


def check_whole(storage: Storage) -> dict[str, Any]:
    """The marker's facts if the checkpoint in this folder is whole; raises StageError that says what is missing.

    A folder without our marker (another trainer wrote it) is whole when it holds a model's config and
    weights, every safetensors file is as long as its header says, and every shard of an index is there.
    """
    if storage.exists(MARKER):
        facts = storage.read_json(MARKER)
        present = {info.path: info.size for info in storage.list()}
        for name, expected in facts["files"].items():
            if present.get(name) != expected["size"]:
                found = "is missing" if name not in present else f"has {present[name]} bytes"
                raise StageError(f"the checkpoint {storage.root} is not whole: {name} {found}, not {expected['size']}")
            if expected["sha256"] and hashlib.sha256(storage.read(name)).hexdigest() != expected["sha256"]:
                raise StageError(f"the checkpoint {storage.root} is not whole: {name} has other contents than recorded")
        return facts
    return _check_foreign(storage)


def _check_foreign(storage: Storage) -> dict[str, Any]:
    sizes = {info.path: info.size for info in storage.list() if "/" not in info.path}
    if not {"config.json", "adapter_config.json"} & set(sizes):
        raise StageError(
            f"there is no checkpoint in {storage.root}: neither config.json nor adapter_config.json is there"
        )
    weights = [name for name in sizes if name.endswith(WEIGHT_SUFFIXES)]
    expected: set[str] = set()
    for name in sizes:
        if name.endswith(".index.json"):
            expected |= set(storage.read_json(name).get("weight_map", {}).values())
    if not weights or expected - set(sizes):
        lacking = ", ".join(sorted(expected - set(sizes))) or "its weights"
        raise StageError(f"the checkpoint {storage.root} is not whole: {lacking} are missing")
    for name in weights:
        if name.endswith(".safetensors") and sizes[name] != _safetensors_size(storage, name):
            raise StageError(f"the checkpoint {storage.root} is not whole: {name} is cut off at {sizes[name]} bytes")
    return {}


def _safetensors_size(storage: Storage, name: str) -> int:
    """Length that a safetensors file should have by its header; -1 if the header itself is cut off."""
    with storage.open(name) as file:
        start = file.read(8)
        if len(start) < 8:
            return -1
        (length,) = struct.unpack("<Q", start)
        header = file.read(length) if length < 2**28 else b""
    if len(header) != length:
        return -1
    tensors = [value for key, value in json.loads(header).items() if key != "__metadata__"]
    return 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)


def is_whole(storage: Storage) -> bool:
    """Whether our marker is there and every file that it lists is too."""
    try:
        return storage.exists(MARKER) and check_whole(storage) is not None
    except StageError:
        return False


def step_folders(storage: Storage) -> list[str]:
    """Names of the checkpoints checkpoint-<step> of a trainer's folder, newest first."""
    names = [name for name in storage.folders() if name.removeprefix("checkpoint-").isdigit()]
    return sorted(names, key=lambda name: -int(name.removeprefix("checkpoint-")))


def last_whole(storage: Storage) -> str | None:
    """Name of the newest whole checkpoint of a trainer's folder."""
    return next((name for name in step_folders(storage) if is_whole(storage.sub(name))), None)


def upload(folder: Path, storage: Storage) -> None:
    """Copy a local checkpoint folder, its marker last."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    storage.delete(MARKER)
    for path in paths:
        with path.open("rb") as source, storage.open_write(path.relative_to(folder).as_posix()) as sink:
            shutil.copyfileobj(source, sink, 16 * 2**20)
    storage.write(MARKER, (folder / MARKER).read_bytes())


def download(storage: Storage, folder: Path) -> Path:
    """Copy a folder to local disk."""
    files = storage.list()
    if not files:
        raise UserError(f"there is nothing in {storage.root}: give the folder of a model")
    for info in files:
        target = folder / info.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage.open(info.path) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 16 * 2**20)
    return folder
