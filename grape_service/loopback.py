"""Servers on this machine are never asked for through a proxy, whatever http_proxy says."""

from __future__ import annotations

import os

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def without_proxy() -> dict[str, str]:
    """NO_PROXY and no_proxy with this machine's own addresses in them."""
    given = [entry for name in ("NO_PROXY", "no_proxy") for entry in os.environ.get(name, "").split(",") if entry]
    entries = ",".join(dict.fromkeys([*given, *LOOPBACK]))
    return {"NO_PROXY": entries, "no_proxy": entries}


def ask_loopback_directly() -> None:
    """Have this process and those that it starts take no proxy to this machine's own addresses."""
    os.environ.update(without_proxy())
