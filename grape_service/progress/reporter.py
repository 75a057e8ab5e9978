"""How long work shows where it is: stages report to one reporter, which the CLI or a flow sets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

TOKENS = "tokens"
"""The unit of stages that score."""


@dataclass(frozen=True)
class Upcoming:
    """A stage that is still to come: its seconds, or the tokens that it will score."""

    stage: str
    seconds: float = 0.0
    tokens: float = 0.0


class Reporter(Protocol):
    """Gets the run's id and every step of every stage; called in the driver process only."""

    run: RunClock
    """Where the run is: what its heartbeat tells."""

    def expect(self, upcoming: Sequence[Upcoming], token_rate: float | None = None) -> None: ...
    def started(self, run_id: str) -> None: ...
    def begin(self, stage: str, total: int, unit: str) -> None: ...
    def advance(self, stage: str, amount: int) -> None: ...
    def end(self, stage: str) -> None: ...
    def event(self, text: str) -> None: ...


@dataclass
class StageClock:
    """Rate and remaining time of one stage."""

    total: int
    unit: str
    started: float
    done: int = 0
    ended: float | None = None

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    @property
    def first(self) -> str:
        """What it does before anything is done and there is a rate."""
        return "at the first shard" if self.unit == TOKENS else f"at the first {self.unit.removesuffix('s')}"

    @property
    def rate(self) -> float:
        """Units per second since the stage began."""
        return self.done / max(self.seconds, 1e-9)

    @property
    def rate_text(self) -> str:
        """The rate with its unit; of what takes longer than a second, how long one takes."""
        if self.rate >= 10:
            return f"{self.rate:,.0f} {self.unit}/s"
        if self.rate >= 1 or not self.done:
            return f"{self.rate:.2g} {self.unit}/s"
        return f"{duration(1 / self.rate)} a {self.unit.removesuffix('s')}"

    @property
    def eta(self) -> float | None:
        """Seconds that are left at this rate; None before anything is done."""
        if self.ended is not None:
            return 0.0
        return max(0.0, (self.total - self.done) / self.rate) if self.done else None


@dataclass
class RunClock:
    """Where a whole run is: the stages that began, each with its clock, and those ahead, in order."""

    stages: dict[str, StageClock] = field(default_factory=dict)
    upcoming: list[Upcoming] = field(default_factory=list)
    earlier_token_rate: float | None = None  # tokens a second of an earlier run's engines
    started: float = field(default_factory=time.monotonic)

    def expect(self, upcoming: Sequence[Upcoming], token_rate: float | None = None) -> None:
        """What is to come, in the place of what was expected before."""
        self.upcoming = list(upcoming)
        self.earlier_token_rate = token_rate if token_rate is not None else self.earlier_token_rate

    def begin(self, stage: str, total: int, unit: str) -> StageClock:
        """A stage begins; those that were to come before it will not come any more."""
        names = [item.stage for item in self.upcoming]
        if stage in names:
            self.upcoming = self.upcoming[names.index(stage) + 1 :]
        self.stages[stage] = StageClock(total, unit, started=time.monotonic())
        return self.stages[stage]

    def end(self, stage: str) -> StageClock:
        """A stage is over."""
        self.stages[stage].ended = time.monotonic()
        return self.stages[stage]

    def where(self) -> dict[str, Any]:
        """The stage that goes on, or the last one that ended, with how far it is; empty before the first."""
        name = next((name for name, clock in self.stages.items() if clock.ended is None), None)
        name = name or next(reversed(self.stages), None)
        if name is None:
            return {}
        clock = self.stages[name]
        return {"stage": name, "done": clock.done, "total": clock.total, "unit": clock.unit, "eta": self.eta}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def token_rate(self) -> float | None:
        """Tokens a second that were scored while scoring, in this run or, before it did any, in an earlier one."""
        scoring = [clock for clock in self.stages.values() if clock.unit == TOKENS]
        tokens = sum(clock.done for clock in scoring)
        return tokens / max(sum(clock.seconds for clock in scoring), 1e-9) if tokens else self.earlier_token_rate

    @property
    def eta(self) -> float | None:
        """Seconds that are left of the whole run; None while the rate of a stage is not known."""
        left = [clock.eta for clock in self.stages.values() if clock.ended is None]
        rate = self.token_rate
        for item in self.upcoming:
            left.append(item.seconds)
            if item.tokens:
                left.append(item.tokens / rate if rate else None)
        known = [seconds for seconds in left if seconds is not None]
        return sum(known) if self.stages and len(known) == len(left) else None


class Silent:
    """Reports to nobody."""

    def __init__(self) -> None:
        self.run = RunClock()

    def expect(self, upcoming: Sequence[Upcoming], token_rate: float | None = None) -> None:
        self.run.expect(upcoming, token_rate)

    def started(self, run_id: str) -> None: ...

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.run.begin(stage, total, unit)

    def advance(self, stage: str, amount: int) -> None:
        self.run.stages[stage].done += amount

    def end(self, stage: str) -> None:
        self.run.end(stage)

    def event(self, text: str) -> None: ...


_reporter: Reporter = Silent()


def set_reporter(reporter: Reporter) -> None:
    """From now on, progress goes to `reporter`."""
    global _reporter
    _reporter = reporter


def reporter() -> Reporter:
    """Where progress goes."""
    return _reporter


def duration(seconds: float) -> str:
    """Seconds as people write them: 8 s, 4 min 10 s, 3 h 05 min."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
