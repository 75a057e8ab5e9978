"""What changed between two versions of a dataset; found once, since versions never change."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from grape_service.errors import UserError
from grape_service.release.compare import differences, prompts_of, turnover_between
from grape_service.release.diff import Diff, diff
from grape_service.ui.folder import Folder

MAX_ROWS = 1_000_000
"""Rows of both versions that are compared without being asked again: every row is read."""
KEPT = 32


class Changes:
    """Differences between versions of the datasets of a folder."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self._found: OrderedDict[tuple[str, str], Diff] = OrderedDict()
        self._lock = threading.Lock()

    def between(self, name: str, a: str, b: str, whole: bool = False) -> dict[str, Any]:
        """`diff` (None for large versions unless `whole`), both releases and settings that differ. Raises UserError."""
        if not a or not b:
            raise UserError(f"two versions of {name} are needed: choose them on the page of the dataset")
        old, new = self.folder.release(name, a), self.folder.release(name, b)
        key = (f"{old.reference} {old.manifest.content_digest}", f"{new.reference} {new.manifest.content_digest}")
        with self._lock:
            found = self._found.get(key)
        rows = old.row_count + new.row_count
        if found is None and (whole or rows <= MAX_ROWS):
            found = diff(old, new)
            with self._lock:
                self._found[key] = found
                while len(self._found) > KEPT:
                    self._found.popitem(last=False)
        moved = turnover_between(old, new) if found is not None else None
        return {
            "old": old,
            "new": new,
            "diff": found,
            "prompts": {} if found is None else prompts_of(found, old, new),
            "rows": rows,
            "turnover": moved,
            "settings": differences(old.manifest.config, new.manifest.config),
        }
