"""Progress of a run that is a job elsewhere: lines of its log, which whoever follows the log replays."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence

import orjson

from grape_service.progress.reporter import RunClock, Upcoming, reporter

PROGRESS = "GRAPE_PROGRESS"
"""`lines` in the environment of a run: it reports as lines of its log, for `Replay`. `none`: it reports nothing."""
MARK = "@grape "
LINE_SECONDS = 5.0
"""How often such a line tells of a stage that goes on."""


class Lines:
    """Reports as lines on standard error, a step's name and its arguments in each."""

    def __init__(self) -> None:
        self.run = RunClock()
        self.waiting: dict[str, int] = {}  # steps that were not told yet, by stage
        self.told: dict[str, float] = {}

    def started(self, run_id: str) -> None:
        self._line("started", run_id)

    def expect(self, upcoming: Sequence[Upcoming], token_rate: float | None = None) -> None:
        self.run.expect(upcoming, token_rate)
        self._line("expect", [[item.stage, item.seconds, item.tokens] for item in upcoming], token_rate)

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.waiting[stage], self.told[stage] = 0, time.monotonic()
        self.run.begin(stage, total, unit)
        self._line("begin", stage, total, unit)

    def advance(self, stage: str, amount: int) -> None:
        self.waiting[stage] += amount
        self.run.stages[stage].done += amount
        if time.monotonic() - self.told[stage] >= LINE_SECONDS:
            self._advance(stage)

    def end(self, stage: str) -> None:
        self._advance(stage)
        self.run.end(stage)
        self._line("end", stage)

    def event(self, text: str) -> None:
        self._line("event", text)

    def _advance(self, stage: str) -> None:
        amount, self.waiting[stage], self.told[stage] = self.waiting[stage], 0, time.monotonic()
        if amount:
            self._line("advance", stage, amount)

    def _line(self, step: str, *arguments: object) -> None:
        sys.stderr.write(f"{MARK}{orjson.dumps([step, *arguments]).decode()}\n")
        sys.stderr.flush()


class Replay:
    """Takes a job's log in pieces: the lines of `Lines` go to the reporter of this process, the rest to `write`."""

    def __init__(self, write: Callable[[str], None]):
        self.write = write
        self.begun = ""  # a line whose end has not come yet
        self.stages: set[str] = set()  # that have begun and not ended

    def __call__(self, text: str) -> None:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            self._line(line)

    def _line(self, line: str) -> None:
        """Other processes write into the same log: a line may begin or end with their words, or be torn."""
        before, mark, rest = line.partition(MARK)
        if not mark:
            self.write(f"{line}\n")
            return
        while mark:
            after = self._step(rest)
            if after is not None:
                for words in (before, after):
                    self.write(f"{words}\n" if words.strip() else "")
                return
            _, mark, rest = rest.partition(MARK)
        if before:
            self.write(f"{line}\n")

    def _step(self, text: str) -> str | None:
        """Replay the step that a text begins with, and give what comes after it; None where there is none: one that is
        torn, or of a stage whose beginning was."""
        try:
            step, end = json.JSONDecoder().raw_decode(text)
            match step:
                case ["started" | "event", str(value)]:
                    getattr(reporter(), step[0])(value)
                case ["expect", list(upcoming), int() | float() | None as token_rate]:
                    reporter().expect([Upcoming(*item) for item in upcoming], token_rate)
                case ["begin", str(stage), int(total), str(unit)]:
                    self.stages.add(stage)
                    reporter().begin(stage, total, unit)
                case ["advance", str(stage), int(amount)] if stage in self.stages:
                    reporter().advance(stage, amount)
                case ["end", str(stage)] if stage in self.stages:
                    self.stages.discard(stage)
                    reporter().end(stage)
                case _:
                    return None
        except (json.JSONDecodeError, RecursionError, TypeError):
            return None
        return text[end:]
