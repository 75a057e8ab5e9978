"""Fixtures that any test may ask for: a real S3 server, and a fresh place to write to."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from grape_service.storage.storage import Storage
from tests.file_marks import left_out
from tests.seaweed import BUCKET, SeaweedServer, running_server

ROOT = str(Path(__file__).resolve().parent.parent)
# Processes that tests start import this package and the tests' own modules as this process does.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

# The folder of datasets that was used last, and digests of models, are not kept where the developer's own are.
os.environ.setdefault("GRAPE_CACHE", os.path.join(tempfile.gettempdir(), f"grape-tests-{os.getuid()}"))

# Processes of tests share the cores: threads that spin while they wait for each other would slow all of them down.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would the processes that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_numbers = itertools.count()

# A busy machine is no failure.
settings.register_profile("repository", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repository")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file that `-m quick` and the like leave out is not imported."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if is_test and left_out(collection_path, config.option.markexpr) else None


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Ray in a process that files share would give the next of them its authentication mode."""
    if "ray" in sys.modules and not item.get_closest_marker("alone") and not item.get_closest_marker("vllm"):
        assert not sys.modules["ray"].is_initialized(), f"{item.path.name} starts Ray: mark it pytest.mark.alone"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """SeaweedFS for the whole session; see `SeaweedServer` for endpoint, environment, options."""
    with running_server(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def s3_url(s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty s3:// folder; endpoint and credentials are in the environment, as a user would have them."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/test-{next(_numbers):04d}"


@pytest.fixture
def restartable_s3(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SeaweedServer]:
    """A server of the test's own, to kill and start again; the environment points to it."""
    with running_server(tmp_path_factory.mktemp("seaweed-own")) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(params=["local", "s3"])
def any_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage, once on local disk and once on S3."""
    if request.param == "local":
        return Storage(str(tmp_path / "storage"))
    return Storage(request.getfixturevalue("s3_url"))
