"""What `grape check` says: findings, and tables beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grape_service.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    status: str  # ok | warning | error
    detail: str

    def to_json(self) -> dict[str, str]:
        return {"what": self.what, "status": self.status, "detail": self.detail}


@dataclass(frozen=True)
class Table:
    """Rows with the same keys, under a name."""

    name: str
    rows: list[dict[str, Any]]


def look(what: str, look_at: Callable[[], tuple[str, str]]) -> Finding:
    """The finding of a function that gives status and detail; a UserError is an error's."""
    try:
        status, detail = look_at()
    except UserError as error:
        return Finding(what, "error", str(error))
    return Finding(what, status, detail)
