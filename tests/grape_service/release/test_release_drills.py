"""Writers that race, die and lose their server. Each drill prints how many rounds and kills it made."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pytest

from grape_service.errors import StageError, UserError
from grape_service.release.catalog import read_catalog
from grape_service.release.gc import UNFINISHED, collect
from grape_service.release.load import load
from grape_service.release.tags import move_tag, read_tag
from grape_service.release.verify import verify
from grape_service.storage.probe import check_writable
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import SCHEMA, publish_version, rows
from tests.seaweed import BUCKET, SeaweedServer

WRITERS, ROUNDS = 8, 10
pytestmark = pytest.mark.drill
fork = multiprocessing.get_context("fork")


def signed_rows(start: int, count: int, signature: str) -> pa.Table:
    """Rows whose column `topic` tells who wrote them."""
    table = rows(start, count)
    return table.set_column(SCHEMA.get_field_index("topic"), "topic", pa.array([signature] * count))


def run_all(target: Any, arguments: list[tuple[Any, ...]], seconds: float = 120) -> None:
    """Run a function in a process each; every one has to end well."""
    processes = [fork.Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def publish_rounds(storage: Storage, writer: int, barrier: Barrier) -> None:
    for turn in range(ROUNDS):
        signature = f"writer {writer} round {turn}"
        barrier.wait(60)
        publish_version(storage, parts=[signed_rows(i * 5, 5, signature) for i in range(2)])


def test_writers_that_publish_at_once_share_nothing(any_storage: Storage) -> None:
    barrier = fork.Barrier(WRITERS)
    run_all(publish_rounds, [(any_storage, writer, barrier) for writer in range(WRITERS)])
    published = read_catalog(any_storage, "math-sft")
    assert [entry.version for entry in published] == [f"v{n:04d}" for n in range(1, WRITERS * ROUNDS + 1)]
    with ThreadPoolExecutor(4) as pool:
        signatures = list(pool.map(lambda entry: checked_signature(any_storage, entry.version), published))
    assert len(set(signatures)) == WRITERS * ROUNDS
    tag = read_tag(any_storage, "math-sft", "latest")
    assert tag is not None
    assert tag.version == published[-1].version
    print(f"{WRITERS} writers, {ROUNDS} rounds: {len(published)} whole versions, none with a file of another")


def checked_signature(storage: Storage, version: str) -> str:
    """Who wrote a version, which is whole and all of one hand."""
    release = load(f"{storage.root}/math-sft@{version}")
    assert verify(release) == []
    assert release.row_count == 10
    (signature,) = set(release.dataset.to_table(columns=["topic"])["topic"].to_pylist())
    return str(signature)


def move_often(storage: Storage, mover: int, barrier: Barrier) -> None:
    barrier.wait(60)
    for turn in range(ROUNDS):
        move_tag(storage, "math-sft", "best", f"v{1 + (mover + turn) % 3:04d}", who=f"mover {mover}", reason=str(turn))


def test_movers_of_one_tag_lose_no_move(any_storage: Storage) -> None:
    for _ in range(3):
        publish_version(any_storage, parts=[rows(0, 1)], tags=())
    barrier = fork.Barrier(WRITERS)
    run_all(move_often, [(any_storage, mover, barrier) for mover in range(WRITERS)])
    tag = read_tag(any_storage, "math-sft", "best")
    assert tag is not None
    assert len(tag.history) == WRITERS * ROUNDS
    assert [move.previous for move in tag.history] == [None, *[move.version for move in tag.history[:-1]]]
    assert tag.version == tag.history[-1].version
    for mover in range(WRITERS):
        made = [move.reason for move in tag.history if move.who == f"mover {mover}"]
        assert made == [str(turn) for turn in range(ROUNDS)]
    print(f"{WRITERS} movers of one tag: {len(tag.history)} moves, each in the history, in order")


class KillingStorage(Storage):
    """Sends this process SIGKILL in the middle of its n-th write."""

    writes_left = 0

    def _count(self) -> None:
        KillingStorage.writes_left -= 1
        if KillingStorage.writes_left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def open_write(self, path: str) -> Iterator[IO[bytes]]:
        with super().open_write(path) as file:
            yield file
            self._count()

    def create_if_absent(self, path: str, data: bytes) -> bool:
        self._count()
        return super().create_if_absent(path, data)

    def compare_and_swap(self, path: str, data: bytes, etag: str | None) -> bool:
        if etag is not None:
            self._count()
        return super().compare_and_swap(path, data, etag)


def publish_and_die(root: str, after: int) -> None:
    KillingStorage.writes_left = after
    publish_version(KillingStorage(root), parts=[rows(0, 20), rows(20, 20)])


def test_a_writer_killed_at_any_step_leaves_no_version(any_storage: Storage) -> None:
    published, kills, after = [], 0, 0
    while True:
        process = fork.Process(target=publish_and_die, args=(any_storage.root, after))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        known = [entry.version for entry in read_catalog(any_storage, "math-sft")]
        for version in known:
            assert verify(load(f"{any_storage.root}/math-sft@{version}")) == []
        assert len(known) - len(published) == (after > 7)  # only the steps after the manifest find a version
        if after == 7:  # data files, card, report, metadata, everything but the manifest
            folder = f"math-sft/versions/{any_storage.folders('math-sft/versions')[-1]}"
            files = {info.path.split("/")[-1] for info in any_storage.list(folder)}
            assert {"part-00000.parquet", "part-00001.parquet", "README.md", "report.html", "croissant.json"} <= files
        published = [*known, publish_version(any_storage, parts=[rows(0, 4)]).version]
        after += 1
    assert kills == 11
    assert len(set(published)) == len(published)
    before = len(read_catalog(any_storage, "math-sft"))

    assert collect(any_storage, None, keep_versions=1000, dry_run=False) == []  # their writers may live: an hour
    found = collect(any_storage, None, keep_versions=1000, stale_seconds=0)
    assert {item.kind for item in found} == {UNFINISHED}
    assert sum(item.num_files for item in found) >= 14
    assert collect(any_storage, None, keep_versions=1000, stale_seconds=0, dry_run=False) == found
    assert collect(any_storage, None, keep_versions=1000, stale_seconds=0) == []
    assert len(read_catalog(any_storage, "math-sft")) == before
    for entry in read_catalog(any_storage, "math-sft"):
        assert verify(load(f"{any_storage.root}/math-sft@{entry.version}")) == []
    highest = max(entry.version for entry in read_catalog(any_storage, "math-sft"))
    assert publish_version(any_storage).version > highest
    print(f"{kills} writers killed, one at each step; {len(found)} leftovers removed, no version lost or half there")


def test_a_server_that_dies_meanwhile_is_waited_for_or_named(restartable_s3: SeaweedServer) -> None:
    storage = Storage(f"s3://{BUCKET}/drill")
    parts = [rows(i * 1500, 1500, tokens=400) for i in range(8)]
    publish_version(storage, parts=parts)
    thread = threading.Thread(target=publish_version, args=(storage,), kwargs={"parts": parts})
    thread.start()
    time.sleep(0.5)
    restartable_s3.kill()
    time.sleep(0.5)
    restartable_s3.start()
    thread.join(90)
    assert not thread.is_alive()
    for version in ("v0001", "v0002"):
        release = load(f"{storage.root}/math-sft@{version}")
        assert verify(release) == []
        assert release.manifest.files == load(f"{storage.root}/math-sft@v0001").manifest.files

    impatient = Storage(storage.root, {"retry_seconds": 1})
    restartable_s3.kill()
    with pytest.raises(StageError, match=r"gave no answer for 1 seconds .*: run again once it does") as refused:
        publish_version(impatient, parts=parts)
    assert "\n" not in str(refused.value)
    restartable_s3.start()
    assert publish_version(impatient, parts=parts).version == "v0003"
    print("2 kills of the S3 server while publishing: 1 run waited and ended, 1 ended with a sentence and went on")


def test_writers_without_permission_bucket_or_space_end_with_one_sentence(
    s3_server: SeaweedServer, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    storage = Storage(s3_url)
    publish_version(storage)
    with pytest.raises(UserError, match=r"the bucket of .* does not exist"):
        publish_version(Storage("s3://no-such-bucket/sets"))
    with monkeypatch.context() as patch:
        for name, value in s3_server.reader_environment.items():
            patch.setenv(name, value)
        reader = Storage(s3_url)
        for write in (lambda: check_writable(reader), lambda: publish_version(reader)):
            with pytest.raises(UserError, match="these credentials may not write"):
                write()
        with pytest.raises(UserError, match="these credentials may not write"):
            move_tag(reader, "math-sft", "best", "v0001")
        assert load(f"{s3_url}/math-sft").row_count == 80
    with small_disk(tmp_path) as folder:
        local = Storage(str(folder))
        publish_version(local, parts=[rows(0, 20)])
        with pytest.raises(UserError, match=r"no space left|grew larger") as refused:
            publish_version(local, parts=[rows(0, 20), *(rows(i, 1000, tokens=200) for i in range(20, 8000, 1000))])
        assert "\n" not in str(refused.value)
        assert [entry.version for entry in read_catalog(local, "math-sft")] == ["v0001"]
        assert collect(local, None, dry_run=False)[0].kind == UNFINISHED
        assert publish_version(local, parts=[rows(0, 20)]).version == "v0003"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 3 MiB where we may mount one; else a folder whose files may not grow beyond 1 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mounted.returncode != 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)
