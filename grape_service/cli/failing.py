"""How a command says what is wrong."""

from __future__ import annotations

import sys

_said: set[str] = set()
_at_interrupt = ["stopped; run the same command again to resume"]


def at_interrupt(sentence: str) -> None:
    """What Ctrl-C says from now on."""
    _at_interrupt[0] = sentence


def interrupt_sentence() -> str:
    """What Ctrl-C says now."""
    return _at_interrupt[0]


def fail(sentence: str, status: int) -> int:
    """Say what is wrong on standard error, once, whoever says it first; the status."""
    if sentence not in _said:
        _said.add(sentence)
        from grape_service.display import visible

        print(f"error: {visible(sentence)}", file=sys.stderr, flush=True)
    return status
