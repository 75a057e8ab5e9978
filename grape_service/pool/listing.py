"""Everything below a pool's path: what is read, what is passed over and why; what is neither is refused."""

from __future__ import annotations

import glob
import os
import re
import stat
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.pool.files import FORMATS, FolderColumns, PoolFile, format_of, is_local, pool_filesystem, version_of
from grape_service.pool.filters import nearest
from grape_service.storage.options import StorageOptions

MAGIC = frozenset("*?[")
NOTES = (".md", ".txt", ".lock")
MARKERS = (
    "_success",
    "_metadata",
    "_common_metadata",
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
)
STATE = "state.json"
"""Beside the Arrow files of a folder that datasets' save_to_disk wrote."""
MAX_EXAMPLES = 5
HIDDEN, MARKER, NOTE = "hidden", "marker without rows", "notes"
OURS, SAME_FILE, LOOP = "output of this service", "the same file as another", "link to a folder above it"
OUR_FOLDERS = ("versions", "tags", "runs")
"""Of a dataset."""
_MANIFEST = re.compile(r"(?P<dataset>(?:[^/]+/)*)versions/v[0-9]{4,}/(?:manifest|claim)\.json")
_FOLDER_COLUMN = re.compile(r"(?P<name>[^=/]+)=(?P<value>[^/]*)")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"


@dataclass
class PassedOver:
    """Entries that are not read, for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Listing:
    """A pool's files, by group and address, and what else lies there."""

    files: list[PoolFile] = field(default_factory=list)
    passed_over: dict[str, PassedOver] = field(default_factory=dict)

    def pass_over(self, reason: str, address: str) -> None:
        """Count an entry that is not read."""
        passed = self.passed_over.setdefault(reason, PassedOver())
        passed.count += 1
        if len(passed.examples) < MAX_EXAMPLES:
            passed.examples.append(address)


@dataclass(frozen=True)
class _Entry:
    relative: str  # below the group's path, with the folders' names in it
    name: str  # as the file system calls it
    info: dict[str, Any]
    target: str | None = None  # what a local name leads to
    linked: bool = False
    kind: str = "file"  # or why it is not one: HIDDEN (a folder), LOOP, MARKER


def list_pool(config: Config) -> Listing:
    """The files of every group of a config's pool, and what is passed over.

    Folders are read at any depth, links are followed. Raises UserError where a group has no file, a file is of an
    unknown format or belongs to two groups, a link leads nowhere, or a folder cannot be read.
    """
    listing = Listing()
    ours = [f"{config.output.path.rstrip('/')}/{config.name}", config.workspace_path]
    seen: dict[str, int] = {}
    for index, group in enumerate(config.pool.groups):
        found = _list_path(group.path, config.storage, listing, ours)
        for file in found:
            if seen.setdefault(file.url, index) != index:
                raise UserError(f"the pool file '{file.url}' is in two groups of pool.path: name it in one of them")
        listing.files += [replace(file, group=index) for file in found]
    return listing


def list_files(url: str, options: StorageOptions) -> list[PoolFile]:
    """The files of one path, sorted by address. Raises UserError as `list_pool` does."""
    return _list_path(url, options, Listing(), [])


def _list_path(url: str, options: StorageOptions, listing: Listing, ours: list[str]) -> list[PoolFile]:
    fs, path = pool_filesystem(url, options)
    local = is_local(fs)
    entries, is_one_file = _entries(fs, path, url, local)
    roots = [] if is_one_file else _our_folders(entries, _addresses(ours), fs, local)
    files: list[tuple[PoolFile, _Entry]] = []
    targets: dict[str, str] = {}
    for entry in sorted(entries, key=lambda entry: (entry.linked, entry.name)):
        address = entry.name if local else fs.unstrip_protocol(entry.name)
        reason = None if is_one_file else _passed_over(entry, address, roots)
        if reason is None and entry.target is not None and targets.setdefault(entry.target, address) != address:
            reason = SAME_FILE
        if reason is not None:
            listing.pass_over(reason, address)
            continue
        format_of(address)
        columns = _folder_columns(url, entry.relative)
        file = PoolFile(address, int(entry.info.get("size") or 0), version_of(fs, entry.info), folders=columns)
        files.append((file, entry))
    if not files:
        raise UserError(f"pool.path '{url}' has no file that ends with one of {', '.join(FORMATS)}")
    return _with_typed_folders(sorted((file for file, _ in files), key=lambda file: file.url))


