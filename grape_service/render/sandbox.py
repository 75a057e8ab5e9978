"""Chat templates are programs of others: they run in a process of their own, with little memory and little time.

One such process serves all templates of this one, and starts again after a template that it did not survive. Asking
it costs less than transformers' own rendering in this process.
"""

from __future__ import annotations

import atexit
import itertools
import marshal
import os
import select
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from grape_service.render import template_process
from grape_service.render.template_process import (
    FAILED,
    LENGTH,
    MAX_ADDED,
    MAX_TIMES,
    NOT_A_TEMPLATE,
    RENDERED,
    TOO_LONG,
)
from grape_service.rows.candidate import Message, Tool

TODAY = datetime(2024, 7, 26)
"""What templates that write the current date get: rows must have the same tokens on every day.
It is the date that Llama 3's templates fall back to."""
MAX_BYTES = 2 * 2**30
"""Memory that templates may have."""
MAX_SECONDS = 2.0
"""Of processor time for one rendering; 2,000 messages whose template looks at all others for each take half of one."""
LATE_MILLISECONDS = 100
"""After so long the process is asked how much processor time it has used: most renderings take less than one."""
MAX_WAIT = 30.0
"""Seconds for one rendering on a machine that is busy with other work."""


class RenderingError(Exception):
    """A template refused the messages, or failed on them."""


class NotATemplate(RenderingError):
    """Jinja cannot parse it."""


class TooMuch(RenderingError):
    """A template took more memory or time, or made more text, than one rendering may."""

    def __init__(self, what: str):
        super().__init__(f"it takes more than {what}: a loop without an end?")


class Source:
    """A template's text and the variables that every rendering gets."""

    _numbers = itertools.count()

    def __init__(self, text: str, variables: dict[str, Any]):
        self.text = text
        self.variables = plain(variables)
        self.number = next(self._numbers)

    def render(self, messages: list[Message], tools: list[Tool] | None, generation_prompt: bool) -> str:
        """The conversation as one text. Raises RenderingError with the template's words."""
        values = {
            **self.variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        return _process.render(self.number, self.text, values)


class _Process:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._known: set[int] = set()

    def render(self, number: int, source: str, values: dict[str, Any]) -> str:
        with self._lock:
            child = self._running()
            try:
                request = _packed((number, None if number in self._known else source, values))
                self._known.add(number)
                assert child.stdin is not None, "it is a pipe"
                child.stdin.write(LENGTH.pack(len(request)) + request)
                answer = self._answer(child)
            except BaseException:  # half an answer may be on its way
                self.end()
                raise
        kind, text = answer[:1], answer[1:].decode("utf-8", "surrogatepass")
        if kind == RENDERED:
            return text
        if kind == FAILED:
            raise RenderingError(text)
        if kind == NOT_A_TEMPLATE:
            raise NotATemplate(text)
        self.end()  # what it still holds is of no use
        if kind == TOO_LONG:
            raise TooMuch(f"{MAX_ADDED:,} characters beside {MAX_TIMES} for each one of the conversation")
        raise TooMuch(f"{MAX_BYTES // 2**30} GiB of memory")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        self._child, self._owner, self._known = None, os.getpid(), set()
        path = [place for place in sys.path if place and Path(place).is_dir()]
        self._child = subprocess.Popen(
            [sys.executable, "-P", template_process.__file__, str(MAX_BYTES), TODAY.isoformat()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "TZ": "UTC", "LC_ALL": "C.UTF-8"},
        )
        return self._child

    def _answer(self, child: subprocess.Popen[bytes]) -> bytes:
        assert child.stdout is not None, "it is a pipe"
        file = child.stdout.fileno()
        poll = select.poll()
        poll.register(file, select.POLLIN)
        began = time.monotonic()
        used: float | None = None  # by the process before, and in the first of these waits
        length, data, is_late = None, bytearray(), False
        while length is None or len(data) < length:
            if not poll.poll(LATE_MILLISECONDS):
                waited = time.monotonic() - began
                now = _processor_seconds(child.pid)
                if not is_late:
                    used, is_late = now, True
                if waited > MAX_WAIT or (waited if None in (used, now) else now - used) > MAX_SECONDS:  # type: ignore[operator]
                    raise TooMuch(f"{MAX_SECONDS:g} seconds")
                continue
            part = os.read(file, 1 << 20)
            if not part:
                raise TooMuch(f"{MAX_BYTES // 2**30} GiB of memory")
            data += part
            if length is None and len(data) >= LENGTH.size:
                (length,) = LENGTH.unpack(data[: LENGTH.size])
                del data[: LENGTH.size]
        return bytes(data)

    def end(self) -> None:
        """End the process; the next rendering starts another."""
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


_process = _Process()
atexit.register(_process.end)


def _packed(request: tuple[int, str | None, dict[str, Any]]) -> bytes:
    try:
        return marshal.dumps(request)
    except ValueError:  # a value of another type, such as a date
        pass
    try:
        return marshal.dumps((*request[:2], plain(request[2])))
    except (ValueError, RecursionError) as error:
        raise RenderingError(f"the messages cannot be handed to a template: {error}") from None


def plain(value: Any) -> Any:
    """A value as JSON has it; anything else becomes the name of its type, as in transformers."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


def _processor_seconds(pid: int) -> float | None:
    """Processor time that a process has used; None where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
