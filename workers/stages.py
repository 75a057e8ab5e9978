"""The stages of a run on Ray: each takes the run and what the stage before it left, and gives back counts.

Prepare, select, weigh and release are Ray tasks over partitions; scoring is a pool of actors. The driver
holds counts, never rows. No Prefect here: flows call these functions.
"""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.checks.settings import enabled_checks
from grape_service.config import Config
from grape_service.digests import partition_of
from grape_service.errors import StageError, UserError
from grape_service.models import folder_here
from grape_service.plan import estimate_against_actual
from grape_service.prepare.counts import PieceCounts
from grape_service.prepare.finish import finish_prepare, load_prepared
from grape_service.prepare.map_piece import map_piece
from grape_service.prepare.plan import Piece, PreparePlan, plan_prepare
from grape_service.prepare.prepared import Prepared
from grape_service.prepare.reduce import reduce_partition
from grape_service.prepare.shards import shard_paths
from grape_service.prepare.summary import summarise_map
from grape_service.progress import reporter
from grape_service.releases.manifest import PolicyUse
from grape_service.render.compatibility import incompatible_ids
from grape_service.render.renderer import Renderer
from grape_service.report.examples import examples_of_kinds, read_examples
from grape_service.report.statistics import SelectStatistics, source_names
from grape_service.scores import ScoreStore
from grape_service.select import SelectCounts, select_partition
from grape_service.storage import Storage
from workers import publishing
from workers.cluster import num_cores, run_tasks
from workers.metrics import count_rejects
from workers.outlook import look_ahead
from workers.publishing import Outcome
from workers.replicas import ScoreTotals
from workers.run import Run
from workers.scoring import Engines, ShardFile, score_shards
from workers.weighing import Derivations, Kept, Weighed


def prepare(run: Run) -> Prepared:
    """Pool -> shards of whole prompts. An unchanged pool under unchanged settings is not read again."""
    config, workspace = run.config, run.workspace
    enabled_checks(config.checks)  # a misspelt check is told before the work
    with run.stage("prepare"):
        plan = plan_prepare(config, run.target_renderer.digest(), workspace)
        prepared = load_prepared(plan, workspace)
        look_ahead(run, plan.pool_bytes, prepared)
        if prepared is None:
            prepared = _prepare_anew(run, plan)
            look_ahead(run, plan.pool_bytes, prepared)
        else:
            run.event(f"prepare: the pool is unchanged, {prepared.rows:,} rows are there")
        check_compatibility(run, prepared.used_token_ids)
        count_rejects(run.name, prepared.rejects.by_reason)
    return prepared


