"""How much of a dataset turned over from one version to a later one, by what each version in between has in
changes.parquet: which prompts keep changing their winner.

Prompts whose choice changed are dealt to files on disk by a hash, and one of them is counted at a time, so memory does
not grow with the versions.
"""

from __future__ import annotations

import contextlib
import heapq
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.release.changes import OTHER_CHOICE
from grape_service.release.diff import hash_of_texts
from grape_service.release.manifest import CHANGES_FILE, read_manifest
from grape_service.release.reference import version_folder
from grape_service.rows.columns import CHANGE
from grape_service.storage.parquet import read_row_groups
from grape_service.storage.storage import Storage

MAX_STEPS = 100
"""Versions that are followed back."""
MOST_RESTLESS = 20
BUCKETS = 64
_CHOICES = pa.schema([CHANGE.field("prompt_id")])


@dataclass(frozen=True)
class Restless:
    """A prompt and in how many of the versions another response was kept than in the version before."""

    prompt_id: str
    times: int


@dataclass(frozen=True)
class Turnover:
    """From a version to a later one of the same dataset."""

    versions: list[str]
    """The later one and those before it that have changes, newest first, down to the one after the first."""
    churn: list[float]
    """Of each of them, against the version before it: see `ChangeCounts.churn`."""
    prompts: list[int] = field(default_factory=list)
    """How many prompts changed their choice in 1, 2, ... of the versions."""
    most: list[Restless] = field(default_factory=list)
    """Those that changed it most often, in two of the versions at least."""

    def to_json(self) -> JsonObject:
        """For --json."""
        return asdict(self)


def steps_between(storage: Storage, name: str, first: str, last: str) -> list[str] | None:
    """The versions from `last` back to the one whose changes are since `first`; None where they do not lead there."""
    steps: list[str] = []
    version = last
    while version != first:
        changes = read_manifest(storage, name, version).counts.get("changes") or {}
        since = changes.get("since")
        if not isinstance(since, str) or "churn" not in changes or since in steps or len(steps) == MAX_STEPS:
            return None
        steps.append(version)
        version = since
    return steps


def turnover(storage: Storage, name: str, first: str, last: str) -> Turnover | None:
    """What changed on the way from `first` to `last`; None where their versions do not follow each other.

    Raises UserError, StageError for a version that cannot be read.
    """
    steps = steps_between(storage, name, first, last)
    if not steps:
        return None
    churn = [float(read_manifest(storage, name, version).counts["changes"]["churn"]) for version in steps]
    with tempfile.TemporaryDirectory(prefix="grape-turnover-") as temporary:
        folder = Path(temporary)
        for version in steps:
            _deal(storage, name, version, folder)
        times = np.zeros(len(steps), np.int64)
        most: list[tuple[int, str]] = []
        for bucket in range(BUCKETS):
            counts = _count(folder, bucket)
            if counts.num_rows == 0:
                continue
            often = counts["times"].to_numpy()
            times += np.bincount(often, minlength=len(steps) + 1)[1:]
            repeated = counts.filter(pc.greater(counts["times"], 1)).to_pylist()
            most = heapq.nsmallest(MOST_RESTLESS, [*most, *((-one["times"], one["prompt_id"]) for one in repeated)])
    restless = [Restless(prompt, -negative) for negative, prompt in most]
    return Turnover(steps, churn, times.tolist(), restless)


def _deal(storage: Storage, name: str, version: str, folder: Path) -> None:
    """Append the prompts whose choice is another in a version to their buckets, each once."""
    path = f"{version_folder(name, version)}/{CHANGES_FILE}"
    if not storage.exists(path):
        raise UserError(f"{storage.url(path)} is missing, though the manifest names it: restore the version")
    with contextlib.ExitStack() as stack:
        writers: dict[int, Any] = {}
        last: str | None = None
        for table in read_row_groups(storage, path, ["prompt_id", "reason"]):
            found = pc.unique(table.filter(pc.equal(table["reason"], OTHER_CHOICE))["prompt_id"])
            if len(found) and found[0].as_py() == last:  # its rows go on from the row group before
                found = found.slice(1)
            if not len(found):
                continue
            last = found[-1].as_py()
            buckets = hash_of_texts(found) % np.uint64(BUCKETS)
            for bucket in np.unique(buckets):
                if bucket not in writers:
                    target = str(folder / f"{bucket}-{version}.arrow")
                    writers[bucket] = stack.enter_context(pa.ipc.new_stream(target, _CHOICES))
                writers[bucket].write_batch(pa.record_batch([found.filter(pa.array(buckets == bucket))], _CHOICES))


def _count(folder: Path, bucket: int) -> pa.Table:
    """In how many versions each prompt of a bucket has another choice: prompt_id, times."""
    tables = [_CHOICES.empty_table()]
    for path in folder.glob(f"{bucket}-*.arrow"):
        with pa.ipc.open_stream(str(path)) as reader:
            tables.append(reader.read_all())
    counted = pa.concat_tables(tables).group_by("prompt_id").aggregate([("prompt_id", "count")])
    return counted.rename_columns(["prompt_id", "times"])
