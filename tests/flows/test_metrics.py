"""Runs that a worker took and that do not start, as Prometheus sees them, of a real Prefect server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State, StateType
from prefect.states import AwaitingRetry, Completed, Pending, Running, Scheduled
from prefect.testing.utilities import prefect_test_harness
from prometheus_client import CollectorRegistry, generate_latest

from flows.metrics import TAG, UnstartedRuns, first_taken

pytestmark = pytest.mark.alone
BEGAN = datetime(2026, 11, 29, tzinfo=UTC)


@flow
def nothing() -> None:
    """Is never run."""


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    with prefect_test_harness(server_startup_timeout=120), get_client(sync_client=True) as client:
        yield client


def told() -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(UnstartedRuns())
    lines = [line.split(" ") for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


@pytest.mark.timeout(240)
def test_runs_that_were_taken_and_did_not_start_are_told(client: SyncPrefectClient) -> None:
    assert told() == {"grape_unstarted_runs": 0.0, "grape_unstarted_seconds": 0.0}
    client.create_flow_run(nothing, tags=["other"], state=Pending())
    client.create_flow_run(nothing, tags=[TAG], state=Scheduled())
    run = client.create_flow_run(nothing, tags=[TAG], state=Pending())
    found = told()
    assert found["grape_unstarted_runs"] == 1
    assert found["grape_unstarted_seconds"] > 0
    client.set_flow_run_state(run.id, AwaitingRetry(), force=True)  # as automations.yaml puts it back
    assert told()["grape_unstarted_runs"] == 1
    client.set_flow_run_state(run.id, Running(), force=True)
    assert told()["grape_unstarted_runs"] == 0
    client.set_flow_run_state(run.id, Completed(), force=True)
    assert told()["grape_unstarted_runs"] == 0


@pytest.mark.parametrize(
    ("types", "taken"),
    [
        (["SCHEDULED"], None),
        (["SCHEDULED", "PENDING"], 1),
        (["SCHEDULED", "PENDING", "SCHEDULED", "PENDING"], 1),
        (["PENDING", "RUNNING", "SCHEDULED"], None),
        (["PENDING", "RUNNING", "SCHEDULED", "PENDING", "SCHEDULED"], 3),
    ],
)
def test_a_run_is_taken_when_a_worker_first_has_it_since_it_ran(types: list[str], taken: int | None) -> None:
    states = [State(type=StateType(one), timestamp=BEGAN + timedelta(minutes=n)) for n, one in enumerate(types)]
    assert first_taken(states[::-1]) == (None if taken is None else BEGAN + timedelta(minutes=taken))
