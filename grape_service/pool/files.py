"""Finds the files of a pool, wherever fsspec reaches, and opens them."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any

import fsspec
import zstandard
from fsspec.implementations.local import LocalFileSystem

from grape_service.errors import UserError
from grape_service.storage.storage import Storage, refuse_secrets

FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
NOT_DATA = (".md", ".txt", ".lock", ".crc")
"""Files of a pool's folder that are passed over: its card, notes, check sums."""
MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class PoolFile:
    """One file of a pool as it was when the run was planned."""

    url: str
    size: int
    version: str
    """The store's etag, or the modification time of a local file."""
    digest: str | None = None
    """sha256 of the content, for local files."""

    @property
    def format(self) -> str:
        """One of FORMATS."""
        return format_of(self.url)


def format_of(path: str) -> str:
    """The format that a file's name ends with. Raises UserError for others."""
    name = path.rsplit("/", 1)[-1].lower()
    for extension in sorted(FORMATS, key=len, reverse=True):
        if name.endswith(extension):
            return extension
    raise UserError(f"the pool file '{path}' is none of {', '.join(FORMATS)}: convert it, or name others with a glob")


def pool_filesystem(url: str, options: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a pool's address and the path in it. Raises UserError for an unknown kind of address."""
    refuse_secrets(options)
    if "://" not in url or url.startswith("file://"):
        path = os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
        return LocalFileSystem(), path
    if url.startswith("s3://"):
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return Storage(f"s3://{bucket}", options).fs, f"{bucket}/{key}"
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"pool.path '{url}' cannot be opened: {error}") from error


def list_pool_files(
    url: str, options: dict[str, Any], known: Iterable[PoolFile] = (), with_digests: bool = True
) -> list[PoolFile]:
    """The files of a pool: one file, all data files below a folder, or those that match a glob; sorted by address.

    With digests, the content of local files is read, but for `known` ones that have not changed. Names that
    begin with '.' or '_' are passed over in folders. Raises UserError where there is nothing, or a file of an
    unknown format.
    """
    fs, path = pool_filesystem(url, options)
    entries = _entries(fs, path, url)
    if not entries:
        raise UserError(f"pool.path '{url}' has no file that ends with one of {', '.join(FORMATS)}")
    files = sorted((_pool_file(fs, entry) for entry in entries), key=lambda file: file.url)
    for file in files:
        format_of(file.url)
    if not (with_digests and _is_local(fs)):
        return files
    digests = {replace(file, digest=None): file.digest for file in known}
    with ThreadPoolExecutor(4, thread_name_prefix="digests") as threads:
        return list(threads.map(lambda file: _with_digest(file, digests.get(file)), files))


def _entries(fs: fsspec.AbstractFileSystem, path: str, url: str) -> list[dict[str, Any]]:
    if MAGIC & set(path) and not fs.exists(path):
        found = fs.glob(path, detail=True)
        return [entry for entry in found.values() if entry["type"] == "file"]
    try:
        info = fs.info(path)
    except FileNotFoundError:
        raise UserError(f"pool.path '{url}' does not exist") from None
    if info["type"] == "file":
        return [info]
    found = fs.find(path, detail=True)
    base = len(path.rstrip("/"))
    return [entry for name, entry in found.items() if entry["type"] == "file" and _is_data(name[base:])]


def _is_data(relative: str) -> bool:
    parts = relative.strip("/").split("/")
    if any(part.startswith((".", "_")) for part in parts):
        return False
    return not parts[-1].lower().endswith(NOT_DATA) and not parts[-1].upper().startswith("LICENSE")


def _pool_file(fs: fsspec.AbstractFileSystem, entry: dict[str, Any]) -> PoolFile:
    url = entry["name"] if _is_local(fs) else fs.unstrip_protocol(entry["name"])
    return PoolFile(url, int(entry.get("size") or 0), _version(fs, entry))


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))


def _version(fs: fsspec.AbstractFileSystem, entry: dict[str, Any]) -> str:
    if _is_local(fs):
        return f"{os.stat(entry['name']).st_mtime_ns:x}"
    for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated"):
        if entry.get(key):
            return str(entry[key]).strip('"')
    return str(entry.get("size"))


def _with_digest(file: PoolFile, digest: str | None) -> PoolFile:
    if digest is None:
        try:
            with open(file.url, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except PermissionError:
            raise UserError(f"the pool file '{file.url}' cannot be read: permission denied") from None
    return replace(file, digest=digest)


def open_pool_file(file: PoolFile, options: dict[str, Any]) -> IO[bytes]:
    """The file's bytes, not decompressed. Raises UserError if it changed since the run was planned."""
    fs, path = pool_filesystem(file.url, options)
    try:
        entry = fs.info(path)
        if int(entry.get("size") or 0) != file.size or _version(fs, entry) != file.version:
            raise UserError(f"the pool file '{file.url}' changed while the run was reading it: start the run again")
        return fs.open(path, "rb", **({} if _is_local(fs) else {"block_size": 8 * 2**20}))
    except FileNotFoundError:
        raise UserError(f"the pool file '{file.url}' is gone: start the run again without it") from None


def decompressed(file: IO[bytes], format: str) -> Any:
    """The content of a .gz or .zst file as a stream; others as they are."""
    if format.endswith(".gz"):
        return gzip.open(file)
    if format.endswith(".zst"):
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return file
