"""A deployed run from its start to its end, whatever happens to its process, its worker or the Prefect server.

A run whose process is gone is put back into the queue, the same run with its parameters: by its worker, which calls
`start_again`, or by the server where the worker is gone too (deploy/automations.yaml). The fourth try only says that
there were three. The job on a cluster has an id made from the run's, by which the next try finds it. A thread looks for
what Prefect's worker misses once its server was away: it stops looking for runs to be cancelled after half a minute.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import AwaitingRetry, Cancelled

from grape_service.config.schema import NotifyConfig
from grape_service.errors import StageError, best_effort
from grape_service.storage.options import wait_for_first_answer
from grape_service.webhooks import failed, notify
from workers.cluster.submit import job_of

log = logging.getLogger(__name__)

MAX_TRIES = 3
LOOK_SECONDS = 10.0
CANCEL_SECONDS = 30.0
"""How long Prefect's worker may take to end a run that is being cancelled, before the run ends itself."""
FINAL = (StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED)

GONE = "Its process is gone"
"""Begins the message of each state that says so, here and in deploy/automations.yaml."""
SAY_SECONDS = 120.0
"""How long a server that is away is asked to start a run again."""


def start_again(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """What a worker does where the process of a run has died: longer before each try, as what killed it may pass.

    A run that no deployment started, and one that died in the try that was to say so, stay as they are.
    """
    deadline = time.monotonic() + SAY_SECONDS
    while flow_run.deployment_id is not None:
        try:
            with get_client(sync_client=True) as client:
                deaths = _history(client, flow_run.id)[1]
                if deaths < MAX_TRIES:
                    at = datetime.now(UTC) + timedelta(seconds=_delay(flow_run) * 2**deaths)
                    message = f"{GONE}: {state.message or 'it ended without a word'}"
                    client.set_flow_run_state(flow_run.id, AwaitingRetry(scheduled_time=at, message=message))
            return
        except (httpx.HTTPError, PrefectHTTPStatusError):
            if time.monotonic() > deadline:
                raise
            time.sleep(2.0)


def _delay(run: FlowRun) -> float:
    policy = run.empirical_policy
    delay = policy.retry_delay if policy is not None else None
    return float(delay) if isinstance(delay, int | float) else 60.0


@contextlib.contextmanager
def as_one_run(name: str, notification: NotifyConfig | None = None) -> Iterator[None]:
    """Around what a flow does for the dataset `name`. Raises StageError where the run has died MAX_TRIES times, and
    tells `notification` of it. A flow that no deployment started has somebody who looks after it: nothing happens.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    if run is None or run.deployment_id is None:
        yield
        return
    wait_for_first_answer()
    tries = deaths = 0
    with best_effort("ask Prefect for the run's tries"), get_client(sync_client=True) as client:
        run = client.read_flow_run(run.id)
        tries, deaths = _history(client, run.id)
    if deaths and tries > MAX_TRIES:
        error = StageError(
            f"the process of this run ended without a word in {deaths} of {tries - 1} tries (out of memory, "
            "killed, or its node was lost; the worker's log says which): run again; stored scores are reused"
        )
        notify(notification, failed(error, name, 0.0))
        raise error
    watch = _Watch(run)
    watch.start()
    try:
        with job_of(str(run.id)):
            yield
    except BaseException:
        if watch.is_cancelled:  # else the state would be Crashed
            with best_effort("tell Prefect that the run was cancelled"), get_client(sync_client=True) as client:
                client.set_flow_run_state(run.id, Cancelled(), force=True)
        raise
    finally:
        watch.over.set()


def _history(client: SyncPrefectClient, run_id: UUID) -> tuple[int, int]:
    """Tries of a run so far, and how many ended without a word, since somebody last started it."""
    tries = deaths = 0
    is_begun = (
        False  # since its process was last gone: a process that ends by a signal may say so before its worker does
    )
    for state in sorted(client.read_flow_run_states(run_id), key=lambda state: state.timestamp):
        if state.type in FINAL:
            tries = deaths = 0
        tries += state.type == StateType.RUNNING
        is_begun |= state.type in (StateType.PENDING, StateType.RUNNING)
        if (state.message or "").startswith(GONE):
            deaths += is_begun
            is_begun = False
    return tries, deaths


class _Watch(threading.Thread):
    """Looks at the run's state every LOOK_SECONDS; a server that is away is asked again."""

    def __init__(self, run: FlowRun):
        super().__init__(name="run-watch", daemon=True)
        self.run_id, self.count = run.id, run.run_count
        self.over = threading.Event()
        self.is_cancelled = False
        self.context = contextvars.copy_context()  # Prefect's settings

    def run(self) -> None:
        self.context.run(self._look)

    def _look(self) -> None:
        since: float | None = None
        while not self.over.wait(LOOK_SECONDS):
            try:
                with get_client(sync_client=True) as client:
                    found = client.read_flow_run(self.run_id)
            except Exception:  # whatever a server that starts or ends answers
                continue
            if found.run_count > self.count:
                # The server took this process for dead, and another one has the run: its job stays for that one.
                log.error("another process has this run: this one ends")
                os._exit(0)  # for the worker this is no crash; a private Ray ends with it
            is_cancelling = found.state is not None and found.state.is_cancelling()
            since = (since or time.monotonic()) if is_cancelling else None
            if since is not None and time.monotonic() - since >= CANCEL_SECONDS:
                self.is_cancelled = True
                os.kill(os.getpid(), signal.SIGTERM)  # as the worker would have done
                return
