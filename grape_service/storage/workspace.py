"""A workspace's format: whether this version of grape-service reads what another one left there.

workspace.json      {"format": 1}, written by the first run
"""

from __future__ import annotations

from grape_service.errors import UserError
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import Storage, json_bytes

FORMAT = 1
"""Raised when code of before could not read what is stored; tests/grape_service/storage/test_workspace.py asks."""
PATH = "workspace.json"


def open_workspace(root: str, options: StorageOptions | None = None) -> Storage:
    """A workspace that is read. Raises UserError where a newer grape-service has written in it."""
    workspace = Storage(root, options)
    refuse_newer(workspace)
    return workspace


def refuse_newer(workspace: Storage) -> None:
    """Raises UserError where a newer grape-service has written in a workspace: one small read."""
    found = _format(workspace)
    if found > FORMAT:
        raise UserError(
            f"the workspace {workspace.root} was written by a newer grape-service (its format is {found}, this one "
            f"reads {FORMAT}): use that version, or another workspace"
        )


def begin_workspace(workspace: Storage) -> None:
    """Note our format in a workspace before anything is written there. Raises UserError as `refuse_newer` does."""
    if not workspace.create_if_absent(PATH, json_bytes({"format": FORMAT})):
        refuse_newer(workspace)
        if _format(workspace) < FORMAT:
            workspace.write_json(PATH, {"format": FORMAT})


def _format(workspace: Storage) -> int:
    try:
        value = workspace.read_json_value(PATH)
    except FileNotFoundError:  # nothing is there, or what versions before the first format wrote
        return FORMAT
    found = value.get("format") if isinstance(value, dict) else None
    if not isinstance(found, int):
        raise UserError(f"{workspace.url(PATH)} does not hold a format: restore it, or give another workspace")
    return found
