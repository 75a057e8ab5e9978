"""Seconds of an engine that several units share: each has its part of them, so that together they are the engine's."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Turn:
    """A unit on the engine."""

    seconds: float = 0.0  # its part of those so far: with n units on the engine, one n-th


class Turns:
    """Who is on the engine, in any threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on: list[Turn] = []
        self._told = 0.0  # when the last part was given out

    @contextlib.contextmanager
    def turn(self) -> Iterator[Turn]:
        """The block is on the engine; its seconds are whole once it has ended."""
        turn = Turn()
        with self._lock:
            self._tell()
            self._on.append(turn)
        try:
            yield turn
        finally:
            with self._lock:
                self._tell()
                self._on[:] = [other for other in self._on if other is not turn]

    def _tell(self) -> None:
        now = time.monotonic()
        for turn in self._on:
            turn.seconds += (now - self._told) / len(self._on)
        self._told = now
