"""What a run came to: what the commands print, Prefect shows and webhooks are told."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from workers.run import Run


@dataclass
class Outcome:
    """What a run came to. Everything has a default, so that a run that ends at an early stage leaves the rest out."""

    reference: str | None = None
    version: str | None = None
    prompts: int = 0
    rows: int = 0
    rejected: int = 0
    failed: int = 0
    seconds: float = 0.0
    report: str | None = None
    scored: int = 0
    reused: int = 0
    is_new: bool = True
    training: dict[str, Any] | None = None  # the record of the training run
    counts: dict[str, Any] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)  # score includes engine start, release report
    storage_options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that --json prints: the keys of the design, and what else is known."""
        keys = ("reference", "version", "prompts", "rows", "rejected", "failed", "seconds", "report", "scored")
        return {
            **{key: getattr(self, key) for key in keys},
            "reused": self.reused,
            "is_new": self.is_new,
            "training": self.training,
            "stage_seconds": {name: round(seconds, 3) for name, seconds in self.stage_seconds.items()},
            "counts": self.counts,
        }

    def sentence(self) -> str:
        """The run in one line."""
        unchanged = "" if self.is_new else "; nothing changed, so this is the existing version"
        what = " released" if self.reference else ""
        number = self.counts.get("pool", {}).get("left_out", 0)
        left_out = f"{number:,} left out as duplicate, truncated or too long, " if number else ""
        return (
            f"{counted(self.rows, 'row')} of {counted(self.prompts, 'prompt')}{what}, "
            f"{counted(self.rejected, 'pool row')} rejected, {left_out}{self.failed:,} failed; "
            f"{counted(self.scored, 'row')} scored, {self.reused:,} reused; {self.seconds:.1f} s{unchanged}"
        )


def counted(number: int, noun: str) -> str:
    """'1 row', '1,000 rows'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def outcome_of(run: Run, **values: Any) -> Outcome:
    """The outcome of `run` with its times; `values` are fields of Outcome."""
    seconds = round(time.time() - run.started, 3)
    return Outcome(seconds=seconds, stage_seconds=run.stage_seconds, storage_options=run.config.storage, **values)


def release_outcome(run: Run, version: str, is_new: bool, **values: Any) -> Outcome:
    """The outcome of a run that published `version`, or found it unchanged; `values` are fields of Outcome."""
    dataset = f"{run.output.root}/{run.name}"
    return outcome_of(
        run,
        reference=f"{dataset}@{version}",
        version=version,
        is_new=is_new,
        report=f"{dataset}/versions/{version}/report.html",
        **values,
    )
