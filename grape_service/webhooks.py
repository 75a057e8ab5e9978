"""Tells a webhook how a run ended: one signed POST, tried again with growing pauses; never a reason to fail."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import orjson

from grape_service.config.schema import Config, NotifyConfig
from grape_service.errors import StageError, UserError
from grape_service.progress.reporter import reporter

SECRET = "GRAPE_WEBHOOK_SECRET"
ADDRESS = "GRAPE_WEBHOOK"
"""Environment: the webhook's address, where the config names none."""
SIGNATURE = "X-Grape-Signature"
TRIES = 5
FIRST_PAUSE_SECONDS = 1.0
TIMEOUT_SECONDS = 10.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A signed body goes to the address that was given and to no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def notify(config: NotifyConfig | None, body: dict[str, Any], pause: float = FIRST_PAUSE_SECONDS) -> bool:
    """POST `body` as JSON to the webhook; whether it was taken. Says so when it was not, and raises nothing.

    With GRAPE_WEBHOOK_SECRET set, the header X-Grape-Signature is `sha256=` and the hex HMAC-SHA256 of the body.
    Answers of 5xx, 408 and 429 and connections that fail are tried again, others are final.
    """
    if config is None:
        return False
    address = config.webhook or os.environ.get(ADDRESS)
    if not address:
        reporter().event(f"nobody was told how the run ended: give notify.webhook or set {ADDRESS}")
        return False
    host = urlsplit(address).hostname or "no host"
    data = orjson.dumps(body, default=str)
    headers = {"Content-Type": "application/json", "User-Agent": "grape-service"}
    secret = os.environ.get(SECRET)
    if secret:
        headers[SIGNATURE] = f"sha256={signature(secret, data)}"
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        problem, again = _post(address, data, headers)
        if not problem:
            return True
        if not again:
            break
    # The address itself may hold a token: only its host is told.
    reporter().event(f"the webhook at {host} was not told how the run ended: {problem}")
    return False


def signature(secret: str, data: bytes) -> str:
    """Hex HMAC-SHA256."""
    return hmac.new(secret.encode(), data, hashlib.sha256).hexdigest()


def _post(url: str, data: bytes, headers: dict[str, str]) -> tuple[str, bool]:
    """(what went wrong or "", whether to try again)."""
    if urlsplit(url).scheme not in ("http", "https"):
        return "its address is not http:// or https://", False
    request = urllib.request.Request(url, data=data, headers=headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_SECONDS):
            return "", False
    except urllib.error.HTTPError as error:
        return f"it answers {error.code}", error.code >= 500 or error.code in (408, 429)
    except (OSError, ValueError) as error:
        return type(error).__name__, isinstance(error, OSError)


def completed(outcome: dict[str, Any], run_name: str) -> dict[str, Any]:
    """The body for a run that completed."""
    return {"event": "completed", "name": run_name, **outcome}


def failed(error: BaseException, run_name: str, seconds: float) -> dict[str, Any]:
    """The body for a run that did not; the error's type and, where it is one of ours, its sentence."""
    from grape_service.errors import StageError, UserError

    ours = isinstance(error, StageError | UserError)
    message = str(error) if ours else f"{type(error).__name__}; see the run's log"
    return {"event": "failed", "name": run_name, "error": message, "seconds": round(seconds, 3)}


@contextlib.contextmanager
def notify_when_done(config: Config) -> Iterator[list[dict[str, Any]]]:
    """Tells config.notify how the block ended: the block appends what it came to; an exception is a failure.

    A run that was stopped by a person or by Prefect tells nobody.
    """
    started = time.monotonic()
    outcomes: list[dict[str, Any]] = []
    try:
        yield outcomes
    except Exception as error:
        notify(config.notify, failed(error, config.name, time.monotonic() - started))
        raise
    if outcomes:
        notify(config.notify, completed(outcomes[-1], config.name))


SECRET = "GRAPE_WEBHOOK_SECRET"
TRIES = 4


def post_job(url: str, body: dict[str, Any], key: str) -> dict[str, Any]:
    """Tell `url` to train; the answer's JSON, {} if it has none. The same `key` asks for the same job.

    Raises UserError when the address refuses it, StageError when it does not answer.
    """
    data = json.dumps(body, sort_keys=True).encode()
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    if os.environ.get(SECRET):
        digest = hmac.new(os.environ[SECRET].encode(), data, hashlib.sha256).hexdigest()
        headers["X-Grape-Signature"] = f"sha256={digest}"
    return _json(urllib.request.Request(url, data=data, headers=headers, method="POST"))


def get_status(url: str) -> dict[str, Any]:
    """{"state": running | succeeded | failed, "checkpoint": ..., "error": ..., "metrics": ...} from `url`."""
    status = _json(urllib.request.Request(url, headers={"Accept": "application/json"}))
    if status.get("state") not in ("running", "succeeded", "failed"):
        raise StageError(f"{url} gives no state: it should be running, succeeded or failed")
    return status


def _json(request: urllib.request.Request) -> dict[str, Any]:
    if not request.full_url.startswith(("http://", "https://")):
        raise UserError(f"webhook: '{request.full_url}' is not an http:// or https:// address")
    for attempt in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
            try:
                value = json.loads(text or b"{}")
            except json.JSONDecodeError:
                return {}
            return value if isinstance(value, dict) else {}
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise UserError(
                    f"the webhook {request.full_url} refused the job: {error.code} {error.reason}"
                ) from None
            reason = f"{error.code} {error.reason}"
        except OSError as error:
            reason = str(error)
        if attempt < TRIES:
            time.sleep(2**attempt)
    raise StageError(f"the webhook {request.full_url} does not answer: {reason}")
