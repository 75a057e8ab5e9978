"""Twenty runs at once on a Prefect server with Postgres; with SQLite, requests fail as its file is locked."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.jobs import ROOT, Job
from tests.postgres import Postgres, missing, postgres
from tests.prefect_service import Service

pytestmark = [pytest.mark.timeout(400), pytest.mark.skipif(missing() is not None, reason=str(missing()))]
RUNS = 20
PROGRAM = """
import sys, threading
from prefect import flow
from flows.artifacts import PrefectProgress
from flows.tasks import as_task

def stage(number, progress):
    progress.begin("score", 3, "shards")
    for _ in range(3):
        progress.updated["score"] = 0.0
        progress.advance("score", 1)
    progress.end("score")
    return number

@flow(name="many", persist_result=False)
def many(number: int):
    progress = PrefectProgress(f"run-{number}", str(number))
    return sum(as_task(f"stage {place}", stage)(number, progress) for place in range(4))

found = {}
def one(number):
    try:
        found[number] = many(number)
    except Exception as error:
        print(number, repr(error)[:300], file=sys.stderr)
threads = [threading.Thread(target=one, args=(number,)) for number in range(int(sys.argv[1]))]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(sum(found.values()), len(found))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the user postgres may enter, as pytest's own is not."""
    made = Path(tempfile.mkdtemp(prefix="grape-postgres-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def test_twenty_runs_at_once(folder: Path) -> None:
    with postgres(folder) as database, many_runs(folder, database) as service:
        runs = service.client.post("/flow_runs/filter", json={}).json()
        assert [run["state_name"] for run in runs] == ["Completed"] * RUNS
        progress = service.client.post("/artifacts/filter", json={"limit": 200}).json()
        assert {one["data"] for one in progress} == {100.0}
        assert len(progress) == 4 * RUNS


@contextmanager
def many_runs(folder: Path, database: Postgres) -> Iterator[Service]:
    """A Prefect server on that database, where RUNS runs have gone on at the same time."""
    job = Job(folder / "job", {}, {"PREFECT_API_DATABASE_CONNECTION_URL": database.url})
    job.folder.mkdir()
    try:
        service = Service(job)
        command = [sys.executable, "-c", PROGRAM, str(RUNS)]
        done = subprocess.run(command, env=job.environ(), cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.stdout.split() == [str(4 * sum(range(RUNS))), str(RUNS)], done.stderr[-3000:]
        assert "gave up" not in done.stderr
        yield service
    finally:
        job.kill_all()
