"""Training jobs on a release: SFT, then RL on its checkpoint, each a job that is started once.

    record = train("s3://team/datasets/math-sft@v0003", config.train, "http://head:8265")

A request is the dataset version, the train section and `key`. The same request is the same run: what has
succeeded is not done again, what runs is followed, what failed is tried again from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import orjson

from grape_service import webhooks
from grape_service.config.training import STAGES, Job, Stage, TrainConfig
from grape_service.errors import StageError, UserError
from grape_service.release.load import Release
from grape_service.release.manifest import without_secrets
from grape_service.storage.storage import Storage
from workers.cluster.jobs import PRIVATE, JobServer
from workers.training.progress import JobProgress
from workers.training.records import FORMAT, Lease, Record, RunRecords
from workers.training.request import request_of
from workers.training.trainers import checkpoints

POLL_SECONDS = 1.0
DONE = ("succeeded", "sent")
"""States of a stage that is not to be done again; sent: a webhook took it and says nothing about its end."""


class Deployments(Protocol):
    """Runs of Prefect deployments, which this package knows only by their names."""

    def start(self, name: str, parameters: dict[str, Any], key: str) -> str:
        """Id of the deployment's one run for `key`, which is started unless there is one."""

    def state(self, run_id: str) -> tuple[str, str]:
        """(running, succeeded, failed or cancelled; the same in Prefect's words)."""

    def cancel(self, run_id: str) -> None:
        """Ask the run to end."""


