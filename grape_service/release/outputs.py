"""Which outputs use a workspace: its scores and shards may go only when nothing in any of them needs them.

outputs/<digest>.json     {"output": address}, written by every run before it does anything
"""

from __future__ import annotations

import hashlib
from typing import Any

from grape_service.errors import UserError
from grape_service.release.catalog import list_datasets
from grape_service.storage.storage import Storage, json_bytes

FOLDER = "outputs"


def register_output(workspace: Storage, output: Storage) -> None:
    """Note that an output has releases that are made with this workspace."""
    path = f"{FOLDER}/{hashlib.sha256(output.root.encode()).hexdigest()[:16]}.json"
    workspace.create_if_absent(path, json_bytes({"output": output.root}))


def other_outputs(workspace: Storage, output: Storage) -> list[Storage]:
    """The other outputs that use this workspace.

    Raises UserError where one of them cannot be seen: then nobody knows what its releases need.
    """
    found: list[Storage] = []
    for info in workspace.list(FOLDER):
        value: Any = workspace.read_json_value(info.path)
        root = value.get("output") if isinstance(value, dict) else None
        if not isinstance(root, str):
            raise UserError(f"{workspace.url(info.path)} does not name an output: delete it, or restore it")
        if root == output.root:
            continue
        other = Storage(root, workspace.options)
        try:
            names = list_datasets(other)
        except OSError as error:
            raise _unseen(workspace, info.path, root, str(error).splitlines()[0]) from None
        if not names:
            raise _unseen(workspace, info.path, root, "there is no dataset in it")
        found.append(other)
    return found


def _unseen(workspace: Storage, path: str, root: str, why: str) -> UserError:
    return UserError(
        f"the output {root} uses the workspace {workspace.root} too and cannot be seen from here ({why}): run gc "
        f"where it can be seen, or delete {workspace.url(path)} if that output is gone for good"
    )
