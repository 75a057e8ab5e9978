"""grape submit and grape jobs: runs as jobs of a Ray cluster."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from grape_service.cli.failing import at_interrupt
from grape_service.cli.output import ConfigArgument, JsonOption, SetOption, config_of, print_json, print_table, say
from grape_service.errors import UserError
from grape_service.progress.reporter import duration

AddressOption = Annotated[
    str, typer.Option("--address", envvar="GRAPE_RAY_ADDRESS", help="The head's Jobs API, http://head:8265.")
]
JobArgument = Annotated[str, typer.Argument(help="The job's id.", metavar="JOB")]

jobs = typer.Typer(help="Jobs that grape submit started: list, logs, stop.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(epilog="Example: grape submit config.yaml --address http://head:8265")(submit)
    app.add_typer(jobs, name="jobs")


def submit(
    config: ConfigArgument,
    address: AddressOption,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and leave it running.")] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="Use the code installed on the cluster instead of sending this one.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", help="Name of a variable of this environment that the job gets. Not for secrets."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make a new version even if nothing changed.")] = False,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a config as one job of a Ray cluster, show its log, end with its exit status."""
    from workers.cluster import submit
    from workers.cluster.jobs import job_server

    settings = config_of(config, sets)
    missing = [name for name in env or [] if name not in os.environ]
    if missing:
        raise UserError(f"--env {missing[0]}: this environment has no such variable")
    environment = {name: os.environ[name] for name in env or []}
    with job_server(address) as server:
        arguments = (submit.CONFIG_NAME, *(["--force"] if force else []))
        job = submit.submit(settings, server, arguments, not installed, environment)
        if detach:
            print_json({"job": job.job_id, "address": address}) if as_json else say(job.job_id)
            return
        at_interrupt(_goes_on(job.job_id))
        submit.write_error(f"job {job.job_id}; Ctrl-C leaves it running, `grape jobs stop {job.job_id}` ends it\n")
        status = submit.follow(server, job.job_id, submit.write_error)
        if as_json and status == 0:
            print_json({"job": job.job_id, **(submit.outcome_in(server.log(job.job_id)) or {})})
    raise typer.Exit(status)


@jobs.command("list", epilog="Example: grape jobs list --address http://head:8265")
def list_jobs(address: AddressOption, as_json: JsonOption = False) -> None:
    """Every job of the cluster, newest first."""
    from workers.cluster.jobs import job_server

    with job_server(address) as server:
        found = server.jobs()
    if as_json:
        print_json({"jobs": found})
        return
    rows = [[job["id"], job["state"], moment(job["started"]), took(job["started"], job["ended"])] for job in found]
    print_table(address, ["job", "state", "started", "took"], rows)


@jobs.command(epilog="Example: grape jobs logs grape-math-sft-20261123T101500-3fa9c1 --follow")
def logs(
    job: JobArgument,
    address: AddressOption,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends, then exit as it did.")] = False,
) -> None:
    """What a job has printed."""
    from workers.cluster import submit
    from workers.cluster.jobs import job_server

    with job_server(address) as server:
        if server.state(job) is None:
            raise UserError(f"{address} knows no job '{job}': see `grape jobs list`")
        if follow:
            at_interrupt(_goes_on(job))
            raise typer.Exit(submit.follow(server, job, write_out))
        write_out(server.log(job))


@jobs.command(epilog="Example: grape jobs stop grape-math-sft-20261123T101500-3fa9c1")
def stop(job: JobArgument, address: AddressOption) -> None:
    """End a job; what it scored is kept, and the next run resumes from there."""
    from workers.cluster.jobs import job_server

    with job_server(address) as server:
        if server.state(job) is None:
            raise UserError(f"{address} knows no job '{job}': see `grape jobs list`")
        server.stop(job)
        say(f"{job} {server.state(job)}")


def _goes_on(job: str) -> str:
    """What Ctrl-C says to whoever only looks on."""
    return f"no longer followed: the job {job} goes on; `grape jobs logs {job} --follow` follows it again"


def write_out(text: str) -> None:
    """A part of a log on standard output."""
    sys.stdout.write(text)
    sys.stdout.flush()


def moment(milliseconds: int | None) -> str:
    """Month, day and UTC time, or nothing: short, so that a job's id stays on one line."""
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%m-%d %H:%M}" if milliseconds else ""


def took(started: int | None, ended: int | None) -> str:
    """How long a job ran, or nothing while it does."""
    return duration((ended - started) / 1000) if started and ended else ""
