"""grape check: read everything, run nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import typer

from grape_service.cli.output import ConfigArgument, JsonOption, SetOption, config_of, print_json, print_table
from grape_service.errors import UserError

if TYPE_CHECKING:
    from grape_service.config.schema import Config

TITLES = {"groups": "groups of files", "sources": "sources and who wrote them"}
TIMEOUT_SECONDS = 5


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: grape check config.yaml")(check)


def check(config: ConfigArgument, sets: SetOption = None, as_json: JsonOption = False) -> None:
    """Look at storage, pool, models and tokens, and score a sample of recorded log-probabilities again."""
    from workers.engines.aside import ModelsAside

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as engines have it, see workers/scoring/replicas.py
    models = ModelsAside()
    try:
        settings = config_of(config, sets)
        models.begin(settings)
        from grape_service.estimate.finding import Finding, Table
        from grape_service.estimate.preflight import check as findings_of

        found = list(findings_of(settings, models, probes_of(settings)))
    finally:
        models.close()
    findings = [one for one in found if isinstance(one, Finding)]
    tables = [one for one in found if isinstance(one, Table)]
    if as_json:
        print_json(
            {"findings": [finding.to_json() for finding in findings], **{table.name: table.rows for table in tables}}
        )
    else:
        for table in tables:
            if table.rows:
                columns = [name for name in table.rows[0] if name != "shapes"]
                print_table(TITLES[table.name], columns, [[row[name] for name in columns] for row in table.rows])
        print_table("", ["", "", "what was seen"], [[f.what, f.status, f.detail] for f in findings])
    errors = [finding for finding in findings if finding.status == "error"]
    if errors:
        raise UserError(f"{errors[0].what}: {errors[0].detail}")


def probes_of(config: Config) -> dict[str, Callable[[], tuple[str, str]]]:
    """What lies outside this package: engines, the cluster and webhook that are named, what training needs."""
    probes: dict[str, Callable[[], tuple[str, str]]] = {"engines": partial(_engines, config)}
    if config.workers.ray_address != "auto":
        probes["workers.ray_address"] = partial(_answers, config.workers.ray_address)
    if config.notify is not None and config.notify.webhook:
        probes["notify.webhook"] = partial(_answers, config.notify.webhook)
    if config.train is not None:
        probes["train"] = partial(_training, config)
    return probes


def _engines(config: Config) -> tuple[str, str]:
    from workers.engines.choose import refuse_missing_engines

    refuse_missing_engines(config)
    return "ok", ", ".join(dict.fromkeys(policy.engine for policy in config.policies()))


def _answers(address: str) -> tuple[str, str]:
    """Whether something listens there; nothing is sent, and what may be secret is not repeated."""
    parts = urlsplit(address)
    try:
        port = parts.port or {"https": 443}.get(parts.scheme, 80)
        socket.create_connection((parts.hostname or "", port), TIMEOUT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{parts.hostname} does not answer: {error}") from None
    return "ok", f"{parts.hostname} answers"


def _training(config: Config) -> tuple[str, str]:
    from workers.stages.train import checked_jobs

    assert config.train is not None
    return "ok", ", ".join(checked_jobs(config.train, config.workers.ray_address))
