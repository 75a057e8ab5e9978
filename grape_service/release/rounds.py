"""Rounds of a job that selects, releases and trains several times: their records, and what they are called.

    <output>/<name>/rounds/<id>.json      a job's rounds: the target, version, training run and checkpoint of each

A record tells and decides little: what is done is found by the keys of releases and training runs, also after a kill.
Only checkpoints that addresses stood for are taken from it, while the job has not ended.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from grape_service.json_types import JsonObject
from grape_service.progress.reporter import duration
from grape_service.release.claim import LATE_SECONDS
from grape_service.storage.storage import Storage

FORMAT = 1


_WRITING = threading.Lock()


def round_name(number: int) -> str:
    """What a round is called, counted from 1; a tag of that name points to its version."""
    return f"round-{number}"


@dataclass
class Round:
    """One round, as far as it has come."""

    name: str
    target: str  # the model that selects and weighs, and is trained
    reference: str | None = None
    version: str | None = None
    rows: int | None = None
    churn: float | None = None  # against the round before, see changes.py
    gate: dict[str, Any] | None = None  # figures between SFT and RL
    run: str | None = None  # id of the training run
    checkpoint: str | None = None

    @property
    def gate_text(self) -> str:
        """The gate's figures, without of how many prompts and samples they are."""
        counts = ("samples", "unknown")
        figures = {k: v for k, v in (self.gate or {}).items() if k not in counts and not k.endswith("prompts")}
        return ", ".join(f"{name} {figure:.3g}" for name, figure in figures.items())


@dataclass
class Rounds:
    """The rounds of one job."""

    id: str
    name: str  # of the dataset
    planned: int
    state: str = "running"  # running, succeeded, stopped (by a limit of its own), failed
    error: str | None = None
    checkpoints: dict[str, str] = field(default_factory=dict)  # by an address that moves, what it stands for
    rounds: list[Round] = field(default_factory=list)
    updated: float = field(default=0.0, compare=False)  # when it was written; a job that runs does it again

    def state_in_words(self, now: float | None = None) -> str:
        """The state; of a job that runs and has given no sign of life, for how long it has not."""
        silent = (time.time() if now is None else now) - self.updated
        if self.state != "running" or silent < LATE_SECONDS:
            return self.state
        return f"no sign of life for {duration(silent)}"

    @property
    def is_under_way(self) -> bool:
        """Whether it goes on where it was when it is started again."""
        return self.state in ("running", "failed")

    def to_json(self) -> JsonObject:
        """What the record holds."""
        return {"format": FORMAT, **asdict(self)}


def read_rounds(storage: Storage, name: str, id_: str) -> Rounds | None:
    """A job's rounds; None where there are none, or the record is not ours."""
    try:
        return _rounds(orjson.loads(storage.read(_path(name, id_))))
    except FileNotFoundError:
        return None


def write_rounds(storage: Storage, rounds: Rounds) -> None:
    """Write down how far a job is. Of two threads the one that writes later has the newer state."""
    with _WRITING:
        rounds.updated = time.time()
        storage.write_json(_path(rounds.name, rounds.id), rounds.to_json())


def all_rounds(storage: Storage, name: str) -> list[Rounds]:
    """Every job with rounds of a dataset, the one that was written last at the end."""
    found = []
    for info in sorted(storage.list(f"{name}/rounds"), key=lambda info: info.modified):
        try:
            rounds = _rounds(orjson.loads(storage.read(info.path)))
        except (orjson.JSONDecodeError, FileNotFoundError):
            continue
        found += [rounds] if rounds is not None else []
    return found


def round_of_run(jobs: list[Rounds], run_id: str | None) -> Round | None:
    """The round in which a training run was, of the newest job that has it."""
    return next((one for job in reversed(jobs) for one in job.rounds if run_id and one.run == run_id), None)


def job_of_version(jobs: list[Rounds], version: str) -> Rounds | None:
    """The newest job with a round that released a version."""
    return next((job for job in reversed(jobs) if any(one.version == version for one in job.rounds)), None)


def round_under_way(jobs: list[Rounds], reference: str) -> tuple[Rounds, Round] | None:
    """The newest job that runs, and its round that trains on a version now."""
    for job in reversed(jobs):
        if job.state == "running" and job.rounds and job.rounds[-1].reference == reference:
            return job, job.rounds[-1]
    return None


def _path(name: str, id_: str) -> str:
    return f"{name}/rounds/{id_}.json"


def _rounds(value: Any) -> Rounds | None:
    try:
        known = {key: value[key] for key in Rounds.__dataclass_fields__ if key in value}
        known |= {"updated": float(known.get("updated", 0.0)), "rounds": [Round(**one) for one in value["rounds"]]}
        return Rounds(**known)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
