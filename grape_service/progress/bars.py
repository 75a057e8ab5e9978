"""Progress on standard error: a bar for the whole run and one for each stage, with rate and ETA; events above them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from copy import copy
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from grape_service.display import counted, visible
from grape_service.progress.log_lines import PROGRESS, Lines
from grape_service.progress.reporter import RunClock, Silent, StageClock, Upcoming, duration, reporter, set_reporter

LOG_SECONDS = 10.0
"""How often a line is printed where standard error is no terminal."""


class Rate(ProgressColumn):
    """Units per second; of a whole run the tokens scored per second."""

    def render(self, task: Task) -> Text:
        clock: RunClock | StageClock = task.fields["clock"]
        if isinstance(clock, RunClock):
            return Text(f"{clock.token_rate:,.0f} tokens/s" if clock.token_rate else "" if clock.stages else "starting")
        return Text(clock.rate_text if clock.done else "" if task.finished else clock.first)


class Share(ProgressColumn):
    """How much of a stage is done; nothing before its first part is."""

    def render(self, task: Task) -> Text:
        most = 100 if task.finished or not isinstance(task.fields["clock"], RunClock) else 99
        return Text("" if task.total is None else f"{min(task.percentage, most):>3.0f}%")


class Remaining(ProgressColumn):
    """Time that is left of a stage or of the whole run."""

    def render(self, task: Task) -> Text:
        eta = task.fields["clock"].eta
        return Text("" if task.finished or eta is None else f"ETA {duration(eta)}")


def _columns(width: int) -> list[ProgressColumn]:
    """What fits into a terminal of this width: names are broken between words, all else stands in one line."""
    name = TextColumn("{task.description:<18}", table_column=Column())
    bars = [BarColumn(bar_width=30 if width >= 120 else 10, table_column=Column(no_wrap=True))] if width >= 100 else []
    kept = Column(no_wrap=True)
    rest = (Share(kept), Rate(copy(kept)), TimeElapsedColumn(copy(kept)), Remaining(copy(kept)))
    return [name, *bars, *rest]


class Bars:
    """The reporter of the CLI. A context manager."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        widgets = self.console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        self.live = self.console.is_terminal or widgets
        self.progress = Progress(*_columns(self.console.width), console=self.console, disable=not self.live)
        self.run = RunClock()
        self.whole = self.progress.add_task("whole run", total=None, clock=self.run)
        self.tasks: dict[str, TaskID] = {}
        self.last_line = time.monotonic()
        self.latest: str | None = None  # the stage that began last
        self.is_over = threading.Event()

    def __enter__(self) -> Bars:
        set_reporter(self)
        self.progress.start()
        if not self.live:
            threading.Thread(target=self._tell_now_and_then, name="progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.progress.update(self.whole, total=1, completed=1)
        self.is_over.set()
        self.progress.stop()
        set_reporter(Silent())

    def expect(self, upcoming: Sequence[Upcoming], token_rate: float | None = None) -> None:
        self.run.expect(upcoming, token_rate)

    def started(self, run_id: str) -> None:
        self._line(f"run {run_id}")

    def begin(self, stage: str, total: int, unit: str) -> None:
        clock = self.run.begin(stage, total, unit)
        self.latest = stage
        self.tasks[stage] = self.progress.add_task(stage, total=None, clock=clock)  # it moves until there is a share
        if not self.live:
            self._line(f"{stage}: {counted(total, clock.unit[:-1])}, {clock.first}")

    def advance(self, stage: str, amount: int) -> None:
        clock = self.run.stages[stage]
        clock.done += amount
        whole = max(clock.total, 1)
        self.progress.update(self.tasks[stage], total=whole, completed=min(clock.done, whole))
        eta = self.run.eta
        if eta is not None:
            self.progress.update(self.whole, total=self.run.seconds + eta, completed=self.run.seconds)
        if not self.live and time.monotonic() - self.last_line > LOG_SECONDS:
            self._tell(stage)

    def _tell(self, stage: str) -> None:
        """A line on where a stage is."""
        clock, eta = self.run.stages[stage], self.run.eta
        if not clock.done:
            self._line(f"{stage}: {clock.first}, for {duration(clock.seconds)} now")
            return
        left = f", ETA {duration(clock.eta)}" if clock.eta is not None else ""
        whole = f"; whole run: ETA {duration(eta)}" if eta is not None else ""
        share = 100 * clock.done / max(clock.total, 1)
        self._line(f"{stage}: {share:.0f}% of {counted(clock.total, clock.unit[:-1])}, {clock.rate_text}{left}{whole}")

    def _tell_now_and_then(self) -> None:
        """Lines also while a stage is at its first part, which may take minutes."""
        while not self.is_over.wait(LOG_SECONDS / 4):
            stage, waited = self.latest, time.monotonic() - self.last_line
            if stage is not None and self.run.stages[stage].ended is None and waited > LOG_SECONDS:
                self._tell(stage)

    def end(self, stage: str) -> None:
        clock = self.run.end(stage)
        self.progress.update(self.tasks[stage], total=max(clock.total, 1), completed=max(clock.total, 1))
        if not self.live:
            self._line(f"{stage}: {counted(clock.done, clock.unit[:-1])} in {clock.seconds:.1f} s")

    def event(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        self.last_line = time.monotonic()
        self.progress.console.print(Text(visible(text)), highlight=False, soft_wrap=True)


def stop_shown() -> None:
    """Take the bars from the terminal, where they are shown, for a process that ends at once."""
    bars = reporter()
    if isinstance(bars, Bars):
        bars.progress.stop()


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Progress goes to standard error inside the block: as bars, or as lines for another process that follows; nowhere
    where none is wanted."""
    wanted = os.environ.get(PROGRESS)
    if wanted not in ("lines", "none"):
        with Bars():
            yield
        return
    set_reporter(Lines() if wanted == "lines" else Silent())
    try:
        yield
    finally:
        set_reporter(Silent())
