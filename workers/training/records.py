"""Records of training runs, beside the release: <output>/<name>/runs/<id>.json, moved by compare-and-swap.

A record names the dataset version, the config, each stage's job, state, checkpoint and metrics. It also holds a
lease: the one process that starts jobs for the run; others follow the record.
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import TypedDict

import orjson

from grape_service.config.training import Stage
from grape_service.errors import StageError, UserError
from grape_service.json_types import JsonObject
from grape_service.storage.storage import Storage, json_bytes

FORMAT = 1
LEASE_SECONDS = 60.0


class StageRecord(TypedDict, total=False):
    """How a stage of a run stands; the first five are there from the start."""

    state: str  # waiting, running, succeeded, sent, failed, cancelled
    kind: str  # of the job: builtin, command, webhook, deployment
    attempt: int  # the number of the newest one
    output: str
    inputs: str  # digest of all that the result depends on
    run: str  # SFT of a run with RL: the run that does it
    job_id: str
    address: str | None  # of the cluster that runs the job
    status_url: str | None  # of a webhook's job
    flow_run: str  # of a deployment's
    lost: bool  # nothing is known of its end: it may go on
    cancel: bool  # somebody asked for it
    error: str | None
    started: float  # seconds since 1970
    ended: float | None
    checkpoint: str
    metrics: JsonObject  # as the trainer has them
    notes: list[str]
    tracking: JsonObject  # runs of trackers that it reports to, by package
    log: str
    gate: dict[str, float]  # figures of the gate between SFT and RL


class LeaseRecord(TypedDict):
    """Who starts jobs for a run, and until when."""

    holder: str
    expires: float  # seconds since 1970


class Record(TypedDict):
    """A run."""

    format: int
    id: str
    key: str | None
    dataset: str  # reference of the release
    version: str
    target: str | None
    config: JsonObject
    created: float
    updated: float
    state: str
    lease: LeaseRecord | None
    stages: dict[Stage, StageRecord]


class RunRecords:
    """The records of one dataset."""

    def __init__(self, datasets: Storage, name: str):
        self.storage = datasets.sub(f"{name}/runs")

    def url(self, run_id: str) -> str:
        """Full address of a record."""
        return self.storage.url(f"{run_id}.json")

    def read(self, run_id: str) -> Record:
        """A record. Raises UserError if there is none."""
        return self._read_with_etag(run_id)[0]

    def _read_with_etag(self, run_id: str) -> tuple[Record, str]:
        path = f"{run_id}.json"
        try:
            data, etag = self.storage.read_with_etag(path)
        except FileNotFoundError:
            known = ", ".join(self.ids()) or "none"
            raise UserError(f"there is no run '{run_id}' in {self.storage.root}; there are: {known}") from None
        return self._record(path, data), etag

    def _record(self, path: str, data: bytes) -> Record:
        """Raises UserError for what is no record, or one of a newer grape-service."""
        try:
            record: Record = orjson.loads(data)
            newer, lease = record["format"] > FORMAT, record["lease"]
            stages = record["stages"].values()
            is_whole = (lease is None or "expires" in lease) and stages and all("state" in entry for entry in stages)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            newer = is_whole = False
        if newer:
            raise UserError(f"{self.storage.url(path)} was written by a newer grape-service: use that version")
        if not is_whole:
            raise self.refused(path.removesuffix(".json"))
        return record

    def refused(self, run_id: str) -> UserError:
        """What to say of a file that is not the record of its run."""
        return UserError(
            f"{self.url(run_id)} is not the record of a training run: restore it, or delete it to train again"
        )

    def ids(self) -> list[str]:
        """Ids of all runs."""
        return [i.path.removesuffix(".json") for i in self.storage.list() if "/" not in i.path]

    def create(self, record: Record) -> Record:
        """Write a new record unless there is one of its id; the one that is there then."""
        self.storage.create_if_absent(f"{record['id']}.json", json_bytes(record))
        return self.read(record["id"])

    def change(self, run_id: str, mutate: Callable[[Record], None], news: bool = True) -> Record:
        """Apply `mutate` to the newest record and write it, again if another wrote in between.

        `news`: whether this changes `updated`; a lease does not. Raises UserError if there is no such record.
        """
        while True:
            record, etag = self._read_with_etag(run_id)
            before = copy.deepcopy(record)
            mutate(record)
            if record == before:
                return record
            if news:
                record["updated"] = time.time()
            if self.storage.compare_and_swap(f"{run_id}.json", json_bytes(record), etag):
                return record


class LeaseLost(StageError):
    """Another process took over the run, while this one was held up for longer than LEASE_SECONDS."""


class Lease:
    """The right to start jobs for a run; ends by itself when it is not renewed."""

    def __init__(self, records: RunRecords, run_id: str):
        self.records = records
        self.run_id = run_id
        self.holder = uuid.uuid4().hex
        self.held_until = 0.0

    @property
    def is_held(self) -> bool:
        """Whether this process had it when it last looked."""
        return self.held_until > 0

    def acquire(self) -> bool:
        """Take the lease if nobody holds it, or renew it; False if another has it."""

        def take(record: Record) -> None:
            lease = record["lease"]
            if lease is None or lease["holder"] == self.holder or lease["expires"] < time.time():
                record["lease"] = {"holder": self.holder, "expires": time.time() + LEASE_SECONDS}

        lease = self.records.change(self.run_id, take, news=False)["lease"]
        assert lease is not None, "it is this process's or another's"
        self.held_until = lease["expires"] if lease["holder"] == self.holder else 0.0
        return self.is_held

    def renew(self) -> None:
        """Renew it when half of its time is over. Raises LeaseLost if another took it meanwhile."""
        if time.time() > self.held_until - LEASE_SECONDS / 2 and not self.acquire():
            raise LeaseLost(f"another process took over the run {self.run_id}")

    def release(self) -> None:
        """Give it back, if it is held."""

        def give_back(record: Record) -> None:
            if record["lease"] is not None and record["lease"]["holder"] == self.holder:
                record["lease"] = None

        self.records.change(self.run_id, give_back, news=False)
        self.held_until = 0.0


def settled(records: RunRecords, run_id: str, problem_of: Callable[[StageRecord], str | None]) -> Record:
    """A record in which nothing runs that has ended: SFT as its own run has it, and what nobody follows any more.

    A job of a private Ray ended with the process that followed it; of others `problem_of` says why they do not run, and
    the next run asks them once more.
    """
    record = records.read(run_id)
    for stage, entry in record["stages"].items():
        owner = entry.get("run", run_id)
        values: StageRecord | None = None
        if owner != run_id:
            owned = settled(records, owner, problem_of)["stages"]
            if stage not in owned:
                raise records.refused(owner)
            values = {**owned[stage], "run": owner}
        elif entry["state"] == "running" and not is_followed(record):
            if entry.get("address") == "private":
                ended = "the process that followed it has ended, and its private Ray with it"
                values = {"state": "failed", "error": ended}
            elif problem := problem_of(entry):
                values = {"state": "failed", "error": f"{problem}; run again to ask once more", "lost": True}
        if values is not None:
            record = records.change(run_id, partial(update_stage, stage=stage, values=values))
    return record


def is_followed(record: Record) -> bool:
    """Whether a process starts and follows jobs for a run, as far as its lease says."""
    return record["lease"] is not None and record["lease"]["expires"] > time.time()


def forget_cancelling(record: Record) -> None:
    """Take back what was asked of a record's stages by --cancel."""
    for entry in record["stages"].values():
        entry.pop("cancel", None)


def update_stage(record: Record, stage: Stage, values: StageRecord) -> None:
    """Change a stage, and the state of the whole with it."""
    record["stages"][stage].update(values)
    states = [entry["state"] for entry in record["stages"].values()]
    record["state"] = next(
        (state for state in ("failed", "cancelled", "running", "waiting") if state in states), "succeeded"
    )
