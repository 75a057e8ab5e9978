"""Writing a version: data files from any number of tasks, then the manifest, which makes it exist."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from grape_service.errors import StageError, UserError
from grape_service.release.card import render_card
from grape_service.release.catalog import add_to_catalog, read_catalog
from grape_service.release.claim import PUBLISHED, Claim, iso_time
from grape_service.release.croissant import render_croissant
from grape_service.release.manifest import (
    CROISSANT_FILE,
    FORMAT,
    MANIFEST,
    OF_BEHAVIOR,
    OF_TARGET,
    OF_TOKENS,
    DocumentEntry,
    FileEntry,
    Manifest,
    ManifestFields,
    columns_of,
    read_manifest,
    without_secrets,
)
from grape_service.release.reference import check_tag, version_folder, version_number
from grape_service.release.tags import move_tag
from grape_service.storage.parquet import open_writer, row_groups
from grape_service.storage.storage import Storage

LICENSE_COLUMNS = ("license", "licence")
"""Columns of a pool that say under which license a row may be used."""
MAX_LICENSES = 100
"""Of a data file, that its manifest entry counts."""
_TOKEN_COLUMNS = (*OF_TOKENS[1:], *OF_TARGET, *OF_BEHAVIOR)


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
    licenses: Counter[str] = Counter()
    with storage.open_write(f"{version_folder}/{path}") as file:
        hashing = _HashingFile(file)
        with open_writer(hashing, schema) as writer:
            for group in row_groups(batches, schema):
                _check_alignment(group)
                rows += group.num_rows
                tokens += _num_values(group, "input_ids" if "input_ids" in group.column_names else "response_ids")
                loss_tokens += _num_true(group, "loss_mask")
                licenses.update(_licenses(group))
                writer.write_table(group, row_group_size=group.num_rows)
    known = {"licenses": dict(licenses.most_common(MAX_LICENSES))} if licenses else {}
    return FileEntry(
        path=path,
        size=hashing.size,
        sha256=hashing.digest(),
        rows=rows,
        tokens=tokens,
        loss_tokens=loss_tokens,
        **known,
    )


def publish(
    storage: Storage,
    claim: Claim,
    schema: pa.Schema,
    entries: Sequence[FileEntry],
    fields: ManifestFields,
    report_html: str | None = None,
    documents: Sequence[DocumentEntry] = (),
) -> Version:
    """Make a claimed version exist: its documents, then the manifest by create-if-absent, then its tags.

    `documents` are there already; card, report and croissant.json are written here. Tags that point to a later version
    already stay there.
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
        columns=columns_of(schema, fields.parents.at_another_target),
        files=entries,
    )
    texts = {"README.md": render_card(manifest), CROISSANT_FILE: render_croissant(manifest, storage.root)}
    if report_html is not None:
        texts["report.html"] = report_html
    written = [_write_document(storage, claim.folder, *item) for item in texts.items()]
    manifest = manifest.model_copy(update={"documents": [*written, *documents]})
    claim.check()
    path = f"{claim.folder}/{MANIFEST}"
    if not storage.create_if_absent(path, manifest.to_json()) and storage.read_json(path)["writer"] != claim.writer:
        raise StageError(f"{storage.url(path)} was written by another: run again for another version")
    add_to_catalog(storage, manifest)
    moved = [
        tag
        for tag in fields.tags
        if move_tag(storage, claim.name, tag, claim.version, who="grape", reason="published", only_forward=True)
    ]
    claim.end(PUBLISHED)
    return Version(f"{storage.root}/{claim.name}@{claim.version}", claim.name, claim.version, manifest, moved)


def find_identical(storage: Storage, name: str, content_digest: str) -> str | None:
    """The newest version with this content that is whole, if there is one: a small read, whatever the number of
    versions, and a look at the one that it names."""
    found = [entry.version for entry in read_catalog(storage, name) if entry.content_digest == content_digest]
    newest_first = sorted(found, key=version_number, reverse=True)
    return next((version for version in newest_first if is_whole(storage, name, version, content_digest)), None)


def is_whole(storage: Storage, name: str, version: str, content_digest: str) -> bool:
    """Whether a version exists with this content, and each of its data files as the manifest has it: in its size, and
    where it is not older than the manifest, which is written last, in its digest. Three requests, about."""
    folder = version_folder(name, version)
    try:
        manifest = read_manifest(storage, name, version)
        written = storage.info(f"{folder}/{MANIFEST}").modified
        there = {info.path.removeprefix(f"{folder}/"): info for info in storage.list(f"{folder}/data")}
        if manifest.content_digest != content_digest or there.keys() != {file.path for file in manifest.files}:
            return False
        return all(
            there[file.path].size == file.size
            and (there[file.path].modified < written or storage.sha256(f"{folder}/{file.path}") == file.sha256)
            for file in manifest.files
        )
    except (FileNotFoundError, UserError):
        return False


def _licenses(table: pa.Table) -> dict[str, int]:
    """Rows by the license that a column of the pool gives them."""
    name = next((name for name in LICENSE_COLUMNS if name in table.column_names), None)
    if name is None or not pa.types.is_string(table.schema.field(name).type):
        return {}
    found = pc.value_counts(table[name].drop_null())
    return dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True))


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


def write_table(
    storage: Storage, folder: str, name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch | pa.Table]
) -> DocumentEntry:
    """Write a Parquet file beside the data of a version, whole or not at all."""
    with storage.open_write(f"{folder}/{name}") as file:
        hashing = _HashingFile(file)
        with open_writer(hashing, schema) as writer:
            for group in row_groups(batches, schema):
                writer.write_table(group, row_group_size=group.num_rows)
    return DocumentEntry(path=name, size=hashing.size, sha256=hashing.digest())


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
