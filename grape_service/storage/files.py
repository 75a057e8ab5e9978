"""What a kind of storage has to do: local.py does it for a folder, s3.py for S3; used through storage.py alone."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import IO, Protocol, TypeAlias

import fsspec
import pyarrow.fs as pafs

from grape_service.errors import UserError


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a listing; `path` is relative to the storage's root."""

    path: str
    size: int
    etag: str  # changes when the file does; read_with_etag gives the one that compare_and_swap takes
    modified: float  # seconds since 1970


FileInfos: TypeAlias = list[FileInfo]
Names: TypeAlias = list[str]


class Files(Protocol):
    """Files below one place. Every path taken is a full one, without s3://; what is not there is FileNotFoundError,
    what a user can mend UserError, a server that stays away StageError."""

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """For programs that take an fsspec file system."""
        ...

    @property
    def arrow(self) -> pafs.FileSystem:
        """For pyarrow."""
        ...

    def read_with_etag(self, full: str, max_bytes: int | None = None) -> tuple[bytes, str]:
        """All bytes of a file and the etag that `swap` takes."""
        ...

    def open(self, full: str) -> IO[bytes]:
        """A file for reading."""
        ...

    def read_range(self, full: str, start: int, end: int) -> bytes:
        """Bytes [start, end); fewer where the file ends before."""
        ...

    def info(self, full: str) -> FileInfo:
        """Size, etag and time of a file."""
        ...

    def list(self, full: str) -> FileInfos:
        """Files below a folder, in any order."""
        ...

    def folders(self, full: str) -> Names:
        """Names of the folders directly below, in any order."""
        ...

    def open_write(self, full: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A file that exists, whole, once the block has ended."""
        ...

    def delete(self, full: str) -> None:
        """Delete a file, if it is there."""
        ...

    def write_in_parts(self, full: str, data: bytes) -> None:
        """Write a file as a large one is written."""
        ...

    def delete_many(self, fulls: Names) -> None:
        """Delete files; those that are not there are none to delete."""
        ...

    def delete_folder(self, full: str) -> None:
        """Delete what is below a folder."""
        ...

    def now(self) -> float:
        """Seconds since 1970 by the clock that dates the files."""
        ...

    def unfinished(self, full: str, before: float) -> FileInfos:
        """What killed writers left below a folder before a moment of that clock."""
        ...

    def delete_unfinished(self, found: FileInfos) -> None:
        """Delete what `unfinished` found."""
        ...

    def create_if_absent(self, full: str, data: bytes) -> bool:
        """Write a file unless there is one; False if there is."""
        ...

    def swap(self, full: str, data: bytes, etag: str) -> bool:
        """Replace a file whose etag is still `etag`; False if it is not, or there is no file."""
        ...


def refuse_longer(address: str, size: int, max_bytes: int) -> None:
    """Raises UserError for a file that nobody should read into memory."""
    if size > max_bytes:
        raise UserError(f"{address} has {size} bytes: such a file has at most {max_bytes}; restore it")
