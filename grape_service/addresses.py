"""Addresses of servers that somebody has typed."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit


def is_http_address(address: Any) -> bool:
    """Whether it is http:// or https:// with a host, and with a port that there can be, if any."""
    try:
        parts = urlsplit(address.strip())
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (AttributeError, TypeError, ValueError):  # no text, no port, or no IPv6 address
        return False
