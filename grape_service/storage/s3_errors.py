"""Which errors of S3 are tried again, and the sentence for each that is not."""

from __future__ import annotations

import asyncio
from typing import Any

import botocore.exceptions as boto_errors
from aiohttp import ClientError as HttpClientError
from s3fs.errors import translate_boto_error

from grape_service.errors import StageError, UserError

TRANSIENT_CODES = frozenset(
    [
        "BandwidthLimitExceeded",
        "InternalError",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "XAmzContentSHA256Mismatch",
    ]
)


TRANSIENT_ERRORS = (
    boto_errors.HTTPClientError,
    boto_errors.ConnectionError,
    boto_errors.IncompleteReadError,
    HttpClientError,
    ConnectionError,
    TimeoutError,
    asyncio.TimeoutError,
)


class StorageUnavailable(StageError):
    """The server did not answer for as long as a request is tried again; a later run goes on."""


def no_answer(address: str, error: Exception, seconds: float, first_seconds: float | None) -> Exception:
    """What to raise where a server stays away; one that has never answered is most likely a mistake in the config."""
    reason = " ".join(str(error).split()) or "it takes connections and says nothing"
    begin = f"{address} gave no answer for {seconds if first_seconds is None else first_seconds:.0f} seconds ({reason})"
    if first_seconds is not None:
        return UserError(f"{begin}: correct the address, or run again once it does")
    return StorageUnavailable(f"{begin}: run again once it does; finished work is kept")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code, status = error_code(error)
        return code in TRANSIENT_CODES or (status >= 500 and status != 501) or status == 429
    return isinstance(error, TRANSIENT_ERRORS)


def error_code(error: BaseException | None) -> tuple[str, int]:
    """S3's code and HTTP status of an error or of what caused it; ("", 0) if it is not S3's."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
            return str(response.get("Error", {}).get("Code", "")), int(status)
        error = error.__cause__ or error.__context__
    return "", 0


def condition_failed(error: BaseException) -> bool:
    """Whether an S3 error says that If-Match or If-None-Match did not hold."""
    code, status = error_code(error)
    return code in ("PreconditionFailed", "ConditionalRequestConflict") or status in (409, 412)


def is_answer(error: Exception) -> bool:
    """Whether an S3 server has answered with this error, and not something before it or in its place."""
    code, status = error_code(error)
    return status != 0 and (status < 500 or not code.isdigit())


def plain_error(error: Exception, method: str, kwargs: dict[str, Any], attempts: int, endpoint: str) -> Exception:
    """A user error as one sentence; anything else as the OSError it stands for."""
    code, status = error_code(error)
    bucket = kwargs.get("Bucket", "")
    address = f"s3://{bucket}/{kwargs['Key']}" if kwargs.get("Key") else f"s3://{bucket}"
    has_body = not method.startswith("head_")  # in which an S3 server says what is wrong, with a code of its own
    if code.isdigit() and has_body and status not in (403, 409, 412, 416) and (method, status) != ("get_object", 404):
        return UserError(
            f"{address}: {endpoint} answers with HTTP status {status} and is not an S3 server: correct the address"
        )
    if code == "NoSuchBucket" or (method == "head_bucket" and status == 404):
        return UserError(f"the bucket of {address} does not exist: create '{bucket}' or correct the address")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return UserError(f"the credentials for {address} are refused ({code}): check AWS_ACCESS_KEY_ID and its secret")
    if status == 403:
        doing = "read" if method.startswith(("get_", "head_", "list_")) else "write"
        return UserError(f"these credentials may not {doing} {address}: allow it or use other credentials")
    if isinstance(error, boto_errors.NoCredentialsError | boto_errors.PartialCredentialsError):
        return UserError(f"no credentials for {address}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile")
    if isinstance(error, boto_errors.BotoCoreError):
        return UserError(f"{address} cannot be used: {' '.join(str(error).split())}")
    if (400 <= status < 500 or status == 501) and status not in (404, 409, 412, 416):
        return UserError(f"{address} at {endpoint} cannot be used: {' '.join(str(error).split())}")
    translated: Exception = translate_boto_error(error, set_cause=False)
    translated.attempts = attempts  # type: ignore[attr-defined]
    return translated
