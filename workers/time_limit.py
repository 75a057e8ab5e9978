"""How long a run may take: GRAPE_FLOW_TIMEOUT_SECONDS, with Prefect (which keeps it itself) and without."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from grape_service.errors import StageError, UserError

VARIABLE = "GRAPE_FLOW_TIMEOUT_SECONDS"


def limit_seconds() -> float | None:
    """What the environment allows a run; None without a limit. Raises UserError for what is not a number above 0."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"{VARIABLE} is {text!r}: give it a number of seconds, or unset it")
    return seconds


class _TimeIsOver(BaseException):
    """Passes through whatever gives up what fails, as Ctrl-C does."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Ends the block with StageError when it takes longer than the environment allows; in the main thread alone."""
    seconds = limit_seconds()
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: Any) -> None:
        raise _TimeIsOver

    previous = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeIsOver:
        raise StageError(
            f"the run took longer than {VARIABLE} allows, {seconds:g} seconds: run again; stored scores are reused"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
