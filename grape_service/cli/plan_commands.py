"""grape plan: counts, tokens, GPU hours, time and money before anything runs."""

from __future__ import annotations

from typing import Annotated

import typer

from grape_service.cli.output import ConfigArgument, JsonOption, SetOption, config_of, print_json, print_table, say
from grape_service.progress.reporter import duration


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: grape plan config.yaml --replicas 8 --price 2.5")(plan)


def plan(
    config: ConfigArgument,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Scoring engines at the same time.")] = 1,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Device to plan for, such as H100; default: this machine's, or the cluster's."),
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option("--tokens-per-second", min=0.001, help="Of one replica, where you know it.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Price of a GPU hour.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Count the whole pool instead of a sample.")] = False,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count the pool's tokens and estimate what sampling and scoring take. Starts no engine."""
    from grape_service.estimate.plan import make_plan
    from grape_service.models.imports import import_without_extras, is_own_process

    settings = config_of(config, sets)
    if is_own_process():
        import_without_extras(with_torch=settings.runs_own_code)
    found = make_plan(settings, replicas, device, tokens_per_second, price, exact)
    if as_json:
        print_json(found.to_json())
        return
    print_table(
        "pool", ["", "count"], [[name.replace("_", " "), f"{count:,.0f}"] for name, count in found.pool.items()]
    )
    say(found.counted)
    if settings.train is not None and settings.train.rounds > 1:
        say(f"rounds     {settings.train.rounds}: the figures are of the first, and training is not in them")
    for sentence in found.checkpoints:
        say(f"checkpoint {sentence}")
    rows = [
        [p.role, p.model, f"{p.rows:,.0f}", f"{p.tokens:,.0f}", f"{p.tokens_per_second:,.0f}", hours(p.gpu_hours)]
        for p in found.policies
    ]
    unit = "CPU" if found.policies and all(p.device == "cpu" for p in found.policies) else "GPU"
    print_table(
        "to sample and score" if settings.gather is not None else "to score",
        ["policy", "model", "rows", "tokens", "tokens/s a replica", f"{unit} time"],
        rows,
    )
    if found.race is not None:
        say(found.race["sentence"])
    if any(p.role == "behavior" for p in found.policies):
        say("behavior rows: those that select is expected to keep, times the share of their sources in the pool")
    for origin in sorted({f"{p.device}: {p.origin}" for p in found.policies}):
        say(f"tokens/s on {origin}")
    say(f"{unit} time   {hours(found.gpu_hours)}")
    doing = "sampling and scoring" if settings.gather is not None else "scoring"
    say(f"wall time  {hours(found.wall_seconds / 3600)} of {doing} with {replicas} replica{'s' * (replicas > 1)}")
    if found.cost is not None:
        say(f"cost       {found.cost:,.2f} at {price:g} a GPU hour")


def hours(value: float) -> str:
    """Hours of work in a unit that fits."""
    if value >= 10:
        return f"{value:,.0f} h"
    if 0 < value * 3600 < 1:
        return "under 1 s"
    return duration(value * 3600)
