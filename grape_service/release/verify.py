"""Whether a version is, byte for byte, what its manifest says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from grape_service.display import counted
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.release.claim import CLAIM
from grape_service.release.load import Release, schema_difference
from grape_service.release.manifest import MANIFEST, DocumentEntry, FileEntry

_READERS = 4


@dataclass(frozen=True)
class Problem:
    """One file of a version that is not as it should be."""

    path: str  # relative to the version's folder
    problem: str

    def __str__(self) -> str:
        return f"{ascii(self.path)[1:-1]} {self.problem}"

    def to_json(self) -> JsonObject:
        return asdict(self)


def verify(release: Release) -> list[Problem]:
    """Read every file of a version: sizes, sha256, rows, columns, and that there is no other file. Empty: all is well.

    A manifest that is not to be trusted is refused by `load`, before this."""
    entries: list[FileEntry | DocumentEntry] = [*release.manifest.files, *release.manifest.documents]
    found = {info.path.removeprefix(f"{release.folder}/"): info.size for info in release.storage.list(release.folder)}
    expected = {entry.path for entry in entries} | {MANIFEST, CLAIM}
    problems = [
        Problem(path, "is in the folder but not in the manifest") for path in sorted(found) if path not in expected
    ]
    with ThreadPoolExecutor(_READERS) as pool:
        checked = pool.map(lambda entry: _check(release, entry, found.get(entry.path)), entries)
        problems += [
            Problem(entry.path, problem) for entry, problem in zip(entries, checked, strict=True) if problem is not None
        ]
    return sorted(problems, key=lambda problem: problem.path)


def render_text(release: Release, problems: list[Problem]) -> str:
    """What `verify` found, for people."""
    if not problems:
        manifest = release.manifest
        return (
            f"{release.reference} is whole: {counted(len(manifest.files), 'data file')}, "
            f"{counted(manifest.rows, 'row')}, {manifest.num_bytes:,} bytes, every size and sha256 as in the manifest"
        )
    lines = [f"{release.reference} has {counted(len(problems), 'problem')}:"]
    return "\n".join([*lines, *[f"  {problem}" for problem in problems]])


def _check(release: Release, entry: FileEntry | DocumentEntry, size: int | None) -> str | None:
    """What is wrong with one file; None if nothing is."""
    if size is None:
        return "is missing"
    if size != entry.size:
        return f"has {size:,} bytes, not {entry.size:,}"
    try:
        digest = release.storage.sha256(f"{release.folder}/{entry.path}")
    except FileNotFoundError:
        return "is missing"
    if digest != entry.sha256:
        return f"has other contents: sha256 {digest}, not {entry.sha256}"
    return _check_parquet(release, entry) if isinstance(entry, FileEntry) else None


def _check_parquet(release: Release, entry: FileEntry) -> str | None:
    try:
        with release.open_file(entry.path) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
    except UserError as error:
        return f"is not readable Parquet: {error}"
    if rows != entry.rows:
        return f"holds {rows:,} rows, not {entry.rows:,}"
    difference = schema_difference(release.manifest.columns, schema)
    return f"has other columns than the manifest: {difference}" if difference else None
