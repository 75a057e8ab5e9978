"""Which errors of S3 are tried again, and the sentence for each that is not."""

from __future__ import annotations

import asyncio
import time
from email.utils import parsedate_to_datetime
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


EXPIRED = frozenset(["ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"])
REFUSED = frozenset(["InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId"])
SKEWED = frozenset(["RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"])
ELSEWHERE = frozenset(["PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"])
SKEW_SECONDS = 14 * 60
"""S3 refuses requests that are dated a quarter of an hour before or after its own time."""


SAME_WITH_BODY: dict[str, tuple[str, dict[str, Any]]] = {
    "head_object": ("get_object", {"Range": "bytes=0-0"}),
    "head_bucket": ("list_objects_v2", {"MaxKeys": 1}),
}
"""A request that is refused for the same reason as one whose answers have no body, and so no code."""


def is_refusal(error: BaseException, has_code: bool) -> bool:
    """Whether an error is a server's refusal, with a code of S3's or with an HTTP status alone."""
    code, status = error_code(error)
    return 300 <= status < 500 and status not in (404, 409, 412, 416, 429) and code.isdigit() is not has_code


def may_be_of_old_credentials(error: BaseException) -> bool:
    """Whether a request may have been refused because its credentials were replaced meanwhile."""
    code, status = error_code(error)
    return code in EXPIRED | REFUSED or (code.isdigit() and status in (400, 403))


def has_expired(error: BaseException) -> bool:
    """Whether the server says that the credentials have expired."""
    return error_code(error)[0] in EXPIRED


def expired(address: str, error: BaseException) -> StorageUnavailable:
    """What to raise then: whoever renews them need not be whoever runs this, so that a later try may go on."""
    code = error_code(error)[0]
    return StorageUnavailable(
        f"the credentials for {address} have expired ({code}) and there are no newer ones: renew them and run again; "
        "finished work is kept"
    )


def refused_delete(address: str, answer: dict[str, Any]) -> UserError:
    """What one of many deletes was answered."""
    if answer.get("Code") == "AccessDenied":
        return UserError(f"these credentials may not delete {address}: allow it or use other credentials")
    return UserError(f"cannot delete {address}: {answer.get('Message') or answer.get('Code')}")


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
    if (sentence := _of_clock_or_region(error, address, endpoint)) is not None:
        return UserError(sentence)
    # In the body an S3 server says what is wrong, with a code of its own; HEAD has none, but is redirected as others.
    has_body = not method.startswith("head_") or 300 <= status < 400
    if code.isdigit() and has_body and status not in (403, 409, 412, 416) and (method, status) != ("get_object", 404):
        return UserError(
            f"{address}: {endpoint} answers with HTTP status {status} and is not an S3 server: correct the address"
        )
    if code == "NoSuchBucket" or (method == "head_bucket" and status == 404):
        return UserError(f"the bucket of {address} does not exist: create '{bucket}' or correct the address")
    if code in EXPIRED:
        return expired(address, error)
    if code in REFUSED:
        return UserError(f"the credentials for {address} are refused ({code}): check AWS_ACCESS_KEY_ID and its secret")
    if status == 403:
        doing = {"get": "read", "head": "read", "list": "read", "delete": "delete"}.get(method.split("_")[0], "write")
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


def _of_clock_or_region(error: Exception, address: str, endpoint: str) -> str | None:
    """The sentence where a clock is wrong, or the bucket is not where it was asked for."""
    code, status = error_code(error)
    response = getattr(error, "response", None) or {}
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    apart = _seconds_apart(headers.get("date"))
    if code in SKEWED or (status == 403 and apart > SKEW_SECONDS):
        by = f"by {apart / 60:.0f} minutes" if apart > SKEW_SECONDS else "by more than the server allows"
        return f"{address}: the clock of this machine and that of {endpoint} differ {by}: set this machine's clock"
    details = response.get("Error", {})
    region = headers.get("x-amz-bucket-region") or details.get("Region")
    # Where a HEAD's cause could not be learnt either, its status is its code.
    if code in ELSEWHERE or (300 <= status < 400 and (region or not code.isdigit())) or (code == "400" and region):
        where = f", {region}," if region else ""
        other = f" and the endpoint to {details['Endpoint']}" if details.get("Endpoint") else ""
        return (
            f"the bucket of {address} is in another region{where} than {endpoint} serves: set AWS_DEFAULT_REGION or "
            f"storage.client_kwargs.region_name to it{other or ', and an endpoint of that region'}"
        )
    return None


def _seconds_apart(date: str | None) -> float:
    """How far a server's clock is from this machine's; 0 where it tells no time."""
    try:
        return abs(parsedate_to_datetime(date or "").timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
