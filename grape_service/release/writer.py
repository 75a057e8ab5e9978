"""Writing a version: data files from any number of tasks, then the manifest, which makes it exist."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from grape_service.errors import StageError
from grape_service.release.card import render_card
from grape_service.release.catalog import add_to_catalog, read_catalog
from grape_service.release.claim import PUBLISHED, Claim, iso_time
from grape_service.release.manifest import (
    FORMAT,
    MANIFEST,
    DocumentEntry,
    FileEntry,
    Manifest,
    ManifestFields,
    columns_of,
    without_secrets,
)
from grape_service.release.reference import check_tag, version_number
from grape_service.release.tags import move_tag
from grape_service.storage.parquet import open_writer, row_groups
from grape_service.storage.storage import Storage

_TOKEN_COLUMNS = ("loss_mask", "labels", "target_logprobs", "behavior_logprobs", "loss_weights")


@dataclass(frozen=True)
class Version:
    """A published version."""

    reference: str
    name: str
    version: str
    manifest: Manifest
    tags: list[str]  # those that were moved to it


def write_part(
    storage: Storage, version_folder: str, index: int, schema: pa.Schema, batches: Iterable[pa.RecordBatch | pa.Table]
) -> FileEntry:
    """Write one data file of a version, whole or not at all; in any process, one call for each index.

    The bytes depend on the rows and the schema alone, not on how the rows are cut into batches. A task that
    is tried again replaces the same file. Raises UserError where the storage may not be written.
    """
    path = f"data/part-{index:05d}.parquet"
    rows = tokens = loss_tokens = 0
    with storage.open_write(f"{version_folder}/{path}") as file:
        hashing = _HashingFile(file)
        with open_writer(hashing, schema) as writer:
            for group in row_groups(batches, schema):
                _check_alignment(group)
                rows += group.num_rows
                tokens += _num_values(group, "input_ids")
                loss_tokens += _num_true(group, "loss_mask")
                writer.write_table(group, row_group_size=group.num_rows)
    return FileEntry(
        path=path, size=hashing.size, sha256=hashing.digest(), rows=rows, tokens=tokens, loss_tokens=loss_tokens
    )


def publish(
    storage: Storage,
    claim: Claim,
    schema: pa.Schema,
    entries: Sequence[FileEntry],
    fields: ManifestFields,
    card: str | None = None,
    report_html: str | None = None,
    who: str = "grape",
) -> Version:
    """Make a claimed version exist: card, report, then the manifest by create-if-absent, then its tags.

    `card`: README.md; None writes the usual one. Tags that point to a later version already stay there.
    Raises StageError if the claim was lost, a file is missing or one is there that is not in `entries`.
    """
    for tag in fields.tags:
        check_tag(tag)
    entries = sorted(entries, key=lambda entry: entry.path)
    _check_files(storage, claim, entries)
    manifest = Manifest(
        **{**fields.model_dump(), "config": without_secrets(fields.config)},
        format=FORMAT,
        name=claim.name,
        version=claim.version,
        created=iso_time(time.time()),
        writer=claim.writer,
        columns=columns_of(schema),
        files=entries,
    )
    documents = {"README.md": card if card is not None else render_card(manifest)}
    if report_html is not None:
        documents["report.html"] = report_html
    manifest = manifest.model_copy(
        update={"documents": [_write_document(storage, claim.folder, *item) for item in documents.items()]}
    )
    claim.check()
    path = f"{claim.folder}/{MANIFEST}"
    if not storage.create_if_absent(path, manifest.to_json()) and storage.read_json(path)["writer"] != claim.writer:
        raise StageError(f"{storage.url(path)} was written by another: run again for another version")
    add_to_catalog(storage, manifest)
    moved = [
        tag
        for tag in fields.tags
        if move_tag(storage, claim.name, tag, claim.version, who=who, reason="published", only_forward=True)
    ]
    claim.end(PUBLISHED)
    return Version(f"{storage.root}/{claim.name}@{claim.version}", claim.name, claim.version, manifest, moved)


def find_identical(storage: Storage, name: str, content_digest: str) -> str | None:
    """The newest version with this content, if there is one. One small read, whatever the number of versions."""
    found = [entry.version for entry in read_catalog(storage, name) if entry.content_digest == content_digest]
    return max(found, key=version_number, default=None)


def _num_values(table: pa.Table, name: str) -> int:
    return int(pc.sum(pc.list_value_length(table[name])).as_py() or 0) if name in table.column_names else 0


def _num_true(table: pa.Table, name: str) -> int:
    return int(pc.sum(pc.list_flatten(table[name])).as_py() or 0) if name in table.column_names else 0


def _check_alignment(table: pa.Table) -> None:
    """Each token column is as long as input_ids, row by row, or null."""
    if "input_ids" not in table.column_names:
        return
    expected = pc.list_value_length(table["input_ids"])
    for name in _TOKEN_COLUMNS:
        if name in table.column_names:
            differ = pc.fill_null(pc.not_equal(pc.list_value_length(table[name]), expected), False)
            assert not pc.any(differ).as_py(), f"{name} is not aligned with input_ids"


def _write_document(storage: Storage, folder: str, name: str, text: str) -> DocumentEntry:
    data = text.encode()
    storage.write(f"{folder}/{name}", data)
    return DocumentEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _check_files(storage: Storage, claim: Claim, entries: Sequence[FileEntry]) -> None:
    found = {info.path.removeprefix(f"{claim.folder}/"): info.size for info in storage.list(f"{claim.folder}/data")}
    expected = {entry.path: entry.size for entry in entries}
    if len(expected) != len(entries):
        raise StageError(f"two data files of {storage.url(claim.folder)} have one name: each part needs its own index")
    for path in sorted({*found, *expected}):
        size, written = found.get(path, "no"), expected.get(path, "no")
        if size != written:
            raise StageError(
                f"{storage.url(claim.folder)}/{path} has {size} bytes where {written} were written: "
                "run again for another version"
            )


class _HashingFile:
    """What pyarrow writes to: passes bytes on and digests them."""

    closed = False

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self._sha256.update(data)
        self._file.write(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def digest(self) -> str:
        return self._sha256.hexdigest()
