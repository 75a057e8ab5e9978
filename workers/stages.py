"""The stages of a run on Ray: each takes the run and what the stage before it left, and gives back counts.

Prepare, select, weigh and release are Ray tasks over partitions; scoring is a pool of actors. The driver
holds counts, never rows. No Prefect here: flows call these functions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from grape_service.config import Config, PolicyConfig, RenderConfig
from grape_service.derived import Derived, Group, derive_partition
from grape_service.errors import StageError, UserError
from grape_service.prepare import (
    PieceCounts,
    PreparePlan,
    Prepared,
    finish_prepare,
    load_prepared,
    map_piece,
    plan_prepare,
    reduce_partition,
)
from grape_service.progress import reporter
from grape_service.render.compatibility import incompatible_ids
from grape_service.render.renderer import Renderer
from grape_service.scores import ScoreStore
from grape_service.select import SelectCounts, select_partition
from grape_service.storage import Storage
from workers.cluster import num_cores, run_tasks
from workers.replicas import ScoreTotals
from workers.run import Run
from workers.scoring import Engines, ShardFile, score_shards


@dataclass
class Kept:
    """What selection left: a file of kept rows for each partition that has any."""

    paths: dict[str, str]  # partition -> path in the workspace
    counts: SelectCounts
    rows: dict[str, int]  # partition -> rows


def prepare(run: Run) -> Prepared:
    """Pool -> shards of whole prompts. An unchanged pool under unchanged settings is not read again."""
    config, workspace = run.config, run.workspace
    with run.stage("prepare"):
        plan = plan_prepare(config, run.target_renderer.digest(), workspace)
        prepared = load_prepared(plan, workspace)
        if prepared is None:
            prepared = _prepare_anew(run, plan)
        else:
            run.event(f"prepare: the pool is unchanged, {prepared.rows:,} rows are there")
        check_compatibility(run, prepared)
    return prepared


def _prepare_anew(run: Run, plan: PreparePlan) -> Prepared:
    config, workspace = run.config, run.workspace
    threads = max(1, num_cores(config.workers) // max(1, len(plan.pieces)))
    reporter().begin("prepare", sum(piece.size for piece in plan.pieces), "bytes")
    pieces = run_tasks(
        map_task,
        [(plan, piece, config, run.target_files.folder, workspace) for piece in plan.pieces],
        config.workers,
        done=lambda index, _: reporter().advance("prepare", plan.pieces[index].size),
        threads=threads,
    )
    reporter().end("prepare")
    reporter().begin("shard", plan.num_partitions, "partitions")
    partitions = run_tasks(
        reduce_partition,
        [(plan, partition, config, pieces, workspace) for partition in plan.partitions],
        config.workers,
        done=lambda *_: reporter().advance("shard", 1),
    )
    reporter().end("shard")
    return finish_prepare(plan, partitions, config, workspace)


def map_task(plan: PreparePlan, piece: Any, config: Config, folder: str, workspace: Storage) -> PieceCounts:
    """map_piece with a renderer of this process (a Ray task)."""
    return map_piece(plan, piece, config, Renderer.load(folder, config.target, config.render), workspace)


def check_compatibility(run: Run, prepared: Prepared) -> None:
    """Refuse behavior policies under which the pool's token ids mean other bytes, before any scoring."""
    config = run.config
    if config.weights is None or config.behavior is None:
        return
    for policy in config.behavior.policies():
        files = run.files_of(policy)
        if files.folder == run.target_files.folder:
            continue
        other = Renderer.load(files.folder, policy, config.render)
        bad = incompatible_ids(run.target_renderer, other, prepared.used_ids)
        if len(bad):
            raise UserError(
                f"{config.target.model} and {policy.model} cannot be compared token by token: "
                f"{len(bad):,} of the token ids used mean other text there (the first: {bad[0]}); "
                "use a behavior policy with the same tokenizer, or weights: null"
            )


