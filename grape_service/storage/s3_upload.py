"""A file that is being written to S3."""

from __future__ import annotations

import contextlib
import io
from concurrent.futures import Future
from typing import Any, Protocol

from grape_service.errors import StageError, UserError

PART_BYTES = 16 * 2**20
PARTS_IN_FLIGHT = 2
MAX_PARTS = 10_000


class Requests(Protocol):
    """What sends requests, and tries them again."""

    def call_s3(self, method: str, **kwargs: Any) -> Any:
        """The answer to a request."""
        ...

    def submit(self, method: str, **kwargs: Any) -> Future[Any]:
        """A request that runs in the background."""
        ...


class UploadFile(io.RawIOBase):
    """A file being written to S3: parts go up in the background, and it exists only once it is closed.

    Small files are one PUT. `abandon` leaves nothing behind, not even parts.
    """

    def __init__(self, requests: Requests, full: str, part_bytes: int = PART_BYTES):
        super().__init__()
        self._requests = requests
        self._bucket, _, self._key = full.partition("/")
        self._part_bytes = part_bytes
        self._buffer = bytearray()
        self._upload_id: str | None = None
        self._parts: list[Future[Any]] = []
        self._position = 0
        self._ended = False

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        """Take bytes; waits while enough parts are in flight. Raises what an earlier part raised."""
        view = memoryview(data).cast("B")
        self._buffer += view
        self._position += len(view)
        while len(self._buffer) >= self._part_bytes:
            self._send_part(bytes(memoryview(self._buffer)[: self._part_bytes]))
            del self._buffer[: self._part_bytes]
        return len(view)

    def _send_part(self, data: bytes) -> None:
        target = {"Bucket": self._bucket, "Key": self._key}
        if self._upload_id is None:
            self._upload_id = self._requests.call_s3("create_multipart_upload", **target)["UploadId"]
        if len(self._parts) >= PARTS_IN_FLIGHT:
            self._parts[-PARTS_IN_FLIGHT].result()
        if len(self._parts) >= MAX_PARTS:
            raise UserError(f"s3://{self._bucket}/{self._key} is larger than {MAX_PARTS} parts: use more partitions")
        number = len(self._parts) + 1
        self._parts.append(
            self._requests.submit("upload_part", **target, UploadId=self._upload_id, PartNumber=number, Body=data)
        )

    def close(self) -> None:
        """Finish the upload: the object exists from here on. Raises if a part failed; then it does not."""
        if self._ended:
            return
        target = {"Bucket": self._bucket, "Key": self._key}
        if self._upload_id is None:
            self._end()
            self._requests.call_s3("put_object", **target, Body=bytes(self._buffer))
            return
        try:
            if self._buffer:
                self._send_part(bytes(self._buffer))
            parts = [{"PartNumber": i, "ETag": part.result()["ETag"]} for i, part in enumerate(self._parts, 1)]
        except BaseException:
            self.abandon()
            raise
        upload_id, size = self._upload_id, self._position
        self._end()
        try:
            self._requests.call_s3(
                "complete_multipart_upload", **target, UploadId=upload_id, MultipartUpload={"Parts": parts}
            )
        except FileNotFoundError:
            # Completed by an earlier attempt whose answer was lost.
            if self._requests.call_s3("head_object", **target)["ContentLength"] != size:
                raise

    def abandon(self) -> None:
        """Give the upload up and have the server forget its parts."""
        if self._ended:
            return
        upload_id = self._upload_id
        for part in self._parts:
            part.cancel()
        self._end()
        if upload_id is not None:
            with contextlib.suppress(StageError, OSError, UserError):  # gc aborts what this does not
                self._requests.call_s3("abort_multipart_upload", Bucket=self._bucket, Key=self._key, UploadId=upload_id)

    def _end(self) -> None:
        self._ended = True
        super().close()

    def __del__(self) -> None:
        """An upload that nobody closed is not finished by the garbage collector."""
        self._ended = True
