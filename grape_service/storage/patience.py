"""How long this process waits for an S3 server that has never answered it."""

from __future__ import annotations

FIRST_ANSWER_SECONDS = 5.0
"""Most likely the address is wrong, or the server is not up, and somebody waits for the sentence that says so."""

_seconds: float | None = FIRST_ANSWER_SECONDS


def first_answer_seconds() -> float | None:
    """None: as long as for a server that has answered before."""
    return _seconds


def be_patient() -> None:
    """From now on wait for it as long as for any: a worker may start while a server is away that its run has seen."""
    global _seconds
    _seconds = None
