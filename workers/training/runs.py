"""Training jobs on a release: SFT, then RL on its checkpoint, each a job that is started once.

    record = train("s3://team/datasets/math-sft@v0003", config.train, "http://head:8265")

A run is named by its inputs (inputs.py), so the same request is the same run: what has succeeded is not done again,
what runs is followed, what failed is tried again from its last checkpoint. SFT is a run of its own, with its own
record, also where RL follows: another RL section takes the SFT that is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Unpack

from grape_service.config.local_paths import resolved_model
from grape_service.config.training import STAGES, Job, Stage, TrainConfig
from grape_service.errors import StageError, UserError, best_effort
from grape_service.models.whole import CheckpointFacts, NoCheckpoint
from grape_service.release.load import Release
from grape_service.release.manifest import without_secrets
from grape_service.storage.storage import Storage
from workers.cluster.jobs import PRIVATE, JobServer
from workers.training.attempts import POLL_SECONDS, Deployments, Ended, attempt
from workers.training.claim import CLAIM, claimed_output
from workers.training.inputs import stage_inputs
from workers.training.records import (
    FORMAT,
    Lease,
    LeaseLost,
    Record,
    RunRecords,
    StageRecord,
    forget_cancelling,
    is_followed,
    update_stage,
)
from workers.training.request import NO_TARGET, Target, starting_model
from workers.training.trainers import checkpoints

DONE = ("succeeded", "sent")
"""States of a stage that is not to be done again; sent: a webhook took it and says nothing about its end."""


def target_of(release: Release, model: str | None, revision: str | None) -> Target:
    """The model of the config that asks, where it is another than the one that the release was made for."""
    released = release.manifest.config.get("target") or {}
    is_released = (
        model is not None and released.get("model") and resolved_model(model) == resolved_model(released["model"])
    )
    return NO_TARGET if is_released and revision in (None, released.get("revision")) else Target(model, revision)


def inputs_of(release: Release, jobs: dict[Stage, Job], key: str | None, target: Target) -> dict[Stage, str]:
    """Digest of each stage's inputs; the last one's names the run."""
    inputs: dict[Stage, str] = {}
    for stage, job in jobs.items():
        after = inputs.get("sft") if stage == "rl" else None
        model = None if after else starting_model(release, job, target)
        inputs[stage] = stage_inputs(stage, job, release, model, after, key)
    return inputs


def run_id_of(inputs: dict[Stage, str]) -> str:
    """Name of the run of a request; equal requests have equal names."""
    return list(inputs.values())[-1][:16]


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
        target_revision: str | None = None,
    ):
        self.release = release
        self.jobs = jobs
        self.say = say
        self.deployments = deployments
        self.target = target_of(release, target_model, target_revision)
        self.server: JobServer | None = None
        self.inputs = inputs_of(release, jobs, key, self.target)
        self.id = run_id_of(self.inputs)
        self.sft_run: TrainingRun | None = None
        if len(jobs) > 1:
            alone, first = TrainConfig(sft=config.sft), {"sft": jobs["sft"]}
            self.sft_run = TrainingRun(release, alone, first, key, say, deployments, *self.target)  # type: ignore[arg-type]
        self.records = RunRecords(release.storage, release.name)
        self.lease = Lease(self.records, self.id)
        self.record = self.records.create(self._new_record(config, key))
        if self.record["stages"].keys() != jobs.keys():
            raise self.records.refused(self.id)
        if not is_followed(self.record):  # what was cancelled before is wanted again
            self.record = self.records.change(self.id, forget_cancelling)

    @property
    def stages(self) -> list[Stage]:
        """The stages of the request, in their order."""
        return [stage for stage in STAGES if stage in self.jobs]

    def use(self, server: JobServer) -> None:
        """Start jobs at this server."""
        self.server = server
        if self.sft_run is not None:
            self.sft_run.use(server)

    def do(self, stage: Stage) -> Record:
        """Do one stage, or follow the process that does it; the record afterwards."""
        if stage == "sft" and self.sft_run is not None:
            return self._take_over(self.sft_run)
        while True:
            try:
                return self._do_alone(stage)
            except LeaseLost as lost:
                self.say(f"{stage}: {lost}, and is followed from here")
                self._stop_own_private_job(stage)

    def _stop_own_private_job(self, stage: Stage) -> None:
        """End what this process started on its private Ray: the one that took over starts its own on the output."""
        if self.server is not None and self.server.is_private:
            with best_effort(f"stop the job of {stage}"):
                self.server.stop(self.record["stages"][stage]["job_id"])

    def _do_alone(self, stage: Stage) -> Record:
        while not self.lease.acquire():
            self.record = self.records.read(self.id)
            if self.record["stages"][stage]["state"] in DONE:
                return self.record
            time.sleep(POLL_SECONDS)
        self.record = self.records.read(self.id)
        if problem := self._gone(stage):
            self.say(f"{stage}: {problem}; training again")
            self._set(stage, state="failed", error=problem)
        if self.record["stages"][stage]["state"] not in DONE:
            self._do(stage)
        return self.record

    def _take_over(self, sft_run: TrainingRun) -> Record:
        """Have SFT's own run do it, and note in this one's record how it went."""
        try:
            if not sft_run.is_done("sft"):
                self._set("sft", state="running", run=sft_run.id, error=None)
            sft_run.do("sft")
        finally:
            self._note_sft(sft_run, sft_run.records.read(sft_run.id))
        return self.record

    def give_back(self) -> None:
        """Let go of the run; `record` is the newest then."""
        if self.sft_run is not None:
            self.sft_run.give_back()
        self.lease.release()
        self.record = self.records.read(self.id)

    def stop_private_jobs(self) -> None:
        """End what runs on a private Ray, which ends with this process."""
        if self.server is None or not self.server.is_private:
            return
        if self.sft_run is not None:
            self.sft_run.stop_private_jobs()
            self._note_sft(self.sft_run, self.sft_run.record)
        for stage in self.stages:
            state = self.record["stages"][stage]
            if state["state"] == "running" and state.get("address") == PRIVATE and self.lease.is_held:
                self.server.stop(state["job_id"])
                self._set(stage, state="cancelled", error="the process that started it ended", ended=time.time())

    def _do(self, stage: Stage) -> None:
        job = self.jobs[stage]
        checkpoint = self._checkpoint_for(stage)
        self._claim_output(stage)
        for _ in range(job.attempts):
            state = self._set(stage, error=None)
            if not self._goes_on(stage, state):
                if state.get("cancel"):  # it was asked for while nothing ran
                    self._set(stage, state="cancelled", error=f"{stage} was cancelled", ended=time.time())
                    raise StageError(f"{stage} was cancelled")
                number = state["attempt"] + 1
                address = self.server.address if self.server else None
                self._set(
                    stage,
                    state="running",
                    attempt=number,
                    job_id=f"grape-{self.id}-{stage}-{number}",
                    address=address if job.kind in ("builtin", "command") else None,
                    status_url=None,
                    lost=False,
                    started=time.time(),
                    ended=None,
                )
            self.say(f"{stage}: {job.kind} {self.record['stages'][stage]['job_id']}")
            values = self._values(stage, checkpoint)
            ended = self._with_result(stage, attempt(self, stage, job, values), values["output"])
            self._set(stage, state=ended.state, error=ended.error, ended=time.time(), lost=ended.is_lost)
            if ended.error is None:
                return
            self.say(f"{stage}: {ended.error.splitlines()[0]}")
            if ended.is_final and not ended.is_lost:
                raise UserError(ended.error)
            if ended.state == "cancelled" or ended.is_lost:
                break
        raise StageError(ended.error)

    def _goes_on(self, stage: Stage, state: StageRecord) -> bool:
        """Whether the recorded attempt is under way and can be followed under its own id.

        A private Ray's jobs ended with the process that started it. Raises UserError if it runs elsewhere.
        """
        if state["state"] != "running" and not state.get("lost"):
            return False
        if state["kind"] in ("builtin", "command"):
            if state["address"] == PRIVATE:
                return False
            assert self.server is not None
            if state["address"] != self.server.address:
                raise UserError(
                    f"{stage} of run {self.id} runs at {state['address']}: follow it there, or cancel it before it "
                    f"starts at {self.server.address}"
                )
            return not state.get("lost") or self.server.state(state["job_id"]) is not None
        if state.get("lost") and state["kind"] == "webhook":
            return self._is_known_again(stage, state)
        return True

    def _is_known_again(self, stage: Stage, state: StageRecord) -> bool:
        """Whether a webhook's job, of which nothing was to be learnt, tells its state now."""
        from grape_service import webhooks

        status_url = state.get("status_url")
        if not status_url:  # the webhook may have it: asked again with the same key, it starts no other
            return True
        try:
            webhooks.get_status(status_url)
        except (UserError, StageError) as error:
            self.say(f"{stage}: the job before still cannot be asked ({error}), so another is started")
            return False
        return True

    # Output, checkpoint and record

    def _claim_output(self, stage: Stage) -> None:
        """Take the job's folder before the job is there; where it is another job's, a folder of its own in it."""
        asked = self._output(stage, self.jobs[stage])
        facts = {"stage": stage, "run": self.id, "dataset": self.release.reference}
        output = claimed_output(asked, self.inputs[stage], facts, self.release.storage.options)
        if output != Storage(asked, self.release.storage.options).root:
            self.say(f"{stage}: {asked} holds what another job made, so this one's output is {output}")
        self._set(stage, output=output)

    def _with_result(self, stage: Stage, ended: Ended, output: str) -> Ended:
        """The end of an attempt with its checkpoint in the record; a failure where there is none that is this job's."""
        if ended.state != "succeeded":
            return ended
        try:
            address, facts = self._checkpoint_of(stage, ended.checkpoint or output)
        except (StageError, UserError, OSError) as no_result:
            return Ended("failed", f"{stage} ended well, but {no_result}")
        self._set(
            stage,
            checkpoint=address,
            metrics=ended.metrics or facts.get("metrics") or {},
            notes=facts.get("notes", []),
            tracking=facts.get("tracking", {}),
        )
        self.say(f"{stage}: succeeded, checkpoint {address}")
        return ended

    def _checkpoint_of(self, stage: Stage, output: str) -> tuple[str, CheckpointFacts]:
        """Address and facts of the checkpoint in a job's output. Raises StageError where there is none, or where the
        first that is there is not whole or not this job's."""
        storage = Storage(output, self.release.storage.options)
        for name in ["model", "", *checkpoints.step_folders(storage)]:
            folder = storage.sub(name) if name else storage
            try:
                facts = checkpoints.check_whole(folder)
            except NoCheckpoint as error:
                nothing = error
            else:
                self._refuse_anothers(stage, folder, facts)
                return folder.root, facts
        raise nothing

    def _refuse_anothers(self, stage: Stage, folder: Storage, facts: CheckpointFacts) -> None:
        """Raises StageError for a checkpoint that was there before the job, or that says it is of another one."""
        if self.jobs[stage].kind == "builtin" and facts.get("run") != self.id:
            raise StageError(f"the checkpoint {folder.root} is not of this job: its complete.json names another run")
        if facts.get("dataset", self.release.reference) != self.release.reference:
            raise StageError(f"the checkpoint {folder.root} was trained on {facts['dataset']}")
        output = Storage(self.record["stages"][stage]["output"], self.release.storage.options)
        newest = max((_written(folder, info.path, info.modified) for info in folder.list()), default=0.0)
        claim = output.info(CLAIM)
        if folder.is_s3 == output.is_s3 and newest < _written(output, CLAIM, claim.modified):
            raise StageError(f"the checkpoint {folder.root} is older than the job, so it is not what the job made")

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage needs no job: it ended well, and its checkpoint is still what it was."""
        if stage == "sft" and self.sft_run is not None:
            return self.sft_run.is_done(stage)
        return self.record["stages"][stage]["state"] in DONE and self._gone(stage) is None

    def _gone(self, stage: Stage) -> str | None:
        """What is wrong with the checkpoint of a stage that succeeded; None where it is what it was."""
        entry = self.record["stages"][stage]
        if entry["state"] != "succeeded":
            return None
        try:
            checkpoints.check_whole(Storage(entry["checkpoint"], self.release.storage.options))
        except StageError as error:
            return str(error)
        return None

    def _new_record(self, config: TrainConfig, key: str | None) -> Record:
        now = time.time()
        stages: dict[Stage, StageRecord] = {
            stage: {
                "state": "waiting",
                "kind": job.kind,
                "attempt": 0,
                "output": self._output(stage, job),
                "inputs": self.inputs[stage],
            }
            for stage, job in self.jobs.items()
        }
        if self.sft_run is not None:
            stages["sft"] = {**self.sft_run.record["stages"]["sft"], "run": self.sft_run.id}
        return {
            "format": FORMAT,
            "id": self.id,
            "key": key,
            "dataset": self.release.reference,
            "version": self.release.version,
            "target": self.target.model,
            "config": without_secrets(config.model_dump(mode="json")),
            "created": now,
            "updated": now,
            "state": "waiting",
            "lease": None,
            "stages": stages,
        }

    def _output(self, stage: Stage, job: Job) -> str:
        return job.output or RunRecords(self.release.storage, self.release.name).storage.url(f"{self.id}/{stage}")

    def _set(self, stage: Stage, **values: Unpack[StageRecord]) -> StageRecord:
        """Change a stage of the record; the stage."""
        self.record = self.records.change(self.id, partial(update_stage, stage=stage, values=values))
        return self.record["stages"][stage]

    def _note_sft(self, sft_run: TrainingRun, record: Record) -> None:
        values: StageRecord = {**record["stages"]["sft"], "run": sft_run.id}
        self._set("sft", **values)

    def note(self, stage: Stage, **values: Unpack[StageRecord]) -> None:
        """Write down what an attempt of a stage has learnt."""
        self._set(stage, **values)

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
        model = starting_model(self.release, self.jobs["rl"], self.target)
        return model[0] if model else None


def _written(storage: Storage, path: str, modified: float) -> float:
    """When a file came to be where it is: on local disk, a copy may keep the modification time of its original."""
    return modified if storage.is_s3 else os.stat(storage.full(path)).st_ctime
