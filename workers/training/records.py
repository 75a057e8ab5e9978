"""Records of training runs, beside the release: <output>/<name>/runs/<id>.json, moved by compare-and-swap.

A record names the dataset version, the config, each stage's job, state, checkpoint and metrics. It also holds a
lease: the one process that starts jobs for the run; others follow the record.
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable
from typing import Any

import orjson

from grape_service.errors import UserError
from grape_service.release.reference import parse_reference
from grape_service.storage.storage import Storage, json_bytes
from workers.training.trainers.checkpoints import MARKER

FORMAT = 1
LEASE_SECONDS = 60.0
OPEN_STATES = ("waiting", "running")

Record = dict[str, Any]


class RunRecords:
    """The records of one dataset."""

    def __init__(self, datasets: Storage, name: str):
        self.storage = datasets.sub(f"{name}/runs")

    def url(self, run_id: str) -> str:
        """Full address of a record."""
        return self.storage.url(f"{run_id}.json")

    def read(self, run_id: str) -> Record:
        """A record. Raises UserError if there is none."""
        try:
            return self.storage.read_json(f"{run_id}.json")
        except FileNotFoundError:
            known = ", ".join(self.ids()) or "none"
            raise UserError(f"there is no run '{run_id}' in {self.storage.root}; there are: {known}") from None

    def ids(self) -> list[str]:
        """Ids of all runs."""
        return [i.path.removesuffix(".json") for i in self.storage.list() if "/" not in i.path]

    def create(self, record: Record) -> Record:
        """Write a new record unless there is one of its id; the one that is there then."""
        self.storage.create_if_absent(f"{record['id']}.json", json_bytes(record))
        return self.read(record["id"])

    def change(self, run_id: str, mutate: Callable[[Record], None], news: bool = True) -> Record:
        """Apply `mutate` to the newest record and write it, again if another wrote in between.

        `news`: whether `updated` says so; a lease is none.
        """
        path = f"{run_id}.json"
        while True:
            data, etag = self.storage.read_with_etag(path)
            record = orjson.loads(data)
            before = copy.deepcopy(record)
            mutate(record)
            if record == before:
                return record
            if news:
                record["updated"] = time.time()
            if self.storage.compare_and_swap(path, json_bytes(record), etag):
                return record


class Lease:
    """The right to start jobs for a run; ends by itself when it is not renewed."""

    def __init__(self, records: RunRecords, run_id: str):
        self.records = records
        self.run_id = run_id
        self.holder = uuid.uuid4().hex
        self.held_until = 0.0

    def acquire(self) -> bool:
        """Take the lease if nobody holds it, or renew it; False if another has it."""

        def take(record: Record) -> None:
            lease = record.get("lease") or {}
            if lease.get("holder") in (None, self.holder) or lease["expires"] < time.time():
                record["lease"] = {"holder": self.holder, "expires": time.time() + LEASE_SECONDS}

        lease = self.records.change(self.run_id, take, news=False)["lease"]
        self.held_until = lease["expires"] if lease["holder"] == self.holder else 0.0
        return self.held_until > 0

    def renew(self) -> None:
        """Renew it when half of its time is over. Raises AssertionError if another took it meanwhile."""
        if time.time() > self.held_until - LEASE_SECONDS / 2:
            held = self.acquire()
            assert held, "another process took over this run"

    def release(self) -> None:
        """Give it back, if it is held."""

        def give_back(record: Record) -> None:
            if (record.get("lease") or {}).get("holder") == self.holder:
                record["lease"] = None

        self.records.change(self.run_id, give_back, news=False)
        self.held_until = 0.0


def lineage(checkpoint: str, storage_options: dict[str, Any] | None = None) -> dict[str, Any]:
    """From a checkpoint back to the pool: its facts, its run's record, its dataset version and that one's parents.

    Raises UserError where the checkpoint does not say what it was made from.
    """
    import grape_service

    storage = Storage(checkpoint, storage_options)
    if not storage.exists(MARKER):
        raise UserError(f"{checkpoint} has no {MARKER}, so it does not say what it was made from")
    facts = storage.read_json(MARKER)
    reference = parse_reference(facts["dataset"])
    release = grape_service.load(facts["dataset"], storage_options)
    run_id = facts.get("run")
    records = RunRecords(reference.storage(storage_options), reference.name)
    return {
        "checkpoint": {key: value for key, value in facts.items() if key != "files"},
        "run": records.read(run_id) if run_id else None,
        "dataset": release.reference,
        "parents": release.manifest.parents.model_dump(mode="json"),
    }
