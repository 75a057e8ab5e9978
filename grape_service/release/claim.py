"""Claims: how a writer gets a version number that nobody else will ever have."""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
import uuid
from types import TracebackType

import orjson

from grape_service.errors import StageError, UserError
from grape_service.json_types import JsonObject
from grape_service.release.reference import VERSION_PATTERN, check_name, version_folder, version_name, version_number
from grape_service.storage.storage import Storage, json_bytes

CLAIM = "claim.json"
HEARTBEAT_SECONDS = 20.0
LATE_SECONDS = 90.0
"""What gave no sign of life for so long is stuck or gone."""
STALE_SECONDS = 3600.0
"""A claim without a heartbeat for so long is dead."""
WRITING, ABANDONED, PUBLISHED, BURNED = "writing", "abandoned", "published", "burned"


class Claim:
    """One version's folder, and the right to write there. A context manager: left without publishing, it is abandoned.

    A thread renews the claim; where that finds another's hand on it, `check` raises.
    """

    def __init__(self, storage: Storage, name: str, version: str, writer: str, state: JsonObject):
        self.storage = storage
        self.name = name
        self.version = version
        self.writer = writer
        self.folder = version_folder(name, version)
        self._path = f"{self.folder}/{CLAIM}"
        self._state = state
        self._lock = threading.Lock()
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name=f"claim-{version}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Renew the claim now. Raises StageError if it was taken away."""
        if not self._renew(self._state["state"]):
            raise StageError(
                f"the claim of {self.storage.url(self.folder)} was taken away, as after an hour without a sign "
                "of life: run again for another version"
            )

    def end(self, state: str) -> None:
        """Stop the heartbeat and note how it ended."""
        self._stop.set()
        self._thread.join()
        self._renew(state)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stop.is_set():
            return
        try:
            self.end(ABANDONED)
        except (StageError, UserError, OSError):
            if error is None:
                raise

    def _keep_alive(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._renew(WRITING)
            except (StageError, UserError, OSError):
                continue  # the writer itself will meet the same error, or the server comes back

    def _renew(self, state: str) -> bool:
        with self._lock:
            if self._lost:
                return False
            etag = self._own_etag()
            self._state = {**self._state, "state": state, "heartbeat": time.time()}
            renewed = etag is not None and self.storage.compare_and_swap(self._path, json_bytes(self._state), etag)
            self._lost = not renewed
            return renewed

    def _own_etag(self) -> str | None:
        """The etag of the claim as it is now; None if it is not this writer's any more."""
        try:
            data, etag = self.storage.read_with_etag(self._path)
        except FileNotFoundError:
            return None
        return etag if orjson.loads(data).get("writer") == self.writer else None


def claim_version(storage: Storage, name: str) -> Claim:
    """The next free version number of a dataset, by create-if-absent: two writers never share one.

    Raises UserError where the storage may not be written."""
    check_name(name)
    writer = f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex}"
    number = highest_number(storage, name)
    while True:
        number += 1
        version = version_name(number)
        path = f"{version_folder(name, version)}/{CLAIM}"
        now = time.time()
        state = {"writer": writer, "version": version, "claimed": iso_time(now), "heartbeat": now, "state": WRITING}
        if storage.create_if_absent(path, json_bytes(state)) or _is_own(storage, path, writer):
            return Claim(storage, name, version, writer, state)


def highest_number(storage: Storage, name: str) -> int:
    """The highest version number that was ever claimed; 0 if none was."""
    claimed = [folder for folder in storage.folders(f"{name}/versions") if VERSION_PATTERN.fullmatch(folder)]
    return max((version_number(version) for version in claimed), default=0)


def _is_own(storage: Storage, path: str, writer: str) -> bool:
    """Whether a refused write had won, and only its answer was lost."""
    try:
        return storage.read_json(path).get("writer") == writer
    except FileNotFoundError:
        return False


def iso_time(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
