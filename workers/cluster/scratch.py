"""The temporary folder of a private Ray, and the end of everything that belongs to one.

A Ray is known by its folder: every process of it has that name in its environment, and the run that it serves holds
a lock on a file in it. A folder that nobody has locked belongs to a run that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from grape_service.errors import StageError

MARK = "GRAPE_PRIVATE_RAY"
"""In the environment of every process of a private Ray: its scratch folder."""
PREFIX = "grape-head-"
LOCK = "lock"
SOCKET_BYTES = 103
"""Length of the longest path of a Unix socket: 103 bytes on macOS, 107 on Linux."""
LONGEST_SOCKET = "/r/session/sockets/plasma_store"
KILL_SECONDS = 2.0
"""How long processes that were killed are waited for."""
OTHER_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
"""Where a private Ray lives when TMPDIR's own path is too long for sockets, missing or read-only."""


@dataclass(frozen=True)
class Scratch:
    """A folder that only this user can enter, locked by this process."""

    path: str
    lock: int  # file descriptor

    @property
    def ray_folder(self) -> str:
        """Ray's own folder, which it opens to everybody: it lies in one that is closed."""
        return f"{self.path}/r"

    @property
    def token_path(self) -> str:
        """The file with the token that Ray asks for."""
        return f"{self.path}/token"


def places() -> list[str]:
    """Folders in which a private Ray may live, the best first: absolute, and short enough for its sockets."""
    with contextlib.suppress(FileNotFoundError):  # no usable TMPDIR, nor any other that Python knows
        found = [os.path.abspath(tempfile.gettempdir())]
        return [place for place in dict.fromkeys((*found, *OTHER_PLACES)) if fits(place)]
    return [place for place in OTHER_PLACES if fits(place)]


def fits(place: str) -> bool:
    """Whether Ray's sockets in a scratch folder in `place` have paths that the system takes."""
    return len(os.fsencode(f"{place}/{PREFIX}12345678{LONGEST_SOCKET}")) <= SOCKET_BYTES


@contextlib.contextmanager
def scratch_folder() -> Iterator[Scratch]:
    """A new folder with a token; after the block no process of it is left, nor the folder. Raises StageError."""
    scratch = _make()
    _own.add(scratch.path)
    try:
        yield scratch
    finally:
        end_processes(scratch.path)
        remove(scratch.path)
        _own.discard(scratch.path)
        os.close(scratch.lock)


_own: set[str] = set()


def end_own() -> None:
    """Kill and delete what this process has started, from another thread than the one that waits for it."""
    for path in list(_own):
        end_processes(path)
        remove(path)


def _make() -> Scratch:
    reasons = []
    for place in places():
        try:
            path = tempfile.mkdtemp(prefix=PREFIX, dir=place)
            lock = os.open(f"{path}/{LOCK}", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            scratch = Scratch(path, lock)
            with open(scratch.token_path, "x", opener=_for_owner) as file:
                file.write(secrets.token_hex(32))
            return scratch
        except OSError as error:
            reasons.append(f"{place}: {error.strerror}")
    tried = "; ".join(reasons) or f"every temporary folder has a path longer than {SOCKET_BYTES} bytes"
    raise StageError(f"there is no place for Ray's temporary files ({tried}): set TMPDIR to a folder with a short path")


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def end_leftovers() -> list[str]:
    """End what runs of this user that were killed have left: processes and folders; the folders."""
    found = []
    for place in places():
        with contextlib.suppress(OSError):
            for entry in os.scandir(place):
                if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False) and _is_left(entry):
                    end_processes(entry.path)
                    remove(entry.path)
                    found.append(entry.path)
    return found


def _is_left(entry: os.DirEntry[str]) -> bool:
    """Whether this user's run that made the folder is gone."""
    try:
        status = entry.stat(follow_symlinks=False)
        if status.st_uid != os.getuid():
            return False
        lock = os.open(f"{entry.path}/{LOCK}", os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # its run is about to make the lock
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)


def remove(path: str) -> None:
    """Delete a scratch folder; what a process that ends has just written goes with the second try."""
    for _ in range(3):
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.exists(path):
            return
        time.sleep(0.05)


def end_processes(scratch: str) -> None:
    """Kill every process of a private Ray but this one."""
    for _ in range(5):  # one that ends may just have started another
        found = [one for one in psutil.process_iter() if one.pid != os.getpid() and is_of(one, scratch)]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + KILL_SECONDS
        while not all(_is_over(process) for process in found) and time.monotonic() < deadline:
            time.sleep(0.01)


def _is_over(process: psutil.Process) -> bool:
    """Whether a process has ended, although its parent, or the system's first process, may not have asked for it."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def is_of(process: psutil.Process, scratch: str) -> bool:
    """By its environment or, where its title was written over that, by the logs that it has open."""
    try:
        if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        environment = _environment(process.pid)
        if environment is None:
            return process.environ().get(MARK) == scratch
        if f"{MARK}={scratch}".encode() in environment:
            return True
        return b"=" not in environment[0] and any(file.path.startswith(f"{scratch}/") for file in process.open_files())
    except (psutil.Error, OSError):  # gone
        return False


def _environment(pid: int) -> list[bytes] | None:
    path = Path(f"/proc/{pid}/environ")
    return path.read_bytes().split(b"\0") if path.parent.exists() else None
