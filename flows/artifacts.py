"""What one sees of a run in Prefect: progress by stage, counts, links, the resolved config, log lines."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

import yaml
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from grape_service.config.schema import Config
from grape_service.display import visible
from grape_service.errors import best_effort
from grape_service.progress.reporter import RunClock, Silent, Upcoming, duration, reporter, set_reporter
from grape_service.release.manifest import without_secrets
from workers.outcome import Outcome

UPDATE_SECONDS = 5.0


class PrefectProgress:
    """A reporter: a progress artifact per stage, a log line per event. A server that is away stops nothing."""

    def __init__(self, name: str, run_id: str):
        self.name, self.run_id = name, run_id  # "" until a job elsewhere tells its run's id
        self.run = RunClock()
        self.artifacts: dict[str, UUID] = {}
        self.updated: dict[str, float] = {}
        self.stage = ""  # the one that has begun and not ended

    def started(self, run_id: str) -> None:
        self.run_id = run_id

    def expect(self, upcoming: Sequence[Upcoming], token_rate: float | None = None) -> None:
        self.run.expect(upcoming, token_rate)

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.stage = stage
        self.run.begin(stage, total, unit)
        self.updated[stage] = time.monotonic()
        self.event(f"{total:,} {unit} to do")
        with best_effort("show an artifact in Prefect"):
            description = f"{stage}: 0 of {total:,} {unit}"
            created = create_progress_artifact(progress=0.0, key=key(self.name, stage), description=description)
            assert isinstance(created, UUID)
            self.artifacts[stage] = created

    def advance(self, stage: str, amount: int) -> None:
        self.run.stages[stage].done += amount
        if time.monotonic() - self.updated[stage] >= UPDATE_SECONDS:
            self.updated[stage] = time.monotonic()
            self._update(stage)

    def end(self, stage: str) -> None:
        clock = self.run.end(stage)
        self._update(stage)
        self.event(f"{clock.done:,} {clock.unit} in {clock.seconds:.1f} s")
        self.stage = ""

    def event(self, text: str) -> None:
        with contextlib.suppress(MissingContextError):
            task = TaskRunContext.get()
            stage = self.stage or (task.task.name if task else "start")
            get_run_logger().info("run=%s stage=%s %s", self.run_id, stage.replace(" ", "-"), text)

    def _update(self, stage: str) -> None:
        if stage not in self.artifacts:
            return
        clock, eta = self.run.stages[stage], self.run.eta
        share = min(100.0, 100 * clock.done / max(clock.total, 1)) if clock.ended is None else 100.0
        left = f", {duration(clock.eta)} left" if clock.eta else ""
        whole = f"; {duration(eta)} left of the whole run" if eta else ""
        text = (
            f"{stage}: {min(clock.done, clock.total):,} of {clock.total:,} {clock.unit}, {clock.rate_text}{left}{whole}"
        )
        with best_effort("show an artifact in Prefect"):
            update_progress_artifact(self.artifacts[stage], progress=round(share, 2), description=text)


@contextlib.contextmanager
def shown(config: Config, name: str, run_id: str = "") -> Iterator[None]:
    """Progress of a run goes to Prefect inside the block, unless somebody (the CLI) shows it already."""
    if not isinstance(reporter(), Silent):
        yield
        return
    set_reporter(PrefectProgress(name, run_id))
    try:
        show_config(config, name)
        yield
    finally:
        set_reporter(Silent())


def show_config(config: Config, name: str) -> None:
    """The resolved config, secrets hidden."""
    text = yaml.safe_dump(without_secrets(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
    indented = "\n".join(f"    {line}" for line in text.splitlines())  # a code block that no line of text can end
    with best_effort("show an artifact in Prefect"):
        create_markdown_artifact(f"{indented}\n", key=key(name, "config"), description="Resolved config")


def show_outcome(config: Config, outcome: Outcome) -> None:
    """Counts with every reason, and links to the release and its report; the CLI shows its own."""
    if not isinstance(reporter(), Silent):
        return
    with best_effort("show an artifact in Prefect"):
        create_table_artifact(count_table(outcome), key=key(config.name, "counts"), description=outcome.sentence())
        # "release" is the key of the progress of that stage.
        links = {"report": outcome.report, "version": outcome.reference}
        commands = {
            "report": f"grape report {outcome.reference}",
            "version": f"grape datasets show {outcome.reference}",
        }
        for name, address in links.items():  # a browser opens no s3:// address: the command does
            if address:
                create_link_artifact(
                    address, link_text=address, key=key(config.name, name), description=f"`{commands[name]}`"
                )


def count_table(outcome: Outcome) -> list[dict[str, Any]]:
    """Rows of the table of counts: what came in, what was left out and why, what was released."""
    pool = outcome.counts.get("pool", {})
    rows = [("pool rows", pool.get("rows_in"), "")]
    rows.append(("filtered", pool.get("filtered"), "pool.where"))
    reasons = sorted(pool.get("rejected_by_reason", {}).items(), key=lambda item: -item[1])
    rows += [("rejected", count, reason) for reason, count in reasons]
    intended = sorted(pool.get("left_out_by_reason", {}).items(), key=lambda item: -item[1])
    rows += [("left out", count, reason) for reason, count in intended]
    rows += [
        ("scored now", outcome.scored, ""),
        ("reused", outcome.reused, ""),
        ("failed", outcome.failed, ""),
    ]
    left_out = outcome.counts.get("select", {}).get("prompts_left_out") or {}
    rows += [("prompts left out", count, reason) for reason, count in sorted(left_out.items())]
    rows.append(("rows of the release" if outcome.reference else "rows", outcome.rows, f"{outcome.prompts:,} prompts"))
    return [{"what": what, "rows": count, "note": escape(note)} for what, count, note in rows if count is not None]


def escape(text: str) -> str:
    """Text of a pool as a table cell that no Markdown or HTML reader takes for its own."""
    return re.sub(r"[<>&|`\[\]]", " ", visible(str(text)))[:200]


def key(*parts: str) -> str:
    """An artifact's key: a-z, 0-9 and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
