"""Progress on standard error: a bar for the whole run and one for each stage, with rate and ETA; events above them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from grape_service.display import counted, visible
from grape_service.progress.log_lines import PROGRESS, Lines
from grape_service.progress.reporter import Ahead, RunClock, Silent, StageClock, duration, reporter, set_reporter

LOG_SECONDS = 10.0
"""How often a line is printed where standard error is no terminal."""


class Rate(ProgressColumn):
    """Units per second; of a whole run the tokens scored per second."""

    def render(self, task: Task) -> Text:
        clock: RunClock | StageClock = task.fields["clock"]
        if isinstance(clock, RunClock):
            return Text(f"{clock.token_rate:,.0f} tokens/s" if clock.token_rate else "")
        return Text(clock.rate_text if clock.done else "")


class Remaining(ProgressColumn):
    """Time that is left of a stage or of the whole run."""

    def render(self, task: Task) -> Text:
        eta = task.fields["clock"].eta
        return Text("" if task.finished or eta is None else f"ETA {duration(eta)}")


class Bars:
    """The reporter of the CLI. A context manager."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        widgets = self.console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        self.live = self.console.is_terminal or widgets
        self.progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            Rate(),
            TimeElapsedColumn(),
            Remaining(),
            console=self.console,
            disable=not self.live,
        )
        self.run = RunClock()
        self.whole = self.progress.add_task("whole run", total=None, clock=self.run)
        self.tasks: dict[str, TaskID] = {}
        self.last_line = time.monotonic()

    def __enter__(self) -> Bars:
        set_reporter(self)
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.progress.update(self.whole, total=1, completed=1)
        self.progress.stop()
        set_reporter(Silent())

    def expect(self, ahead: Sequence[Ahead], token_rate: float | None = None) -> None:
        self.run.expect(ahead, token_rate)

    def started(self, run_id: str) -> None:
        self._line(f"run {run_id}")

    def begin(self, stage: str, total: int, unit: str) -> None:
        clock = self.run.begin(stage, total, unit)
        self.tasks[stage] = self.progress.add_task(stage, total=max(total, 1), clock=clock)

    def advance(self, stage: str, amount: int) -> None:
        clock = self.run.stages[stage]
        clock.done += amount
        self.progress.update(self.tasks[stage], completed=min(clock.done, max(clock.total, 1)))
        eta = self.run.eta
        if eta is not None:
            self.progress.update(self.whole, total=self.run.seconds + eta, completed=self.run.seconds)
        if not self.live and time.monotonic() - self.last_line > LOG_SECONDS:
            self.last_line = time.monotonic()
            left = f", ETA {duration(clock.eta)}" if clock.eta is not None else ""
            whole = f"; whole run: ETA {duration(eta)}" if eta is not None else ""
            share = 100 * clock.done / max(clock.total, 1)
            self._line(
                f"{stage}: {share:.0f}% of {counted(clock.total, clock.unit[:-1])}, {clock.rate_text}{left}{whole}"
            )

    def end(self, stage: str) -> None:
        clock = self.run.end(stage)
        self.progress.update(self.tasks[stage], completed=max(clock.total, 1))
        if not self.live:
            self._line(f"{stage}: {counted(clock.done, clock.unit[:-1])} in {clock.seconds:.1f} s")

    def event(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        self.progress.console.print(Text(visible(text)), highlight=False, soft_wrap=True)


def stop_shown() -> None:
    """Take the bars from the terminal, where they are shown, for a process that ends at once."""
    bars = reporter()
    if isinstance(bars, Bars):
        bars.progress.stop()


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Progress goes to standard error inside the block: as bars, or as lines for another process that follows."""
    if os.environ.get(PROGRESS) != "lines":
        with Bars():
            yield
        return
    set_reporter(Lines())
    try:
        yield
    finally:
        set_reporter(Silent())
