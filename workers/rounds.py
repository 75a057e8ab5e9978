"""Several rounds: select, weigh, release and train, and all of it again under the checkpoint that came of it.

Each round is the whole pipeline on a config made from the job's: its target is the checkpoint of the round before. What
a round made is found by its keys when the job is started again, so that a job that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grape_service.config.gather import GatherConfig
from grape_service.config.schema import Config
from grape_service.config.training import SftSettings, TrainConfig
from grape_service.errors import StageError
from grape_service.keys import rounds_key
from grape_service.models.newest import resolved
from grape_service.models.whole import check_whole
from grape_service.progress.reporter import reporter
from grape_service.release.changes import changes_of_versions
from grape_service.release.load import load
from grape_service.release.manifest import read_manifest
from grape_service.release.rounds import Round, Rounds, read_rounds, round_name, write_rounds
from grape_service.release.tags import move_tag, point_tags
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import Storage
from workers.gate import Gather, RoundStopped, Train, train_gated
from workers.outcome import Outcome
from workers.run import RoundOf, heartbeat
from workers.training.base_model import base_revision
from workers.training.records import Record

Release = Callable[[Config, RoundOf, str | None], Outcome]
"""Makes the release of a round: whole, or weighed from the release of the round before."""


def run_rounds(config: Config, train: Train, release: Release, gather: Gather) -> Outcome:
    """All rounds of a job; the outcome of the last, with all of them. Raises UserError, StageError as a round ended."""
    assert config.train is not None, "there are rounds of training"
    output = Storage(config.output.path, config.storage)
    job = _begun(config, output)
    try:
        with heartbeat(lambda: write_rounds(output, job)):
            outcome = _rounds(config, config.train, job, output, train, release, gather)
    except BaseException as error:
        job.state = "stopped" if isinstance(error, RoundStopped) else "failed"
        job.error = str(error).partition("\n")[0] if isinstance(error, StageError) else type(error).__name__
        write_rounds(output, job)
        raise
    job.state = "succeeded"
    write_rounds(output, job)
    outcome.rounds = job.to_json()["rounds"]
    return outcome


def _begun(config: Config, output: Storage) -> Rounds:
    """The record of the job: with the checkpoints that it had found, where it did not come to an end and they are still
    there, or else with the newest."""
    assert config.train is not None, "there are rounds of training"
    key = rounds_key(config)
    earlier = read_rounds(output, config.name, key)
    known = earlier.checkpoints if earlier is not None and earlier.is_under_way else {}
    if not all(_is_there(folder, config.storage) for folder in known.values()):
        known = {}
    found = resolved(config, known)[1]
    checkpoints = {asked: one.folder for asked, one in found.items()}
    job = Rounds(key, config.name, config.train.rounds, checkpoints=checkpoints)
    write_rounds(output, job)
    return job


def _is_there(folder: str, options: StorageOptions) -> bool:
    try:
        check_whole(Storage(folder, options))
    except (StageError, FileNotFoundError):
        return False
    return True


def _rounds(
    config: Config, settings: TrainConfig, job: Rounds, output: Storage, train: Train, release: Release, gather: Gather
) -> Outcome:
    outcome: Outcome | None = None
    for number in range(1, settings.rounds + 1):
        before = job.rounds[-1] if job.rounds else None
        own = round_config(config, [one.checkpoint or "" for one in job.rounds])
        this = Round(round_name(number), job.checkpoints.get(own.target.model, own.target.model))
        job.rounds.append(this)
        reporter().event(f"{this.name} of {settings.rounds}: the target is {this.target}")
        keeps_rows = before is not None and settings.refresh.select == "keep"
        if outcome is None or not keeps_rows:
            outcome = release(own, RoundOf(this.name, job), None)
        elif config.weights is not None and settings.refresh.weights == "again":
            outcome = release(own, RoundOf(this.name, job), outcome.reference)
        assert outcome.version is not None, "a release has a version"
        this.reference, this.version, this.rows = outcome.reference, outcome.version, outcome.rows
        if before is not None and before.version is not None:
            this.churn = churn_since(output, config.name, before.version, outcome.version)
            _refuse_churn(this, before, settings.refresh.max_churn)
        point_tags(output, config.name, [this.name], outcome.version, this.name)
        if number == settings.rounds:
            point_tags(output, config.name, config.output.tags, outcome.version, this.name)
        else:  # rounds that were there already leave them where they are
            for tag in config.output.tags:
                move_tag(output, config.name, tag, outcome.version, reason=this.name, only_forward=True)
        write_rounds(output, job)
        jobs = round_jobs(settings, number, this.target if before is not None else None)
        assert outcome.reference is not None, "a release has a reference"
        try:
            record = train_gated(config, jobs_on(jobs, outcome), outcome.reference, train, gather)
        except RoundStopped as stopped:
            this.gate = stopped.figures
            raise
        outcome.training = record
        this.run, this.checkpoint = record["id"], _checkpoint(record, this.name)
        this.gate = record["stages"]["sft"].get("gate")
        write_rounds(output, job)
    assert outcome is not None, "there is a round at least"
    return outcome


def round_config(config: Config, checkpoints: list[str]) -> Config:
    """The config of the round after those that made `checkpoints`: the last of them is the target.

    A policy that samples and is the job's target samples anew with each checkpoint, as a source of its own: what the
    checkpoints before sampled stays in the pool. Tags are moved, and jobs started, by the rounds.
    """
    quiet = {"train": None, "notify": None, "output": config.output.model_copy(update={"tags": []})}
    if not checkpoints:
        return config.model_copy(update=quiet)
    trained = config
    for checkpoint in checkpoints:
        trained = trained.trained_to(checkpoint)
    if config.gather is None:
        return trained.model_copy(update=quiet)
    policies = dict(config.gather.policies)
    for name, policy in config.gather.policies.items():
        if all(getattr(policy, key) == getattr(config.target, key) for key in ("model", "revision", "adapter")):
            for number, checkpoint in enumerate(checkpoints, 2):
                policies[f"{name}-{round_name(number)}"] = policy.model_copy(
                    update={"model": checkpoint, "revision": None, "adapter": None}
                )
    gather = config.gather.model_copy(update={"policies": policies})
    return trained.model_copy(update={**quiet, "gather": gather, "behavior": _with_sources(config, gather)})


def _with_sources(config: Config, gather: GatherConfig) -> Any:
    """The config's behavior, also of what checkpoints sample."""
    behavior = config.behavior
    if behavior is None or behavior.sources is None:
        return behavior
    new = {name: gather.behavior_of(name) for name in gather.policies if name not in behavior.sources}
    return behavior.model_copy(update={"sources": {**behavior.sources, **new}})


