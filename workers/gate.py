"""The gate between SFT and RL: held-out loss and pass@k of SFT's checkpoint, recorded, and whether RL starts.

Samples are made, kept and judged as `gather` does it, so a gate that is asked again samples nothing twice.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable

import numpy as np
import orjson

from grape_service.config.checks import ChecksConfig
from grape_service.config.gate import HELD_OUT_LOSS, GateConfig
from grape_service.config.gather import GatherConfig, GatherPolicy
from grape_service.config.pool import PoolConfig
from grape_service.config.schema import Config, gate_verifier
from grape_service.config.training import TrainConfig
from grape_service.display import counted
from grape_service.errors import StageError, UserError
from grape_service.gather.pass_at import pass_at
from grape_service.keys import digest_of
from grape_service.progress.reporter import reporter
from grape_service.release.load import Release, load
from grape_service.rows.keys import in_eval_share
from grape_service.storage.parquet import read_row_groups
from grape_service.storage.storage import Storage
from grape_service.storage.workspace import open_workspace
from workers.outcome import Outcome
from workers.training.records import Record, RunRecords, StageRecord
from workers.training.trainers.prompts import release_rows
from workers.training.trainers.trackers import add_figures

Train = Callable[..., Record]
Gather = Callable[[Config], Outcome]
"""Runs a config up to the end of its gather stage."""
Figures = dict[str, float]
"""Of a checkpoint by name: held-out loss, pass@k, and how many prompts and samples they are."""
POLICY = "gate"
"""Whom the gate's samples are of."""


class RoundStopped(StageError):
    """A limit of the config was met between two steps: nothing more is trained."""

    def __init__(self, sentence: str, figures: Figures | None = None):
        super().__init__(sentence)
        self.figures = figures


def train_gated(config: Config, jobs: TrainConfig, reference: str, train: Train, gather: Gather) -> Record:
    """Train on a release, with the config's gate between SFT and RL; the run's record.

    Raises RoundStopped where a rule of the gate holds, and what `train` and `gather` raise.
    """
    how = config.workers.ray_address, config.storage
    gate = config.train.gate if config.train is not None else None
    if gate is None or jobs.sft is None:
        return train(reference, jobs, *how)
    record = train(reference, jobs.model_copy(update={"rl": None}), *how)
    stage = record["stages"]["sft"]
    if not stage.get("checkpoint"):
        raise StageError(f"the gate has no checkpoint to look at: SFT is '{stage['state']}', and says no more")
    release = load(reference, config.storage)
    figures = measure(config, gate, release, stage, gather)
    said = ", ".join(f"{name} {figures[name]:.4g}" for name in gate.figures)
    reporter().event(f"gate: {said}, of {stage['checkpoint']}")
    records = RunRecords(release.storage, release.name)
    record = records.change(record["id"], lambda known: known["stages"]["sft"].update({"gate": figures}))
    numbers = {f"gate/{name}": float(figure) for name, figure in figures.items()}
    add_figures(record["stages"]["sft"], numbers, reporter().event)
    if jobs.rl is None:
        return record
    refused = gate.refusals(figures)
    if refused:
        raise RoundStopped(f"gate: {'; '.join(refused)}: RL is not started on {stage['checkpoint']}", figures)
    return train(reference, jobs, *how)


def measure(config: Config, gate: GateConfig, release: Release, stage: StageRecord, gather: Gather) -> Figures:
    """The gate's figures of the checkpoint that SFT made, by name, and of how many prompts and samples they are.

    Raises StageError where a figure cannot be told.
    """
    figures: Figures = {}
    if gate.held_out_loss:
        loss = (stage.get("metrics") or {}).get("eval_loss")
        if loss is None:
            raise StageError(
                "the gate has no held-out loss: SFT kept no prompt back (sft.eval_share is too small for this release)"
            )
        figures[HELD_OUT_LOSS] = float(loss)
    if gate.pass_at:
        figures |= _pass_at(config, gate, release, stage["checkpoint"], gather)
    return figures


