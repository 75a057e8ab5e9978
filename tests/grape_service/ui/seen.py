"""What a page shows."""

from __future__ import annotations

import html
import re

from starlette.testclient import TestClient


def text_of(client: TestClient, path: str, status: int = 200) -> str:
    """The text of a page, without markup."""
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", answer.text)))
