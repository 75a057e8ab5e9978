"""What all flows share: their time limit, and how a stage becomes a Prefect task."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

TIMEOUT_SECONDS = float(os.environ.get("GRAPE_FLOW_TIMEOUT_SECONDS") or 0) or None
"""A flow that takes longer fails; its scores are kept. Deployments set it in their environment."""

Function = TypeVar("Function", bound=Callable[..., Any])


def as_task(name: str, function: Function) -> Function:
    """A stage of the pipeline as a Prefect task; its arguments are references, so nothing is cached."""
    return task(name=name, cache_policy=NO_CACHE)(function)  # type: ignore[return-value]