def score_target(run: Run, engines: Engines, prepared: Prepared) -> ScoreTotals:
    """log p of every response token of the pool under the target policy."""
    if not run.config.select.needs_scores:
        return ScoreTotals()
    shards = [
        ShardFile(shard.path, partition, shard.rows, shard.tokens)
        for partition, group in prepared.shards.items()
        for shard in group
    ]
    with run.stage("score"):
        return score_shards(run, engines, run.config.target, shards, "score target")


def select(run: Run, prepared: Prepared) -> Kept:
    """Keep the best candidates of each prompt."""
    partitions = [partition for partition, shards in prepared.shards.items() if shards]
    store = ScoreStore(run.workspace, run.policy_id(run.config.target)) if run.config.select.needs_scores else None
    paths = {partition: f"{run.folder}/kept/{partition}.parquet" for partition in partitions}
    arguments = [
        (run.workspace, partition, [s.path for s in prepared.shards[partition]], store, run.config, None, path)
        for partition, path in paths.items()
    ]
    with run.stage("select"):
        reporter().begin("select", len(arguments), "partitions")
        counts = run_tasks(
            select_partition, arguments, run.config.workers, done=lambda *_: reporter().advance("select", 1)
        )
        reporter().end("select")
    rows = {partition: count.kept_rows for partition, count in zip(partitions, counts, strict=True)}
    total = sum(counts, SelectCounts())
    if total.kept_rows == 0:
        reasons = ", ".join(f"{reason}: {n:,}" for reason, n in total.prompts_left_out.items())
        raise UserError(f"no prompt is left after selection ({reasons or 'the pool has no rows'})")
    return Kept({p: path for p, path in paths.items() if rows[p]}, total, rows)


def policy_groups(run: Run, prepared: Prepared) -> list[Group]:
    """Who scores kept rows: the target where it has not, the target at recorded temperatures, behavior policies."""
    config = run.config
    assert config.behavior is not None
    target, files = config.target, run.target_files
    temperatures = [] if config.select.needs_scores else [1.0]
    temperatures += sorted(t for t in prepared.temperatures if t != 1.0)
    groups = [
        Group(f"target-{t:g}", target, run.policy_id(target, t), files.folder, t, is_target=True) for t in temperatures
    ]
    for number, policy in enumerate(config.behavior.policies()):
        folder = run.files_of(policy).folder
        groups.append(Group(f"behavior-{number}", policy, run.policy_id(policy), folder, 1.0, is_target=False))
    return groups


@dataclass
class Derivations:
    """The shards of kept rows that were made for each group."""

    groups: list[Group] = field(default_factory=list)
    shards: dict[str, dict[str, Derived]] = field(default_factory=dict)  # partition -> group name -> shards
    totals: dict[str, ScoreTotals] = field(default_factory=dict)  # group name -> what scoring did


def score_policies(run: Run, engines: Engines, prepared: Prepared, kept: Kept) -> Derivations:
    """log p of kept responses under whatever PEAR needs beside the target's scores, policy by policy."""
    config = run.config
    if config.weights is None:
        return Derivations()
    groups = policy_groups(run, prepared)
    if not groups:
        return Derivations()
    with run.stage("score behavior"):
        arguments = [
            (
                run.workspace,
                path,
                f"{run.folder}/derived/{partition}",
                groups,
                config.behavior,
                config.render,
                run.target_renderer.turn_end_id,
                config.workers.shard_tokens,
            )
            for partition, path in kept.paths.items()
        ]
        made = run_tasks(derive_partition, arguments, config.workers)
        derivations = Derivations(groups, dict(zip(kept.paths, made, strict=True)))
        for group in sorted(groups, key=lambda group: not _same_weights(run, group)):
            shards = [
                ShardFile(shard.path, partition, shard.rows, shard.tokens)
                for partition, by_group in derivations.shards.items()
                for shard in by_group[group.name].shards
            ]
            if shards:
                stage = f"score {group.name}"
                totals = score_shards(run, engines, group.policy, shards, stage, group.temperature)
                derivations.totals[group.name] = totals
    return derivations


def _same_weights(run: Run, group: Group) -> bool:
    return run.policy_id(group.policy) == run.policy_id(run.config.target)
