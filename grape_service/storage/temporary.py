"""Folders in the machine's temporary one that outlive a process, each of one user alone."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from grape_service.errors import UserError


def temporary_folder(name: str, variable: str = "TMPDIR") -> Path:
    """The folder `name` of this user, at 0700, made if it is not there.

    Raises UserError where it is another user's, or a link; `variable` is what the user can set instead.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set {variable} to a folder of your own")
    folder.chmod(0o700)
    return folder
