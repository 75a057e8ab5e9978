"""One attempt of a stage: a Ray job, a webhook's job or a Prefect deployment, started once and followed to its end.

What does not answer for a while is waited for: the job goes on without us. What cannot be found for LOST_SECONDS has
failed as far as the record is concerned, with the reason; the next run asks once more before it starts another.
Where another process has taken over the run, LeaseLost ends the attempt here: the record is the other's then.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, Unpack

from grape_service import webhooks
from grape_service.config.training import Job, Stage
from grape_service.errors import StageError, UserError, best_effort
from grape_service.json_types import JsonObject
from grape_service.release.load import Release
from grape_service.storage.storage import Storage
from workers.cluster.jobs import JobServer, job_server
from workers.cluster.submit import LOST_SECONDS
from workers.training.progress import JobProgress
from workers.training.records import Lease, LeaseLost, Record, RunRecords, StageRecord
from workers.training.request import Target, request_of
from workers.training.tracking import not_passed_on
from workers.training.trainers.checkpoints import ERROR_FILE

Answer = TypeVar("Answer")

POLL_SECONDS = 1.0
ASKED_SECONDS = 10.0
"""How long the answer is awaited where somebody who follows nothing asks how a job stands."""
HAS = {"cancelled": "been cancelled"}
CANNOT_BE_RUN = (126, 127)
"""What a shell ends with where a command is no program, or not there."""


class Deployments(Protocol):
    """Runs of Prefect deployments, which this package knows only by their names."""

    def start(self, name: str, parameters: JsonObject, key: str) -> str:
        """Id of the deployment's one run for `key`, which is started unless there is one."""

    def started(self, key: str, seconds: float | None = None) -> str | None:
        """Id of the run that was started for `key`, asked for once within `seconds`; None where there is none."""

    def state(self, run_id: str, seconds: float | None = None) -> tuple[str, str]:
        """(running, succeeded, failed or cancelled; the same in Prefect's words), asked for once within `seconds`."""

    def cancel(self, run_id: str, seconds: float | None = None) -> None:
        """Ask the run to end unless it has; once and within `seconds`, where these are given."""


class Run(Protocol):
    """What an attempt needs of its run."""

    id: str
    release: Release
    records: RunRecords
    record: Record
    lease: Lease
    target: Target
    server: JobServer | None
    deployments: Deployments | None
    say: Callable[[str], None]

    def note(self, stage: Stage, **values: Unpack[StageRecord]) -> None:
        """Write what is known of a stage into the record."""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    state: str  # succeeded, sent, failed, cancelled
    error: str | None = None
    checkpoint: str | None = None  # where a webhook's job says that it is
    metrics: JsonObject = field(default_factory=dict)
    is_final: bool = False  # trying again would end in the same way
    is_lost: bool = False  # nothing is known of its end: it may go on


def attempt(run: Run, stage: Stage, job: Job, values: dict[str, str]) -> Ended:
    """Start the recorded attempt of a stage, unless it was started, and follow it to its end.

    Raises LeaseLost where another process took over the run, and the attempt with it.
    """
    ways = {"builtin": ray_job, "command": ray_job, "webhook": webhook, "deployment": deployment}
    try:
        return ways[job.kind](run, stage, job, values)
    except LeaseLost:
        raise
    except UserError as error:
        return Ended("failed", str(error), is_final=True)
    except (StageError, OSError, RuntimeError) as error:
        return Ended("failed", f"{stage}: {_first_line(error)}" if not isinstance(error, StageError) else str(error))


def ray_job(run: Run, stage: Stage, job: Job, values: dict[str, str]) -> Ended:
    """A job of the Ray that the run has, under the id in its record."""
    assert run.server is not None
    server, recorded = run.server, run.record["stages"][stage]
    job_id = recorded["job_id"]
    here = os.environ | job.environment if server.is_private else job.environment
    if job.kind == "builtin" and (sentence := not_passed_on(os.environ, here, server.address)):
        run.say(f"{stage}: {sentence}")
    output = Storage(values["output"], run.release.storage.options)
    if job.kind == "builtin" and server.state(job_id) is None:
        output.delete(ERROR_FILE)
    server.submit(request_of(stage, job, values, job_id, run.id, run.release, run.records, server, run.target))
    progress = JobProgress(output, stage, recorded["started"], run.say, is_ours=job.kind == "builtin")

    def ask() -> str | None:
        progress.look(waits_for=server.waits_for(job_id))
        return server.state(job_id)

    found = follow(run, stage, job, f"the Ray cluster at {server.address}", ask, lambda: server.stop(job_id))
    if isinstance(found, Ended) and found.is_lost:
        return found
    with best_effort("tell the last step"):
        progress.look(last=True)
    _keep_log(run, stage, job_id)
    if isinstance(found, Ended):
        return found
    if found == "succeeded":
        return Ended("succeeded")
    if found == "cancelled":
        return Ended("cancelled", f"{stage} was cancelled")
    if found is None:
        return Ended(
            "failed", f"{stage}: Ray no longer knows the job {job_id}, so it has ended; run again to resume it"
        )
    sentence = _user_error(output) if job.kind == "builtin" else None
    if sentence is not None:
        return Ended("failed", sentence, is_final=True)
    if job.kind == "command" and server.exit_code(job_id) in CANNOT_BE_RUN:
        assert job.command is not None
        sentence = f"train.{stage}.command: there is no program '{job.command[0]}' that can be run where the job runs"
        return Ended("failed", sentence, is_final=True)
    tail = ""
    with contextlib.suppress(RuntimeError, OSError):
        tail = server.log_tail(job_id)
    return Ended("failed", f"{stage} failed, and its log ends with:\n{tail}")


