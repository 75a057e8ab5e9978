"""Addresses that somebody has typed, and those of this machine, which is never asked for through a proxy."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlsplit


def is_http_address(address: Any) -> bool:
    """Whether it is http:// or https:// with a host, and with a port that there can be, if any."""
    try:
        parts = urlsplit(address.strip())
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (AttributeError, TypeError, ValueError):  # no text, no port, or no IPv6 address
        return False


_MOVING = re.compile(r"(?P<folder>.+?)/?@(?P<which>latest|step-\d+)")


def moving_checkpoint(address: str) -> tuple[str, str] | None:
    """The folder and `latest` or `step-N` of an address such as s3://runs/7/checkpoints/@latest; None for another."""
    found = _MOVING.fullmatch(address)
    return (found["folder"], found["which"]) if found is not None else None


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def without_proxy() -> dict[str, str]:
    """NO_PROXY and no_proxy with this machine's own addresses in them."""
    given = [entry for name in ("NO_PROXY", "no_proxy") for entry in os.environ.get(name, "").split(",") if entry]
    entries = ",".join(dict.fromkeys([*given, *LOOPBACK]))
    return {"NO_PROXY": entries, "no_proxy": entries}


def ask_loopback_directly() -> None:
    """Have this process and those that it starts take no proxy to this machine's own addresses."""
    os.environ.update(without_proxy())
