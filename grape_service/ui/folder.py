"""The folder of datasets that the pages show, and what they know of each dataset."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from grape_service.config.schema import NAME_PATTERN
from grape_service.errors import StageError, UserError
from grape_service.release.catalog import CatalogEntry, list_datasets, read_catalog
from grape_service.release.load import Release, load, refuse_candidates, resolve_version
from grape_service.release.made_by import MadeBy
from grape_service.release.manifest import Manifest, read_manifest
from grape_service.release.reference import Reference, check_name
from grape_service.release.tags import Tag, read_tag
from grape_service.report.facts import facts_of_manifest
from grape_service.report.notices import warnings_of
from grape_service.report.warning import ReportWarning
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import FileInfo, Storage
from grape_service.storage.workspace import refuse_newer

READERS = 32
"""Requests to storage at the same time."""


@dataclass(frozen=True)
class Summary:
    """A dataset in a line; `problem` where a part of it cannot be read."""

    name: str
    version: str = ""
    tags: list[str] = field(default_factory=list)
    num_versions: int = 0
    rows: int = 0
    tokens: int = 0
    created: str = ""
    made_by: MadeBy = field(default_factory=MadeBy)
    since: str = ""
    warnings: int | None = None
    problem: str = ""


class Folder:
    """A folder of datasets, or one dataset of it, with the workspace that its releases were made in."""

    def __init__(self, path: str, options: StorageOptions | None = None, workspace: str | None = None):
        """Raises UserError for a place that cannot hold releases."""
        storage = Storage(path, options)
        if not storage.is_s3 and not Path(storage.root).is_dir():
            raise UserError(f"there is no folder {storage.root}: give the output.path of configs")
        self.only: str | None = None
        if not list_datasets(storage) and storage.folders("versions"):
            parent, _, self.only = storage.root.rpartition("/")
            storage = Storage(parent, options)
        self.storage = storage
        self.workspaces = [Storage(workspace or f"{storage.root}/.grape", options)]
        self._told: dict[tuple[str, str, str], int | None] = {}
        self._tags: dict[str, tuple[str, Tag | None]] = {}
        self._summaries: dict[str, tuple[float, Summary | None]] = {}
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """What people call it."""
        return f"{self.storage.root}/{self.only}" if self.only else self.storage.root

    def names(self) -> list[str]:
        """Folders whose names are those of datasets, in order."""
        return [self.only] if self.only else [n for n in self.storage.folders() if NAME_PATTERN.fullmatch(n)]

    def summaries(self, names: list[str], max_age: float = 0.0) -> list[Summary]:
        """These datasets in a line each, in this order; as they were read at most `max_age` seconds ago.

        A few requests for each that is read, all at the same time.
        """
        now = time.monotonic()
        with self._lock:
            old = [name for name in names if now - self._summaries.get(name, (-math.inf, None))[0] > max_age]
        with ThreadPoolExecutor(READERS) as pool:
            read = list(pool.map(self._summary, old))
        with self._lock:
            self._summaries.update({name: (now, summary) for name, summary in zip(old, read, strict=True)})
            found = [self._summaries[name][1] for name in names]
        return [summary for summary in found if summary is not None]

    def versions(self, name: str) -> list[CatalogEntry]:
        """A dataset's versions, newest first. Raises UserError where there is no such dataset."""
        self.check(name)
        entries = read_catalog(self.storage, name)
        if not entries and not self.storage.folders(f"{name}/versions"):
            raise UserError(f"there is no dataset '{name}' in {self.address}")
        return entries[::-1]

    def tags(self, name: str) -> tuple[list[Tag], list[str]]:
        """A dataset's tags, and a sentence for each that cannot be read."""
        found: list[Tag] = []
        problems: list[str] = []
        for info in self.storage.list(f"{name}/tags"):
            try:
                tag = self._tag(name, info)
                found += [tag] if tag is not None else []
            except UserError as error:
                problems.append(str(error))
        return found, problems

    def _tag(self, name: str, info: FileInfo) -> Tag | None:
        """A tag of a listing; what was read is kept for as long as its file does not change."""
        with self._lock:
            known = self._tags.get(info.path)
        if known is None or known[0] != info.etag:
            known = info.etag, read_tag(self.storage, name, info.path.rpartition("/")[2].removesuffix(".json"))
            with self._lock:
                self._tags[info.path] = known
        return known[1]

    def tags_of(self, name: str, version: str) -> list[str]:
        """Names of the tags that point to a version."""
        return [tag.name for tag in self.tags(name)[0] if tag.version == version]

    def release(self, name: str, version_or_tag: str) -> Release:
        """A version, opened. Raises UserError where there is none or its manifest is damaged."""
        self.check(name)
        return load(Reference(self.storage.root, name, version_or_tag), self.storage.options)

    def training_set(self, name: str, version_or_tag: str) -> Release:
        """A version that is a training set, opened. Raises UserError, also for candidates."""
        release = self.release(name, version_or_tag)
        refuse_candidates(release)
        return release

    def version_of(self, name: str, version_or_tag: str) -> str:
        """The version that a tag points to. Raises UserError."""
        self.check(name)
        return resolve_version(self.storage, name, version_or_tag)

    def check(self, name: str) -> None:
        """Raises UserError for a name that is not valid, or is of another dataset than the one that is shown."""
        check_name(name)
        if self.only and name != self.only:
            raise UserError(f"there is no dataset '{name}' in {self.address}")

    def workspace_with(self, path: str) -> Storage | None:
        """The workspace that holds this path. Those that manifests name are not looked at: they open no doors.

        Raises UserError where a newer grape-service has written there."""
        found = next((workspace for workspace in self.workspaces if workspace.exists(path)), None)
        if found is not None:
            refuse_newer(found)
        return found

    def _summary(self, name: str) -> Summary | None:
        """A dataset in a line; None for a folder that holds none."""
        try:
            entries = read_catalog(self.storage, name)
            if not entries:
                if not self.storage.folders(f"{name}/versions"):
                    return None
                return Summary(name, problem="no version was finished yet")
            newest = entries[-1]
            tags = [t.name if t.version == newest.version else f"{t.name}: {t.version}" for t in self.tags(name)[0]]
            warnings = self._tell(name, newest)
        except (UserError, StageError, OSError) as error:
            return Summary(name, problem=str(error))
        return Summary(
            name,
            newest.version,
            tags,
            len(entries),
            newest.rows,
            newest.tokens,
            newest.created,
            newest.made_by,
            newest.since(entries[-2] if len(entries) > 1 else None),
            warnings,
        )

    def _tell(self, name: str, entry: CatalogEntry) -> int | None:
        """The number of warnings; kept, since a manifest never changes."""
        key = (name, entry.version, entry.content_digest)
        with self._lock:
            if key in self._told:
                return self._told[key]
        warnings = warnings_in(read_manifest(self.storage, name, entry.version))
        told = None if warnings is None else len(warnings)
        with self._lock:
            self._told[key] = told
        return told


def warnings_in(manifest: Manifest) -> list[ReportWarning] | None:
    """The report's warnings; None where the manifest's counts or statistics are not what they should be."""
    try:
        return warnings_of(facts_of_manifest(manifest))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError):
        return None