def _user_error(output: Storage) -> str | None:
    """What a job of our own said that the user can correct."""
    if not output.exists(ERROR_FILE):
        return None
    return str(output.read_json(ERROR_FILE)["error"])


def _keep_log(run: Run, stage: Stage, job_id: str) -> None:
    """Put a job's log beside the record: Ray forgets it, a private one at once."""
    assert run.server is not None
    with contextlib.suppress(RuntimeError, OSError):  # a job that never ran has none
        name = f"{run.id}/{job_id}.log"
        run.records.storage.write(name, run.server.log(job_id).encode())
        run.note(stage, log=run.records.storage.url(name))


def webhook(run: Run, stage: Stage, job: Job, values: dict[str, str]) -> Ended:
    """A job behind a webhook, followed where its answer names a status_url."""
    assert job.webhook is not None
    state = run.record["stages"][stage]
    status_url = state.get("status_url")
    if not status_url:
        body = {**job.parameters, **values, "run": run.id, "stage": stage}
        status_url = webhooks.post_job(job.webhook, body, state["job_id"]).get("status_url")
        if not status_url:
            run.say(f"{stage}: its webhook took the job and names no status_url, so how it ends is not known here")
            return Ended("sent")
        run.note(stage, status_url=status_url)
    status: dict[str, Any] = {}

    def ask() -> str:
        before = status.get("word")
        status.update(webhooks.get_status(status_url))
        if status["state"] == "running" and status["word"] != before:
            run.say(f"{stage}: its webhook says '{status['word']}'")
        return str(status["state"])

    def stop() -> None:
        run.say(f"{stage}: {job.webhook} may go on, it has no stop")

    found = follow(run, stage, job, "the status of the webhook's job", ask, stop)
    if isinstance(found, Ended):
        return found
    run.note(stage, status_url=None)
    if found == "succeeded":
        checkpoint, metrics = status.get("checkpoint"), status.get("metrics")
        if checkpoint is not None and not isinstance(checkpoint, str):
            return Ended("failed", f"{stage} ended well, but the checkpoint that its status names is no address")
        return Ended("succeeded", checkpoint=checkpoint, metrics=metrics if isinstance(metrics, dict) else {})
    if found == "cancelled":
        return Ended("cancelled", f"{stage} was cancelled")
    return Ended("failed", f"{stage} failed: {status.get('error') or 'its status gives no reason'}")


def problem_of(state: StageRecord, deployments: Deployments | None = None) -> str | None:
    """Why the job of a stage that nobody follows does not run, as far as it can be asked; None where it runs."""
    job_id = state["job_id"]
    try:
        found, words, who = _asked_once(state, state.get("address"), deployments)
    except webhooks.UnknownState:
        return None
    except (UserError, StageError, OSError, RuntimeError) as error:
        return f"nobody follows the job {job_id}, and it cannot be asked: {_first_line(error)}"
    if found is None:
        return f"{who} no longer knows the job {job_id}"
    if found == "running":
        return None
    return f"{who} says that the job {job_id} has {HAS.get(found, found)}{words}, and nobody followed it"


def _asked_once(
    state: StageRecord, address: str | None, deployments: Deployments | None
) -> tuple[str | None, str, str]:
    """(The state of a stage's job, None if it is not known; the same in Prefect's words; who says so).

    `address`: of the Ray cluster that has it. Raises UserError or StageError where it cannot be asked.
    """
    if address:
        with job_server(address) as server:
            return server.state(state["job_id"]), "", f"the Ray cluster at {address}"
    if status_url := state.get("status_url"):
        status = webhooks.get_status(status_url, timeout=ASKED_SECONDS / 2, tries=2)
        return str(status["state"]), "", "its webhook"
    if state["kind"] == "deployment" and deployments is not None:
        found, words = deployments.state(_flow_run_of(state, deployments), ASKED_SECONDS)
        return found, f" ({words})", "Prefect"
    noted = state.get("flow_run")
    raise StageError(f"who has it is not known here{f', its flow run is {noted}' if noted else ''}")


def _flow_run_of(state: StageRecord, deployments: Deployments) -> str:
    """The flow run of a stage's job: as noted, or as Prefect has it where whoever started it ended before the note.

    Raises StageError where there is none.
    """
    flow_run = state.get("flow_run") or deployments.started(state["job_id"], ASKED_SECONDS)
    if flow_run is None:
        raise StageError("Prefect has no flow run of it")
    return flow_run


