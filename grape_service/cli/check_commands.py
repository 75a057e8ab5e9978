"""grape check: read everything, run nothing."""

from __future__ import annotations

from typing import Any

import typer

from grape_service.cli.output import ConfigArgument, JsonOption, SetOption, config_of, print_json, print_table
from grape_service.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: grape check config.yaml")(check)


def check(config: ConfigArgument, sets: SetOption = None, as_json: JsonOption = False) -> None:
    """Look at storage, pool, models and tokens, and score a sample of recorded log-probabilities again."""
    from grape_service.estimate.preflight import check as findings_of
    from workers.engines.choose import load_engine

    engines: dict[str, Any] = {}

    def score(policy: Any, folder: str, batch: Any, temperature: float) -> Any:
        if folder not in engines:
            engines[folder] = load_engine(policy, folder)
        return engines[folder].score(batch, temperature)

    findings = list(findings_of(config_of(config, sets), score))
    for engine in engines.values():
        engine.close()
    if as_json:
        print_json({"findings": [finding.to_json() for finding in findings]})
    else:
        print_table("", ["", "", "what was seen"], [[f.what, f.status, f.detail] for f in findings])
    errors = [finding for finding in findings if finding.status == "error"]
    if errors:
        raise UserError(f"{errors[0].what}: {errors[0].detail}")
