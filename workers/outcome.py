"""What a run came to: what the commands print, Prefect shows and webhooks are told."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grape_service.config.local_paths import resolved_model
from grape_service.json_types import JsonObject
from grape_service.progress.reporter import duration
from grape_service.storage.options import StorageOptions
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
    tags_moved: dict[str, str] = field(default_factory=dict)  # tag: the version that it was at, where nothing changed
    training: Mapping[str, Any] | None = None  # a Record of training/records.py
    rounds: list[dict[str, Any]] = field(default_factory=list)  # of a job with several, as its record has them
    counts: dict[str, Any] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)  # score includes engine start, release report
    target: str | None = None  # the model that is to be trained; None where that is one with an adapter
    target_revision: str | None = None  # its commit on the hub; None for other places
    storage_options: StorageOptions = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """The object that --json prints: the keys of the design, and what else is known."""
        keys = ("reference", "version", "prompts", "rows", "rejected", "failed", "seconds", "report", "scored")
        return {
            **{key: getattr(self, key) for key in keys},
            "reused": self.reused,
            "is_new": self.is_new,
            "tags_moved": self.tags_moved,
            "training": self.training,
            "rounds": self.rounds,
            "stage_seconds": {name: round(seconds, 3) for name, seconds in self.stage_seconds.items()},
            "counts": self.counts,
        }

    def sentence(self) -> str:
        """The run in one line."""
        what = " released" if self.reference else ""
        pool = self.counts.get("pool", {})
        filtered = f"{pool['filtered']:,} filtered out, " if pool.get("filtered") else ""
        left_out = (
            f"{pool['left_out']:,} left out as duplicate, truncated or too long, " if pool.get("left_out") else ""
        )
        return (
            f"{counted(self.rows, 'row')} of {counted(self.prompts, 'prompt')}{what}; "
            f"of the pool's rows {filtered}{left_out}{self.rejected:,} rejected, {self.failed:,} failed; "
            f"{counted(self.scored, 'row')} scored, {self.reused:,} reused; {took(self.seconds)}{self.unchanged()}"
        )

    def unchanged(self) -> str:
        """That there was nothing to do, and which tags are at another version for it; empty for a new version."""
        if self.is_new:
            return ""
        moved = [f"; {tag} points to it now (before: {version})" for tag, version in self.tags_moved.items()]
        return f"; nothing changed, so this is the existing version {self.version or ''}".rstrip() + "".join(moved)


def took(seconds: float) -> str:
    """Seconds with a decimal below a minute, then minutes."""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def counted(number: int, noun: str) -> str:
    """'1 row', '1,000 rows'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def outcome_of(run: Run, **values: Any) -> Outcome:
    """The outcome of `run` with its times; `values` are fields of Outcome."""
    seconds = round(time.time() - run.started, 3)
    outcome = Outcome(seconds=seconds, stage_seconds=run.stage_seconds, storage_options=run.config.storage, **values)
    if run.config.target.adapter is None:
        outcome.target, outcome.target_revision = resolved_model(run.config.target.model), run.target_files.revision
    return outcome


def release_outcome(run: Run, version: str, is_new: bool, **values: Any) -> Outcome:
    """The outcome of a run that published `version`, or found it unchanged; `values` are fields of Outcome."""
    dataset = f"{run.output.root}/{run.name}"
    return outcome_of(
        run,
        reference=f"{dataset}@{version}",
        version=version,
        is_new=is_new,
        tags_moved=run.tags_moved,
        report=f"{dataset}/versions/{version}/report.html",
        **values,
    )
