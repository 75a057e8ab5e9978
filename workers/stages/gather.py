"""The gather stage: candidates are sampled for the pool's prompts, verified, and become part of the pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from grape_service.config.gather import VerifyConfig
from grape_service.config.policy import RecordedBehavior
from grape_service.config.pool import PoolConfig, PoolGroup
from grape_service.config.schema import Config
from grape_service.display import counted
from grape_service.errors import StageError
from grape_service.gather.audit import refuse_drift
from grape_service.gather.candidates import GatherCounts, Gathered, write_candidates
from grape_service.gather.missing import sampling_of
from grape_service.gather.prompts import carried, prompts_config
from grape_service.gather.verdicts import judge_of
from grape_service.keys import digest_of
from grape_service.models.files import PolicyFiles
from grape_service.models.tokenizer import load_tokenizer
from grape_service.pool.contract import group_contracts
from grape_service.prepare.finish import load_prepared
from grape_service.prepare.plan import plan_prepare, pool_listing, rendering_of
from grape_service.prepare.reduce import shard_paths
from grape_service.prepare.result import Prepared
from grape_service.storage.storage import Storage
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.scoring.engines import Engines
from workers.scoring.failures import FailureLimit
from workers.stages.accounts import check_gathered
from workers.stages.audit import audit
from workers.stages.judge import ask_judge
from workers.stages.prepare import read_pool
from workers.stages.provenance import pool_parents
from workers.stages.release_candidates import release_candidates
from workers.stages.sample import Budget, sample_missing


@dataclass
class GatheredPool:
    """What gather left: the config of the stages that follow, whose pool has the samples, and what was made."""

    config: Config
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)  # by policy: GatherCounts, sampled_now, audit
    is_whole: bool = True  # no limit was met, and no unit failed
    released: str | None = None  # the version of gather.release

    def outcome(self) -> dict[str, int]:
        """Fields of the outcome of a run that ends here."""
        found = list(self.counts.values())
        sampled = sum(counts["sampled_now"] for counts in found)
        rows = sum(counts["samples"] for counts in found)
        return {
            "prompts": max((counts["prompts"] for counts in found), default=0),
            "rows": rows,
            "scored": sampled,
            "reused": rows - sampled,
        }


def gather(run: Run, engines: Engines) -> GatheredPool:
    """Sample what is missing for each policy; the pool of what follows is what was gathered, and rows that bring
    responses. Raises UserError, StageError where units failed and none may."""
    config = run.config
    assert config.gather is not None, "gathering needs a gather section"
    gathered = GatheredPool(config)
    budget = Budget(config.gather)
    if config.gather.verify.while_sampling.method != "none":
        judge_of(config.gather.verify)
    paths = []
    with run.stage("gather"):
        for name in config.gather.policies:
            counts, path = _gather_policy(run, engines, name, budget, gathered)
            gathered.counts[name] = counts
            if counts["samples"]:
                paths.append(path)
        if budget.met:
            run.event(f"gather ends with what there is: {budget.met}")
            gathered.is_whole = False
        if config.gather.release is not None and paths:
            gathered.released = release_candidates(run, gathered.counts, paths)
            run.event(f"the candidates are {gathered.released}")
    gathered.config = config.model_copy(update={"pool": _pool_with(config, run, paths)})
    return gathered


def _gather_policy(
    run: Run, engines: Engines, name: str, budget: Budget, gathered: GatheredPool
) -> tuple[dict[str, Any], str]:
    config = run.config
    assert config.gather is not None
    policy = config.gather.policy(name)
    own = replace(run, config=prompts_config(config, policy))
    plan = plan_prepare(own.config, rendering_of(own.target_renderer, own.target_files), run.workspace)
    prompts = load_prepared(plan, own.config, run.workspace) or read_pool(own, plan)
    run.prompts = pool_parents(run, prompts, "prompts")
    renderer = own.target_renderer
    sampling = sampling_of(config.gather, name, run.policy_id(policy), renderer.stop_ids)
    shards = list(_shards(prompts))
    share, done = config.workers.max_failed_share, f"sampled from gather.policies.{name}"
    limit = FailureLimit(run, share, prompts.rows, "prompt", done)
    totals = sample_missing(run, engines, f"gather {name}", policy, sampling, shards, limit, budget)
    if totals.failed:
        gathered.is_whole = False
        run.event(f"{name}: {counted(totals.failed, 'prompt')} could not be sampled")
        if not totals.rows and not totals.reused:
            raise StageError(f"gather.policies.{name}: nothing could be sampled: {totals.failed_units[0][1]}")
    shares = renderer.vocabulary.digest == run.target_renderer.vocabulary.digest
    as_gathered = Gathered(name, sampling.sampler, sampling.config, sampling.samples, sampling.verify, shares)
    made_of = [as_gathered.made_of(), prompts.prepare_id]  # the same files whenever it runs, with what there is by then
    out = f"gathered/pools/{name}-{digest_of(made_of, 16)}"
    counts = sum(
        run_tasks(
            write_candidates_task,
            (
                {"shard": shard, "partition": partition, "out": f"{out}/{partition}-{number:05d}.parquet"}
                for partition, shard, number in shards
            ),
            config.workers,
            shared={
                "storage": run.workspace,
                "gathered": as_gathered,
                "model": PolicyFiles(policy, own.target_files.folder, config.storage),
                "stop_ids": sampling.stop_ids,
            },
            together=together(config.workers, prompts.prompts),
        ),
        GatherCounts(),
    )
    if config.gather.verify.asks_model:
        out, verdicts, all_judged = ask_judge(run, engines, name, out, counts.samples, budget)
        counts += verdicts
        gathered.is_whole &= all_judged
    if sampling.right is None and not budget.met:
        check_gathered(name, counts, totals.failed * sampling.samples, config.gather.verify)
    sampled_now = counts.samples - totals.reused
    run.event(_sentence(name, counts, sampled_now, config.gather.verify))
    found: dict[str, Any] = {**asdict(counts), "sampled_now": sampled_now, "failed_prompts": totals.failed}
    found["candidates"] = out
    if shares and isinstance(config.gather.behavior_of(name), RecordedBehavior):
        of_prompts = [(partition, path) for partition, path, _ in shards]
        drift = audit(run, engines, name, policy, sampling, of_prompts, counts.samples)
        if drift is not None:
            found["audit"] = drift.to_json()
            refuse_drift(config, name, drift)
    return found, out


def _shards(prompts: Prepared) -> Iterator[tuple[str, str, int]]:
    """(partition, path, number) of each shard of prompts."""
    for partition, totals in prompts.partitions.items():
        for number, path in enumerate(shard_paths(prompts, partition) if totals.num_shards else ()):
            yield partition, path, number


def write_candidates_task(
    storage: Storage,
    shard: str,
    partition: str,
    gathered: Gathered,
    model: PolicyFiles,
    stop_ids: tuple[int, ...],
    out: str,
) -> GatherCounts:
    """write_candidates with the policy's tokenizer (a Ray task)."""
    tokenizer = load_tokenizer(model.here(), model.policy)
    return write_candidates(storage, shard, partition, gathered, tokenizer, stop_ids, out)


