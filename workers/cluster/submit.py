"""A whole run as one job of a Ray cluster: packed, submitted through the Jobs API, followed to its exit status."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson
import yaml

from grape_service.config.local_paths import with_absolute_paths
from grape_service.config.schema import Config
from grape_service.errors import StageError, UserError, best_effort
from grape_service.progress.log_lines import PROGRESS, Replay
from grape_service.progress.reporter import reporter
from grape_service.release.reference import parse_reference
from workers.cluster.jobs import JobRequest, JobServer, LogBroken, job_server
from workers.cluster.ray import IN_CLUSTER
from workers.outcome import Outcome

POLL_SECONDS = 1.0
PACKAGES = ("grape_service", "workers", "flows")
What = Literal["gather", "score", "select", "release", "weigh"]
COMMANDS: dict[What, str] = {
    "gather": "gather",
    "score": "score",
    "select": "select",
    "release": "run",
    "weigh": "weigh",
}
"""The command that does the job up to a stage, or weighs a release again."""
CONFIG_NAME = "config.yaml"
STOPPED_STATUS = 130
LOST_SECONDS = 120.0
"""A head that answers nothing for so long is gone."""
MAX_SUBMITS = 3
"""How often a run is submitted where the cluster's head is started again under it."""


class JobForgotten(StageError):
    """A head that was started again knows nothing of a job, which ended with the head before it."""


_run: ContextVar[str | None] = ContextVar("run", default=None)


