"""An S3 server that refuses connections is told in one sentence, exit status 2, wherever a command meets it first."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from grape_service.cli import failing
from grape_service.storage import options
from tests import tiny_models
from tests.grape_service.cli.test_user_errors import grape


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(options, "_first_answer_seconds", 0.3)
    monkeypatch.setattr(failing, "_said", set())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("http_proxy", "https_proxy"):  # the way to this machine does not lead through a proxy
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


PLACES: dict[str, dict[str, Any]] = {
    "pool": {"pool": {"path": "s3://bucket/pool"}},
    "target": {"target": {"model": "s3://bucket/model"}},
    "checks": {"checks": {"contamination": {"files": ["s3://bucket/evaluation.jsonl"]}}},
    "output": {"output": {"path": "s3://bucket/out"}},
    "workspace": {"workspace": "s3://bucket/work"},
}


@pytest.mark.parametrize(
    ("command", "place"),
    [
        *(("run", place) for place in PLACES),
        *(("check", place) for place in PLACES),
        ("plan", "pool"),
        ("plan", "target"),
    ],
)
def test_a_config_that_names_it(
    tmp_path: Path,
    dead: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    place: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.jsonl").write_text(json.dumps({"prompt": "What is 3 + 4?", "response": "7"}) + "\n")
    config = {
        "name": "x",
        "pool": {"path": "pool.jsonl"},
        "target": {"model": tiny_models.make_model(tmp_path / "model") if place != "target" else "model"},
        "output": {"path": "out"},
        "storage": {"endpoint_url": dead},
        **PLACES[place],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    began = time.monotonic()
    status, _, err = grape(monkeypatch, capsys, command, "config.yaml")
    said = err.strip().splitlines()[-1]
    assert status == 2
    assert f"s3://bucket at {dead} gave no answer for 0 seconds" in said, err
    assert err.count("error: ") == 1
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    "arguments",
    [
        ["datasets", "list", "s3://bucket/out"],
        ["datasets", "verify", "s3://bucket/out/x@latest"],
        ["export", "s3://bucket/out/x@latest", "exported", "--to", "trl"],
        ["report", "s3://bucket/out/x@latest"],
        ["ui", "s3://bucket/out"],
        ["rows", "s3://bucket/out/x@latest"],
    ],
)
def test_an_address_on_the_command_line(
    dead: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    status, _, err = grape(monkeypatch, capsys, *arguments, "--endpoint", dead)
    assert (status, err.count("error: ")) == (2, 1), err
    assert f"error: s3://bucket at {dead} gave no answer" in err