def run_id_of(release: Release, config: TrainConfig, key: str | None) -> str:
    """Name of the run of a request; equal requests have equal names."""
    request = [release.reference, config.without_defaults(), key]
    return hashlib.sha256(orjson.dumps(request, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


class TrainingRun:
    """One run of a release: its record, and the stages that are done for it."""

    def __init__(
        self,
        release: Release,
        config: TrainConfig,
        jobs: dict[Stage, Job],
        key: str | None,
        say: Callable[[str], None],
        deployments: Deployments | None,
        target_model: str | None = None,
    ):
        self.release = release
        self.jobs = jobs
        self.say = say
        self.deployments = deployments
        self.target_model = target_model  # of the config that asks, where SFT's own section names none
        self.server: JobServer | None = None
        self.id = run_id_of(release, config, key)
        self.records = RunRecords(release.storage, release.name)
        self.lease = Lease(self.records, self.id)
        self.record = self.records.create(self._new_record(config, key))

    @property
    def stages(self) -> list[Stage]:
        """The stages of the request, in their order."""
        return [stage for stage in STAGES if stage in self.jobs]

    def do(self, stage: Stage) -> Record:
        """Do one stage, or follow the process that does it; the record afterwards."""
        while not self.lease.acquire():
            self.record = self.records.read(self.id)
            if self.record["stages"][stage]["state"] in DONE:
                return self.record
            time.sleep(POLL_SECONDS)
        self.record = self.records.read(self.id)
        if self.record["stages"][stage]["state"] not in DONE:
            self._do(stage)
        return self.record

    def give_back(self) -> None:
        """Let go of the run; `record` is the newest then."""
        self.lease.release()
        self.record = self.records.read(self.id)

    def stop_private_jobs(self) -> None:
        """End what runs on a private Ray, which ends with this process."""
        if self.server is None or not self.server.is_private:
            return
        for stage in self.stages:
            state = self.record["stages"][stage]
            if state["state"] == "running" and state.get("address") == PRIVATE:
                self.server.stop(state["job_id"])
                self._set(stage, state="cancelled", error="the process that started it ended", ended=time.time())

    def _do(self, stage: Stage) -> None:
        job = self.jobs[stage]
        checkpoint = self._checkpoint_for(stage)
        for _ in range(job.attempts):
            state = self._set(stage, cancel=False, error=None)
            if not self._goes_on(stage, state):
                attempt = state["attempt"] + 1
                job_id = f"grape-{self.id}-{stage}-{attempt}"
                address = self.server.address if self.server else None
                self._set(
                    stage,
                    state="running",
                    attempt=attempt,
                    job_id=job_id,
                    address=address if job.kind in ("builtin", "command") else None,
                    started=time.time(),
                    ended=None,
                )
            error = self._attempt(stage, job, checkpoint)
            if error is None:
                return
            self.say(f"{stage}: {error.splitlines()[0]}")
            if self.record["stages"][stage]["state"] == "cancelled":
                break
        raise StageError(error)

    def _goes_on(self, stage: Stage, state: dict[str, Any]) -> bool:
        """Whether the recorded attempt is under way and can be followed under its own id.

        A private Ray's jobs ended with the process that started it. Raises UserError if it runs elsewhere.
        """
        if state["state"] != "running":
            return False
        if state["kind"] not in ("builtin", "command"):
            return True
        if state["address"] == PRIVATE:
            return False
        assert self.server is not None
        if state["address"] != self.server.address:
            raise UserError(
                f"{stage} of run {self.id} runs at {state['address']}: follow it there, or cancel it before it starts "
                f"at {self.server.address}"
            )
        return True

    def _attempt(self, stage: Stage, job: Job, checkpoint: str | None) -> str | None:
        """Run one attempt to its end and record it; what went wrong, or None."""
        state = self.record["stages"][stage]
        self.say(f"{stage}: {job.kind} {state['job_id']}")
        values = self._values(stage, checkpoint)
        found: dict[str, Any] = {}
        if job.kind in ("builtin", "command"):
            outcome, error = self._ray_job(stage, job, values)
        elif job.kind == "webhook":
            outcome, error, found = self._webhook(stage, job, values)
        else:
            outcome, error = self._deployment(stage, job, values, state["job_id"])
        if outcome == "succeeded":
            try:
                address, facts = self._checkpoint_of(found.get("checkpoint") or values["output"])
            except StageError as not_whole:
                outcome, error = "failed", f"{stage} ended well, but {not_whole}"
            else:
                metrics = found.get("metrics") or facts.get("metrics") or {}
                self._set(stage, state="succeeded", checkpoint=address, metrics=metrics, ended=time.time())
                self.say(f"{stage}: succeeded, checkpoint {address}")
                return None
        if outcome == "sent":
            self._set(stage, state="sent", ended=time.time())
            return None
        self._set(stage, state=outcome, error=error, ended=time.time())
        return error

    # One way to train each

    def _ray_job(self, stage: Stage, job: Job, values: dict[str, str]) -> tuple[str, str | None]:
        assert self.server is not None
        job_id = self.record["stages"][stage]["job_id"]
        server = self.server
        server.submit(
            request_of(stage, job, values, job_id, self.id, self.release, self.records, server, self.target_model)
        )
        output = Storage(values["output"], self.release.storage.options)
        progress = JobProgress(output, stage, self.record["stages"][stage]["started"], self.say)

        def runs() -> bool:
            if job.kind == "builtin":
                progress.look()
            return server.state(job_id) == "running"

        ended = self._follow(stage, job, runs, lambda: server.stop(job_id))
        if job.kind == "builtin":
            progress.look(last=True)
        self._keep_log(stage, job_id)
        if ended is not None:
            return ended
        state = server.state(job_id)
        if state == "succeeded":
            return "succeeded", None
        if state == "cancelled":
            return "cancelled", f"{stage} was cancelled"
        if state is None:
            return "failed", f"{stage}: Ray no longer knows the job {job_id}"
        return "failed", f"{stage} failed, and its log ends with:\n{server.log_tail(job_id)}"

    def _follow(
        self, stage: Stage, job: Job, runs: Callable[[], bool], stop: Callable[[], None]
    ) -> tuple[str, str] | None:
        """Wait while it runs; None when it has ended by itself, else what ended it here, after `stop`."""
        deadline = time.time() + (job.timeout_seconds or float("inf"))
        while runs():
            self.lease.renew()
            self.record = self.records.read(self.id)
            if self.record["stages"][stage].get("cancel"):
                stop()
                return "cancelled", f"{stage} was cancelled"
            if time.time() > deadline:
                stop()
                return "failed", f"{stage} took longer than timeout_seconds {job.timeout_seconds:g} and was stopped"
            time.sleep(POLL_SECONDS)
        return None

    def _keep_log(self, stage: Stage, job_id: str) -> None:
        """Put a job's log beside the record: Ray forgets it, a private one at once."""
        assert self.server is not None
        with contextlib.suppress(RuntimeError):  # a job that never ran has none
            name = f"{self.id}/{job_id}.log"
            self.records.storage.write(name, self.server.log(job_id).encode())
            self._set(stage, log=self.records.storage.url(name))

    def _webhook(self, stage: Stage, job: Job, values: dict[str, str]) -> tuple[str, str | None, dict[str, Any]]:
        assert job.webhook is not None
        state = self.record["stages"][stage]
        status_url = state.get("status_url")
        if not status_url:
            body = {**job.parameters, **values, "run": self.id, "stage": stage}
            status_url = webhooks.post_job(job.webhook, body, state["job_id"]).get("status_url")
            if not status_url:
                return "sent", None, {}
            self._set(stage, status_url=status_url)
        status: dict[str, Any] = {}

        def runs() -> bool:
            status.update(webhooks.get_status(status_url))
            return status["state"] == "running"

        ended = self._follow(stage, job, runs, lambda: self.say(f"{stage}: {job.webhook} may go on, it has no stop"))
        if ended is not None:
            return *ended, {}
        self._set(stage, status_url=None)
        if status["state"] == "failed":
            return "failed", f"{stage} failed: {status.get('error') or 'its status gives no reason'}", {}
        return "succeeded", None, status

    def _deployment(self, stage: Stage, job: Job, values: dict[str, str], key: str) -> tuple[str, str | None]:
        assert job.deployment is not None
        deployments = self.deployments
        if deployments is None:
            raise UserError(f"train.{stage}.deployment: '{job.deployment}' needs Prefect, and this process has none")
        run_id = deployments.start(job.deployment, {**job.parameters, **values}, key)
        self._set(stage, flow_run=run_id)
        ended = self._follow(
            stage, job, lambda: deployments.state(run_id)[0] == "running", lambda: deployments.cancel(run_id)
        )
        if ended is not None:
            return ended
        state, words = deployments.state(run_id)
        return state, None if state == "succeeded" else f"the deployment {job.deployment} ended as {words}"

    # Record and checkpoints

    def _new_record(self, config: TrainConfig, key: str | None) -> Record:
        now = time.time()
        stages = {
            stage: {"state": "waiting", "kind": job.kind, "attempt": 0, "output": self._output(stage, job)}
            for stage, job in self.jobs.items()
        }
        return {
            "format": FORMAT,
            "id": self.id,
            "key": key,
            "dataset": self.release.reference,
            "version": self.release.version,
            "config": without_secrets(config.model_dump(mode="json")),
            "created": now,
            "updated": now,
            "state": "waiting",
            "lease": None,
            "stages": stages,
        }

    def _output(self, stage: Stage, job: Job) -> str:
        return job.output or self.records.storage.url(f"{self.id}/{stage}")

    def _set(self, stage: Stage, **values: Any) -> dict[str, Any]:
        def mutate(record: Record) -> None:
            record["stages"][stage].update(values)
            states = [entry["state"] for entry in record["stages"].values()]
            record["state"] = next(
                (state for state in ("failed", "cancelled", "running", "waiting") if state in states), "succeeded"
            )

        self.record = self.records.change(self.id, mutate)
        return self.record["stages"][stage]

    def _values(self, stage: Stage, checkpoint: str | None) -> dict[str, str]:
        """What commands, webhooks and deployments are told."""
        output = self.record["stages"][stage]["output"]
        if stage == "sft":
            last = checkpoints.last_whole(Storage(output, self.release.storage.options))
            checkpoint = f"{output}/{last}" if last else ""
        return {
            "dataset_path": f"{self.release.path}/data",
            "dataset_version": self.release.version,
            "checkpoint": checkpoint or "",
            "output": output,
        }

    def _checkpoint_for(self, stage: Stage) -> str | None:
        """What RL starts from: SFT's checkpoint, checked again, else the model that it names. Raises StageError."""
        if stage == "sft":
            return None
        if "sft" in self.jobs:
            sft = self.record["stages"]["sft"]
            if sft["state"] != "succeeded":
                raise StageError(f"RL starts when SFT has succeeded with a checkpoint, and SFT is '{sft['state']}'")
            checkpoints.check_whole(Storage(sft["checkpoint"], self.release.storage.options))
            return sft["checkpoint"]
        model = getattr(self.jobs["rl"], "model", None) or (self.release.manifest.config.get("target") or {}).get(
            "model"
        )
        if not model and self.jobs["rl"].kind == "builtin":
            raise UserError("train.rl.model: without an sft section, say which model RL starts from")
        return model

    def _checkpoint_of(self, output: str) -> tuple[str, dict[str, Any]]:
        """Address and facts of the whole checkpoint in a job's output. Raises StageError that says what is wrong."""
        storage = Storage(output, self.release.storage.options)
        problem: StageError | None = None
        for name in ["model", "", *checkpoints.step_folders(storage)]:
            folder = storage.sub(name) if name else storage
            try:
                return folder.root, checkpoints.check_whole(folder)
            except StageError as error:
                if problem is None or "there is no checkpoint" in str(problem):
                    problem = error
        assert problem is not None
        raise problem
