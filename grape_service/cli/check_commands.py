"""grape check: read everything, run nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import typer

from grape_service.cli.output import (
    ConfigArgument,
    JsonOption,
    SetOption,
    config_of,
    events_told,
    print_json,
    print_table,
)
from grape_service.cli.packages import need_run
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
    need_run()
    from workers.engines.side_process import ModelsInSideProcess

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as engines have it, see workers/scoring/replicas.py
    models = ModelsInSideProcess()
    try:
        settings = config_of(config, sets)
        models.begin(settings)
        from grape_service.estimate.finding import Finding, Table
        from grape_service.estimate.preflight import check as findings_of

        with events_told():
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
        probes["workers.ray_address"] = partial(_cluster, config.workers.ray_address)
    if config.notify is not None and config.notify.webhook:
        probes["notify.webhook"] = partial(_answers, config.notify.webhook)
    if config.train is not None:
        probes["train"] = partial(_training, config)
    return probes


def _engines(config: Config) -> tuple[str, str]:
    from workers.engines.choose import imports_transformers, refuse_missing_engines
    from workers.engines.transformers.arguments import engine_args, unknown_args

    refuse_missing_engines(config)
    engines = ", ".join(dict.fromkeys(policy.engine for policy in config.policies()))
    is_here = config.workers.ray_address == "auto"
    here = [policy for policy in config.policies() if is_here and imports_transformers(policy)]
    for policy in here:
        engine_args(policy)
    if ignored := sorted({name for policy in here for name in unknown_args(policy)}):
        return "warning", f"{engines}; only vLLM reads engine_args {', '.join(ignored)}, and it is not installed here"
    return "ok", engines


def _answers(address: str) -> tuple[str, str]:
    """Whether something listens there; nothing is sent, and what may be secret is not repeated."""
    parts = urlsplit(address)
    try:
        port = parts.port or {"https": 443}.get(parts.scheme, 80)
        socket.create_connection((parts.hostname or "", port), TIMEOUT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{parts.hostname} does not answer: {error}") from None
    return "ok", f"{parts.hostname} answers"


def _cluster(address: str) -> tuple[str, str]:
    """Whether a Ray cluster answers there and takes our token, and nobody else can write to its folders here."""
    from workers.cluster.jobs import job_server

    _answers(address)
    with job_server(address) as server:
        nodes, seen = server.refuse_open_folders()
    there = f"{urlsplit(address).hostname} answers, {nodes} node{'' if nodes == 1 else 's'}"
    if seen:
        return "ok", f"{there}; no other user of this machine can write to Ray's folders"
    return "ok", f"{there}; whether other users can write to Ray's folders there, the job sees"


def _training(config: Config) -> tuple[str, str]:
    from grape_service.config.schema import gate_verifier
    from grape_service.gather.verdicts import judge_of
    from workers.stages.train import check_cluster, check_prompts, checked_jobs

    assert config.train is not None
    jobs = checked_jobs(config.train, config.workers.ray_address, config.storage)
    check_prompts(config.train, [group.path for group in config.pool.groups], config.storage)
    check_cluster(config.train, config.workers.ray_address)
    verify = gate_verifier(config) if config.train.gate is not None and config.train.gate.pass_at else None
    if verify is not None and not verify.asks_model:
        judge_of(verify)
    rounds = config.train.rounds
    return "ok", ", ".join([*jobs, *([f"{rounds} rounds"] if rounds > 1 else [])])
