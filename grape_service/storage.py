"""Files, local or on S3, behind one small interface; the only module that opens paths.

Plain reads and writes go through fsspec. Two conditional writes are all the coordination there is:
`create_if_absent` and `compare_and_swap`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import fsspec
import orjson
import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem

from grape_service.errors import UserError

SECRET_OPTIONS = ("key", "secret", "token", "password")


@dataclass(frozen=True)
class FileInfo:
    """One file of a listing; `path` is relative to the storage's root."""

    path: str
    size: int
    etag: str
    modified: float  # seconds since 1970


class Storage:
    """A folder, local or s3://, that is read and written. Paths are relative to it, with '/'."""

    def __init__(self, root: str, options: dict[str, Any] | None = None):
        """Raises UserError where conditional writes do not exist or `options` hold a secret."""
        refuse_secrets(options)
        self.options = dict(options or {})
        self.root = normal_url(root)
        self.is_s3 = self.root.startswith("s3://")
        self.fs = filesystem(self.root, orjson.dumps(self.options, option=orjson.OPT_SORT_KEYS))
        self._base = self.root.removeprefix("s3://")

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.root, self.options)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def sub(self, folder: str) -> Storage:
        """The folder below this one as a storage of its own."""
        return Storage(self.url(folder), self.options)

    def url(self, path: str = "") -> str:
        """Full address of a path, for people and manifests."""
        return f"{self.root}/{path}" if path else self.root

    def full(self, path: str = "") -> str:
        """The path as fsspec and pyarrow take it, without 's3://'. Raises UserError if it climbs out."""
        if path.startswith("/") or ".." in path.split("/"):
            raise UserError(f"'{path}' climbs out of {self.root}: paths stay below their folder")
        return f"{self._base}/{path}" if path else self._base

    @property
    def arrow(self) -> pafs.FileSystem:
        """For pyarrow.parquet and pyarrow.dataset, with paths from `full`."""
        if not self.is_s3:
            return pafs.LocalFileSystem()
        return pafs.PyFileSystem(pafs.FSSpecHandler(self.fs))

    # Reading

    def read(self, path: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        return self.read_with_etag(path)[0]

    def read_with_etag(self, path: str) -> tuple[bytes, str]:
        """All bytes of a file and the etag that compare_and_swap takes. Raises FileNotFoundError."""
        if not self.is_s3:
            data = Path(self.full(path)).read_bytes()
            return data, hashlib.sha256(data).hexdigest()
        while True:
            etag = self.info(path).etag
            data = self.fs.cat_file(self.full(path))
            if self.info(path).etag == etag:
                return data, etag

    def read_json(self, path: str) -> Any:
        """A JSON file's value. Raises FileNotFoundError."""
        return orjson.loads(self.read(path))

    def open(self, path: str) -> IO[bytes]:
        """A file for reading. Raises FileNotFoundError."""
        return self.fs.open(self.full(path), "rb")

    def info(self, path: str) -> FileInfo:
        """Size and etag. Raises FileNotFoundError."""
        if self.is_s3:
            self.fs.invalidate_cache(os.path.dirname(self.full(path)))
        return self._file_info(self.fs.info(self.full(path), **({"refresh": True} if self.is_s3 else {})))

    def exists(self, path: str) -> bool:
        """Whether there is a file (not a folder) of that name."""
        try:
            self.info(path)
            return True
        except FileNotFoundError:
            return False

    def list(self, prefix: str = "") -> list[FileInfo]:
        """Every file below the folder `prefix`, sorted by path; empty if there is no such folder."""
        if self.is_s3:
            self.fs.invalidate_cache()
        found = self.fs.find(self.full(prefix.rstrip("/")), detail=True)
        infos = [self._file_info(entry) for entry in found.values() if entry["type"] == "file"]
        return sorted((i for i in infos if not _is_temporary(i.path)), key=lambda info: info.path)

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders directly below `prefix`, sorted."""
        if self.is_s3:
            self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.full(prefix.rstrip("/")), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory")

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
        full = self.full(path)
        if self.is_s3:
            file = self.fs.open(full, "wb", block_size=16 * 2**20)
            try:
                yield file
            except BaseException:
                file.discard() if getattr(file, "mpu", None) else None
                file.closed = True
                raise
            file.close()
            return
        temporary = _temporary_name(full)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, full)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def delete(self, path: str) -> None:
        """Delete a file; no error if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.full(path))

    def delete_folder(self, prefix: str) -> None:
        """Delete everything below a folder; no error if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.full(prefix.rstrip("/")), recursive=True)

    def create_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file unless one of that name exists; False if it does. Atomic among any number of writers."""
        full = self.full(path)
        if self.is_s3:
            return self._conditional_put(full, data, {"IfNoneMatch": "*"})
        temporary = _temporary_name(full)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, full)
            return True
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def compare_and_swap(self, path: str, data: bytes, etag: str | None) -> bool:
        """Replace a file if its etag is still `etag` (None: if it does not exist); False if it is not."""
        if etag is None:
            return self.create_if_absent(path, data)
        full = self.full(path)
        if self.is_s3:
            return self._conditional_put(full, data, {"IfMatch": etag})
        with open(f"{full}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if self.read_with_etag(path)[1] != etag:
                    return False
            except FileNotFoundError:
                return False
            self.write(path, data)
            return True

    def _conditional_put(self, full: str, data: bytes, condition: dict[str, str]) -> bool:
        bucket, _, key = full.partition("/")
        try:
            self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as error:
            if _condition_failed(error):
                return False
            raise
        finally:
            self.fs.invalidate_cache(full)
            self.fs.invalidate_cache(os.path.dirname(full))
        return True

    def _file_info(self, entry: dict[str, Any]) -> FileInfo:
        if self.is_s3:
            modified = entry.get("LastModified")
            return FileInfo(
                path=entry["name"].removeprefix(self._base).lstrip("/"),
                size=int(entry["size"] or 0),
                etag=str(entry.get("ETag", "")).strip('"'),
                modified=modified.timestamp() if modified else 0.0,
            )
        if entry["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "not a file", entry["name"])
        return FileInfo(
            path=os.path.relpath(entry["name"], self._base),
            size=int(entry["size"]),
            etag=f"{entry.get('ino', 0):x}-{int(entry['mtime'] * 1e6):x}-{entry['size']:x}",
            modified=float(entry["mtime"]),
        )


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON with sorted keys and a newline at the end."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def normal_url(root: str) -> str:
    """s3:// addresses as they are, local folders absolute. Raises UserError for other places."""
    if root.startswith("s3://"):
        root = root.rstrip("/")
        if root == "s3:/" or not root.removeprefix("s3://").split("/")[0]:
            raise UserError("the address s3:// names no bucket: write s3://bucket/folder")
        return root
    if "://" in root and not root.startswith("file://"):
        scheme = root.split("://")[0]
        raise UserError(
            f"'{root}' cannot hold releases: {scheme}:// has no conditional writes; use a local folder or s3://"
        )
    return os.path.abspath(os.path.expanduser(root.removeprefix("file://")))


def refuse_secrets(options: dict[str, Any] | None) -> None:
    """Raises UserError when storage options hold a secret: those come from the environment."""
    flat = {**(options or {}), **(options or {}).get("client_kwargs", {})}
    for name in flat:
        if name in SECRET_OPTIONS or name.startswith("aws_"):
            raise UserError(
                f"storage.{name} is a secret: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
            )


@lru_cache(maxsize=32)
def filesystem(url: str, options_json: bytes) -> fsspec.AbstractFileSystem:
    """The fsspec file system of a url; for s3 with retries and without listing caches."""
    if not url.startswith("s3://"):
        return LocalFileSystem(auto_mkdir=True)
    import s3fs

    options = orjson.loads(options_json)
    config_kwargs = {
        "retries": {"max_attempts": 10, "mode": "adaptive"},
        "connect_timeout": 10,
        "read_timeout": 60,
        **options.pop("config_kwargs", {}),
    }
    return s3fs.S3FileSystem(config_kwargs=config_kwargs, use_listings_cache=False, **options)


def _condition_failed(error: BaseException) -> bool:
    """Whether an S3 error says that If-Match or If-None-Match did not hold."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return code in ("PreconditionFailed", "ConditionalRequestConflict") or status in (409, 412)
        seen = seen.__cause__ or seen.__context__
    return isinstance(error, FileExistsError)


def _temporary_name(full: str) -> str:
    folder, name = os.path.split(full)
    return os.path.join(folder, f".tmp-{uuid.uuid4().hex}-{name[:80]}")


def _is_temporary(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return name.startswith(".tmp-") or name.endswith(".lock")
