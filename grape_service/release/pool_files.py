"""All files that a version was made from: a manifest lists the first MAX_LISTED, a file beside its data all of more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import orjson
import pyarrow as pa

from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.release.load import Release
from grape_service.release.manifest import POOL_FILES, DocumentEntry, FileList, PoolFile, Role
from grape_service.release.writer import write_table
from grape_service.storage.parquet import open_checked
from grape_service.storage.storage import Storage

MAX_LISTED = 10_000
BATCH_FILES = 65_536
SCHEMA = pa.schema(
    [
        pa.field("role", pa.string(), nullable=False),  # pool, or prompts: what gather sampled for
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),  # bytes
        pa.field("etag", pa.string()),
        pa.field("digest", pa.string()),
    ]
)


def listed(files: list[JsonObject]) -> tuple[list[PoolFile], FileList | None]:
    """The files that a manifest lists, and how many there are with a digest of all of them, where these are more.

    `files` have url, size, version (an etag) and digest, as a plan of prepare has them.
    """
    first = [PoolFile(path=f["url"], size=f["size"], etag=f["version"], digest=f["digest"]) for f in files[:MAX_LISTED]]
    if len(files) <= MAX_LISTED:
        return first, None
    digest = hashlib.sha256()
    for file in files:
        digest.update(orjson.dumps([file["url"], file["size"], file["digest"] or file["version"]]))
    return first, FileList(files=len(files), digest=digest.hexdigest())


def write_pool_files(storage: Storage, folder: str, files: Mapping[Role, Sequence[JsonObject]]) -> DocumentEntry:
    """Write all files of each role beside the data of a version."""

    def batches() -> Iterator[pa.RecordBatch]:
        for role, of_role in files.items():
            for start in range(0, len(of_role), BATCH_FILES):
                rows = [
                    {"role": role, "path": f["url"], "size": f["size"], "etag": f["version"], "digest": f["digest"]}
                    for f in of_role[start : start + BATCH_FILES]
                ]
                yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)

    return write_table(storage, folder, POOL_FILES, SCHEMA, batches())


def copy_pool_files(release: Release, storage: Storage, folder: str) -> list[DocumentEntry]:
    """The file of `write_pool_files` of another version, for one that has the same parents; none where it has none."""
    entry = _entry(release)
    if entry is None:
        return []
    with open_checked(release.storage, f"{release.folder}/{entry.path}", entry.sha256) as file:
        return [write_table(storage, folder, POOL_FILES, SCHEMA, file.iter_batches(BATCH_FILES))]


def paths_of(release: Release) -> Iterator[str]:
    """Every file of a version's pool and of the prompts that gather sampled for. Raises UserError where the file that
    holds them is damaged or missing."""
    parents = release.manifest.parents
    entry = _entry(release)
    beside = set(parents.all_files) if entry is not None else set()
    for role, files in (("pool", parents.pool), ("prompts", parents.prompts)):
        if role not in beside:
            yield from (item.path for item in files)
    if entry is None:
        return
    with open_checked(release.storage, f"{release.folder}/{entry.path}", entry.sha256) as file:
        for batch in file.iter_batches(BATCH_FILES, columns=["path"]):
            yield from batch.column("path").to_pylist()


def _entry(release: Release) -> DocumentEntry | None:
    found = next((entry for entry in release.manifest.documents if entry.path == POOL_FILES), None)
    if found is None and release.manifest.parents.all_files:
        raise UserError(f"the manifest of {release.reference} does not list {POOL_FILES}: restore it")
    return found
