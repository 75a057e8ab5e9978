"""Whether other users of a machine can write into Ray's folders there, from which Ray runs what is submitted.

Ray opens its temporary folder, its sessions and the packages of working directories to everybody (mode 0777). They are
closed when they lie below a folder that only their owner can enter.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
import sys
from functools import lru_cache
from pathlib import Path

from grape_service.errors import UserError

PACKAGES = "runtime_resources/working_dir_files"
"""Below a session folder: the unpacked working directories of jobs, which Ray uses again for the same content."""
HOW = (
    "start Ray with RAY_TMPDIR, or `ray start --temp-dir`, below a folder of mode 0700 that belongs to Ray's user, "
    "as deploy/README.md shows"
)


def refuse_open_folders(session: str | Path) -> bool:
    """Whether the session folder of a Ray is seen to be on this machine. Raises UserError where others can write in it.

    A folder that only another user can enter is closed, and what is below it cannot be seen.
    """
    folder = Path(session)
    for looked_at in (folder, folder / PACKAGES):
        if found := opened_at(looked_at):
            raise UserError(f"other users of this machine can write into Ray's folder {looked_at}: {found}; {HOW}")
    try:
        return folder.exists()
    except PermissionError:
        return False


def refuse_open_code() -> None:
    """Raises UserError where this process runs from a package that Ray unpacked and that others can write to."""
    for folder in {Path.cwd(), Path(__file__).resolve().parents[2]}:
        if PACKAGES in folder.as_posix() and (found := opened_at(folder)):
            raise UserError(f"other users of this machine can write into Ray's folder {folder}: {found}; {HOW}")


def refuse_open_ray() -> None:
    """The same of the Ray that this process is connected to, on this node; each session is looked at once a process."""
    ray = sys.modules.get("ray")
    node = ray._private.worker.global_worker.node if ray is not None else None
    if node is not None:
        _look_once(node.get_session_dir_path())


@lru_cache(maxsize=4)
def _look_once(session: str) -> None:
    refuse_open_folders(session)


def opened_at(folder: Path) -> str | None:
    """Which part of a path lets other users than its owner and root write in it, and why; None if none does.

    A folder is reached through those above it: one of them that strangers cannot enter closes all below it, one that
    they can write to, or that belongs to another user, lets them put their own in its place.
    """
    path = Path(os.path.realpath(folder))
    trusted = {0, os.getuid(), _owner(path)}
    for part in (*reversed(path.parents), path):
        try:
            status = part.stat()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None
        mode = stat.S_IMODE(status.st_mode)
        strangers = mode & 0o007 | (0 if _is_private(status.st_gid, status.st_uid) else mode >> 3 & 0o007)
        if status.st_uid not in trusted:
            if not strangers & 0o001:
                return None
            return f"{part} belongs to the user {_name(status.st_uid)}"
        is_shared_place = mode & stat.S_ISVTX and part != path  # as /tmp: nobody renames what another user has there
        if strangers & 0o002 and not is_shared_place:
            return f"{part} has mode {mode:04o}"
        if not strangers & 0o001:
            return None
    return None


def _owner(path: Path) -> int:
    """Of the path, or of what is nearest to it where it is not there or cannot be seen."""
    for part in (path, *path.parents):
        with contextlib.suppress(OSError):
            return part.stat().st_uid
    return 0


def _is_private(gid: int, uid: int) -> bool:
    """Whether a group has no other members than the user, or is root's."""
    if gid == 0:
        return True
    try:
        group, name = grp.getgrgid(gid), pwd.getpwuid(uid).pw_name
    except KeyError:
        return False
    return group.gr_name == name and set(group.gr_mem) <= {name}


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