def _prepare_anew(run: Run, plan: PreparePlan) -> Prepared:
    config, workspace = run.config, run.workspace
    threads = max(1, num_cores(config.workers) // max(1, len(plan.pieces)))
    digest = run.target_renderer.digest()
    reporter().begin("prepare", len(plan.pieces), "pieces")
    pieces = run_tasks(
        map_task,
        [(plan, piece, config, run.target_files.folder, digest, workspace) for piece in plan.pieces],
        config.workers,
        done=lambda *_: reporter().advance("prepare", 1),
        threads=threads,
    )
    reporter().end("prepare")
    summary = summarise_map(plan, pieces, config)
    reporter().begin("shard", plan.num_partitions, "partitions")
    partitions = run_tasks(
        reduce_partition,
        [(plan, partition, config, summary, workspace) for partition in plan.partitions],
        config.workers,
        done=lambda *_: reporter().advance("shard", 1),
    )
    reporter().end("shard")
    return finish_prepare(plan, summary, partitions, config, workspace)


def map_task(
    plan: PreparePlan, piece: Piece, config: Config, folder: str, digest: str, workspace: Storage
) -> PieceCounts:
    """map_piece with a renderer of this process (a Ray task). Raises StageError where it is not that of the run."""
    renderer = Renderer.load(folder_here(config.target, folder, config.storage), config.target, config.render)
    if renderer.digest() != digest:
        raise StageError(
            f"the tokenizer or chat template of {config.target.model} on {socket.gethostname()} is not "
            "that of the run: give every node the same model files"
        )
    return map_piece(plan, piece, config, renderer, workspace)


def check_compatibility(run: Run, used_ids: npt.NDArray[np.int64]) -> None:
    """Refuse behavior policies under which the token ids with loss mean other bytes, before any scoring."""
    config = run.config
    if config.weights is None or config.behavior is None:
        return
    for policy in config.behavior.policies():
        files = run.files_of(policy)
        if files.folder == run.target_files.folder:
            continue
        other = Renderer.load(files.folder, policy, config.render, own_template=True)
        bad = incompatible_ids(run.target_renderer, other, used_ids)
        if len(bad):
            raise UserError(
                f"{config.target.model} and {policy.model} cannot be compared token by token: "
                f"{len(bad):,} of the token ids used mean other text there (the first: {bad[0]}); "
                "use a behavior policy with the same tokenizer, or weights: null"
            )


def pool_counts(prepared: Prepared) -> dict[str, Any]:
    """What came in and what became of it, as the manifest tells it."""
    return {
        "rows_in": prepared.rows_in,
        "filtered": prepared.filtered,
        "rejected": prepared.rejects.total,
        "rejected_by_reason": prepared.rejects.by_reason,
        "rows": prepared.rows,
        "prompts": prepared.prompts,
        "tokens": prepared.tokens,
        "loss_tokens": prepared.loss_tokens,
        "truncated": prepared.truncated,
        "sources": prepared.sources,
        "rejects_table": f"{prepared.folder}/rejects",
    }


def score_target(run: Run, engines: Engines, prepared: Prepared) -> ScoreTotals:
    """log p of every response token of the pool under the target policy."""
    if not run.config.select.needs_scores:
        return ScoreTotals()
    shards = []
    for partition, totals in prepared.partitions.items():
        for path in shard_paths(prepared, partition):
            rows, tokens = totals.rows // totals.num_shards, totals.tokens // totals.num_shards
            shards.append(ShardFile(path, partition, rows, tokens))
    with run.stage("score"):
        return score_shards(run, engines, run.config.target, shards, "score target")


def select(run: Run, prepared: Prepared) -> Kept:
    """Keep the best candidates of each prompt."""
    config = run.config
    partitions = [partition for partition, totals in prepared.partitions.items() if totals.num_shards]
    store = ScoreStore(run.workspace, run.policy_id(config.target)) if config.select.needs_scores else None
    paths = {partition: f"{run.folder}/kept/{partition}.parquet" for partition in partitions}
    names = source_names(prepared.sources, prepared.without_source)
    arguments = [
        (run.workspace, partition, shard_paths(prepared, partition), store, config, path, names)
        for partition, path in paths.items()
    ]
    with run.stage("select"):
        reporter().begin("select", len(arguments), "partitions")
        done = run_tasks(select_task, arguments, config.workers, done=lambda *_: reporter().advance("select", 1))
        reporter().end("select")
    counts = [count for count, _ in done]
    rows = {partition: count.kept_rows for partition, count in zip(partitions, counts, strict=True)}
    total = sum(counts, SelectCounts())
    if total.kept_rows == 0:
        reasons = ", ".join(f"{reason}: {n:,}" for reason, n in total.prompts_left_out.items())
        raise UserError(f"no prompt is left after selection ({reasons or 'the pool has no rows'})")
    statistics = sum((found for _, found in done), SelectStatistics.empty(names))
    return Kept({p: path for p, path in paths.items() if rows[p]}, total, config.select.needs_scores, statistics)


def select_task(
    storage: Storage,
    partition: str,
    shards: list[str],
    store: ScoreStore | None,
    config: Config,
    out_path: str,
    names: list[str],
) -> tuple[SelectCounts, SelectStatistics]:
    """select_partition and its statistics for the report (a Ray task)."""
    statistics = SelectStatistics.empty(names)
    return select_partition(storage, partition, shards, store, config, None, out_path, statistics), statistics


def policies_used(run: Run, derivations: Derivations) -> list[PolicyUse]:
    """Every policy that had a part in the release."""
    used = [publishing.policy_use(run, "target", run.config.target)]
    for group in derivations.groups:
        role = "target" if group.is_target else "behavior"
        if group.temperature != 1.0 or not group.is_target:
            used.append(publishing.policy_use(run, role, group.policy, group.temperature))
    return used


def release(
    run: Run,
    prepared: Prepared,
    scored: ScoreTotals,
    kept: Kept,
    derivations: Derivations,
    weighed: Weighed,
    checked: list[dict[str, Any]],
    force: bool = False,
) -> Outcome:
    """Publish the weighed rows as an immutable version and move the tags to it."""
    totals = [scored, *derivations.totals.values()]
    failed = sum(total.failed for total in totals)
    publishing.check_failed_share(run.config, failed, prepared.rows)
    policies = policies_used(run, derivations)
    counts = {
        "pool": pool_counts(prepared),
        "select": kept.counts.to_json(),
        "weigh": weighed.counts.to_json(),
        "score": {"rows": prepared.rows, "failed": failed},
    }
    fields = {
        "counts": counts,
        "config": run.config.model_dump(mode="json"),
        "parents": publishing.parents(run, prepared, policies),
        "statistics": {
            "weights": weighed.counts.totals.figures() if run.config.weights else None,
            "report": report_statistics(kept, weighed),
            "checks": checked,
            "stage_seconds": {name: round(seconds, 3) for name, seconds in run.stage_seconds.items()},
            "engines": run.engines,
            "estimate": estimate_against_actual(run.workspace, run.config, run.engines, sum(t.tokens for t in totals)),
            "events": run.events,
        },
    }
    message_fields, other_fields = prepared.message_fields, list(prepared.other_fields)
    other_fields += [pa.field("sampling", pa.string())] if prepared.recorded else []
    other_fields += [pa.field("tools", pa.string())] if "tool_calls" in message_fields else []
    with run.stage("release"):
        columns = publishing.Columns(message_fields, other_fields)
        version, is_new = publishing.publish_rows(
            run,
            columns,
            weighed.files(),
            weighed.factor,
            fields,
            force,
            examples=lambda: report_examples(run, prepared, kept, weighed),
        )
    reference = f"{run.output.root}/{run.name}@{version}"
    run.delete_intermediate()
    return Outcome(
        reference=reference,
        version=version,
        prompts=weighed.counts.prompts,
        rows=weighed.counts.rows,
        rejected=prepared.rejects.total,
        failed=failed,
        seconds=publishing.run_seconds(run),
        report=f"{run.output.root}/{run.name}/versions/{version}/report.html",
        scored=sum(total.rows for total in totals),
        reused=sum(total.reused for total in totals),
        is_new=is_new,
        counts=counts,
        stage_seconds=run.stage_seconds,
        storage_options=run.config.storage,
    )


def report_statistics(kept: Kept, weighed: Weighed) -> dict[str, Any]:
    """What report.html is made from, beside its examples."""
    weights = weighed.statistics.to_json() if weighed.statistics is not None else None
    return {"select": kept.statistics.to_json(), "weights": weights}


def report_examples(run: Run, prepared: Prepared, kept: Kept, weighed: Weighed) -> list[dict[str, Any]]:
    """The report's examples: a few prompts with all candidates, token by token."""
    store = ScoreStore(run.workspace, run.policy_id(run.config.target)) if run.config.select.needs_scores else None
    wanted: dict[str, list[str]] = {}
    for prompt_id in kept.statistics.examples.prompt_ids():
        wanted.setdefault(partition_of(prompt_id, prepared.num_partitions), []).append(prompt_id)
    arguments = [
        (run.workspace, p, shard_paths(prepared, p), store, ids, run.config.select, weighed.paths.get(p))
        for p, ids in wanted.items()
    ]
    prompts: dict[str, dict[str, Any]] = {}
    for found in run_tasks(read_examples, arguments, run.config.workers):
        prompts.update(found)
    return examples_of_kinds(prompts, kept.statistics.examples.chosen, run.target_renderer.token_bytes)


def outcome_of_scores(run: Run, prepared: Prepared, scored: ScoreTotals) -> Outcome:
    """What `grape score` tells."""
    return Outcome(
        prompts=prepared.prompts,
        rows=prepared.rows,
        rejected=prepared.rejects.total,
        failed=scored.failed,
        seconds=publishing.run_seconds(run),
        scored=scored.rows,
        reused=scored.reused,
        counts={"pool": pool_counts(prepared)},
        stage_seconds=run.stage_seconds,
    )


def outcome_of_selection(run: Run, prepared: Prepared, scored: ScoreTotals, kept: Kept) -> Outcome:
    """What `grape select` tells; rows and prompts are the kept ones."""
    outcome = outcome_of_scores(run, prepared, scored)
    outcome.prompts, outcome.rows = kept.counts.kept_prompts, kept.counts.kept_rows
    outcome.counts["select"] = kept.counts.to_json()
    return outcome
