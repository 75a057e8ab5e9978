"""What a run will take: rows and tokens, GPU hours, wall time and money, before any engine starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.policy import BehaviorConfig, PolicyConfig
from grape_service.config.schema import Config
from grape_service.estimate.survey import Survey, survey_pool
from grape_service.estimate.throughput import Throughput, actual_figures, expected_throughput
from grape_service.models.files import policy_id, resolve_model
from grape_service.prepare.finish import load_prepared
from grape_service.prepare.plan import plan_prepare
from grape_service.prepare.result import Prepared
from grape_service.prepare.shards import shard_paths
from grape_service.render.loading import load_renderer
from grape_service.score.store import ScoreStore
from grape_service.storage.parquet import read_tables
from grape_service.storage.storage import Storage


@dataclass(frozen=True)
class ScoringEstimate:
    """One policy's part of the work."""

    role: str  # target | behavior
    model: str
    rows: float  # that have no score yet
    reused_rows: float
    tokens: float
    tokens_per_second: float  # of one replica
    gpus: int  # of one replica
    device: str
    origin: str  # of the throughput

    @property
    def engine_seconds(self) -> float:
        """Seconds of one replica."""
        return self.tokens / self.tokens_per_second

    @property
    def gpu_hours(self) -> float:
        """GPU hours (replica hours where the device is a CPU)."""
        return self.engine_seconds * self.gpus / 3600


@dataclass(frozen=True)
class Plan:
    """What `grape plan` tells."""

    pool: dict[str, float]
    counted: str  # how
    exact: bool
    token_error: float
    policies: list[ScoringEstimate]
    replicas: int
    price: float | None  # of a GPU hour
    made: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def gpu_hours(self) -> float:
        """Of all policies together."""
        return sum(policy.gpu_hours for policy in self.policies)

    @property
    def wall_seconds(self) -> float:
        """Scoring alone, with all replicas busy."""
        return sum(policy.engine_seconds for policy in self.policies) / self.replicas

    @property
    def cost(self) -> float | None:
        """GPU hours times the price."""
        return None if self.price is None else self.gpu_hours * self.price

    def to_json(self) -> dict[str, Any]:
        """The object that --json prints."""
        policies = [{**asdict(p), "engine_seconds": p.engine_seconds, "gpu_hours": p.gpu_hours} for p in self.policies]
        totals = {"gpu_hours": self.gpu_hours, "wall_seconds": self.wall_seconds, "cost": self.cost}
        return {**asdict(self), "policies": policies, **totals}


def make_plan(
    config: Config,
    replicas: int = 1,
    device: str | None = None,
    tokens_per_second: float | None = None,
    price: float | None = None,
    exact: bool = False,
) -> Plan:
    """Count or estimate the pool and what scoring it takes. Writes nothing but the prepare plan and the estimate.

    Raises UserError for what a run would refuse, and for a device of unknown throughput.
    """
    workspace = Storage(config.workspace_path, config.storage)
    files = resolve_model(config.target, config.storage)
    renderer = load_renderer(files.folder, config.target, config.render)
    prepare_plan = plan_prepare(config, renderer.digest(), workspace)
    prepared = load_prepared(prepare_plan, workspace)
    survey = _survey_of(prepared) if prepared else survey_pool(prepare_plan.files, config, renderer, exact)

    def throughput(policy: PolicyConfig) -> Throughput:
        if tokens_per_second is not None:
            return Throughput(tokens_per_second, device or "given", "--tokens-per-second")
        return expected_throughput(config, policy, device)

    policies = []
    if config.select.needs_scores:
        target_id = policy_id(config.target, files)
        left, rows = (
            _left_to_score(workspace, prepared, target_id, config) if prepared else (survey.tokens, survey.rows)
        )
        policies.append(_estimate("target", config.target, rows, survey.rows - rows, left, throughput(config.target)))
    if config.compared_behavior is not None:
        share = min(1.0, config.select.usual_keep * survey.prompts / max(survey.rows, 1.0))
        if config.select.method == "all":
            share = 1.0
        for policy in config.compared_behavior.policies():
            part = share * _share_of(policy, config.compared_behavior, survey)
            rows, tokens, reused = survey.rows * part, survey.tokens * part, 0.0
            if policy == config.target and config.select.needs_scores:
                rows, tokens, reused = 0.0, 0.0, rows  # every row has been scored by then
            policies.append(_estimate("behavior", policy, rows, reused, tokens, throughput(policy)))
    pool = {
        "rows": survey.rows,
        "prompts": survey.prompts,
        "tokens": survey.tokens,
        "loss_tokens": survey.loss_tokens,
        "rejected": survey.rejected,
        "filtered": survey.filtered,
    }
    counted = "counted exactly: the pool is prepared" if prepared else survey.how()
    plan = Plan(pool, counted, survey.exact, survey.token_error, policies, replicas, price)
    workspace.write_json(estimate_path(config), plan.to_json())
    return plan


