"""What all flows share: their time limit, and how a stage becomes a Prefect task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRunPolicy
from prefect.context import FlowRunContext
from prefect.runtime import flow_run as this_run

from grape_service.errors import UserError, best_effort
from grape_service.webhooks import failures_may_be_tried_again
from workers.time_limit import limit_seconds

TIMEOUT_SECONDS = limit_seconds()
"""A flow that takes longer fails; its scores are kept. Deployments set it in their environment."""

Function = TypeVar("Function", bound=Callable[..., Any])


def as_task(name: str, function: Function) -> Function:
    """A stage of the pipeline as a Prefect task; its arguments are references, so nothing is cached."""
    return task(name=name, cache_policy=NO_CACHE)(function)  # type: ignore[return-value]


def run_name() -> str:
    """A flow run is named after its dataset."""
    parameters = this_run.get_parameters()
    reference, config = parameters.get("reference"), parameters.get("config")
    if isinstance(reference, str):
        return reference.rpartition("/")[2]
    name = config.get("name") if isinstance(config, dict) else getattr(config, "name", None)
    return str(name or this_run.get_flow_name())


@contextlib.contextmanager
def user_errors_are_final() -> Iterator[None]:
    """A user error inside the block is not tried again, as it would come back; what is, notifies after the last try."""
    try:
        with failures_may_be_tried_again(_is_tried_again):
            yield
    except UserError:
        with best_effort("tell Prefect that there is nothing to try again"):
            context = FlowRunContext.get()
            if context is not None and context.flow_run is not None:
                policy = FlowRunPolicy(retries=0, retry_delay=0)
                with get_client(sync_client=True) as client:
                    client.update_flow_run(context.flow_run.id, empirical_policy=policy)
        raise


def _is_tried_again(error: Exception) -> bool:
    """Whether Prefect starts this flow run again after an error: as its server decides it, by the tries so far."""
    context = FlowRunContext.get()
    if isinstance(error, UserError) or context is None or context.flow_run is None:
        return False
    with best_effort("ask Prefect whether there is another try"), get_client(sync_client=True) as client:
        run = client.read_flow_run(context.flow_run.id)
        return run.run_count <= (run.empirical_policy.retries or 0)
    return False
