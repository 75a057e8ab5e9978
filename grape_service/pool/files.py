"""The files of a pool, wherever fsspec reaches, opened and decompressed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from grape_service.errors import UserError
from grape_service.storage.options import StorageOptions, check_options
from grape_service.storage.storage import Storage

FORMATS = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst", ".json", ".json.gz", ".json.zst"),
    *(".csv", ".csv.gz", ".csv.zst", ".parquet", ".arrow"),
)
FolderColumns = tuple[tuple[str, str | int | None], ...]
"""Columns that the names of a file's folders give, with their values."""


@dataclass(frozen=True)
class PoolFile:
    """One file of a pool as it was when the run was planned."""

    url: str
    size: int
    version: str
    """The store's etag, or the modification time of a local file."""
    digest: str | None = None
    """sha256 of the content, for local files."""
    group: int = 0
    """Index in the config's pool.groups."""
    folders: FolderColumns = ()

    @property
    def format(self) -> str:
        """One of FORMATS, .jsonl for .ndjson."""
        return format_of(self.url).replace(".ndjson", ".jsonl")


def format_of(path: str) -> str:
    """The format that a file's name ends with. Raises UserError for others."""
    name = path.rsplit("/", 1)[-1].lower()
    for extension in sorted(FORMATS, key=len, reverse=True):
        if name.endswith(extension):
            return extension
    raise UserError(f"the pool file '{path}' is none of {', '.join(FORMATS)}: convert it, or name others with a glob")


def pool_filesystem(url: str, options: StorageOptions) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a pool's address and the path in it. Raises UserError for an unknown kind of address."""
    check_options(options)
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


def with_digests(
    files: list[PoolFile], known: Iterable[PoolFile] = (), options: StorageOptions | None = None
) -> list[PoolFile]:
    """The same with digests of local files: their content is read, but for `known` ones that have not changed. That of
    files elsewhere is read where their store says nothing of them but their size."""
    digests = {(file.url, file.size, file.version): file.digest for file in known}
    wanted = [file for file in files if "://" not in file.url or file.version == str(file.size)]

    def named(file: PoolFile) -> PoolFile:
        return _with_digest(file, digests.get((file.url, file.size, file.version)), options or {})

    with ThreadPoolExecutor(4, thread_name_prefix="digests") as threads:
        by_url = {file.url: file for file in threads.map(named, wanted)}
    return [by_url.get(file.url, file) for file in files]


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether a file system is this machine's."""
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))


def version_of(fs: fsspec.AbstractFileSystem, entry: dict[str, Any]) -> str:
    """What tells whether a file changed: the store's etag, the modification time of a local file."""
    if is_local(fs):
        return f"{os.stat(entry['name']).st_mtime_ns:x}"
    for key in ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "Last-Modified", "updated"):
        if entry.get(key):
            return str(entry[key]).strip('"')
    return str(entry.get("size"))


def _with_digest(file: PoolFile, digest: str | None, options: StorageOptions) -> PoolFile:
    if digest is None:
        try:
            with open_pool_file(file, options) as content:
                found = hashlib.sha256()
                while block := content.read(2**20):
                    found.update(block)
                digest = found.hexdigest()
        except PermissionError:
            raise UserError(f"the pool file '{file.url}' cannot be read: permission denied") from None
    return replace(file, digest=digest)


def open_pool_file(file: PoolFile, options: StorageOptions) -> IO[bytes]:
    """The file's bytes, not decompressed. Raises UserError if it changed since the run was planned."""
    fs, path = pool_filesystem(file.url, options)
    try:
        entry = fs.info(path)
        if int(entry.get("size") or 0) != file.size or version_of(fs, entry) != file.version:
            raise UserError(f"the pool file '{file.url}' changed while the run was reading it: start the run again")
        return fs.open(path, "rb", **({} if is_local(fs) else {"block_size": 8 * 2**20}))
    except FileNotFoundError:
        raise UserError(f"the pool file '{file.url}' is gone: start the run again without it") from None


def decompressed(file: IO[bytes], format: str) -> Any:
    """The content of a .gz or .zst file as a stream; others as they are. A file that ends in the middle of what it
    holds raises OSError when that is reached."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(format[format.rfind(".") :])
    if codec is None:
        return file
    return pa.CompressedInputStream(pa.PythonFile(file, "r"), codec)