def cancel_job(
    stage: Stage, state: StageRecord, address: str | None, deployments: Deployments | None = None
) -> StageRecord:
    """End the recorded job of a stage from outside of the process that follows it; what the record then says of it.

    `address`: of the Ray cluster that has it. "cancelled" is said of a job that was asked to end and of one that had
    been; one that cannot be asked is lost, with the reason, and one that has ended otherwise is left to the next run.
    """
    job_id = state["job_id"]
    done: StageRecord = {"state": "cancelled", "error": f"{stage} was cancelled", "ended": time.time(), "lost": False}
    if state["kind"] == "webhook":
        return {**done, "error": f"{stage} was cancelled, and the webhook's job may go on, as it has no stop"}
    try:
        found, words, who = _asked_once(state, address, deployments)
        if found == "running" and address:
            with job_server(address) as server:
                server.stop(job_id)
            found = "cancelled"
        elif found == "running":
            assert deployments is not None, "they were asked"
            flow_run = _flow_run_of(state, deployments)
            deployments.cancel(flow_run, ASKED_SECONDS)
            return {**done, "error": f"{stage} was cancelled, and Prefect was told to end its flow run {flow_run}"}
    except (UserError, StageError, OSError, RuntimeError) as error:
        problem = f"{stage} is not cancelled, its job {job_id} cannot be ended: {_first_line(error)}"
        return {"state": "failed", "error": f"{problem}; ask again with --cancel", "lost": True}
    if found == "cancelled":
        return done
    ended = f"{who} no longer knows it" if found is None else f"{who} says that it has {HAS.get(found, found)}{words}"
    return {
        "state": "failed",
        "error": f"{stage} is not cancelled, as its job {job_id} had ended before: {ended}; run again to ask once more",
        "lost": True,
    }


def deployment(run: Run, stage: Stage, job: Job, values: dict[str, str]) -> Ended:
    """A run of a Prefect deployment, one for each attempt."""
    assert job.deployment is not None
    deployments = run.deployments
    if deployments is None:
        raise UserError(f"train.{stage}.deployment: '{job.deployment}' needs Prefect, and this process has none")
    key = run.record["stages"][stage]["job_id"]
    run_id = deployments.start(job.deployment, {**job.parameters, **values}, key)
    run.note(stage, flow_run=run_id)
    words = ""

    def ask() -> str:
        nonlocal words
        before = words
        state, words = deployments.state(run_id)
        if state == "running" and words != before:
            run.say(f"{stage}: Prefect says '{words}' of its flow run")
        return state

    found = follow(run, stage, job, "Prefect", ask, lambda: deployments.cancel(run_id))
    if isinstance(found, Ended):
        return found
    return Ended(str(found), None if found == "succeeded" else f"the deployment {job.deployment} ended as {words}")


def follow(
    run: Run, stage: Stage, job: Job, whom: str, ask: Callable[[], str | None], stop: Callable[[], None]
) -> Ended | str | None:
    """The first state other than running that `ask` gives; or how the attempt was ended here, after `stop`.

    `whom` is asked; where it does not answer, or the run's record cannot be read, both are asked again for
    LOST_SECONDS. Raises LeaseLost where another process took over the run.
    """
    deadline = time.time() + (job.timeout_seconds or float("inf"))
    last_answer = time.monotonic()
    told = ""
    running: str | None = "running"
    while True:
        state, problem = _answer(ask, running, f"{whom} cannot be asked")
        is_cancelled, unread = _answer(lambda: _is_cancelled(run, stage), False, "the run's record cannot be read")
        if unread:  # nor could the record be told of an end
            state, problem = running, problem or unread
        end: Ended | None = None
        if is_cancelled:
            end = Ended("cancelled", f"{stage} was cancelled")
        elif time.time() > deadline:
            limit = f"timeout_seconds {job.timeout_seconds:g}"
            end = Ended("failed", f"{stage} took longer than {limit} and was stopped")
        if end is not None and state == running:
            _, unended = _answer(stop, None, f"the job is to end, and {whom} cannot be told so")
            if not unended:
                return end
            problem = unended
        if not problem:
            last_answer, told = time.monotonic(), ""
        elif time.monotonic() - last_answer > LOST_SECONDS:
            return Ended("failed", f"{stage}: {problem}; run again to ask once more", is_final=True, is_lost=True)
        elif problem != told:
            told = problem
            run.say(f"{stage}: {problem}; waiting for up to {LOST_SECONDS:.0f} s, the job goes on meanwhile")
        if state != running:
            return state
        time.sleep(POLL_SECONDS)


def _is_cancelled(run: Run, stage: Stage) -> bool:
    """Keep the lease, and look whether somebody asks in the record that the stage end. Raises LeaseLost."""
    run.lease.renew()
    return bool(run.records.read(run.id)["stages"][stage].get("cancel"))


def _answer(ask: Callable[[], Answer], otherwise: Answer, failing: str) -> tuple[Answer, str]:
    """What `ask` gives, and no problem; `otherwise` and the problem where it fails for now. Raises LeaseLost."""
    try:
        return ask(), ""
    except LeaseLost:
        raise
    except webhooks.UnknownState as error:
        return otherwise, str(error)
    except (UserError, StageError, OSError, RuntimeError) as error:
        return otherwise, f"{failing}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