def _sentence(name: str, counts: GatherCounts, sampled_now: int, verify: VerifyConfig) -> str:
    words = f"gather {name}: {counted(counts.samples, 'sample')} of {counted(counts.prompts, 'prompt')}, "
    words += f"{sampled_now:,} of them made now, {counts.truncated:,} cut at max_tokens"
    if verify.method != "none":
        words += f"; {counts.right:,} right, {counts.wrong:,} wrong, {counts.unknown:,} unknown"
    return words


def _pool_with(config: Config, run: Run, paths: list[str]) -> PoolConfig:
    """The pool of what follows: gathered files, and those of the pool's groups that bring responses."""
    assert config.gather is not None
    groups = [group.model_copy(update={"carry": carried(config, group)}) for group in config.pool.groups]
    everywhere = {"columns": {}, "where": [], "carry": [], "shape": "auto"}  # stands in each group
    read = config.model_copy(update={"pool": config.pool.model_copy(update={**everywhere, "path": groups})})
    contracts = group_contracts(tuple(pool_listing(read, run.workspace).files), read)
    kept = [
        group
        for group, contract in zip(groups, contracts, strict=True)
        if any(layout.missing is None for layout in contract.layouts)
    ]
    carry = sorted({name for group in groups for name in group.carry})
    own = [
        PoolGroup(path=f"{run.workspace.url(path)}/*.parquet", where=config.pool.where, carry=carry, shape="response")
        for path in paths
    ]
    if not own and not kept:
        raise StageError("gather made no candidate, and the pool brings none")
    return config.pool.model_copy(
        update={"path": [*kept, *own], "columns": {}, "where": [], "carry": [], "shape": "auto"}
    )
