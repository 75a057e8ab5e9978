"""A private Ray: on loopback alone, closed to other users, gone when its run is, whatever ends that."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from grape_service.config.schema import WorkersConfig
from workers.cluster import scratch
from workers.cluster.ray import need_ray, ray_for, ray_is_up, starting_ray
from workers.cluster.scratch import MARK, end_leftovers, fits, is_of, places

pytestmark = pytest.mark.alone

NOBODY = 65534
HOLD = """
import os, sys, time
from workers.cluster.ray import private_ray
with private_ray(2):
    print(os.path.dirname(os.environ["RAY_AUTH_TOKEN_PATH"]), flush=True)
    time.sleep(120)
"""
LOOK = """
import os, sys
from ray._raylet import Config, GcsClient
for name in sys.argv[3:]:
    if name == "nobody":
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    open(sys.argv[2] + "/token").read()
    print("token read")
except PermissionError:
    print("no token")
try:
    os.listdir(sys.argv[2] + "/r/session/sockets")
    print("sockets seen")
except PermissionError:
    print("no sockets")
try:
    print("answered", len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)))
except Exception as error:
    print("refused", type(error).__name__)
"""


def worker_pid() -> int:
    return os.getpid()


def is_worker(line: str) -> bool:
    return "default_worker.py" in line or line.startswith("ray::IDLE")


def of_ray(folder: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if is_of(process, folder)]


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    """The scratch folder of a private Ray that has run a task."""
    with ray_for(WorkersConfig()):
        assert not ray_is_up()  # nothing has asked for it yet
        need_ray()
        folder = str(Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent)
        # Ray would wait for ever for a worker of its own accord that is killed as it starts.
        assert not [one for one in of_ray(folder) if is_worker(" ".join(one.cmdline()[:4]))]
        assert ray.get(ray.remote(worker_pid).remote()) != os.getpid()
        yield folder
    assert not os.path.exists(folder)
    assert not of_ray(folder)
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_every_listener_is_on_loopback(folder: str) -> None:
    processes = of_ray(folder)
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {"gcs_server", "raylet"} <= {process.name() for process in processes}
    assert len(listening) > 5  # GCS, raylet, agents, workers
    assert set(listening) == {"127.0.0.1"}


def test_token_and_sockets_are_for_the_owner(folder: str) -> None:
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(f"{folder}/token").st_mode) == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_another_user_reads_nothing_and_is_not_answered(folder: str) -> None:
    address = ray.get_runtime_context().gcs_address
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_TOKEN")}
    wrong = {**others, "RAY_AUTH_TOKEN": "0" * 64}
    for environment, user, expected in (
        (dict(os.environ), "owner", ["token read", "sockets seen", "answered 1"]),
        (wrong, "nobody", ["no token", "no sockets", "refused"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", LOOK, address, folder, user],
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
        lines = done.stdout.splitlines()
        assert len(lines) == 3, done.stderr[-2000:]
        assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


def test_a_ray_that_was_begun_and_not_needed_leaves_nothing() -> None:
    before = os.environ.get("RAY_AUTH_TOKEN_PATH")
    with starting_ray(2):
        folder = str(Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent)
        deadline = time.monotonic() + 30
        while not any(process.name() == "gcs_server" for process in of_ray(folder)) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not os.path.exists(folder)
    assert not of_ray(folder)
    assert os.environ.get("RAY_AUTH_TOKEN_PATH") == before


@pytest.fixture
def held() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that holds a private Ray, and its folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = process.stdout.readline().strip()
    try:
        assert os.path.exists(f"{folder}/token")
        yield process, folder
    finally:
        process.kill()
        process.wait()
        scratch.end_processes(folder)
        scratch.remove(folder)


def wait_until_gone(folder: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (os.path.exists(folder) or of_ray(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not of_ray(folder)
    assert not os.path.exists(folder)


@pytest.mark.drill
def test_ray_ends_with_a_run_that_is_killed(held: tuple[subprocess.Popen[str], str]) -> None:
    process, folder = held
    process.kill()
    wait_until_gone(folder, 30)


@pytest.mark.drill
def test_the_next_run_ends_what_is_left_and_nothing_that_lives(
    folder: str, held: tuple[subprocess.Popen[str], str]
) -> None:
    process, left = held
    assert left not in end_leftovers()
    head = next(one for one in of_ray(left) if "workers.cluster.head" in " ".join(one.cmdline()))
    head.send_signal(signal.SIGSTOP)  # so that it cannot end the rest
    process.kill()
    process.wait()
    assert of_ray(left)
    assert end_leftovers() == [left]
    assert not of_ray(left)
    assert not os.path.exists(left)
    assert of_ray(folder)
    assert ray.get(ray.remote(worker_pid).remote())


def test_sockets_fit_where_a_mac_keeps_its_temporary_files() -> None:
    assert fits("/var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T")
    assert not fits("/" + "a" * 60)


@pytest.mark.parametrize("kind", ["long", "missing", "file"])
def test_a_temporary_folder_that_cannot_be_used_is_passed_over(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / ("job" * 30 if kind == "long" else kind)
    if kind == "long":
        place.mkdir()
    elif kind == "file":
        place.write_text("")
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert str(place) not in places()
    with scratch.scratch_folder() as made:
        assert fits(os.path.dirname(made.path))
        assert os.stat(made.token_path).st_size == 64
    assert not os.path.exists(made.path)


def test_the_mark_is_not_in_our_own_environment() -> None:
    assert MARK not in os.environ