def _pass_at(config: Config, gate: GateConfig, release: Release, checkpoint: str, gather: Gather) -> Figures:
    workspace = open_workspace(config.workspace_path, config.storage)
    pool = PoolConfig(path=gate.prompts) if gate.prompts else write_prompts(config, gate, release, workspace)
    outcome = gather(gate_config(config, gate, checkpoint, pool))
    counts = outcome.counts["gather"][POLICY]
    right, judged, unknown = _verdicts(workspace, counts["candidates"])
    figures: Figures = {"prompts": len(judged), "samples": int(counts["samples"]), "unknown": unknown}
    for k in gate.pass_at:
        value, used = pass_at(right, judged, k)
        if value is None:
            raise StageError(
                f"the gate has no pass@{k}: none of {counted(len(judged), 'prompt')} has {k} samples that were judged "
                f"({unknown:,} samples are neither right nor wrong)"
            )
        figures |= {f"pass@{k}": value, f"pass@{k} prompts": used}
    return figures


def gate_config(config: Config, gate: GateConfig, checkpoint: str, prompts: PoolConfig) -> Config:
    """The config that samples from a checkpoint for some prompts, as gather does."""
    trained = config.trained_to(checkpoint)
    verify = gate_verifier(config)
    assert verify is not None, "the config was validated"
    policy = GatherPolicy.model_validate({**trained.target.model_dump(), "samples": gate.num_samples})
    gather = GatherConfig(policies={POLICY: policy}, sampling=gate.sampling, verify=verify)
    like = {"max_row_bytes": config.pool.max_row_bytes, "messages": config.pool.messages, "truncated": "keep"}
    pool = prompts.model_copy(update=like)
    nothing = {"behavior": None, "weights": None, "train": None, "notify": None, "checks": ChecksConfig()}
    return trained.model_copy(update={"gather": gather, "pool": pool, **nothing})


def write_prompts(config: Config, gate: GateConfig, release: Release, workspace: Storage) -> PoolConfig:
    """The release's prompts that the gate samples for, as a file in the workspace.

    Of the prompts that SFT kept back, or of all where it kept none, `max_prompts` with the smallest digests. Raises
    UserError where there is none.
    """
    share = config.train.sft.eval_share if config.train is not None and config.train.sft is not None else 0.0
    chosen: dict[str, bytes] = {}
    columns: set[str] = set()
    largest: list[tuple[int, str]] = []
    for row in release_rows(release):
        name = str(row["row"]["prompt_id"])
        if name in chosen or (share and not in_eval_share(name, share)):
            continue
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
        if len(chosen) == gate.max_prompts:
            if digest >= -largest[0][0]:
                continue
            del chosen[heapq.heappop(largest)[1]]
        heapq.heappush(largest, (-digest, name))
        beside = {key: value for key, value in row["row"].items() if key not in ("prompt_id", "source", "tools")}
        columns |= beside.keys()
        tools = {"tools": row["tools"]} if row["tools"] else {}
        line = {**beside, "prompt": row["messages"], "prompt_id": name, **tools}
        chosen[name] = orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE)
    if not chosen:
        raise UserError(f"train.gate: {release.reference} has no prompt that SFT kept back: raise sft.eval_share")
    data = b"".join(chosen[name] for name in sorted(chosen))
    path = f"gate/{digest_of(hashlib.sha256(data).hexdigest(), 16)}/prompts.jsonl"
    workspace.write(path, data)
    return PoolConfig(path=workspace.url(path), carry=sorted(columns))


def _verdicts(workspace: Storage, folder: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Of each prompt [P] the samples that are right and those that are right or wrong; how many are neither."""
    right: dict[str, int] = {}
    judged: dict[str, int] = {}
    unknown = 0
    for info in workspace.list(folder):
        for table in read_row_groups(workspace, info.path, ["prompt_id", "verdict"]):
            for prompt, verdict in zip(*(table[name].to_pylist() for name in ("prompt_id", "verdict")), strict=True):
                judged[prompt] = judged.get(prompt, 0) + (verdict in ("right", "wrong"))
                right[prompt] = right.get(prompt, 0) + (verdict == "right")
                unknown += verdict not in ("right", "wrong")
    prompts = sorted(judged)
    return np.array([right[one] for one in prompts]), np.array([judged[one] for one in prompts]), unknown
