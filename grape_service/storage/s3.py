"""S3 through s3fs: requests that wait for a server that is away, and uploads that leave nothing behind.

Every request, those that pyarrow makes through this file system included, goes through `RetryingS3._call_s3`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from functools import cached_property, lru_cache
from typing import IO, Any

import aiobotocore.session
import orjson
import pyarrow.fs as pafs
import s3fs
from fsspec.asyn import sync_wrapper

from grape_service.addresses import ask_loopback_directly
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.storage import s3_events
from grape_service.storage.arrow_io import ArrowHandler
from grape_service.storage.concurrent_map import concurrent_map
from grape_service.storage.files import FileInfo, FileInfos, Names, refuse_longer
from grape_service.storage.options import first_answer_seconds
from grape_service.storage.s3_errors import (
    SAME_WITH_BODY,
    TRANSIENT_ERRORS,
    StorageUnavailable,
    condition_failed,
    error_code,
    expired,
    has_expired,
    is_answer,
    is_refusal,
    is_transient,
    may_be_of_old_credentials,
    no_answer,
    plain_error,
    refused_delete,
)
from grape_service.storage.s3_upload import UploadFile

RETRY_SECONDS = 60.0
"""How long a request is tried again while the server is down, throttles or answers 5xx."""
UPLOADS_A_PAGE = 1000
DELETED_AT_ONCE = 1000
DELETES_IN_FLIGHT = 16
HAVE_ETAG = ("get_object", "head_object", "put_object")
"""Each answer of an S3 server to these has one."""


class RetryingS3(s3fs.S3FileSystem):
    """s3fs whose requests are tried again with backoff for `retry_seconds`; errors are whole sentences."""

    def __init__(self, *args: Any, retry_seconds: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._first_seconds = None if retry_seconds else first_answer_seconds()
        self.retry_seconds = retry_seconds or RETRY_SECONDS
        # When the present outage began and was last seen: what follows a request that waited in vain waits no more.
        self._outage = (0.0, 0.0)
        self._generation = 0  # of credentials, which may be renewed in their file
        self._has_worked = False

    async def _call_s3(self, method: str, *akwarglist: JsonObject, **kwargs: Any) -> Any:
        start, attempts = time.monotonic(), 0
        renewed = False  # since the last wait: where each session is given keys of its own, there are always others
        while True:
            attempts += 1
            generation = self._generation
            try:
                client = await self._client(kwargs.get("Bucket"))
                call = getattr(client, method)
                answering = call(**self._get_s3_method_kwargs(call, *akwarglist, **kwargs))
                answer = await asyncio.wait_for(answering, self._first_seconds)
                if method in HAVE_ETAG and "ETag" not in answer:
                    address = f"s3://{kwargs['Bucket']}/{kwargs['Key']}"
                    raise UserError(f"{address}: {self._address()} is not an S3 server: correct the address")
                self._outage, self._first_seconds, self._has_worked = (0.0, 0.0), None, True
                return answer
            except UserError:
                raise
            except Exception as refusal:
                error = await self._with_cause(refusal, method, *akwarglist, **kwargs)
                self._first_seconds = None if is_answer(error) else self._first_seconds
                if not renewed and may_be_of_old_credentials(error) and await self._renewed(generation):
                    renewed = True
                    continue
                waits = is_transient(error) or (has_expired(error) and self._has_worked)
                if not waits:
                    raise plain_error(error, method, kwargs, attempts, self._address()) from error
                wait = min(0.1 * 1.7**attempts, 5.0) * random.uniform(0.5, 1.0)
                if not self._worth_waiting(start, wait):
                    address = f"s3://{kwargs.get('Bucket', '')} at {self._address()}"
                    if has_expired(error):
                        raise expired(address, error) from error
                    raise no_answer(address, error, self.retry_seconds, self._first_seconds) from error
            await asyncio.sleep(wait)
            renewed = False

    call_s3 = sync_wrapper(_call_s3)

    async def _with_cause(self, error: Exception, method: str, *akwarglist: JsonObject, **kwargs: Any) -> Exception:
        """A request's error; that of a HEAD, which has no body, as a GET of the same is told it."""
        if method in SAME_WITH_BODY and is_refusal(error, has_code=False):
            name, options = SAME_WITH_BODY[method]
            try:
                call = getattr(await self._client(kwargs.get("Bucket")), name)
                asking = call(**self._get_s3_method_kwargs(call, *akwarglist, **{**kwargs, **options}))
                answer = await asyncio.wait_for(asking, self._first_seconds)
            except Exception as cause:
                return cause if is_refusal(cause, has_code=True) else error
            if "Body" in answer:
                answer["Body"].close()
        return error

    async def _client(self, bucket: str | None) -> Any:
        try:
            await self.set_session()
            client = await self.get_s3(bucket)
        except (TypeError, ValueError) as error:  # of a library that is given an option which it does not take
            raise UserError(f"the storage options for s3://{bucket} are not valid: {error}") from error
        s3_events.register(client)
        return client

    async def _renewed(self, generation: int) -> bool:
        """Whether there are other credentials than those of a request that was refused: they are read again, as
        whoever rotates them replaces their file. Requests from now on take them."""
        async with self._renewing:
            if generation != self._generation:
                return True
            old = self.session
            fresh = aiobotocore.session.AioSession(**self.kwargs)
            if await _frozen(old) == await _frozen(fresh):
                return False
            await self.set_session(refresh=True)
            self._generation += 1
            return True

    @cached_property
    def _renewing(self) -> asyncio.Lock:
        return asyncio.Lock()

    def _worth_waiting(self, start: float, wait: float) -> bool:
        now = time.monotonic()
        began, seen = self._outage
        if now - seen > 30:
            began = now
        self._outage = (began, now)
        if self._first_seconds is not None:
            return now + wait - min(began, start) < self._first_seconds
        return now + wait - began < self.retry_seconds and now + wait - start < 2 * self.retry_seconds

    def _address(self) -> str:
        endpoint = getattr(getattr(self._s3, "meta", None), "endpoint_url", None)
        return str(endpoint or self.endpoint_url or "its endpoint")

    async def _read_object(self, bucket: str, key: str, max_bytes: int | None = None, **more: str) -> tuple[bytes, str]:
        for attempt in range(6):
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key, **more)
            try:
                if max_bytes is not None:
                    refuse_longer(f"s3://{bucket}/{key}", answer["ContentLength"], max_bytes)
                return await answer["Body"].read(), answer["ETag"].strip('"')
            except TRANSIENT_ERRORS as error:
                failure = error
                await asyncio.sleep(0.1 * 2**attempt)
            finally:
                answer["Body"].close()
        raise StorageUnavailable(f"s3://{bucket}/{key} broke off six times ({failure}): run again") from failure

    read_object = sync_wrapper(_read_object)
    """A whole object, or the `Range` of it, and its etag in one GET. Raises FileNotFoundError, and UserError for one
    longer than `max_bytes`."""

    def submit(self, method: str, **kwargs: Any) -> Future[Any]:
        """A request that runs in the background."""
        return asyncio.run_coroutine_threadsafe(self._call_s3(method, **kwargs), self.loop)


