"""What all flows share: their time limit, and how a stage becomes a Prefect task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from workers.time_limit import limit_seconds

TIMEOUT_SECONDS = limit_seconds()
"""A flow that takes longer fails; its scores are kept. Deployments set it in their environment."""

Function = TypeVar("Function", bound=Callable[..., Any])


def as_task(name: str, function: Function) -> Function:
    """A stage of the pipeline as a Prefect task; its arguments are references, so nothing is cached."""
    return task(name=name, cache_policy=NO_CACHE)(function)  # type: ignore[return-value]
