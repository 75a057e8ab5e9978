"""Webhooks against a real HTTP server."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from grape_service.config.schema import Config, NotifyConfig
from grape_service.errors import StageError
from grape_service.progress.reporter import Silent, set_reporter
from grape_service.webhooks import (
    WebhookError,
    failed,
    failures_may_be_tried_again,
    notify,
    notify_when_done,
    request_json,
)
from tests.prepared_pools import make_config

pytestmark = pytest.mark.quick


class Receiver:
    """Answers with the statuses it is given, then 200, and keeps what it got."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((dict(self.headers), body))
                status = receiver.statuses.pop(0) if receiver.statuses else 200
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?token=hidden"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Events(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def event(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def events() -> Iterator[Events]:
    made = Events()
    set_reporter(made)
    yield made
    set_reporter(Silent())


def test_a_signed_body_arrives_after_errors(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPE_WEBHOOK_SECRET", "s3cret")
    receiver.statuses = [503, 429]
    assert notify(NotifyConfig(webhook=receiver.url), {"event": "completed", "rows": 3}, pause=0.01)
    assert len(receiver.got) == 3
    headers, body = receiver.got[-1]
    assert json.loads(body) == {"event": "completed", "rows": 3}
    expected = hmac.new(b"s3cret", body, hashlib.sha256).hexdigest()
    assert headers["X-Grape-Signature"] == f"sha256={expected}"


@pytest.mark.parametrize("status", [400, 302])
def test_a_refusal_is_told_without_secrets_and_not_tried_again(
    receiver: Receiver, events: Events, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("GRAPE_WEBHOOK_SECRET", "s3cret")
    receiver.statuses = [status]
    assert not notify(NotifyConfig(webhook=receiver.url), {}, pause=0.01)
    assert len(receiver.got) == 1
    assert f"answers {status}" in events.texts[0]
    assert "hidden" not in events.texts[0]
    assert "s3cret" not in events.texts[0]


def test_nobody_there_gives_up_and_raises_nothing(receiver: Receiver, events: Events) -> None:
    receiver.server.shutdown()
    receiver.server.server_close()
    assert not notify(NotifyConfig(webhook=receiver.url), {}, pause=0.01)
    assert "Error" in events.texts[0]


def test_without_a_secret_there_is_no_signature(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPE_WEBHOOK_SECRET", raising=False)
    assert notify(NotifyConfig(webhook=receiver.url), {})
    assert "X-Grape-Signature" not in receiver.got[0][0]


def test_the_address_may_come_from_the_environment(
    receiver: Receiver, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAPE_WEBHOOK", raising=False)
    assert not notify(NotifyConfig(), {})
    assert "GRAPE_WEBHOOK" in events.texts[0]
    monkeypatch.setenv("GRAPE_WEBHOOK", receiver.url)
    assert notify(NotifyConfig(), {"event": "completed"})
    assert len(receiver.got) == 1


def test_failures_tell_our_sentences_and_only_the_type_of_others() -> None:
    assert failed(StageError("too many failed"), "x", 1.0)["error"] == "too many failed"
    assert "key=abc" not in failed(RuntimeError("key=abc"), "x", 1.0)["error"]


SECRETS = ("hidden", "pa55", "s3cret")


@pytest.mark.parametrize(
    "address",
    [
        "hidden",
        "ftp://user:pa55@host/hidden",
        "http://",
        "http://user:pa55@[bad/hidden",
        "http://127.0.0.1:99999/hidden",
        "http://user:pa55@127.0.0.1:9/hidden?token=hidden",
        "http://no-such-host.invalid/hidden",
        "http://127.0.0.1:9/hid\nden",
        "https://127.0.0.1:9/" + "hidden" * 50_000,
        "http://\udcff.example/hidden",
    ],
)
def test_no_address_breaks_a_run(address: str, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPE_WEBHOOK_SECRET", "s3cret\udcff")
    monkeypatch.setenv("GRAPE_WEBHOOK", address)  # which no config has looked at
    body = {"event": "completed", "half": "\ud800", "many": 2**70}
    assert not notify(NotifyConfig(), body, pause=0.001)
    assert len(events.texts) == 1
    assert not [secret for secret in SECRETS if secret in events.texts[0]]


ANSWERS = {
    "nothing": b"",
    "garbage": b"\xff\x00garbage\r\n\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\nX: ",
    "a body that trickles": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{",
    "an encoding that it is not in": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "a redirect to itself": b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_no_answer_breaks_a_run(name: str, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grape_service.webhooks.TRIES", 1)
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(ANSWERS[name])
                    while "trickles" in name or "endless" in name:
                        if stop.wait(0.05):
                            break
                        connection.sendall(b" ")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        started = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/?token=hidden"
        with contextlib.suppress(WebhookError):
            assert request_json("POST", url, {}, pause=0.001, timeout=0.5) == {}
        assert time.monotonic() - started < 3
        stop.set()
    thread.join(5)


def fails(config: Config) -> None:
    with pytest.raises(StageError), notify_when_done(config):
        raise StageError("the server is away")


def test_a_failure_that_is_tried_again_notifies_nobody(receiver: Receiver) -> None:
    config = make_config("pool.jsonl", notify={"webhook": receiver.url})
    with failures_may_be_tried_again(lambda error: isinstance(error, StageError)):
        fails(config)
    assert receiver.got == []
    fails(config)
    assert [json.loads(body)["event"] for _, body in receiver.got] == ["failed"]
