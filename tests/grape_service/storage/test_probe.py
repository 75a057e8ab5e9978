"""What is wrong with a server or its credentials is said before work is done, and no probe is left."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import pytest
from aiohttp import web

from grape_service.errors import StageError, UserError
from grape_service.storage.probe import check_writable
from grape_service.storage.storage import Storage
from tests.misbehaving_s3 import Proxy, proxy_before, refusal, skewed
from tests.seaweed import OPEN_BUCKET, SeaweedServer

pytestmark = pytest.mark.quick


@pytest.fixture
def proxy(s3_server: SeaweedServer, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxy_before(s3_server.endpoint) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.address)
        yield found


_numbers = itertools.count()


@pytest.fixture
def storage(proxy: Proxy, s3_server: SeaweedServer) -> Storage:
    client = s3_server.client()
    with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=OPEN_BUCKET)
    return Storage(f"s3://{OPEN_BUCKET}/{next(_numbers)}", {"anon": True, "retry_seconds": 3})


def deletes(request: web.Request) -> bool:
    return request.method == "DELETE" or (request.method == "POST" and "delete" in request.query)


def test_a_server_that_behaves(proxy: Proxy, storage: Storage) -> None:
    check_writable(storage)
    assert storage.list() == storage.unfinished(older_than=-60) == []
    assert len(proxy.seen) < 20


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
def test_ignored_conditions(proxy: Proxy, storage: Storage, header: str) -> None:
    proxy.drop = (header.lower(),)
    with pytest.raises(UserError, match=rf"ignores conditional writes \({header}\)") as refused:
        check_writable(storage)
    assert storage.root in str(refused.value)
    assert ".grape-probe" not in str(refused.value)
    proxy.drop = ()
    assert storage.list() == []


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
def test_conditions_that_a_server_does_not_know(proxy: Proxy, storage: Storage, header: str) -> None:
    proxy.answer = lambda request: refusal(request, 501, "NotImplemented") if header in request.headers else None
    with pytest.raises(UserError, match="NotImplemented"):
        check_writable(storage)
    proxy.answer = lambda request: None
    assert storage.list() == []


def test_no_permission_to_delete_leaves_nothing(proxy: Proxy, storage: Storage) -> None:
    proxy.answer = lambda request: refusal(request, 403, "AccessDenied") if deletes(request) else None
    with pytest.raises(UserError, match=f"these credentials may not delete {storage.root}:") as refused:
        check_writable(storage)
    assert ".grape-probe" not in str(refused.value)
    assert storage.list() == []


@pytest.mark.parametrize(
    ("status", "code"), [(501, "NotImplemented"), (405, "MethodNotAllowed"), (400, "InvalidArgument")]
)
def test_a_server_without_delete_objects_is_served_one_by_one(
    proxy: Proxy, storage: Storage, status: int, code: str
) -> None:
    proxy.answer = lambda request: refusal(request, status, code) if "delete" in request.query else None
    check_writable(storage)
    for number in range(20):
        storage.write(f"folder/{number}", b"x")
    storage.delete_folder("folder")
    assert storage.list() == []


def test_parts_that_a_server_does_not_take(proxy: Proxy, storage: Storage) -> None:
    proxy.answer = lambda request: refusal(request, 400, "InvalidArgument") if "uploads" in request.query else None
    with pytest.raises(UserError, match="InvalidArgument"):
        check_writable(storage)
    proxy.answer = lambda request: None
    assert storage.list() == []


ASKS: list[Callable[[Storage], object]] = [check_writable, Storage.list, lambda s: s.read("a"), lambda s: s.exists("a")]


@pytest.mark.parametrize("ask", ASKS)
def test_a_clock_that_differs(proxy: Proxy, storage: Storage, ask: Callable[[Storage], object]) -> None:
    proxy.answer = lambda request: skewed(request, 3600)
    with pytest.raises(UserError, match=r"the clock of this machine and that of .* differ by 60 minutes") as refused:
        ask(storage)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize(
    ("status", "code"), [(301, "PermanentRedirect"), (307, "TemporaryRedirect"), (400, "AuthorizationHeaderMalformed")]
)
def test_a_bucket_of_another_region(
    proxy: Proxy, storage: Storage, status: int, code: str, ask: Callable[[Storage], object]
) -> None:
    region = {"x-amz-bucket-region": "eu-west-1"}
    proxy.answer = lambda request: refusal(request, status, code, **region)
    with pytest.raises(UserError, match=r"is in another region, eu-west-1, than http://127.*AWS_DEFAULT_REGION"):
        ask(storage)


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (403, "RequestTimeTooSkewed", "the clock of this machine and that of .* differ by more than the server allows"),
        (400, "AuthorizationHeaderMalformed", "is in another region than http://127.*AWS_DEFAULT_REGION"),
        (301, "PermanentRedirect", "is in another region than http://127.*AWS_DEFAULT_REGION"),
        (400, "ExpiredToken", r"the credentials for .* have expired \(ExpiredToken\)"),
        (403, "ExpiredToken", r"the credentials for .* have expired \(ExpiredToken\)"),
        (403, "SignatureDoesNotMatch", r"the credentials for .* are refused \(SignatureDoesNotMatch\)"),
        (400, "InvalidToken", r"the credentials for .* are refused \(InvalidToken\)"),
        (403, "AccessDenied", "these credentials may not read .*/a: allow it"),
    ],
)
def test_why_a_head_is_refused_is_learnt_by_a_get(
    proxy: Proxy, storage: Storage, status: int, code: str, sentence: str
) -> None:
    proxy.answer = lambda request: refusal(request, status, code)
    for ask in (Storage.exists, Storage.info, lambda storage, path: storage.fs.info(storage.full(path))):
        with pytest.raises((UserError, StageError), match=sentence) as refused:
            ask(storage, "a")
        assert "\n" not in str(refused.value)
        assert storage.full("a") in str(refused.value)


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("status", [301, 307, 308])
def test_a_redirect_that_names_no_region(
    proxy: Proxy, storage: Storage, status: int, ask: Callable[[Storage], object]
) -> None:
    proxy.answer = lambda request: web.Response(status=status)
    sentence = rf"answers with HTTP status {status} and is not an S3 server: correct"
    with pytest.raises(UserError, match=sentence):
        ask(storage)
    assert len(proxy.seen) < 10


def test_a_head_alone_that_is_refused(proxy: Proxy, storage: Storage) -> None:
    storage.write("a", b"1")
    proxy.answer = lambda request: refusal(request, 403, "AccessDenied") if request.method == "HEAD" else None
    with pytest.raises(UserError, match="these credentials may not read"):
        storage.exists("a")
    assert storage.read("a") == b"1"


class Rotated:
    """A server that takes the newest token alone, and credentials in a file that somebody rotates."""

    def __init__(self, path: Path):
        self.path, self.good, self.asked = path, "", 0

    def write(self, token: str) -> None:
        lines = ["[default]", "aws_access_key_id = a", "aws_secret_access_key = b", f"aws_session_token = {token}", ""]
        self.path.with_suffix(".new").write_text("\n".join(lines))
        self.path.with_suffix(".new").replace(self.path)

    def __call__(self, request: web.Request) -> web.Response | None:
        self.asked += 1
        if request.headers.get("x-amz-security-token") == self.good:
            if request.method == "HEAD":
                return web.Response(status=404)
            body = b"x" if request.method == "GET" else b""
            return web.Response(body=body, headers={"ETag": '"x"', "Last-Modified": formatdate(usegmt=True)})
        return refusal(request, 400, "ExpiredToken")


@pytest.fixture
def rotated(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rotated:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    proxy.answer = Rotated(tmp_path / "credentials")
    return proxy.answer


@pytest.mark.parametrize("ask", [lambda s: s.write("a", b"1"), lambda s: s.read("a"), lambda s: s.exists("a")])
def test_a_token_that_was_rotated_in_its_file_is_read_again(rotated: Rotated, ask: Callable[[Storage], object]) -> None:
    storage = Storage("s3://bucket/x", {"retry_seconds": 3})
    rotated.write("one")
    rotated.good = "one"
    storage.write("a", b"1")
    rotated.write("two")
    rotated.good = "two"
    ask(storage)
    with ThreadPoolExecutor(8) as pool:  # all that were under way take the new one
        rotated.write("three")
        rotated.good = "three"
        list(pool.map(lambda number: storage.write(f"{number}", b"1"), range(16)))


def test_a_token_that_is_rotated_a_little_later_is_waited_for(rotated: Rotated) -> None:
    storage = Storage("s3://bucket/x", {"retry_seconds": 10})
    rotated.write("one")
    rotated.good = "one"
    storage.write("a", b"1")
    rotated.good = "two"
    timer = threading.Timer(1.0, rotated.write, ("two",))
    timer.start()
    storage.write("a", b"2")
    timer.join()


def test_a_token_that_stays_expired_may_be_tried_again_later(rotated: Rotated) -> None:
    storage = Storage("s3://bucket/x", {"retry_seconds": 2})
    rotated.write("old")
    rotated.good = "new"
    with pytest.raises(StageError, match=r"the credentials for s3://bucket/x/a have expired .*renew them"):
        storage.write("a", b"1")
    assert rotated.asked == 1  # it never worked: nobody rotates it
    rotated.write("new")
    storage.write("a", b"1")
    rotated.good = "newest"
    with pytest.raises(StageError, match="have expired"):
        storage.write("a", b"1")
    assert rotated.asked < 20


@pytest.fixture
def minted(rotated: Rotated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rotated:
    """Each session is given keys of its own, as where a role is assumed."""
    mint = tmp_path / "mint.sh"
    mint.write_text("""echo '{"Version": 1, "AccessKeyId": "a'$$'", "SecretAccessKey": "b", "SessionToken": "'$$'"}'""")
    (tmp_path / "config").write_text(f"[default]\ncredential_process = /bin/sh {mint}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return rotated


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("status", "code", "sessions"),
    [(400, "InvalidToken", 2), (403, "SignatureDoesNotMatch", 2), (400, "", 2), (403, "", 2), (403, "AccessDenied", 1)],
)
def test_a_refused_head_is_asked_once_more_where_each_session_has_other_keys(
    minted: Rotated, proxy: Proxy, status: int, code: str, sessions: int
) -> None:
    keys: list[str] = []

    def refuse(request: web.Request) -> web.Response:
        if request.path.endswith("/a"):  # botocore asks for the bucket too, which may be in another region
            keys.append(request.headers["x-amz-security-token"])
        return refusal(request, status, code) if code else web.Response(status=status)

    proxy.answer = refuse
    with pytest.raises((UserError, OSError)):
        Storage("s3://bucket/x", {"retry_seconds": 3}).exists("a")
    assert (len(set(keys)), len(keys)) == (sessions, 2 * sessions)  # a GET after each HEAD says why


@pytest.mark.timeout(60)
def test_expired_keys_of_each_session_are_waited_for(minted: Rotated, proxy: Proxy) -> None:
    storage = Storage("s3://bucket/x", {"retry_seconds": 10})
    tokens: list[str] = []

    def take_after(number: int) -> None:
        def answer(request: web.Request) -> web.Response | None:
            tokens.append(request.headers["x-amz-security-token"])
            minted.good = tokens[-1] if len(tokens) > number else ""
            return minted(request)

        tokens.clear()
        proxy.answer = answer

    take_after(0)
    storage.write("a", b"1")
    take_after(7)  # two with a wait after them, four times
    storage.write("a", b"1")
    assert len(tokens) == 8
    assert len(set(tokens)) == 5
    take_after(10**9)
    with pytest.raises(StageError, match="have expired"):
        Storage("s3://bucket/x", {"retry_seconds": 2}).write("a", b"1")
    assert len(tokens) == 2  # these keys never worked
