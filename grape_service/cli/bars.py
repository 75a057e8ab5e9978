"""Progress on standard error: a bar with rate and ETA for each stage, events above it."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from grape_service.progress import Silent, StageClock, set_reporter

LOG_SECONDS = 10.0
"""How often a line is printed where standard error is no terminal."""


class Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        clock: StageClock = task.fields["clock"]
        return Text(f"{clock.rate:,.0f} {clock.unit}/s" if clock.done else "")


class Remaining(ProgressColumn):
    """Time that is left of a stage."""

    def render(self, task: Task) -> Text:
        clock: StageClock = task.fields["clock"]
        if task.finished or clock.eta is None:
            return Text("")
        return Text(f"ETA {duration(clock.eta)}")


class Bars:
    """The reporter of the CLI. A context manager."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        self.progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            Rate(),
            TimeElapsedColumn(),
            Remaining(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.clocks: dict[str, StageClock] = {}
        self.last_line = time.monotonic()

    def __enter__(self) -> Bars:
        set_reporter(self)
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        set_reporter(Silent())

    def begin(self, stage: str, total: int, unit: str) -> None:
        clock = StageClock(total, unit)
        self.clocks[stage] = clock
        self.tasks[stage] = self.progress.add_task(stage, total=max(total, 1), clock=clock)

    def advance(self, stage: str, amount: int) -> None:
        clock = self.clocks[stage]
        clock.done += amount
        self.progress.update(self.tasks[stage], completed=min(clock.done, max(clock.total, 1)))
        if not self.console.is_terminal and time.monotonic() - self.last_line > LOG_SECONDS:
            self.last_line = time.monotonic()
            left = f", ETA {duration(clock.eta)}" if clock.eta is not None else ""
            share = 100 * clock.done / max(clock.total, 1)
            self._line(f"{stage}: {share:.0f}% of {clock.total:,} {clock.unit}, {clock.rate:,.0f} {clock.unit}/s{left}")

    def end(self, stage: str) -> None:
        clock = self.clocks[stage]
        self.progress.update(self.tasks[stage], completed=max(clock.total, 1))
        if not self.console.is_terminal:
            self._line(f"{stage}: {clock.done:,} {clock.unit} in {clock.seconds:.1f} s")

    def event(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        self.progress.console.print(Text(text), highlight=False)


def duration(seconds: float) -> str:
    """Seconds as people write them: 8 s, 4 min 10 s, 3 h 05 min."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