class S3Files:
    """`Files` of `base`, "bucket/folder"."""

    def __init__(self, base: str, options: JsonObject):
        self.base = base
        self._options_json = orjson.dumps(options, option=orjson.OPT_SORT_KEYS)

    @property
    def fs(self) -> RetryingS3:
        environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        return _file_system(self._options_json, environment, os.getpid())

    @property
    def arrow(self) -> pafs.FileSystem:
        return pafs.PyFileSystem(ArrowHandler(self.fs))

    def read_with_etag(self, full: str, max_bytes: int | None = None) -> tuple[bytes, str]:
        return self.fs.read_object(*_bucket_and_key(full), max_bytes)

    def open(self, full: str) -> IO[bytes]:
        return self.fs.open(full, "rb", block_size=8 * 2**20, cache_type="readahead")  # type: ignore[no-any-return]

    def read_range(self, full: str, start: int, end: int) -> bytes:
        return self.fs.read_object(*_bucket_and_key(full), Range=f"bytes={start}-{end - 1}")[0]  # type: ignore[no-any-return]

    def info(self, full: str) -> FileInfo:
        found = self.fs.call_s3("head_object", **_target(full))
        return self._file_info(full, found["ContentLength"], found)

    def list(self, full: str) -> FileInfos:
        bucket, prefix = _bucket_and_key(full)
        return [
            self._file_info(f"{bucket}/{entry['Key']}", entry["Size"], entry)
            for page in self._pages(bucket, prefix, {})
            for entry in page.get("Contents", [])
            if not entry["Key"].endswith("/")
        ]

    def folders(self, full: str) -> Names:
        bucket, prefix = _bucket_and_key(full)
        pages = self._pages(bucket, prefix, {"Delimiter": "/"})
        return [
            entry["Prefix"].rstrip("/").rsplit("/", 1)[-1] for page in pages for entry in page.get("CommonPrefixes", [])
        ]

    def _pages(self, bucket: str, prefix: str, more: JsonObject) -> Iterator[JsonObject]:
        more = {**more, "Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
        while True:
            page = self.fs.call_s3("list_objects_v2", **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]

    @contextlib.contextmanager
    def open_write(self, full: str) -> Iterator[IO[bytes]]:
        file = UploadFile(self.fs, full)
        try:
            yield file  # type: ignore[misc]
        except BaseException:
            file.abandon()
            raise
        file.close()

    def delete(self, full: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.call_s3("delete_object", **_target(full))

    def write_in_parts(self, full: str, data: bytes) -> None:
        with contextlib.closing(UploadFile(self.fs, full, part_bytes=max(1, len(data)))) as file:
            file.write(data)

    def delete_many(self, fulls: Names) -> None:
        """A thousand in a request; one by one where the server knows no such request."""
        for start in range(0, len(fulls), DELETED_AT_ONCE):
            some = fulls[start : start + DELETED_AT_ONCE]
            try:
                self._delete_at_once(some)
            except (UserError, OSError) as error:
                if error_code(error)[1] not in (400, 405, 501):
                    raise
                for _ in concurrent_map(self.delete, some, DELETES_IN_FLIGHT):
                    pass

    def _delete_at_once(self, fulls: Names) -> None:
        bucket, _ = _bucket_and_key(fulls[0])
        objects = [{"Key": _bucket_and_key(full)[1]} for full in fulls]
        answer = self.fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
        for failed in answer.get("Errors", []):
            raise refused_delete(f"s3://{bucket}/{failed.get('Key')}", failed)

    def delete_folder(self, full: str) -> None:
        self.delete_many([f"{self.base}/{info.path}" for info in self.list(full)])

    def now(self) -> float:
        """The server's clock, to the second."""
        bucket, prefix = _bucket_and_key(self.base)
        answer = self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/" if prefix else "", MaxKeys=1)
        date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        try:
            return parsedate_to_datetime(date).timestamp()
        except (TypeError, ValueError):  # a server that tells no time
            return time.time()

    def unfinished(self, full: str, before: float) -> FileInfos:
        """Uploads below a folder that began before a moment of the server's clock; `etag` is an upload's id."""
        bucket, prefix = _bucket_and_key(full)
        found: FileInfos = []
        more: JsonObject = {"Bucket": bucket, "MaxUploads": UPLOADS_A_PAGE}
        more["Prefix"] = f"{prefix}/" if prefix else ""
        while True:
            page = self.fs.call_s3("list_multipart_uploads", **more)
            for upload in page.get("Uploads", []):
                began = upload["Initiated"].timestamp()
                if began < before:
                    path = f"{bucket}/{upload['Key']}"[len(self.base) :].lstrip("/")
                    size = self._bytes_of_upload(bucket, upload["Key"], upload["UploadId"])
                    found.append(FileInfo(path, size, upload["UploadId"], began))
            marks = {"KeyMarker": page.get("NextKeyMarker"), "UploadIdMarker": page.get("NextUploadIdMarker")}
            marks = {name: mark for name, mark in marks.items() if mark}  # some servers go by the second one alone
            if not page.get("IsTruncated") or not marks:
                return found
            more |= marks

    def _bytes_of_upload(self, bucket: str, key: str, upload_id: str) -> int:
        target: JsonObject = {"Bucket": bucket, "Key": key, "UploadId": upload_id}
        size = 0
        while True:
            try:
                page = self.fs.call_s3("list_parts", **target)
            except FileNotFoundError:  # it has ended meanwhile
                return size
            size += sum(part["Size"] for part in page.get("Parts", []))
            if not page.get("IsTruncated"):
                return size
            target["PartNumberMarker"] = page["NextPartNumberMarker"]

    def delete_unfinished(self, found: FileInfos) -> None:
        """Abort what `unfinished` found."""
        for upload in found:
            bucket, key = _bucket_and_key(f"{self.base}/{upload.path}")
            with contextlib.suppress(FileNotFoundError):
                self.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.etag)

    def create_if_absent(self, full: str, data: bytes) -> bool:
        return self._put_if(full, data, {"IfNoneMatch": "*"})

    def swap(self, full: str, data: bytes, etag: str) -> bool:
        return self._put_if(full, data, {"IfMatch": f'"{etag}"'})

    def _put_if(self, full: str, data: bytes, condition: dict[str, str]) -> bool:
        try:
            self.fs.call_s3("put_object", **_target(full), Body=data, **condition)
        except FileNotFoundError:
            return False  # there is nothing to swap
        except OSError as error:
            if not condition_failed(error):
                raise
            # An earlier attempt may have won without its answer reaching us.
            return getattr(error, "attempts", 1) > 1 and self._holds(full, data)
        return True

    def _holds(self, full: str, data: bytes) -> bool:
        try:
            return self.read_with_etag(full)[0] == data
        except FileNotFoundError:
            return False

    def _file_info(self, full: str, size: int, entry: JsonObject) -> FileInfo:
        path = full[len(self.base) :].lstrip("/")
        return FileInfo(path, int(size), str(entry.get("ETag", "")).strip('"'), entry["LastModified"].timestamp())


async def _frozen(session: Any) -> Any:
    """Key, secret and token that a session signs with; None where it has none."""
    credentials = await session.get_credentials()
    return None if credentials is None else await credentials.get_frozen_credentials()


def _bucket_and_key(full: str) -> tuple[str, str]:
    return full.partition("/")[0], full.partition("/")[2]


def _target(full: str) -> dict[str, str]:
    bucket, key = _bucket_and_key(full)
    return {"Bucket": bucket, "Key": key}


@lru_cache(maxsize=16)
def _file_system(options_json: bytes, environment: tuple[tuple[str, str], ...], pid: int) -> RetryingS3:
    """One file system for each set of options, environment and process (a fork must not share its loop)."""
    ask_loopback_directly()
    options = orjson.loads(options_json)
    config = {
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": 5,
        "read_timeout": 60,
        "max_pool_connections": 32,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        **options.pop("config_kwargs", {}),
    }
    plain = {"default_cache_type": "none", "use_listings_cache": False, "skip_instance_cache": True}
    return RetryingS3(**{**plain, **options}, config_kwargs=config)
