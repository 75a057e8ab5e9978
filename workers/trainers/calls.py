"""Webhook trainers: one signed POST that starts the job, and the status that its answer points to."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from grape_service.errors import StageError, UserError

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
