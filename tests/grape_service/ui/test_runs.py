"""Runs and rounds, on their pages and on the command line."""

from __future__ import annotations

import re
import time
from pathlib import Path

import orjson
import pytest
from starlette.testclient import TestClient

from grape_service.cli.runs_commands import list_runs, logs, show
from grape_service.errors import UserError
from grape_service.release.rounds import Round, Rounds, write_rounds
from grape_service.storage.storage import Storage
from grape_service.ui.folder import Folder
from tests.grape_service.release.made_up import publish_version
from tests.grape_service.ui.made_folder import client_of
from tests.grape_service.ui.seen import text_of


def test_runs_tell_where_they_are(client: TestClient) -> None:
    page = text_of(client, "/runs")
    assert "runningscore 25.0% of 120 tokens, 1 min 15 s left" in page
    assert "silent" in page
    assert "damaged heartbeat" in page
    assert "20250101T000000-dddddddd–ended without a word" in page


def test_a_run_that_ended_has_its_result_and_log(client: TestClient, datasets: Path) -> None:
    end = {"name": "pool", "state": "failed", "error": "the engine <b>stopped", "started": 10.0, "ended": 75.0}
    end |= {"stage_seconds": {"prepare": 3.0}, "events": [{"time": "2025-01-01", "event": "shard 3 failed"}]}
    Storage(str(datasets.parent / "workspace")).write_json("runs/20240101T000000-ffffffff/end.json", end)
    assert "20240101T000000-ffffffffpoolfailed1 min 05 sthe engine <b>stopped" in text_of(client, "/runs")
    page = text_of(client, "/runs/20240101T000000-ffffffff")
    for words in ("failed after 1 min 05 s: the engine <b>stopped", "prepare3 s", "shard 3 failed"):
        assert words in page
    assert "there is no run 'nope'" in text_of(client, "/runs/nope", 404).lower()


def test_runs_on_the_command_line(datasets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = str(datasets.parent / "workspace")
    end = {"run_id": "20250101T000000-eeeeeeee", "name": "pool", "state": "failed", "error": "the engine stopped"}
    events = [{"time": "2025-01-01T00:00:01+00:00", "event": "shard 3 failed, attempt 1 of 3"}]
    end |= {"started": 1735689600.0, "ended": 1735689660.0, "stage_seconds": {"prepare": 2.0}, "events": events}
    Storage(workspace).write_json("runs/20250101T000000-eeeeeeee/end.json", end)
    strays = (
        "runs/notes.txt",
        "runs/.DS_Store/x",
        "runs/my notes/end.json",
        "runs/notes/todo.txt",
        "runs/a/b/end.json",
    )
    for stray in strays:
        Storage(workspace).write(stray, b"{}")
    try:
        list_runs(str(datasets), workspace, None, as_json=True)
        told = {run["run_id"]: run["state"] for run in orjson.loads(capsys.readouterr().out)["runs"]}
        assert told["20250101T000000-eeeeeeee"] == "failed"
        assert "running" in told.values()
        assert "silent" in told.values()
        assert all(run_id.startswith("202") for run_id in told)
        show("20250101T000000-eeeeeeee", str(datasets), workspace, None, as_json=False)
        shown = capsys.readouterr().out
        assert "pool  failed  1 min 00 s" in shown
        assert "error: the engine stopped" in shown
        logs("20250101T000000-eeeeeeee", str(datasets), workspace, None)
        assert capsys.readouterr().out.splitlines() == [
            "2025-01-01T00:00:01+00:00 shard 3 failed, attempt 1 of 3",
            "2025-01-01T00:01:00+00:00 failed: the engine stopped",
        ]
        for wrong, sentence in (("20250101T000000-ffffffff", "there is no run"), ("../x", "is not a run")):
            with pytest.raises(UserError, match=sentence):
                show(wrong, str(datasets), workspace, None, as_json=True)
    finally:
        Storage(workspace).delete_folder("runs/20250101T000000-eeeeeeee")
        for stray in strays:
            Storage(workspace).delete(stray)


def test_rounds_have_their_gates_on_the_page_and_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = str(tmp_path / "workspace")
    publish_version(Storage(str(tmp_path)), "math")
    gate = {"held_out_loss": 1.23456, "pass@2": 0.5, "pass@2 prompts": 7, "prompts": 8, "samples": 16, "unknown": 1}
    first = Round("round-1", "/base", f"{tmp_path}/math@v0001", "v0001", 3, gate=gate, run="r-1", checkpoint="/one")
    rounds = [first, Round("round-2", "/one", churn=0.25)]
    write_rounds(Storage(str(tmp_path)), Rounds("job", "math", 3, "failed", "<b>away</b>", rounds=rounds))
    page = text_of(client_of(Folder(str(tmp_path), workspace=workspace)), "/datasets/math")
    for told in ("2 of 3 rounds, failed: <b>away</b>", "held_out_loss 1.23, pass@2 0.5/base", "25%", "/one"):
        assert told in page, told
    for width, heading in (("200", "gate .* run .* target"), ("40", "gate: held_out.*run: r-1.*target: /base")):
        monkeypatch.setenv("COLUMNS", width)
        list_runs(str(tmp_path), workspace, None, as_json=False)
        said = capsys.readouterr().out
        assert re.search(heading, said, re.S), said
        assert re.search("held_out_loss 1.23, .*r-1.*/base", said, re.S), said
    job = Rounds("job", "math", 3, rounds=rounds)
    write_rounds(Storage(str(tmp_path)), job)
    client = client_of(Folder(str(tmp_path), workspace=workspace))
    assert "2 of 3 rounds, running" in text_of(client, "/datasets/math")
    killed = {**job.to_json(), "updated": time.time() - 7200}
    Storage(str(tmp_path)).write_json("math/rounds/job.json", killed)
    assert "2 of 3 rounds, no sign of life for 2 h 00 min" in text_of(client, "/datasets/math")
