"""Storage on local disk and on a real S3 server."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grape_service.errors import StageError, UserError
from grape_service.storage import s3
from grape_service.storage.options import check_options
from grape_service.storage.probe import check_writable
from grape_service.storage.storage import Storage
from tests.seaweed import BUCKET, SeaweedServer

pytestmark = pytest.mark.quick


def test_written_files_read_back_and_list_sorted(any_storage: Storage) -> None:
    for name in ("b/2.bin", "a.bin", "b/1.bin", "b/c/3.bin"):
        any_storage.write(name, name.encode())
    assert any_storage.read("b/c/3.bin") == b"b/c/3.bin"
    assert [info.path for info in any_storage.list()] == ["a.bin", "b/1.bin", "b/2.bin", "b/c/3.bin"]
    assert [info.path for info in any_storage.list("b/c")] == ["b/c/3.bin"]
    assert any_storage.folders() == ["b"]
    assert any_storage.list("nothing") == []
    assert any_storage.folders("nothing") == []
    info = any_storage.info("b/1.bin")
    assert info.size == len("b/1.bin")
    assert abs(info.modified - time.time()) < 120
    with any_storage.open("a.bin") as file:
        assert file.read(3) == b"a.b"
    any_storage.write("a.bin", b"")
    assert any_storage.read("a.bin") == b""
    any_storage.delete("a.bin")
    any_storage.delete("a.bin")
    assert not any_storage.exists("a.bin")
    assert not any_storage.exists("b")
    any_storage.delete_folder("b")
    assert any_storage.list() == []
    for read in (any_storage.read, any_storage.info, any_storage.open):
        with pytest.raises(FileNotFoundError):
            read("a.bin")


def test_a_folder_is_not_the_prefix_of_another_name(any_storage: Storage) -> None:
    any_storage.write("part/x", b"1")
    any_storage.write("part-2/x", b"2")
    assert [info.path for info in any_storage.list("part")] == ["part/x"]
    any_storage.delete_folder("part")
    assert any_storage.read("part-2/x") == b"2"


def test_conditional_writes(any_storage: Storage) -> None:
    assert any_storage.create_if_absent("tag.json", b"one")
    assert not any_storage.create_if_absent("tag.json", b"other")
    data, etag = any_storage.read_with_etag("tag.json")
    assert data == b"one"
    assert any_storage.compare_and_swap("tag.json", b"two", etag)
    assert not any_storage.compare_and_swap("tag.json", b"three", etag)
    assert not any_storage.compare_and_swap("tag.json", b"three", None)
    assert not any_storage.compare_and_swap("nothing.json", b"x", etag)
    assert any_storage.read("tag.json") == b"two"
    assert any_storage.compare_and_swap("new.json", b"x", None)
    assert [info.path for info in any_storage.list()] == ["new.json", "tag.json"]


def test_swaps_lose_no_update_and_leave_no_lock(tmp_path: Path) -> None:
    """The lock file goes after each swap: whoever waited for it must not take the old one for the lock."""
    storage = Storage(str(tmp_path))
    storage.create_if_absent("count", b"0")

    def add() -> None:
        for _ in range(20):
            while True:
                data, etag = storage.read_with_etag("count")
                if storage.compare_and_swap("count", str(int(data) + 1).encode(), etag):
                    break

    threads = [threading.Thread(target=add) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.read("count") == b"120"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_one_of_many_threads_wins(any_storage: Storage) -> None:
    any_storage.create_if_absent("swap", b"start")
    etag = any_storage.read_with_etag("swap")[1]
    won: list[str] = []

    def race(index: int) -> None:
        if any_storage.create_if_absent("create", str(index).encode()):
            won.append(f"create {index}")
        if any_storage.compare_and_swap("swap", str(index).encode(), etag):
            won.append(f"swap {index}")

    threads = [threading.Thread(target=race, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == sorted(
        [f"create {any_storage.read('create').decode()}", f"swap {any_storage.read('swap').decode()}"]
    )


def test_a_large_file_goes_up_in_parts_and_comes_back(any_storage: Storage) -> None:
    piece = bytes(range(256)) * 4096 * 7
    with any_storage.open_write("large.bin") as file:
        for _ in range(6):
            assert file.write(piece) == len(piece)
    assert any_storage.info("large.bin").size == 6 * len(piece)
    assert any_storage.read("large.bin") == piece * 6


@pytest.mark.parametrize("size", [10, 40 * 2**20])
def test_a_write_that_fails_leaves_nothing(any_storage: Storage, size: int) -> None:
    any_storage.write("kept.bin", b"before")
    for name in ("kept.bin", "new.bin"):
        with pytest.raises(ZeroDivisionError), any_storage.open_write(name) as file:
            file.writelines(iter_then_fail(size))
    assert any_storage.read("kept.bin") == b"before"
    assert [info.path for info in any_storage.list()] == ["kept.bin"]
    assert any_storage.unfinished(older_than=-2) == []


def test_what_killed_writers_left_is_deleted(any_storage: Storage) -> None:
    script = (
        "import os, sys; from grape_service.storage.storage import Storage\n"
        "with Storage(sys.argv[1]).open_write('half.bin') as file:\n"
        "    file.write(b'x' * (80 << 20)); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, any_storage.root], env=_environment(), timeout=60)
    assert done.returncode == -9
    assert any_storage.list() == []
    assert any_storage.unfinished(older_than=3600) == []
    found = any_storage.unfinished(older_than=-2)
    assert sum(info.size for info in found) >= 16 * 2**20
    any_storage.delete_unfinished(found)
    assert any_storage.unfinished(older_than=-2) == []


def test_unfinished_uploads_beyond_the_first_page(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "UPLOADS_A_PAGE", 2)
    storage = Storage(s3_url)
    bucket, _, prefix = storage.full().partition("/")
    for number in range(5):
        storage.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/half-{number % 3}.bin")
    found = storage.unfinished(older_than=-2)
    assert sorted(info.path for info in found) == [f"half-{number}.bin" for number in (0, 0, 1, 1, 2)]
    storage.delete_unfinished(found)
    assert storage.unfinished(older_than=-2) == []


def test_the_clock_is_the_store_s(any_storage: Storage) -> None:
    any_storage.write("now.txt", b"")
    assert abs(any_storage.now() - any_storage.info("now.txt").modified) < 3
    assert any_storage.list() == [any_storage.info("now.txt")]


def test_listings_longer_than_a_page(any_storage: Storage) -> None:
    count = 2300 if any_storage.is_s3 else 100_000
    if any_storage.is_s3:
        fs = any_storage.fs
        requests = [
            fs.submit(
                "put_object", Bucket=BUCKET, Key=f"{any_storage.full()[len(BUCKET) + 1 :]}/many/{i:06d}", Body=b"x"
            )
            for i in range(count)
        ]
        for request in requests:
            request.result()
    else:
        (Path(any_storage.root) / "many").mkdir(parents=True)
        for i in range(count):
            os.close(os.open(f"{any_storage.root}/many/{i:06d}", os.O_CREAT | os.O_WRONLY))
    start = time.perf_counter()
    listed = any_storage.list("many")
    seconds = time.perf_counter() - start
    print(f"{count} objects listed in {seconds:.2f} s")
    assert [info.path for info in listed] == [f"many/{i:06d}" for i in range(count)]
    assert seconds < 15
    any_storage.delete_folder("many")
    assert any_storage.list("many") == []


def test_pickled_and_forked_storages_work(any_storage: Storage) -> None:
    any_storage.write("a", b"parent")
    assert pickle.loads(pickle.dumps(any_storage)).read("a") == b"parent"
    assert pickle.loads(pickle.dumps(any_storage.arrow)).get_file_info(any_storage.full("a")).size == 6
    process = multiprocessing.get_context("fork").Process(target=any_storage.write, args=("b", b"child"))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert any_storage.read("b") == b"child"


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a//b", ".", "a/./b", "a\0b"])
def test_paths_that_climb_are_refused(any_storage: Storage, path: str) -> None:
    for touch in (any_storage.read, any_storage.delete, any_storage.sub, any_storage.list):
        with pytest.raises(UserError, match="is not a path below"):
            touch(path)
    with pytest.raises(UserError, match="is not a path below"):
        any_storage.write(path, b"x")


@pytest.mark.parametrize("root", ["gs://bucket/x", "http://host/x", "s3://", "s3:///x", "s3://bucket/../x", ""])
def test_places_without_conditional_writes_are_refused(root: str) -> None:
    with pytest.raises(UserError):
        Storage(root)


@pytest.mark.parametrize(
    "options",
    [
        {"key": "a"},
        {"secret": "b"},
        {"client_kwargs": {"aws_secret_access_key": "b"}},
        {"s3_additional_kwargs": {"SSECustomerKey": "c"}},
        {"endpoint_url": "http://user:pass@host:9000"},
    ],
)
def test_secrets_in_the_options_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY") as refused:
        check_options(options)
    assert "pass@" not in str(refused.value)
    check_options({"endpoint_url": "http://host:9000", "profile": "team", "client_kwargs": {"region_name": "x"}})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"endpoint": "http://host:9000"}, "unknown key 'storage.endpoint'; did you mean 'endpoint_url'?"),
        ({"endpoint_url": "localhost:9000"}, "the endpoint 'localhost:9000' is not a valid address"),
        ({"endpoint_url": "http://host:99999"}, "is not a valid address"),
        ({"endpoint_url": "http://[::1"}, "is not a valid address"),
        ({"client_kwargs": {"endpoint_url": "host:9000"}}, "is not a valid address"),
        ({"anon": "yes"}, "'storage.anon' must be true or false, not 'yes'"),
        ({"retry_seconds": True}, "'storage.retry_seconds' must be a number"),
        ({"client_kwargs": "us-east-1"}, "'storage.client_kwargs' must be a mapping"),
    ],
)
def test_invalid_options_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        Storage("s3://bucket/folder", options)


def test_an_option_that_a_library_does_not_take_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"the storage options for s3://bucket are not valid: .*colour"):
        Storage("s3://bucket/folder", {"config_kwargs": {"colour": "red"}}).list()


def test_the_endpoint_may_come_from_the_options(
    s3_server: SeaweedServer, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    storage = Storage(s3_url, {"endpoint_url": s3_server.endpoint})
    storage.write("a", b"1")
    assert storage.sub("b").options == {"endpoint_url": s3_server.endpoint}
    assert storage.read("a") == b"1"


def test_writable_storage_passes_the_check_and_keeps_no_probe(any_storage: Storage) -> None:
    check_writable(any_storage)
    assert any_storage.list() == []


def test_credentials_that_may_only_read(s3_server: SeaweedServer, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Storage(s3_url).write("a", b"1")
    for name, value in s3_server.reader_environment.items():
        monkeypatch.setenv(name, value)
    reader = Storage(s3_url)
    assert reader.read("a") == b"1"
    with pytest.raises(UserError, match="these credentials may not write") as refused:
        check_writable(reader)
    assert "\n" not in str(refused.value)
    for write in (lambda: reader.write("a", b"2"), lambda: reader.write("b", b"2" * (20 << 20))):
        with pytest.raises(UserError, match="may not write"):
            write()


def test_a_missing_bucket_and_wrong_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"the bucket of .* does not exist: create 'no-such-bucket'"):
        check_writable(Storage("s3://no-such-bucket/x"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r"credentials for .* are refused"):
        check_writable(Storage(s3_url))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(UserError, match="no credentials"):
        check_writable(Storage(s3_url))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a part of its path is a file"):
        check_writable(Storage(str(tmp_path / "file" / "below")))
    with pytest.raises(UserError, match="/proc/grape"):
        check_writable(Storage("/proc/grape"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user who may not write")
def test_no_permission_on_a_local_folder(tmp_path: Path) -> None:
    script = (
        "import os, sys; from grape_service.storage.storage import Storage\n"
        "from grape_service.storage.probe import check_writable\n"
        "os.setuid(65534); check_writable(Storage(sys.argv[1]))\n"
    )
    folder = Path("/var/lib")
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], env=_environment(), capture_output=True, text=True
    )
    assert "UserError: no permission to write /var/lib/" in done.stderr


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(UserError, match="grew larger than this disk or account allows"):
            storage.write("large", b"x" * 2**21)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert storage.list() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.drill
def test_a_server_that_comes_back_is_waited_for_and_one_that_does_not_is_named(restartable_s3: SeaweedServer) -> None:
    storage = Storage(f"s3://{BUCKET}/drill")
    piece = os.urandom(2**20)
    with storage.open_write("large.bin") as file:
        for i in range(40):
            if i == 20:
                restartable_s3.kill()
                back = threading.Timer(2, restartable_s3.start)
                back.start()
            file.write(piece)
    back.join()
    assert storage.read("large.bin") == piece * 40
    restartable_s3.kill()
    impatient = Storage(f"s3://{BUCKET}/drill", {"retry_seconds": 2})
    start = time.monotonic()
    with pytest.raises(StageError, match=r"gave no answer for 2 seconds .*: run again once it does") as refused:
        impatient.write("x", b"1")
    with pytest.raises(StageError, match="gave no answer"), impatient.open_write("y") as file:
        file.write(piece * 20)
    assert time.monotonic() - start < 15
    assert "\n" not in str(refused.value)
    print("2 kills of the S3 server, an upload finished after it came back")
    restartable_s3.start()
    assert impatient.create_if_absent("x", b"1")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.getcwd()}


def iter_then_fail(size: int) -> Iterator[bytes]:
    yield b"x" * size
    raise ZeroDivisionError


@pytest.mark.parametrize("text", ["null", "[1]", "7", '"x"', "", "{"])
def test_a_json_file_that_holds_no_object_is_named_and_a_note_is_made_again(tmp_path, text):
    storage = Storage(str(tmp_path))
    storage.write("a.json", text.encode())
    with pytest.raises(UserError, match=r"a.json (holds no JSON object|is not JSON .*): restore or delete it"):
        storage.read_json("a.json")
    assert storage.read_note("a.json") is None
    assert storage.read_note("b.json") is None
    storage.write_json("a.json", {"files": 3})
    assert storage.read_note("a.json", "files") == {"files": 3}
    assert storage.read_note("a.json", "files", "digest") is None
