"""The folder of datasets that was used last, for commands that are given none."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from grape_service.errors import UserError

VARIABLE = "GRAPE_DATASETS"


def folder_or_last(path: str | None, command: str) -> str:
    """The folder that a command is given, or that GRAPE_DATASETS names, or that was used last.

    Raises UserError that says how to name one."""
    if path:
        remember(path)
        return path
    known = os.environ.get(VARIABLE) or _last()
    if not known:
        raise UserError(
            f"no folder of datasets was used yet: write {command} PATH, or set {VARIABLE}=s3://team/datasets"
        )
    return known


def remember(path: str) -> None:
    """This folder is the one that was used last."""
    with contextlib.suppress(OSError, UserError):  # it is a convenience
        from grape_service.storage.storage import normal_url

        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(normal_url(path), encoding="utf-8")


def _last() -> str | None:
    try:
        return _file().read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError, UserError):
        return None


def _file() -> Path:
    from grape_service.models.files import cache_folder

    return cache_folder() / "last-datasets"