def round_jobs(settings: TrainConfig, number: int, model: str | None) -> TrainConfig:
    """The jobs of a round; `model`: the checkpoint that is trained further."""
    with_rl = settings.rl is not None and (settings.rl.after == "each" or number == settings.rounds)
    sft = settings.sft
    if model is not None and sft is not None and sft.kind == "builtin":
        sft = sft.model_copy(update={"model": model})
    return settings.model_copy(update={"rounds": 1, "sft": sft, "rl": settings.rl if with_rl else None})


def jobs_on(jobs: TrainConfig, outcome: Outcome) -> TrainConfig:
    """Jobs that train the target of the run that gave `outcome`, where its release was made for another: rows that no
    score chose are the same for every target, and released once."""
    assert outcome.reference is not None, "there is a release"
    stage, first = next(iter(jobs.jobs.items()))
    if first.kind != "builtin" or first.model is not None or outcome.target is None:
        return jobs
    release = load(outcome.reference, outcome.storage_options)
    released = release.manifest.config.get("target") or {}
    same_revision = outcome.target_revision in (None, base_revision(release, SftSettings()))
    if outcome.target == released.get("model") and same_revision and not released.get("adapter"):
        return jobs
    own = {"model": outcome.target, "revision": outcome.target_revision}
    return jobs.model_copy(update={stage: first.model_copy(update=own)})


def _checkpoint(record: Record, name: str) -> str:
    """What a training run ended with. Raises StageError where nobody says it."""
    stage = record["stages"].get("rl") or record["stages"]["sft"]
    if not stage.get("checkpoint"):
        raise StageError(
            f"{name}: the trainer has not said where its checkpoint is (its state is '{stage['state']}'), and the next "
            "round starts from it: have a webhook answer with a status_url"
        )
    return str(stage["checkpoint"])


def churn_since(output: Storage, name: str, before: str, after: str) -> float:
    """The share of rows that changed between two versions, as `ChangeCounts.churn` has it. Raises UserError."""
    if before == after:
        return 0.0
    counts = read_manifest(output, name, after).counts.get("changes") or {}
    if counts.get("since") == before and "churn" in counts:
        return float(counts["churn"])
    return changes_of_versions(output, name, before, after).churn


def _refuse_churn(this: Round, before: Round, limit: float) -> None:
    if this.churn is not None and this.churn > limit:
        raise RoundStopped(
            f"{this.name}: {this.churn:.0%} of the rows are others than in {before.name}, more than "
            f"train.refresh.max_churn {limit:g} allows: nothing is trained on {this.reference} and no tag is moved; "
            f"see `grape compare {before.reference} {this.reference}`, or raise the limit"
        )
