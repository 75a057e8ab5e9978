"""Log files of tasks and engines: what they say is below the run's folder, on disk and on S3, without secrets."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from grape_service.errors import StageError
from grape_service.storage.storage import Storage
from tests.prepared_pools import make_config
from workers.cluster.ray import ray_for
from workers.cluster.tasks import run_tasks
from workers.logs import KEPT_CHARACTERS, LogFile, logs_in

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]


def say(number: int) -> int:
    """A task that says nothing, prints, warns or fails."""
    if number == 1:
        print("a line of the task")
    if number == 2:
        warnings.warn("something is odd", stacklevel=1)
    if number == 3:
        raise StageError("this task cannot go on")
    return number


def logs_of(storage: Storage) -> dict[str, str]:
    return {info.path: storage.read(info.path).decode() for info in storage.list("runs/r/logs")}


def test_tasks_leave_a_file_where_they_say_something(tmp_path: Path, s3_url: str) -> None:
    workers = make_config("pool").workers
    with ray_for(workers):
        for storage in (Storage(str(tmp_path)), Storage(f"{s3_url}/logs")):
            with logs_in(storage, "runs/r"):
                assert list(run_tasks(say, ({"number": n} for n in range(3)), workers)) == [0, 1, 2]
                with pytest.raises(StageError, match="this task cannot go on"):
                    list(run_tasks(say, [{"number": 3}], workers))
            found = logs_of(storage)
            names = ["001-say-00001", "001-say-00002", "002-say-00000"]
            assert sorted(found) == [f"runs/r/logs/{name}.log" for name in names]
            printed, warned, failed = (found[f"runs/r/logs/{name}.log"] for name in names)
            assert printed == "a line of the task\n"
            assert "UserWarning: something is odd" in warned
            assert "Traceback" in failed
            assert "StageError: this task cannot go on" in failed
        assert list(run_tasks(say, [{"number": 1}], workers)) == [1]  # of no run
        assert len(logs_of(storage)) == 3


def test_a_file_keeps_its_beginning_and_its_end_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/K7MDENG+bPxRfiCY")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/run/secrets/ray-token")
    storage = Storage(str(tmp_path))
    log = LogFile(storage, "a.log")
    out = sys.stdout
    with log.printed():
        print("begin wJalr/K7MDENG+bPxRfiCY https://user:pass@host/x?token=1 /run/secrets/ray-token")
        for _ in range(4):
            sys.stderr.write("x" * KEPT_CHARACTERS)
        print("end")
    assert sys.stdout is out
    text = storage.read("a.log").decode()
    assert text.startswith("begin *** https://***@host/x?*** /run/secrets/ray-token\n")
    assert text.endswith("xend\n")
    assert " characters are left out " in text
    assert len(text) < 2 * KEPT_CHARACTERS + 100
