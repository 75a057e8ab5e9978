"""The check stage: data checks as Ray tasks over partitions, after select and before anything is published."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.checks.dealt import deal, mean_scores, trust
from grape_service.checks.evaluation import evaluation_items
from grape_service.checks.findings import FINDING, CheckCounts, result_of
from grape_service.checks.partition import check_partition, shared_digests
from grape_service.checks.settings import Check, enabled_checks
from grape_service.checks.sources import check_sources
from grape_service.checks.texts import evaluation_grams
from grape_service.digests import prompt_order
from grape_service.errors import StageError
from grape_service.parquet import array_of, read_row_groups, write_parquet
from grape_service.prepare.prepared import Prepared
from grape_service.prepare.shards import shard_paths
from grape_service.progress import reporter
from grape_service.schemas import SHARD
from grape_service.scores import ScoreStore
from workers.cluster import run_tasks
from workers.run import Run
from workers.scoring import Engines, ShardFile, score_shards
from workers.weighing import Kept

MAX_BUCKETS = 64


def check(run: Run, engines: Engines, prepared: Prepared, kept: Kept) -> list[dict[str, Any]]:
    """What the checks of the config found, as the manifest and the report tell it; the rows that are touched are in
    Parquet tables in the workspace. Raises StageError where one that is set to fail does."""
    checks = enabled_checks(run.config.checks)
    if not checks:
        return []
    folder = f"checks/{run.run_id}"
    with run.stage("check"):
        counts = _check_partitions(run, prepared, kept, checks, folder)
        results = []
        for item in checks:
            if item.name == "sources":
                result, findings = check_sources(item, kept.statistics.to_json())
            elif item.name == "untrusted_target":
                result, findings = _check_target(run, engines, prepared, kept, item)
            else:
                result, findings = result_of(item, counts[item.name], None), None
            if findings is not None:
                write_parquet(run.workspace, f"{folder}/{item.name}.parquet", FINDING, [findings])
            results.append({**result, "table": f"{run.workspace.root}/{folder}"})
    for result in results:
        if result["warning"]:
            run.event(f"check {result['name']}: {result['warning']}")
    failed = [result for result in results if result["warning"] and result["action"] == "fail"]
    if failed:
        raise StageError(
            f"{failed[0]['warning']} checks.{failed[0]['name']} is set to fail, so nothing is published. "
            f"{failed[0]['change']} Who is touched: {run.workspace.url(folder)}"
        )
    return results


def _check_partitions(
    run: Run, prepared: Prepared, kept: Kept, checks: list[Check], folder: str
) -> dict[str, CheckCounts]:
    workspace, workers = run.workspace, run.config.workers
    grams = {}
    for item in checks:
        if item.name == "contamination":
            items = evaluation_items(item.settings["files"], run.config.storage)
            grams = evaluation_grams(items, int(item.settings["n"]))
    partitions = [name for name, totals in prepared.partitions.items() if totals.num_shards]
    digests = [f"{run.folder}/digests/{name}.parquet" for name in partitions]
    arguments = [
        (workspace, shard_paths(prepared, p), kept.paths.get(p), checks, grams, f"{folder}/{p}.parquet", digest)
        for p, digest in zip(partitions, digests, strict=True)
    ]
    reporter().begin("check", len(arguments), "partitions")
    done = run_tasks(check_partition, arguments, workers, done=lambda *_: reporter().advance("check", 1))
    reporter().end("check")
    totals = {item.name: sum((found[item.name] for found in done), CheckCounts()) for item in checks}
    if "exact_duplicates" in totals:
        buckets = min(MAX_BUCKETS, len(partitions))
        shared = run_tasks(
            shared_digests,
            [(workspace, digests, n, buckets, f"{folder}/duplicates-{n:02}.parquet") for n in range(buckets)],
            workers,
        )
        totals["exact_duplicates"] += sum(shared, CheckCounts())
    return totals


def _check_target(
    run: Run, engines: Engines, prepared: Prepared, kept: Kept, item: Check
) -> tuple[dict[str, Any], pa.Table]:
    """Score a sample of kept responses under other prompts and compare with their own scores."""
    counts, warning, findings = CheckCounts(), None, FINDING.empty_table()
    sample = _sample(run, prepared, kept, int(item.settings["rows"]))
    if sample is not None and sample.num_rows > 1:
        path = f"{run.folder}/dealt/shard-00000.parquet"
        dealt = deal(sample)
        write_parquet(run.workspace, path, SHARD, [dealt])
        num_tokens = int(pc.sum(pc.list_value_length(dealt["input_ids"])).as_py())
        shard = ShardFile(path, "b", dealt.num_rows, num_tokens)
        score_shards(run, engines, run.config.target, [shard], "score dealt responses")
        found = ScoreStore(run.workspace, run.policy_id(run.config.target)).read("b", array_of(dealt, "row_key"))
        usable = np.flatnonzero(found.finite())
        if len(usable):
            real = mean_scores([sample["target_logprobs"][int(row)].as_py() for row in usable])
            other = mean_scores([found.take(np.array([row])).tolist() for row in usable])
            touched, warning = trust(real, other, item.settings)
            counts, findings = touched.counts(len(usable), 0.0), touched.table(item.name, sample.take(usable))
    result = result_of(Check(item.name, item.action, {**item.settings, "max_share": 1.0}), counts, None)
    return {**result, "warning": warning}, findings


def _sample(run: Run, prepared: Prepared, kept: Kept, most: int) -> pa.Table | None:
    """Kept rows of different prompts whose loss is one run at the end; None without scores. The same each time."""
    if not kept.has_scores:
        return None
    found: list[pa.Table] = []
    rows = 0
    for partition in sorted(kept.paths):
        for table in read_row_groups(run.workspace, kept.paths[partition], [*SHARD.names, "target_logprobs"]):
            ids = table["prompt_id"].to_pylist()
            first = [row for row, prompt_id in enumerate(ids) if row == 0 or ids[row - 1] != prompt_id]
            first = sorted(first, key=lambda row: prompt_order(ids[row]))
            loss = pc.list_value_length(table["target_logprobs"]).to_numpy(zero_copy_only=False)
            whole = pc.list_value_length(table["input_ids"]).to_numpy() - table["prompt_len"].to_numpy()
            chosen = [row for row in first if loss[row] == whole[row]][: most - rows]
            found.append(table.take(chosen))
            rows += len(chosen)
            if rows >= most:
                return pa.concat_tables(found).combine_chunks()
    return pa.concat_tables(found).combine_chunks() if found else None
