"""Runs of other Prefect deployments, for training jobs that one of them does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelling

from grape_service.errors import StageError, UserError
from grape_service.json_types import JsonObject

_ENDS = {StateType.COMPLETED: "succeeded", StateType.CANCELLED: "cancelled"}


class PrefectDeployments:
    """Starts, follows and cancels runs at PREFECT_API_URL; see workers.training.runs.Deployments."""

    def start(self, name: str, parameters: JsonObject, key: str) -> str:
        """Id of the deployment's one run for `key`. Raises UserError where there is no such deployment."""
        with _server(f"start the deployment {name}"):
            try:
                run = run_deployment(name, parameters=parameters, idempotency_key=key, timeout=0)
            except ObjectNotFound:
                raise UserError(f"there is no deployment '{name}' at {PREFECT_API_URL.value()}") from None
            except PrefectHTTPStatusError as error:
                if error.response.status_code not in (409, 422):
                    raise
                raise UserError(f"the deployment {name} refuses these parameters: {error.response.text}") from None
        return str(cast(FlowRun, run).id)

    def started(self, key: str, seconds: float | None = None) -> str | None:
        """Id of the run that was started for `key`, asked for once within `seconds`; None where there is none."""
        asked = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key]))
        with _server(f"look for the flow run of the job {key}", seconds) as client:
            found = client.read_flow_runs(flow_run_filter=asked, limit=1)
        return str(found[0].id) if found else None

    def state(self, run_id: str, seconds: float | None = None) -> tuple[str, str]:
        """(running, succeeded, failed or cancelled; the same in Prefect's words), asked for once within `seconds`."""
        with _server(f"follow the flow run {run_id}", seconds) as client:
            try:
                state = client.read_flow_run(UUID(run_id)).state
            except ObjectNotFound:
                return "failed", "a flow run that Prefect does not know any more: it was deleted"
        if state is None or not state.is_final():
            return "running", state.name or "" if state else ""
        words = f"{state.name}: {state.message}" if state.message else state.name or state.type.value
        return _ENDS.get(state.type, "failed"), words

    def cancel(self, run_id: str, seconds: float | None = None) -> None:
        """Ask the run to end unless it has; whoever runs it sees to that. Once and within `seconds`, where these are
        given. Raises StageError where Prefect refuses."""
        with _server(f"cancel the flow run {run_id}", seconds) as client, contextlib.suppress(ObjectNotFound):
            answer: OrchestrationResult[Any] = client.set_flow_run_state(UUID(run_id), Cancelling())
            if answer.status != SetStateStatus.ACCEPT and not (answer.state and _is_ending(answer.state)):
                reason = getattr(answer.details, "reason", None) or answer.status.value
                raise StageError(f"Prefect refuses to cancel the flow run {run_id}: {reason}")


def _is_ending(state: State) -> bool:
    return state.is_cancelling() or state.is_final()


@contextmanager
def _server(purpose: str, seconds: float | None = None) -> Iterator[SyncPrefectClient]:
    address = PREFECT_API_URL.value()
    if not address:
        raise UserError(f"to {purpose}, set PREFECT_API_URL to the Prefect server that has it")
    once = {PREFECT_CLIENT_MAX_RETRIES: 0} if seconds else {}
    try:
        with (
            temporary_settings(once),
            get_client(httpx_settings={"timeout": seconds} if seconds else None, sync_client=True) as client,
        ):
            yield client
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        raise StageError(f"Prefect at {address} did not {purpose}: {error or type(error).__name__}") from error