def _entries(fs: fsspec.AbstractFileSystem, path: str, url: str, local: bool) -> tuple[list[_Entry], bool]:
    """What is below a path, and whether the path is one file."""
    if MAGIC & set(path) and not fs.exists(path):
        base = path[: min(path.index(sign) for sign in MAGIC if sign in path)].rpartition("/")[0]
        if local:
            matches = sorted(glob.glob(path, recursive=True))
            found = [entry for match in matches for entry in _local_match(match, base)]
        else:
            found = []
            for match, info in sorted(fs.glob(path, detail=True).items()):
                if info["type"] == "file":
                    found.append(_Entry(match[len(base) :].strip("/"), match, info))
                else:
                    found += [
                        replace(entry, relative=f"{match[len(base) :].strip('/')}/{entry.relative}")
                        for entry in _remote(fs, match)
                    ]
        return list({entry.name: entry for entry in found}.values()), False
    try:
        info = fs.info(path)
    except FileNotFoundError as error:
        if local and os.path.islink(path):
            raise _broken(path) from None
        if url.startswith("http") and error.__cause__ is not None:  # fsspec says the same of a server that is away
            why = f"{type(error.__cause__).__name__}: {error.__cause__}"
            raise UserError(f"pool.path '{url}' is not there or cannot be reached ({why})") from None
        raise UserError(f"pool.path '{url}' does not exist{_near(path) if local else ''}") from None
    if local:
        if os.path.isfile(path):
            return [_local_file(path, os.path.basename(path), False)], True
        return list(_local_folder(path, "", False, (os.path.realpath(path),))), False
    if info["type"] == "file":
        return [_Entry(path.rsplit("/", 1)[-1], path, info)], True
    return _remote(fs, path), False


def _near(path: str) -> str:
    """What there is instead, as the end of a sentence: where a relative path was looked for shows in it."""
    folder, name = os.path.split(path.rstrip("/"))
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return f": there is no folder {folder}"
    near = nearest(name, names, 0.6)
    return f" in {folder}" + (f"; did you mean '{near}'?" if near else "")


def _remote(fs: fsspec.AbstractFileSystem, path: str) -> list[_Entry]:
    base = len(path.rstrip("/"))
    entries = []
    for name, info in fs.find(path, detail=True).items():
        is_marker = name.endswith("/") or name.rstrip("/") == path.rstrip("/") or info["type"] != "file"
        entries.append(_Entry(name[base:].strip("/"), name, info, kind=MARKER if is_marker else "file"))
    return entries


def _local_match(match: str, base: str) -> Iterator[_Entry]:
    relative = os.path.relpath(match, base or "/")
    if os.path.isdir(match):
        yield from _local_folder(match, relative, os.path.islink(match), (os.path.realpath(match),))
    else:
        yield _local_file(match, relative, os.path.islink(match))


def _local_folder(folder: str, relative: str, linked: bool, above: tuple[str, ...]) -> Iterator[_Entry]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder '{folder}' of the pool cannot be read: {error.strerror}") from None
    for entry in entries:
        below = f"{relative}/{entry.name}".lstrip("/")
        is_link = linked or entry.is_symlink()
        if not entry.is_dir():
            yield _local_file(entry.path, below, is_link)
        elif entry.name.startswith((".", "_")):
            yield _Entry(below, entry.path, {}, kind=HIDDEN)
        elif (target := os.path.realpath(entry.path)) in above:
            yield _Entry(below, entry.path, {}, kind=LOOP)
        else:
            yield from _local_folder(entry.path, below, is_link, (*above, target))


