"""Registering a config as a scheduled deployment of a flow, in one command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import orjson
from prefect import Flow
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.schedules import Cron, Schedule
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from pydantic import ValidationError

from flows import automations
from flows.curate import curate
from flows.secrets import VARIABLE, hidden, secrets_of
from flows.server import OPEN, is_open
from grape_service.config.local_paths import with_absolute_paths
from grape_service.config.schema import Config
from grape_service.errors import StageError, UserError

ROOT = Path(__file__).resolve().parents[1]
RETRIES = {"PREFECT_FLOWS_DEFAULT_RETRIES": "2", "PREFECT_FLOWS_DEFAULT_RETRY_DELAY_SECONDS": "60"}
HEARTBEAT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
"""By which deploy/automations.yaml sees that a run is gone."""
LIMIT = {"GRAPE_FLOW_TIMEOUT_SECONDS": "172800"}


@dataclass(frozen=True)
class Deployed:
    """A deployment of Prefect's."""

    name: str  # flow/deployment
    id: str
    url: str  # its page in Prefect
    secret_block: str | None  # which holds what the config hides
    warnings: tuple[str, ...] = ()


def deploy(config: Config, pool: str, cron: str | None = None, timezone: str = "UTC") -> Deployed:
    """Register the whole job of `config` for the work pool `pool`, on a schedule where `cron` is given; a deployment of
    that dataset that is there already is replaced. Secrets of the config go into a secret block.

    Raises UserError for a pool or schedule that is not valid, StageError where Prefect does not answer.
    """
    api = PREFECT_API_URL.value()
    if not api:
        raise UserError("to deploy, set PREFECT_API_URL to the Prefect server, such as http://127.0.0.1:4200/api")
    try:
        with get_client(sync_client=True) as client:
            try:
                client.read_work_pool(pool)
            except ObjectNotFound:
                raise UserError(
                    f"there is no work pool '{pool}' at {api}: `prefect work-pool create {pool} --type process`"
                ) from None
            automations.ensure(client)
        return _deploy(config, pool, cron, timezone, api)
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        raise StageError(f"Prefect at {api} did not take the deployment: {error}") from error


def _deploy(config: Config, pool: str, cron: str | None, timezone: str, api: str) -> Deployed:
    environment = {"PYTHONPATH": str(ROOT), **RETRIES, **HEARTBEAT, **LIMIT}
    secrets = secrets_of(config)
    block = f"grape-{config.name}" if secrets else None
    schedule = _schedule(cron, timezone)
    if block:
        Secret(value=orjson.dumps(secrets).decode()).save(block, overwrite=True)
        environment[VARIABLE] = f"{{{{ prefect.blocks.secret.{block} }}}}"
    values = with_absolute_paths(hidden(config))
    source = cast(Flow[..., Any], Flow.from_source(source=str(ROOT), entrypoint="flows/curate.py:curate"))
    deployment_id = source.deploy(
        name=config.name,
        work_pool_name=pool,
        schedule=schedule,
        parameters={"config": values, "until": "release", "force": False},
        job_variables={"env": environment},
        tags=["grape", "release"],
        description=curate.description,
        build=False,
        push=False,
        print_next_steps=False,
        ignore_warnings=True,  # that a process pool on one machine could be served instead
    )
    root = PREFECT_UI_URL.value() or f"{urlsplit(api).scheme}://{urlsplit(api).netloc}"
    name = f"{curate.name}/{config.name}"
    warnings = (OPEN.format(api),) if is_open(api) else ()
    return Deployed(name, str(deployment_id), f"{root}/deployments/deployment/{deployment_id}", block, warnings)


def _schedule(cron: str | None, timezone: str) -> Schedule | None:
    if cron is None:
        return None
    try:
        CronSchedule(cron=cron, timezone=timezone)
        return Cron(cron, timezone=timezone)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--cron '{cron}' with --timezone '{timezone}' is no schedule: {problem}") from None
