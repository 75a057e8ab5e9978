"""The catalog of a dataset: a small file that lists its versions, so that nobody opens a thousand manifests.

It is derived: a version exists when its manifest does. What the catalog lacks is read from the manifest, and what it
has beyond the folders that exist is left out.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.release.made_by import MadeBy
from grape_service.release.manifest import MANIFEST, Manifest, read_manifest
from grape_service.release.reference import VERSION_PATTERN, check_name, version_folder, version_number
from grape_service.storage.storage import Storage, json_bytes

_TRIES = 20
_READERS = 16


@dataclass(frozen=True)
class CatalogEntry:
    """One version, in a line."""

    version: str
    created: str
    rows: int
    tokens: int
    loss_tokens: int
    num_bytes: int
    content_digest: str
    kind: str = "training"
    made_by: MadeBy = field(default_factory=MadeBy)

    @staticmethod
    def of(manifest: Manifest) -> CatalogEntry:
        return CatalogEntry(
            manifest.version,
            manifest.created,
            manifest.rows,
            manifest.tokens,
            manifest.loss_tokens,
            manifest.num_bytes,
            manifest.content_digest,
            manifest.kind,
            MadeBy.of(manifest.config),
        )

    def since(self, before: CatalogEntry | None) -> str:
        """What is another than in the version before it, in words; empty for a first version."""
        if before is None:
            return ""
        found = self.made_by.since(before.made_by)
        more = self.rows - before.rows
        rows = [f"{more:+,} rows"] if more else []
        same = ["the same rows"] if self.content_digest == before.content_digest else ["other rows or settings"]
        return ", ".join([*found, *rows] or same)


def read_catalog(storage: Storage, name: str) -> list[CatalogEntry]:
    """Every version of a dataset, oldest first; empty if there is none."""
    folders = [v for v in storage.folders(f"{check_name(name)}/versions") if VERSION_PATTERN.fullmatch(v)]
    if not folders:
        return []
    known, gone, _ = _read(storage, name)
    unknown = [version for version in folders if version not in known and version not in gone]
    with ThreadPoolExecutor(_READERS) as pool:
        read = list(pool.map(lambda version: _from_manifest(storage, name, version), unknown))
    found = {entry.version: entry for entry in read if entry is not None}
    entries = {**{version: known[version] for version in folders if version in known}, **found}
    return sorted(entries.values(), key=lambda entry: version_number(entry.version))


def add_to_catalog(storage: Storage, manifest: Manifest) -> None:
    """List a version, and those that are missing; if others keep writing, it is left to be read from its manifest."""
    entries = {entry.version: entry for entry in read_catalog(storage, manifest.name)}
    entries[manifest.version] = CatalogEntry.of(manifest)

    def add(known: dict[str, CatalogEntry], gone: set[str]) -> None:
        known.update({version: entry for version, entry in entries.items() if version not in gone})

    _change(storage, manifest.name, add)


def remove_from_catalog(storage: Storage, name: str, versions: list[str]) -> None:
    """Note that the folders of these versions hold no manifest, and never will."""

    def remove(known: dict[str, CatalogEntry], gone: set[str]) -> None:
        for version in versions:
            known.pop(version, None)
        gone.update(versions)

    _change(storage, name, remove)


def list_datasets(storage: Storage) -> list[str]:
    """Names of the datasets in a folder of datasets."""
    from grape_service.config.schema import NAME_PATTERN

    names = [name for name in storage.folders() if NAME_PATTERN.fullmatch(name)]
    with ThreadPoolExecutor(_READERS) as pool:
        has_versions = list(pool.map(lambda name: bool(storage.folders(f"{name}/versions")), names))
    return [name for name, there in zip(names, has_versions, strict=True) if there]


def _path(name: str) -> str:
    return f"{check_name(name)}/catalog.json"


def _read(storage: Storage, name: str) -> tuple[dict[str, CatalogEntry], set[str], str | None]:
    try:
        data, etag = storage.read_with_etag(_path(name))
    except FileNotFoundError:
        return {}, set(), None
    try:
        value: JsonObject = orjson.loads(data)
        entries = [
            {**entry, "made_by": MadeBy(**entry["made_by"])} for entry in value["versions"] if "made_by" in entry
        ]
        known = {entry["version"]: CatalogEntry(**entry) for entry in entries}
        return known, set(value["gone"]), etag
    except (ValueError, KeyError, TypeError):
        return {}, set(), etag  # derived: made again


def _change(storage: Storage, name: str, change: Any) -> None:
    for attempt in range(_TRIES):
        known, gone, etag = _read(storage, name)
        change(known, gone)
        ordered = sorted(known.values(), key=lambda entry: version_number(entry.version))
        value = {"versions": [asdict(entry) for entry in ordered], "gone": sorted(gone)}
        if storage.compare_and_swap(_path(name), json_bytes(value), etag):
            return
        time.sleep(random.uniform(0, min(0.02 * 1.5**attempt, 0.5)))


def _from_manifest(storage: Storage, name: str, version: str) -> CatalogEntry | None:
    if not storage.exists(f"{version_folder(name, version)}/{MANIFEST}"):
        return None
    try:
        return CatalogEntry.of(read_manifest(storage, name, version))
    except UserError:
        return None  # `verify` and `load` say what is wrong with it
