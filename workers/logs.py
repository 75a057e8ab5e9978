"""A log file of each task and each engine of a run that says something: runs/<run_id>/logs/<name>.log in the workspace.

It holds what the process prints, and the traceback of what it raises; a task that says nothing leaves none.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO, cast

from grape_service.errors import best_effort, without_url_secrets
from grape_service.storage.storage import Storage

KEPT_CHARACTERS = 2**17
"""Of a file's beginning and of its end, each: what is between them is left out."""
FLUSH_SECONDS = 20.0
_SECRET_NAME = re.compile(r".*(SECRET|TOKEN|PASSWORD|AUTH_STRING|API_KEY).*(?<!PATH)(?<!FILE)(?<!MODE)", re.I)
SHORTEST_SECRET = 8


class LogFile:
    """What a process says, written to storage now and then; may be written to from any thread."""

    def __init__(self, storage: Storage, path: str):
        self.storage, self.path = storage, path
        self._lock = threading.Lock()
        self._head = self._tail = ""
        self._left_out = 0
        self._is_changed = False
        self._end = threading.Event()
        self._secrets = _secrets()
        self._open = contextlib.ExitStack()

    def write(self, text: str) -> None:
        """Add text, of which secrets are hidden."""
        text = hidden(text, self._secrets)
        with self._lock:
            room = KEPT_CHARACTERS - len(self._head)
            self._head += text[:room]
            tail = self._tail + text[room:]
            self._left_out += max(0, len(tail) - KEPT_CHARACTERS)
            self._tail = tail[-KEPT_CHARACTERS:]
            self._is_changed = True

    def say(self, text: str) -> None:
        """Add a line with the time."""
        self.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")

    def flush(self) -> None:
        """Write the file if something was added since. A log that cannot be written stops nothing."""
        with self._lock:
            if not self._is_changed:
                return
            gap = f"\n... {self._left_out:,} characters are left out ...\n" if self._left_out else ""
            data, self._is_changed = f"{self._head}{gap}{self._tail}".encode(errors="replace"), False
        with best_effort("write a log file"):
            self.storage.write(self.path, data)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """The traceback of what the block raises is written at once."""
        try:
            yield
        except BaseException:
            self.say(traceback.format_exc())
            self.flush()
            raise

    @contextlib.contextmanager
    def printed(self) -> Iterator[None]:
        """What is printed inside the block goes to the file too."""
        out, error = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = cast(TextIO, _Both(out, self)), cast(TextIO, _Both(error, self))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, error
            self.flush()

    def begin(self) -> None:
        """From now on what the process prints goes to the file too, which is written every FLUSH_SECONDS."""
        self._open.enter_context(self.printed())
        threading.Thread(target=self._flush_on, daemon=True, name="log").start()

    def end(self) -> None:
        """Undo `begin`."""
        self._end.set()
        self._open.close()

    def _flush_on(self) -> None:
        while not self._end.wait(FLUSH_SECONDS):
            self.flush()


class _Both:
    """A stream of which a log file gets a copy."""

    def __init__(self, stream: TextIO, log: LogFile):
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        """Write to both."""
        self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hidden(text: str, secrets: list[str] | None = None) -> str:
    """A text without the secrets of the environment, or those given, and without those of URLs."""
    for secret in _secrets() if secrets is None else secrets:
        text = text.replace(secret, "***")
    return without_url_secrets(text)


def _secrets() -> list[str]:
    """Values of environment variables that are named as secrets are, longest first."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.fullmatch(name)}
    return sorted((value for value in values if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


@dataclass(frozen=True)
class RunLogs:
    """Where the log files of a run are, and how many times tasks were started."""

    storage: Storage
    folder: str
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))


_current: ContextVar[RunLogs | None] = ContextVar("run_logs", default=None)


@contextlib.contextmanager
def logs_in(storage: Storage, run_folder: str) -> Iterator[None]:
    """Inside the block tasks leave log files below a run's folder."""
    token = _current.set(RunLogs(storage, f"{run_folder}/logs"))
    try:
        yield
    finally:
        _current.reset(token)


def current_logs() -> RunLogs | None:
    """Those of `logs_in`."""
    return _current.get()
