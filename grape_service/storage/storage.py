"""Files, local or on S3, behind one small interface; the only way that paths are opened.

Plain reads and writes, and two conditional writes, which are all the coordination there is:
`create_if_absent` and `compare_and_swap`. Where the server is away, a call waits for it about a minute and then
raises a StageError; permissions, a missing bucket and a full disk are UserErrors. Storages can be pickled and
survive a fork.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import IO, Any

import fsspec
import orjson
import pyarrow.fs as pafs

from grape_service.errors import StageError, UserError
from grape_service.storage.files import FileInfo, FileInfos, Files, Names
from grape_service.storage.local import LocalFiles
from grape_service.storage.options import StorageOptions, check_options

__all__ = ["FileInfo", "Storage", "json_bytes", "normal_url"]


class Storage:
    """A folder, local or s3://, that is read and written. Paths are relative to it, with '/'."""

    def __init__(self, root: str, options: StorageOptions | None = None):
        """`options`: those of s3fs, and `retry_seconds`.

        Raises UserError where conditional writes do not exist, and for `options` that hold a secret or do not exist."""
        check_options(options)
        self.options = dict(options or {})
        self.root = normal_url(root)
        self.is_s3 = self.root.startswith("s3://")
        self._base = self.root.removeprefix("s3://")
        if self.is_s3:
            from grape_service.storage.s3 import S3Files

            self._files: Files = S3Files(self._base, self.options)
        else:
            self._files = LocalFiles(self._base)

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.root, self.options)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def sub(self, folder: str) -> Storage:
        """The folder below this one as a storage of its own."""
        self.full(folder)
        return Storage(self.url(folder), self.options)

    def url(self, path: str = "") -> str:
        """Full address of a path, for people and manifests."""
        return f"{self.root}/{path}" if path else self.root

    def full(self, path: str = "") -> str:
        """The path as fsspec and pyarrow take it, without 's3://'. Raises UserError if it climbs out."""
        if not path:
            return self._base
        if any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path:
            raise UserError(f"{path!r} is not a path below {self.root}: write folder/file, without '..' or '//'")
        return f"{self._base}/{path}"

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """For programs that take an fsspec file system, with paths from `full`."""
        return self._files.fs

    @property
    def arrow(self) -> pafs.FileSystem:
        """For pyarrow.parquet and pyarrow.dataset, with paths from `full`."""
        return self._files.arrow

    # Reading

    def read(self, path: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        return self.read_with_etag(path)[0]

    def read_with_etag(self, path: str) -> tuple[bytes, str]:
        """All bytes of a file and the etag that compare_and_swap takes. Raises FileNotFoundError."""
        return self._files.read_with_etag(self.full(path))

    def read_json(self, path: str) -> Any:
        """A JSON file's object. Raises FileNotFoundError, and UserError if it holds anything else."""
        value = self.read_json_value(path)
        if not isinstance(value, dict):
            raise UserError(f"{self.url(path)} holds no JSON object: restore or delete it")
        return value

    def read_note(self, path: str, *keys: str) -> dict[str, Any] | None:
        """A JSON object that only spares work; None where there is none, or none with these keys: it is made again."""
        try:
            value: dict[str, Any] = self.read_json(path)
        except (FileNotFoundError, UserError):
            return None
        return value if set(keys) <= value.keys() else None

    def read_json_value(self, path: str, max_bytes: int | None = None) -> Any:
        """A JSON file's value. Raises FileNotFoundError, and UserError if it is not JSON or longer than `max_bytes`."""
        try:
            return orjson.loads(self._files.read_with_etag(self.full(path), max_bytes)[0])
        except orjson.JSONDecodeError as error:
            raise UserError(f"{self.url(path)} is not JSON ({error}): restore or delete it") from error

    def open(self, path: str) -> IO[bytes]:
        """A file for reading. Raises FileNotFoundError."""
        return self._files.open(self.full(path))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, in one request. Raises FileNotFoundError, StageError where there are fewer."""
        data = self._files.read_range(self.full(path), start, end)
        if len(data) != end - start:
            raise StageError(f"{self.url(path)} is cut off: bytes {start} to {end} are not there; run again")
        return data

    def info(self, path: str) -> FileInfo:
        """Size, etag and time. Raises FileNotFoundError."""
        return self._files.info(self.full(path))

    def exists(self, path: str) -> bool:
        """Whether there is a file (not a folder) of that name."""
        try:
            self.info(path)
            return True
        except FileNotFoundError:
            return False

    def list(self, prefix: str = "") -> FileInfos:
        """Every file below the folder `prefix`, sorted by path; empty if there is no such folder."""
        return sorted(self._files.list(self.full(prefix.rstrip("/"))), key=lambda info: info.path)

    def folders(self, prefix: str = "") -> Names:
        """Names of the folders directly below `prefix`, sorted."""
        return sorted(self._files.folders(self.full(prefix.rstrip("/"))))

    def sha256(self, path: str) -> str:
        """Hex sha256 of a file's bytes, read in blocks."""
        digest = hashlib.sha256()
        with self.open(path) as file:
            while block := file.read(2**22):
                digest.update(block)
        return digest.hexdigest()

    # Writing

    def write(self, path: str, data: bytes) -> None:
        """Write a whole file, or nothing; an existing one is replaced."""
        with self.open_write(path) as file:
            file.write(data)

    def write_json(self, path: str, value: Any) -> None:
        """Write a value as indented JSON with sorted keys."""
        self.write(path, json_bytes(value))

    @contextlib.contextmanager
    def open_write(self, path: str) -> Iterator[IO[bytes]]:
        """A file that appears under its name, whole, when the block ends, and not at all if it raises."""
        with self._files.open_write(self.full(path)) as file:
            yield file

    def write_in_parts(self, path: str, data: bytes) -> None:
        """Write a file as a large one is written, whatever its size: on S3 as an upload of parts."""
        self._files.write_in_parts(self.full(path), data)

    def delete(self, path: str) -> None:
        """Delete a file; no error if it is not there."""
        self._files.delete(self.full(path))

    def delete_files(self, paths: Sequence[str]) -> None:
        """Delete many files; no error for those that are not there."""
        self._files.delete_many([self.full(path) for path in paths])

    def delete_folder(self, prefix: str) -> None:
        """Delete everything below a folder; no error if it is not there."""
        self._files.delete_folder(self.full(prefix.rstrip("/")))

    def now(self) -> float:
        """Seconds since 1970 by the clock that dates the files here: the server's, not this machine's."""
        return self._files.now()

    def unfinished(self, prefix: str = "", older_than: float = 86_400) -> FileInfos:
        """What killed writers left, begun more than `older_than` seconds ago: temporary files, parts of uploads."""
        return self._files.unfinished(self.full(prefix.rstrip("/")), self.now() - older_than)

    def delete_unfinished(self, found: FileInfos) -> None:
        """Delete what `unfinished` found."""
        self._files.delete_unfinished(found)

    def create_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file unless one of that name exists; False if it does. Atomic among any number of writers.

        If the answer of the server is lost, it counts as won when the file holds exactly `data`: writers whose
        victories must be told apart put their own id into it."""
        return self._files.create_if_absent(self.full(path), data)

    def compare_and_swap(self, path: str, data: bytes, etag: str | None) -> bool:
        """Replace a file if its etag is still `etag` (None: if it does not exist); False if it is not."""
        if etag is None:
            return self.create_if_absent(path, data)
        return self._files.swap(self.full(path), data, etag)


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON with sorted keys and a newline at the end."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def normal_url(root: str) -> str:
    """s3:// addresses as they are, local folders absolute. Raises UserError for other places."""
    if root.startswith("s3://"):
        bucket, _, prefix = root.removeprefix("s3://").rstrip("/").partition("/")
        if not bucket:
            raise UserError("the address s3:// names no bucket: write s3://bucket/folder")
        if prefix and any(part in ("", ".", "..") for part in prefix.split("/")):
            raise UserError(f"'{root}' is not an address: write s3://bucket/folder, without '..' or '//'")
        return root.rstrip("/")
    if "://" in root and not root.startswith("file://"):
        scheme = root.split("://")[0]
        raise UserError(
            f"'{root}' cannot hold releases: {scheme}:// has no conditional writes; use a local folder or s3://"
        )
    if not root or "\0" in root:
        raise UserError(f"{root!r} is not a folder: name a local folder or s3://bucket/folder")
    return os.path.abspath(os.path.expanduser(root.removeprefix("file://")))
