"""How long work shows where it is: stages report to one reporter, which the CLI or a flow sets."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol


class Reporter(Protocol):
    """Gets every step of every stage; called in the driver process only."""

    def begin(self, stage: str, total: int, unit: str) -> None: ...
    def advance(self, stage: str, amount: int) -> None: ...
    def end(self, stage: str) -> None: ...
    def event(self, text: str) -> None: ...


@dataclass
class StageClock:
    """Rate and remaining time of one stage."""

    total: int
    unit: str
    started: float = field(default_factory=time.monotonic)
    done: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Units a second since the stage began."""
        return self.done / max(self.seconds, 1e-9)

    @property
    def eta(self) -> float | None:
        """Seconds that are left at this rate; None before anything is done."""
        return (self.total - self.done) / self.rate if self.done else None


class Silent:
    """Reports to nobody."""

    def begin(self, stage: str, total: int, unit: str) -> None: ...
    def advance(self, stage: str, amount: int) -> None: ...
    def end(self, stage: str) -> None: ...
    def event(self, text: str) -> None: ...


_reporter: Reporter = Silent()


def set_reporter(reporter: Reporter) -> None:
    """From now on, progress goes to `reporter`."""
    global _reporter
    _reporter = reporter


def reporter() -> Reporter:
    """Where progress goes."""
    return _reporter