@contextlib.contextmanager
def job_of(run: str) -> Iterator[None]:
    """Inside the block jobs belong to a run that may be tried again by another process: with the same config and
    command it finds the job that an earlier try started."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


@dataclass(frozen=True)
class Submitted:
    """A job and where it runs."""

    job_id: str
    address: str


def submit(
    config: Config,
    server: JobServer,
    arguments: tuple[str, ...] = (CONFIG_NAME,),
    with_code: bool = True,
    environment: Mapping[str, str] | None = None,
    command: str = "run",
) -> Submitted:
    """Start a `grape` command on a config, which `arguments` call CONFIG_NAME, as a job that outlives this process.

    `with_code` packs this checkout's packages; otherwise the cluster has them installed. `environment` can be read
    by whoever may look at the cluster's jobs: secrets belong into the cluster's own environment.
    """
    job_id = _job_id(config, server, command, arguments)
    with packed(config, with_code) as folder:
        server.submit(
            JobRequest(
                id=job_id,
                command=[server.python, "-m", "grape_service.cli", command, *arguments, "--json"],
                environment={IN_CLUSTER: "1", "PYTHONUNBUFFERED": "1", **(environment or {})},
                num_cpus=0,
                working_dir=folder,
            )
        )
    return Submitted(job_id, server.address)


def _job_id(config: Config, server: JobServer, command: str, arguments: tuple[str, ...]) -> str:
    """A new one; inside `job_of` that of the run's job that runs or has succeeded, or else the run's next."""
    run = _run.get()
    if run is None:
        return f"grape-{config.name}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    digest = hashlib.sha256(orjson.dumps([for_cluster(config), command, arguments], option=orjson.OPT_SORT_KEYS))
    begin = f"grape-{config.name}-{run}-{digest.hexdigest()[:12]}"
    for number in itertools.count(1):
        if server.state(f"{begin}-{number}") in (None, "running", "succeeded"):
            break
    return f"{begin}-{number}"


@contextlib.contextmanager
def packed(config: Config, with_code: bool) -> Iterator[str]:
    """A folder with the config and, if wanted, the code: what the cluster gets of this machine."""
    folder = Path(tempfile.mkdtemp(prefix="grape-submit-"))
    try:
        (folder / CONFIG_NAME).write_text(yaml.safe_dump(for_cluster(config), sort_keys=False))
        if with_code:
            root = Path(__file__).resolve().parents[2]
            for package in PACKAGES:
                ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(root / package, folder / package, ignore=ignored)
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def for_cluster(config: Config) -> dict[str, Any]:
    """The config's values as the job reads them: local paths absolute, stages on the job's own cluster.

    A local path has to be the same folder on every node (a shared file system).
    """
    values = with_absolute_paths(config)
    values["workers"] = {**values.get("workers", {}), "ray_address": "auto"}
    return values


def _absolute_reference(reference: str) -> str:
    return str(parse_reference(reference)) if reference else ""


def follow(server: JobServer, job_id: str, write: Callable[[str], None]) -> int:
    """Hand on the job's log as it grows; the job's exit status. Raises StageError when the cluster is gone.

    A connection that breaks is made again: nothing of the log is written twice or left out.
    """
    shown = 0
    for place, text, state in _log(server, job_id):
        write(text[max(0, shown - place) :])
        shown = max(shown, place + len(text))
        if state != "running":
            return exit_status(server, job_id, state)
    raise AssertionError("a log ends with its job")


def _log(server: JobServer, job_id: str) -> Iterator[tuple[int, str, str]]:
    """(place in the log, text from there, the job's state), until the job has ended; a text may come again.

    Only what is new is fetched. Where such a connection breaks, or is not to be had, the log is fetched once.
    """
    last_answer = time.monotonic()
    is_broken = is_known = False
    while True:
        try:
            state = server.state(job_id)
            whole = server.log(job_id) if state is not None and (is_broken or state != "running") else ""
            last_answer = time.monotonic()
        except (ConnectionError, RuntimeError, OSError) as error:
            if time.monotonic() - last_answer > LOST_SECONDS:
                raise StageError(f"the Ray cluster at {server.address} no longer answers: {error}") from error
            time.sleep(POLL_SECONDS)
            continue
        if state is None and is_known:
            raise JobForgotten(
                f"the Ray head at {server.address} was started again and no longer knows the job {job_id}, which ended "
                "with the head before it: submit it again; stored scores are reused"
            )
        if state is None:
            raise UserError(f"{server.address} knows no job '{job_id}': see `grape jobs list`")
        is_known = True
        yield 0, whole, state
        if state != "running":
            return
        place, is_broken = 0, False
        try:
            for part in server.log_parts(job_id):
                yield place, part, state
                place += len(part)
        except LogBroken:
            is_broken = True
        time.sleep(POLL_SECONDS)


def exit_status(server: JobServer, job_id: str, state: str) -> int:
    """0 succeeded, 130 stopped, else what the job's process ended with (1 where it never ran)."""
    if state == "succeeded":
        return 0
    if state == "cancelled":
        return STOPPED_STATUS
    return server.exit_code(job_id) or 1


def outcome_in(log: str) -> dict[str, Any] | None:
    """The JSON object that `grape run --json` prints last, found in a job's log."""
    lines = log.splitlines()
    ends = [place for place, line in enumerate(lines) if line == "}"]
    for end in reversed(ends):
        starts = [place for place, line in enumerate(lines[:end]) if line == "{"]
        for start in reversed(starts[-3:]):
            try:
                value = orjson.loads("\n".join(lines[start : end + 1]))
            except orjson.JSONDecodeError:
                continue
            if isinstance(value, dict) and "reference" in value:
                return value
    return None


def runs_elsewhere(config: Config) -> bool:
    """Whether the config names a cluster that this process is not on."""
    return config.workers.ray_address != "auto" and not os.environ.get(IN_CLUSTER)


def run_as_job(config: Config, what: What = "release", force: bool = False, reference: str = "") -> Outcome:
    """Run a config as one job at its workers.ray_address; its progress is shown as if it ran here.

    `what`: the stage it ends at, or `weigh` of the release at `reference`.

    The job is stopped when this process is interrupted, and submitted again where the cluster's head was started again
    under it. Raises UserError or StageError as the job ended.
    """
    quiet = config.model_copy(update={"notify": None})  # whoever submits tells the webhook
    with job_server(config.workers.ray_address) as server:
        arguments = (_absolute_reference(reference), "--config", CONFIG_NAME) if what == "weigh" else (CONFIG_NAME,)
        if force and what in ("release", "weigh"):  # the others make nothing that is there already
            arguments = (*arguments, "--force")
        for left in reversed(range(MAX_SUBMITS)):
            job = submit(quiet, server, arguments, environment={PROGRESS: "lines"}, command=COMMANDS[what])
            try:
                reporter().event(f"job {job.job_id} on {job.address}")
                status = follow(server, job.job_id, Replay(write_error))
                break
            except JobForgotten as error:
                if not left:
                    raise
                reporter().event(f"{error}; doing so")
            except BaseException:
                with best_effort("stop the job"):
                    server.stop(job.job_id)
                raise
        log, message = server.log(job.job_id), server.message(job.job_id)
    if status == 0:
        value = outcome_in(log)
        if value is None:
            raise StageError(f"the log of the job {job.job_id}, which succeeded, does not end with what it made")
        known = {field.name for field in fields(Outcome)}
        return Outcome(**{key: item for key, item in value.items() if key in known}, storage_options=config.storage)
    reason = next((line for line in reversed(log.splitlines()) if line.startswith("error: ")), "")
    sentence = reason.removeprefix("error: ") or f"the job {job.job_id} ended with status {status}: {message}"
    raise (UserError if status == 2 else StageError)(sentence)


def write_error(text: str) -> None:
    """A part of a log on standard error."""
    sys.stderr.write(text)
    sys.stderr.flush()
