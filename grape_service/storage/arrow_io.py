"""How pyarrow reads files that Python opens, and how a process ends while it does.

pyarrow reads ahead on its own threads. One that calls into Python while Python is being taken down is ended in
the middle of C++, which aborts the process, or waits for ever for a lock. So the last that happens before is that
every read fails, that those under way are waited for, and that all threads have come to rest.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.fs as pafs

CALLS_SECONDS = 20.0
"""How long reads that are under way are waited for at the end of a process."""
REST_SECONDS = 5.0
"""How long, after that, threads are waited for."""
REST_LOOKS = 8
"""Looks, 10 ms apart, that must find every other thread asleep."""


class ArrowHandler(pafs.FSSpecHandler):
    """How pyarrow opens files for reading: one request less than by itself, and never while the process ends."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        with _call():
            return pa.PythonFile(ArrowFile(self.fs.open(path, "rb")), mode="r")


class ArrowFile:
    """A file that Arrow's threads read."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def read(self, num_bytes: int = -1) -> bytes:
        with _call():
            return self._file.read(num_bytes)

    def seek(self, place: int, whence: int = 0) -> int:
        with _call():
            return self._file.seek(place, whence)

    def tell(self) -> int:
        with _call():
            return self._file.tell()

    def close(self) -> None:
        with _call(closing=True):
            self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False


class _Calls:
    """The threads that are inside a call, and whether more are let in."""

    def __init__(self) -> None:
        self.threads: set[int] = set()  # each operation on a set is whole under the interpreter's lock
        self.any = False
        self.ending = False


_calls = _Calls()


@contextmanager
def _call(closing: bool = False) -> Iterator[None]:
    if _calls.ending and not closing:
        raise OSError("this process is ending")
    _calls.any = True
    thread = threading.get_ident()
    _calls.threads.add(thread)
    try:
        yield
    finally:
        _calls.threads.discard(thread)


weakref.finalize(_calls, int)  # has weakref's own work at exit registered now, and so done after ours:


# s3fs closes its connections there, and a read under way would wait for ever.


@atexit.register
def _end_reads() -> None:
    _calls.ending = True
    if not _calls.any:
        return
    deadline = time.monotonic() + CALLS_SECONDS
    while _calls.threads and time.monotonic() < deadline:
        time.sleep(0.01)
    deadline = time.monotonic() + REST_SECONDS
    looks = 0
    while looks < REST_LOOKS and time.monotonic() < deadline:
        time.sleep(0.01)
        looks = looks + 1 if _others_sleep() and not _calls.threads else 0


def _others_sleep() -> bool:
    """Whether no thread but this one runs or waits for a core; True where the system does not tell."""
    own = str(threading.get_native_id())
    for stat in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # it ended meanwhile
            if stat.parent.name != own and stat.read_text().rpartition(")")[2].split()[0] == "R":
                return False
    return True


os.register_at_fork(after_in_child=_calls.threads.clear)  # a fork has none of its parent's threads
