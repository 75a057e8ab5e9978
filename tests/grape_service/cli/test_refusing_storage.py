"""An S3 server that refuses every request for a reason: each command says the reason, in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import grape_service
from grape_service.cli import failing
from grape_service.errors import StageError, UserError
from tests import tiny_models
from tests.grape_service.cli.test_user_errors import grape
from tests.misbehaving_s3 import Proxy, proxy_before, refusal

REASONS = {
    "RequestTimeTooSkewed": (403, "differ by more than the server allows: set this machine's clock"),
    "ExpiredToken": (400, "have expired (ExpiredToken)"),
    "InvalidToken": (400, "are refused (InvalidToken)"),
    "AuthorizationHeaderMalformed": (400, "is in another region than"),
    "AccessDenied": (403, "these credentials may not"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(params=REASONS)
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, str]]:
    status, sentence = REASONS[request.param]
    monkeypatch.setattr(failing, "_said", set())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with proxy_before("http://127.0.0.1:9") as proxy:
        proxy.answer = lambda asked: refusal(asked, status, request.param)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy, sentence


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("place", ["pool.jsonl", "pool/", "target", "output"])
def test_a_config_that_names_it(
    command: str,
    place: str,
    model: str,
    reason: tuple[Proxy, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.jsonl").write_text(json.dumps({"prompt": "What is 3 + 4?", "response": "7"}) + "\n")
    config = {"name": "x", "pool": {"path": "pool.jsonl"}, "target": {"model": model}, "output": {"path": "out"}}
    if place == "target":
        config["target"] = {"model": "s3://bucket/model"}
    elif place == "output":
        config["output"] = {"path": "s3://bucket/out"}
    else:
        config["pool"] = {"path": f"s3://bucket/{place}"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    status, _, err = grape(monkeypatch, capsys, command, "config.yaml")
    assert status in (1, 2)
    assert reason[1] in err, err
    assert "s3://bucket" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["datasets", "list", "s3://bucket/out"],
        ["datasets", "show", "s3://bucket/out/x@v0001"],
        ["export", "s3://bucket/out/x@latest", "exported", "--to", "trl"],
        ["rows", "s3://bucket/out/x@v0001"],
        ["lineage", "s3://bucket/checkpoint"],
    ],
)
def test_an_address_on_the_command_line(
    arguments: list[str],
    reason: tuple[Proxy, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _, err = grape(monkeypatch, capsys, *arguments)
    assert status in (1, 2)
    assert reason[1] in err, err
    assert err.count("\n") == 1


def test_from_python(reason: tuple[Proxy, str]) -> None:
    with pytest.raises((UserError, StageError)) as refused:
        grape_service.load("s3://bucket/out/x@latest")
    assert reason[1] in str(refused.value)
