"""Webhooks against a real HTTP server."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from grape_service.config.schema import NotifyConfig
from grape_service.errors import StageError
from grape_service.progress.reporter import Silent, set_reporter
from grape_service.webhooks import failed, notify


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