def estimate_path(config: Config) -> str:
    """Where the newest estimate for a dataset is kept, in the workspace."""
    return f"estimates/{config.name}.json"


def estimate_against_actual(
    workspace: Storage, config: Config, engines: list[dict[str, Any]], tokens: int
) -> dict[str, Any] | None:
    """For the manifest: the newest `grape plan` of this dataset beside what the engines did; None without a plan."""
    try:
        estimate = workspace.read_json(estimate_path(config))
    except FileNotFoundError:
        return None
    actual = {**actual_figures(engines), "scored_tokens": tokens}
    expected = sum(policy["tokens"] for policy in estimate["policies"])
    seconds = sum(policy["engine_seconds"] for policy in estimate["policies"])
    return {
        "estimate": estimate,
        "actual": actual,
        "tokens_ratio": round(tokens / expected, 4) if expected else None,
        "seconds_ratio": round(actual["engine_seconds"] / seconds, 4) if seconds else None,
    }


def _estimate(
    role: str, policy: PolicyConfig, rows: float, reused: float, tokens: float, rate: Throughput
) -> ScoringEstimate:
    gpus = policy.tensor_parallel
    return ScoringEstimate(
        role, policy.model, rows, reused, tokens, rate.tokens_per_second, gpus, rate.device, rate.origin
    )


def _survey_of(prepared: Prepared) -> Survey:
    counts = (prepared.rows, prepared.prompts, prepared.tokens, prepared.loss_tokens)
    rejected = prepared.rejects.total + prepared.left_out.total
    sources = {source: float(rows) for source, rows in prepared.sources.items()}
    return Survey(*counts, rejected, prepared.filtered, exact=True, sources=sources)


def _share_of(policy: PolicyConfig, behavior: BehaviorConfig, survey: Survey) -> float:
    """The share of the pool's rows whose behavior is this policy; kept rows are taken to have the same."""
    if behavior.sources is None:
        return 1.0
    rows = sum(survey.sources.get(source, 0.0) for source, one in behavior.sources.items() if one == policy)
    return min(1.0, rows / max(survey.rows, 1.0))


def _left_to_score(workspace: Storage, prepared: Prepared, store_id: str, config: Config) -> tuple[float, float]:
    """Tokens and rows of a prepared pool that have no score yet, exactly; one partition's keys at a time, and each of
    its score files opened once."""
    store = ScoreStore(workspace, store_id).with_folders()
    tokens, rows = 0.0, 0.0
    for partition, totals in prepared.partitions.items():
        if not totals.num_shards:
            continue
        if not store.related(partition):
            tokens, rows = tokens + totals.tokens, rows + totals.rows
            continue
        keys, lengths = [], []
        for table in read_tables(workspace, shard_paths(prepared, partition), ["row_key", "input_ids"]):
            keys.append(table["row_key"].combine_chunks())
            lengths.append(pc.list_value_length(table["input_ids"]).to_numpy())
        missing = store.missing(partition, pa.chunked_array(keys), config.statistics)
        rows += int(missing.sum())
        tokens += int(np.concatenate(lengths)[missing].sum())
    return tokens, rows
