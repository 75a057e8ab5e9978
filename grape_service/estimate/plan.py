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
from grape_service.errors import UserError
from grape_service.estimate.gathering import GatherEstimate, gather_estimates, gathered_survey, how
from grape_service.estimate.racing import race_saving
from grape_service.estimate.survey import Survey, survey_of_prepared, survey_pool
from grape_service.estimate.throughput import Throughput, actual_figures, expected_throughput
from grape_service.estimate.windows import windows_left
from grape_service.json_types import JsonObject
from grape_service.models.files import policy_id, resolve_model
from grape_service.models.newest import resolved
from grape_service.prepare.finish import load_prepared
from grape_service.prepare.plan import plan_prepare, rendering_of
from grape_service.prepare.reduce import shard_paths
from grape_service.prepare.result import Prepared
from grape_service.release.pools import with_released_candidates
from grape_service.render.loading import load_renderer
from grape_service.score.shards import shards_of_pool
from grape_service.score.store import ScoreStore
from grape_service.storage.parquet import read_tables
from grape_service.storage.storage import Storage
from grape_service.storage.workspace import open_workspace


@dataclass(frozen=True)
class ScoringEstimate:
    """One policy's part of the work."""

    role: str  # gather <name> | target | target, steps in their windows | behavior
    model: str
    rows: float  # that have no score yet
    reused_rows: float
    tokens: float  # to score; of gather, to sample
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
    race: dict[str, Any] | None = None  # what score.race spares, by what is stored
    checkpoints: list[str] = field(default_factory=list)  # what each address that moves stands for, in words
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

    def to_json(self) -> JsonObject:
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
    config, found = resolved(config)
    config, released = with_released_candidates(config)
    workspace = open_workspace(config.workspace_path, config.storage)
    files = resolve_model(config.target, config.storage)
    sampled = gather_estimates(config, workspace, exact) if config.gather is not None else []
    prepared = None
    if sampled:
        if config.select.windows is not None:
            raise UserError(
                "plan does not know how many steps responses that are still to be sampled will have: leave out the "
                "select method that scores steps in windows of their own, or plan on gathered candidates"
            )
        survey = gathered_survey(sampled)
    else:
        renderer = load_renderer(files.folder, config.target, config.render, storage_options=config.storage)
        prepare_plan = plan_prepare(config, rendering_of(renderer, files), workspace)
        prepared = load_prepared(prepare_plan, config, workspace)
        survey = survey_of_prepared(prepared) if prepared else survey_pool(prepare_plan.files, config, renderer, exact)

    def throughput(policy: PolicyConfig) -> Throughput:
        if tokens_per_second is not None:
            return Throughput(tokens_per_second, device or "given", "--tokens-per-second")
        return expected_throughput(config, policy, device)

    policies = [_sampling(one, tokens_per_second) for one in sampled]
    if config.select.needs_scores:
        target_id = policy_id(config.target, files)
        left, rows = (
            _left_to_score(workspace, prepared, target_id, config) if prepared else (survey.tokens, survey.rows)
        )
        policies.append(_estimate("target", config.target, rows, survey.rows - rows, left, throughput(config.target)))
    if config.select.windows is not None:
        total, rows, left = survey.windows, survey.windows, survey.window_tokens
        if prepared:
            store = ScoreStore(workspace, policy_id(config.target, files)).with_folders()
            total, rows, left = windows_left(prepared, store, renderer.vocabulary, config.select)
        role = "target, steps in their windows"
        policies.append(_estimate(role, config.target, rows, total - rows, left, throughput(config.target)))
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
    counted = "counted exactly: the pool is prepared" if prepared else how(sampled) if sampled else survey.how()
    checkpoints = [one.sentence(asked) for asked, one in found.items()]
    checkpoints += [f"the pool {asked} is {version}" for asked, version in released.items()]
    race = _race(config, prepared, ScoreStore(workspace, policy_id(config.target, files)))
    plan = Plan(pool, counted, survey.exact, survey.token_error, policies, replicas, price, race, checkpoints)
    workspace.write_json(estimate_path(config), plan.to_json())
    return plan


def _race(config: Config, prepared: Prepared | None, store: ScoreStore) -> dict[str, Any] | None:
    """What score.race spares; None where the config does not race."""
    saving = race_saving(config, shards_of_pool(prepared) if prepared is not None else [], store.with_folders())
    return None if saving is None else {**asdict(saving), "share": saving.share, "sentence": saving.sentence()}


def _sampling(one: GatherEstimate, given: float | None) -> ScoringEstimate:
    rate, origin = one.rate(given) if one.samples else (given or 1.0, "nothing is left to sample")
    device = one.known.device if one.known is not None else "given"
    gpus = one.policy.tensor_parallel
    return ScoringEstimate(
        f"gather {one.name}", one.policy.model, one.samples, one.there, one.tokens, rate, gpus, device, origin
    )


def estimate_path(config: Config) -> str:
    """Where the newest estimate for a dataset is kept, in the workspace."""
    return f"estimates/{config.name}.json"


def estimate_against_actual(
    workspace: Storage, config: Config, engines: list[dict[str, Any]], tokens: int
) -> dict[str, Any] | None:
    """For the manifest: the newest `grape plan` of this dataset beside what the engines did; None without a plan."""
    estimate = workspace.read_note(estimate_path(config), "policies")
    if estimate is None:
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
