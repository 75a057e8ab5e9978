"""How pyarrow reads files that Python opens, and how a process ends while it does.

pyarrow reads ahead on threads of its own. One that calls into Python while Python is being taken down is ended in
the middle of C++, which aborts the process, or waits for ever for a lock. So the last that happens before is that
every read fails, and that those under way are waited for.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pyarrow as pa
import pyarrow.fs as pafs

ENDING_SECONDS = 20.0
"""How long reads that are under way are waited for at the end of a process."""
QUIET_SECONDS = 0.1
"""Arrow's threads let go of what they hold a little after their last call."""


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
        self.last = 0.0
        self.ending = False


_calls = _Calls()


@contextmanager
def _call() -> Iterator[None]:
    if _calls.ending:
        _calls.last = time.monotonic()
        raise OSError("this process is ending")
    thread = threading.get_ident()
    _calls.threads.add(thread)
    try:
        yield
    finally:
        _calls.threads.discard(thread)
        _calls.last = time.monotonic()


@atexit.register
def _end_reads() -> None:
    _calls.ending = True
    if not _calls.last:
        return
    deadline = time.monotonic() + ENDING_SECONDS
    while time.monotonic() < deadline and (_calls.threads or time.monotonic() - _calls.last < QUIET_SECONDS):
        time.sleep(0.01)


os.register_at_fork(after_in_child=_calls.threads.clear)  # a fork has none of its parent's threads
