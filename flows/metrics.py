"""Metrics of runs that do not start, for Prometheus, which Prefect's server has none of.

`python -m flows.metrics [PORT [ADDRESS]]` serves them: numbers alone, without names of runs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import State, StateType
from prometheus_client import REGISTRY, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

PORT = 8081
MAX_RUNS = 200
TAG = "grape"


class UnstartedRuns(Collector):
    """Runs that a worker took and that have not started since: those Pending, and those put back from there."""

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """One number each, asked of the server whenever Prometheus asks; the scrape fails where the server is away."""
        with get_client(sync_client=True) as client:
            seconds = unstarted_seconds(client)
        yield GaugeMetricFamily("grape_unstarted_runs", "Runs that were taken and did not start.", len(seconds))
        yield GaugeMetricFamily(
            "grape_unstarted_seconds", "Since the longest waiting of them was taken.", max(seconds, default=0.0)
        )

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing is asked of the server before the first scrape."""
        return []


def unstarted_seconds(client: SyncPrefectClient) -> list[float]:
    """For each run that was taken and has not started since: the seconds since it was taken first."""
    waiting = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.SCHEDULED])
    asked = FlowRunFilter(tags=FlowRunFilterTags(all_=[TAG]), state=FlowRunFilterState(type=waiting))
    runs = client.read_flow_runs(flow_run_filter=asked, limit=MAX_RUNS)
    taken = [first_taken(client.read_flow_run_states(run.id)) for run in runs]
    now = datetime.now(UTC)
    return [(now - one).total_seconds() for one in taken if one is not None]


def first_taken(states: Sequence[State]) -> datetime | None:
    """When a run was first taken by a worker since it ran last; None where it was not."""
    taken: datetime | None = None
    for state in sorted(states, key=lambda state: state.timestamp):
        if state.type == StateType.PENDING:
            taken = taken or state.timestamp
        elif state.type != StateType.SCHEDULED:
            taken = None
    return taken


def main(port: str = str(PORT), address: str = "127.0.0.1") -> None:
    """Serve the metrics until the process is ended."""
    REGISTRY.register(UnstartedRuns())
    start_http_server(int(port), address)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
