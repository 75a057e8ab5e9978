"""Requests to an S3 server that throttles, fails and loses its answers: a small one that does so on purpose."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from grape_service.errors import StageError, UserError
from grape_service.pool.listing import list_files
from grape_service.release.load import load
from grape_service.storage import options, s3
from grape_service.storage.probe import check_writable
from grape_service.storage.storage import Storage
from tests.website import website

pytestmark = pytest.mark.quick


class Moody(http.server.BaseHTTPRequestHandler):
    """Answers with the codes in `moods` first; "lost" does what was asked and then answers 500."""

    protocol_version = "HTTP/1.1"
    moods: list[str] = []
    objects: dict[str, bytes] = {}
    requests = 0

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        mood = self._mood()
        if mood not in ("", "lost"):
            return self._fail(mood)
        if self.headers.get("If-None-Match") == "*" and self.path in self.objects:
            return self._fail("412 PreconditionFailed")
        self.objects[self.path] = data
        return self._fail("500 InternalError") if mood == "lost" else self._answer(200, b"")

    def do_POST(self) -> None:
        """DeleteObjects, as servers answer that insist on Content-MD5."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-MD5") != base64.b64encode(hashlib.md5(body).digest()).decode():
            return self._fail("400 MissingContentMD5")
        for key in re.findall(rb"<Key>(.*?)</Key>", body):
            del self.objects[f"/bucket/{key.decode()}"]
        return self._answer(200, b"<DeleteResult></DeleteResult>")

    def do_GET(self) -> None:
        mood = self._mood()
        if mood == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.send_header("ETag", '"x"')
            self.end_headers()
            self.wfile.write(b"only this much")
            self.close_connection = True
            return None
        if mood:
            return self._fail(mood)
        if "list-type" in self.path:
            names = [path.removeprefix("/bucket/") for path in self.objects]
            entry = (
                "<Contents><Key>{}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified><Size>1</Size></Contents>"
            )
            listed = "".join(entry.format(name) for name in names)
            return self._answer(200, f"<ListBucketResult>{listed}</ListBucketResult>".encode())
        if self.path not in self.objects:
            return self._fail("404 NoSuchKey")
        return self._answer(200, self.objects[self.path])

    def _mood(self) -> str:
        Moody.requests += 1
        return self.moods.pop(0) if self.moods else ""

    def _fail(self, words: str) -> None:
        status, code = words.split()
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} said the server</Message></Error>"
        self._answer(int(status), text.encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"x"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def moody_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    Moody.moods, Moody.objects, Moody.requests = [], {}, 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def storage(moody_address: str) -> Storage:
    return Storage("s3://bucket/x", {"endpoint_url": moody_address, "retry_seconds": 5})


@pytest.mark.parametrize(
    "mood", ["503 SlowDown", "500 InternalError", "429 Throttling", "502 BadGateway", "400 RequestTimeout"]
)
def test_throttling_and_server_errors_are_tried_again(storage: Storage, mood: str) -> None:
    Moody.moods = [mood] * 3
    storage.write("a", b"1")
    assert Moody.requests == 4
    Moody.moods = [mood]
    assert storage.read("a") == b"1"


def test_a_server_that_keeps_failing_is_named_in_one_sentence(storage: Storage) -> None:
    Moody.moods = ["503 SlowDown"] * 1000
    with pytest.raises(
        StageError, match=r"s3://bucket at http://127\.0\.0\.1.* gave no answer for 5 seconds"
    ) as refused:
        storage.write("a", b"1")
    assert "\n" not in str(refused.value)
    assert Moody.requests < 20


@pytest.mark.parametrize(
    ("mood", "sentence"),
    [
        ("403 AccessDenied", "these credentials may not write s3://bucket/x/a"),
        ("404 NoSuchBucket", "the bucket of s3://bucket/x/a does not exist"),
        ("403 SignatureDoesNotMatch", "the credentials for s3://bucket/x/a are refused"),
    ],
)
def test_what_will_not_change_is_not_tried_again(storage: Storage, mood: str, sentence: str) -> None:
    Moody.moods = [mood]
    with pytest.raises(UserError, match=sentence):
        storage.write("a", b"1")
    assert Moody.requests == 1


def test_a_won_race_whose_answer_was_lost_counts_as_won(storage: Storage) -> None:
    Moody.moods = ["lost"]
    assert storage.create_if_absent("a", b"mine")
    assert not storage.create_if_absent("a", b"mine")
    Moody.moods = ["503 SlowDown"]
    assert not storage.create_if_absent("a", b"other")


def test_an_answer_that_breaks_off_is_read_again(storage: Storage) -> None:
    storage.write("a", b"whole")
    Moody.moods = ["cut", "cut"]
    assert storage.read("a") == b"whole"


def test_many_objects_are_deleted_with_content_md5(storage: Storage) -> None:
    for number in range(3):
        storage.write(f"folder/{number}", b"x")
    assert len(Moody.objects) == 3
    storage.delete_folder("folder")
    assert Moody.objects == {}


@contextlib.contextmanager
def no_server(is_silent: bool) -> Iterator[str]:
    """An address at which nothing listens, or something that takes connections and never says a word."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        if is_silent:
            unused.listen()
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_server_that_never_answered_is_told_at_once(is_silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_first_answer_seconds", 1.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    began = time.monotonic()
    with no_server(is_silent) as address:
        storage = Storage("s3://bucket/folder", {"endpoint_url": address})
        for ask in (partial(check_writable, storage), storage.list, partial(storage.read, "a"), storage.folders):
            with pytest.raises(UserError, match=f"s3://bucket at {address} gave no answer for 1 seconds"):
                ask()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("status", [200, 400, 401, 404, 405, 501, 502])
def test_another_server_than_s3_is_told_in_one_sentence(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_first_answer_seconds", 0.5)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with website(status) as address:
        storage = Storage("s3://bucket/folder", {"endpoint_url": address})
        asks: list[Callable[[], object]] = [
            partial(check_writable, storage),
            storage.list,
            storage.folders,
            partial(storage.write, "a", b"1"),
            partial(list_files, "s3://bucket/pool/", storage.options),
            partial(load, "s3://bucket/folder/name@latest", storage.options),
        ]
        for ask in asks:
            with pytest.raises(UserError, match=r"is not an S3 server|gave no answer|cannot be used") as refused:
                ask()
            assert address in str(refused.value)
            assert "\n" not in str(refused.value)


def test_a_server_that_answered_once_is_waited_for(monkeypatch: pytest.MonkeyPatch, moody_address: str) -> None:
    monkeypatch.setattr(s3, "RETRY_SECONDS", 5.0)
    storage = Storage("s3://bucket/x", {"endpoint_url": moody_address})
    storage.write("a", b"1")
    monkeypatch.setattr(options, "_first_answer_seconds", 0.2)
    Moody.moods = ["503 SlowDown"] * 4  # more than a second
    assert storage.read("a") == b"1"


def test_a_worker_waits_for_a_server_that_its_run_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_first_answer_seconds", 0.2)
    monkeypatch.setattr(s3, "RETRY_SECONDS", 1.5)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    options.wait_for_first_answer()
    with no_server(is_silent=False) as address, pytest.raises(StageError, match="finished work is kept"):
        Storage("s3://bucket/worker", {"endpoint_url": address}).list()
