"""Files of a local folder, with the two conditional writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem

from grape_service.errors import UserError
from grape_service.storage.files import FileInfo, FileInfos, Names, refuse_longer

TEMPORARY = ".tmp-"
"""First letters of files that are being written, and of locks; a listing leaves them out."""


class LocalFiles:
    """`Files` of the folder `base`."""

    def __init__(self, base: str):
        self.base = base

    @property
    def fs(self) -> LocalFileSystem:
        return LocalFileSystem(auto_mkdir=True)

    @property
    def arrow(self) -> pafs.FileSystem:
        return pafs.LocalFileSystem()

    def read_with_etag(self, full: str, max_bytes: int | None = None) -> tuple[bytes, str]:
        with self._sentences(full, "read"):
            if max_bytes is not None:
                refuse_longer(full, os.path.getsize(full), max_bytes)
            data = Path(full).read_bytes()
        return data, hashlib.sha256(data).hexdigest()

    def open(self, full: str) -> IO[bytes]:
        with self._sentences(full, "read"):
            return open(full, "rb")

    def read_range(self, full: str, start: int, end: int) -> bytes:
        with self._sentences(full, "read"), open(full, "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)

    def info(self, full: str) -> FileInfo:
        with self._sentences(full, "read"):
            found = os.stat(full)
        if not os.path.isfile(full):
            raise FileNotFoundError(errno.ENOENT, "not a file", full)
        return self._file_info(full, found)

    def list(self, full: str, temporary: bool = False) -> FileInfos:
        """Files below a folder, in no order; `temporary`: those that are being written instead."""
        found: list[FileInfo] = []
        folders = [full]
        while folders:
            try:
                with self._sentences(full, "list"), os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        elif entry.name.startswith(TEMPORARY) is temporary:
                            with contextlib.suppress(FileNotFoundError):
                                found.append(self._file_info(entry.path, entry.stat()))
            except (FileNotFoundError, NotADirectoryError):
                continue
        return found

    def folders(self, full: str) -> Names:
        try:
            with self._sentences(full, "list"), os.scandir(full) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    @contextlib.contextmanager
    def open_write(self, full: str) -> Iterator[IO[bytes]]:
        with self._sentences(full, "write"), _whole_file(full) as (file, temporary):
            yield file
            _to_disk(file)
            os.replace(temporary, full)
            _to_disk_folder(full)

    def delete(self, full: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), self._sentences(full, "delete"):
            os.unlink(full)

    def write_in_parts(self, full: str, data: bytes) -> None:
        with self.open_write(full) as file:
            file.write(data)

    def delete_many(self, fulls: Names) -> None:
        for full in fulls:
            self.delete(full)

    def delete_folder(self, full: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._sentences(full, "delete"):
            shutil.rmtree(full)

    def now(self) -> float:
        """The clock that dates files here, which on a network file system is not this machine's."""
        try:
            with _whole_file(os.path.join(self.base, "clock")) as (file, _):
                return os.fstat(file.fileno()).st_mtime
        except OSError:  # not writable: a dry run needs no more
            return time.time()

    def unfinished(self, full: str, before: float) -> FileInfos:
        """What killed writers left below a folder before a moment of its clock."""
        return [info for info in self.list(full, temporary=True) if info.modified < before]

    def delete_unfinished(self, found: FileInfos) -> None:
        """Delete what `unfinished` found."""
        for info in found:
            self.delete(os.path.join(self.base, info.path))

    def create_if_absent(self, full: str, data: bytes) -> bool:
        with self._sentences(full, "write"), _whole_file(full) as (file, temporary):
            file.write(data)
            _to_disk(file)
            try:
                os.link(temporary, full)
            except FileExistsError:
                return False
            _to_disk_folder(full)
        return True

    def swap(self, full: str, data: bytes, etag: str) -> bool:
        try:
            with self._locked(full):
                if self.read_with_etag(full)[1] != etag:
                    return False
                with self.open_write(full) as file:
                    file.write(data)
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def _locked(self, full: str) -> Iterator[None]:
        """Inside the block, nobody else swaps this file. The lock file is gone after it, so a lock counts only while
        its file is still the one of that name. Raises FileNotFoundError where there is no such folder."""
        folder, name = os.path.split(full)
        path = os.path.join(folder, f"{TEMPORARY}lock-{name}")
        while True:
            with self._sentences(full, "lock"):
                lock = open(path, "wb")  # noqa: SIM115
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_still(lock, path):
                    continue
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                return

    def _file_info(self, full: str, found: os.stat_result) -> FileInfo:
        return FileInfo(
            path=full[len(self.base) :].lstrip("/"),
            size=found.st_size,
            etag=f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}",
            modified=found.st_mtime,
        )

    @contextlib.contextmanager
    def _sentences(self, full: str, doing: str) -> Iterator[None]:
        """A user error as one sentence; a missing file stays FileNotFoundError."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"no space left to write {full}: free some or choose another disk") from error
            if error.errno == errno.EFBIG:
                raise UserError(f"{full} grew larger than this disk or account allows: raise the limit") from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UserError(f"no permission to {doing} {full}: allow it or choose another folder") from error
            if error.errno == errno.ENOTDIR and doing == "read":  # below a file there is nothing
                raise FileNotFoundError(errno.ENOENT, "no such file", full) from error
            if error.errno in (errno.ENOTDIR, errno.EEXIST) and doing == "write":
                raise UserError(f"{full} cannot be written: a part of its path is a file, not a folder") from error
            if error.errno == errno.ENOENT and doing == "write":
                raise UserError(f"{full} cannot be written: its folder cannot be created") from error
            if error.errno in (errno.ENAMETOOLONG, errno.EISDIR, errno.EOPNOTSUPP):
                raise UserError(f"cannot {doing} {full}: {error.strerror}") from error
            raise


def _is_still(file: IO[bytes], path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _whole_file(full: str) -> Iterator[tuple[IO[bytes], str]]:
    """A temporary file beside `full`, and its name; gone when the block ends."""
    folder, name = os.path.split(full)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}-{name[:80]}")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file, temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _to_disk_folder(full: str) -> None:
    """Make a rename or link survive a loss of power."""
    folder = os.open(os.path.dirname(full), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
