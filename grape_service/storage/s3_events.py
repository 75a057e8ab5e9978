"""What a client of S3 does otherwise than botocore's own: two handlers of its events."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from grape_service.json_types import JsonObject


def register(client: Any) -> None:
    """Add the handlers to a client, unless it has them."""
    events = client.meta.events
    events.register_first("before-call.s3.DeleteObjects", _add_md5, unique_id="grape-md5")
    events.register_first("needs-retry.s3.HeadBucket", _ask_for_a_region_once, unique_id="grape-region")


def _add_md5(params: JsonObject, **_: Any) -> None:
    """Content-MD5, which botocore no longer sends and many servers want for this one request."""
    body = params["body"]
    digest = hashlib.md5(body.encode() if isinstance(body, str) else body, usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _ask_for_a_region_once(request_dict: JsonObject, response: Any, **_: Any) -> None:
    """Where a redirect names no region, botocore asks for the bucket's by HeadBucket, and where that is redirected too,
    by another, for ever. Such an answer counts as one that was followed."""
    if response is not None and "x-amz-bucket-region" not in response[1].get("ResponseMetadata", {}).get(
        "HTTPHeaders", {}
    ):
        request_dict.get("context", {}).setdefault("s3_redirect", {})["redirected"] = True