def _local_file(path: str, relative: str, linked: bool) -> _Entry:
    hidden = os.path.basename(path).startswith((".", "_"))
    try:
        status = os.stat(path)
    except (FileNotFoundError, OSError) as error:
        if hidden:
            return _Entry(relative, path, {}, linked=linked)
        if os.path.islink(path):
            raise _broken(path) from None
        raise UserError(f"the pool file '{path}' cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode) and not hidden:
        raise UserError(f"'{path}' in the pool is neither a file nor a folder: take it out of the pool")
    return _Entry(relative, path, {"name": path, "size": status.st_size}, os.path.realpath(path), linked)


def _broken(path: str) -> UserError:
    return UserError(f"the pool file '{path}' is a link to '{os.readlink(path)}', which does not exist: restore it")


def _passed_over(entry: _Entry, address: str, our_folders: list[str]) -> str | None:
    """Why an entry of a folder is not read, or None."""
    if any(address == folder or address.startswith(f"{folder}/") for folder in our_folders):
        return OURS
    if entry.kind != "file":
        return entry.kind
    *folders, name = entry.relative.lower().split("/")
    is_empty = not entry.info.get("size")
    if name in (*MARKERS, STATE) or name.endswith(".crc") or (is_empty and name.endswith("_$folder$")):
        return MARKER
    if any(part.startswith((".", "_")) for part in (*folders, name)):
        return HIDDEN
    return NOTE if name.endswith(NOTES) or name.startswith("license") else None


def _addresses(paths: list[str]) -> list[str]:
    return [path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path)) for path in paths]


def _our_folders(entries: list[_Entry], given: list[str], fs: fsspec.AbstractFileSystem, local: bool) -> list[str]:
    """Folders below the pool's path that the run writes to, and those of datasets that lie there."""
    found = []
    base = None
    for entry in entries:
        address = entry.name if local else fs.unstrip_protocol(entry.name)
        base = address[: len(address) - len(entry.relative)].rstrip("/") if base is None else base
        match = _MANIFEST.fullmatch(entry.relative)
        if match:
            dataset = f"{base}/{match['dataset']}".rstrip("/")
            found += [dataset] if match["dataset"] else [f"{base}/{name}" for name in OUR_FOLDERS]
    return sorted({*found, *(path for path in given if base is not None and path.startswith(f"{base}/"))})


def _folder_columns(url: str, relative: str) -> FolderColumns:
    """Columns that folders' names give, as Spark, Hive and DuckDB write them: name=value, also at the path's end."""
    above = []
    if not MAGIC & set(url):
        for part in reversed(url.rstrip("/").split("/")):
            if not _FOLDER_COLUMN.fullmatch(part) or part.lower().endswith(FORMATS):
                break
            above.append(part)
    parts = [*reversed(above), *relative.split("/")[:-1]]
    found = [match for part in parts if (match := _FOLDER_COLUMN.fullmatch(part))]
    return tuple((urllib.parse.unquote(match["name"]), _folder_value(match["value"])) for match in found)


def _folder_value(value: str) -> str | None:
    return None if value == NULL_FOLDER else urllib.parse.unquote(value)


def _with_typed_folders(files: list[PoolFile]) -> list[PoolFile]:
    """Folder columns as integers where all of a column's values are."""
    values: dict[str, set[Any]] = {}
    for file in files:
        for name, value in file.folders:
            values.setdefault(name, set()).add(value)
    whole = {name for name, found in values.items() if all(v is None or _INTEGER.fullmatch(v) for v in found)}
    whole -= {"source", "prompt_id", "candidate_id"}
    if not whole:
        return files
    return [
        replace(
            file,
            folders=tuple(
                (name, int(value) if name in whole and value is not None else value) for name, value in file.folders
            ),
        )
        for file in files
    ]


def passed_over_text(passed: Mapping[str, PassedOver]) -> str:
    """The entries that are not read in words: '2 hidden (.cache, _tmp); 1 notes (README.md)'."""
    texts = []
    for reason, item in sorted(passed.items()):
        names = ", ".join(example.rstrip("/").rsplit("/", 1)[-1] for example in item.examples[:2])
        texts.append(f"{item.count} {reason} ({names}{', …' if item.count > 2 else ''})")
    return "; ".join(texts)
