"""The check stage: data checks as Ray tasks over partitions, after select and before anything is published."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.checks.evaluation_sets import evaluation_items
from grape_service.checks.findings import CheckCounts, CheckResult, result_of
from grape_service.checks.prompt_shuffle import mean_scores, shuffled, trust
from grape_service.checks.run import CheckContext, CheckPartition, check_partition, gather_digests, shared_digests
from grape_service.checks.sources import check_sources
from grape_service.checks.texts import evaluation_grams
from grape_service.config.checks import Check, Contamination, Sources, UntrustedTarget
from grape_service.errors import StageError
from grape_service.prepare.reduce import shard_path, shard_paths
from grape_service.prepare.result import Prepared
from grape_service.progress.reporter import reporter
from grape_service.rows.columns import FINDING, SHARD
from grape_service.score.shards import Shards
from grape_service.score.store import SHUFFLED_SUFFIX, ScoreStore
from grape_service.storage.parquet import array_of, write_parquet
from grape_service.storage.slices import SliceFiles
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.scoring.engines import Engines
from workers.stages.score import Scoring, score_shards
from workers.stages.select import Kept, sample_kept

MAX_BUCKETS = 64


def check(run: Run, engines: Engines, prepared: Prepared, kept: Kept) -> list[CheckResult]:
    """What the checks of the config found, as the manifest and the report tell it; the flagged rows are in
    Parquet tables in the workspace. Raises StageError where one that is set to fail does."""
    checks = run.config.checks.enabled()
    if not checks:
        return []
    folder = f"checks/{run.run_id}"
    with run.stage("check"):
        counts = _check_partitions(run, prepared, kept, checks, folder)
        results: list[CheckResult] = []
        for item in checks:
            if isinstance(item, Sources):
                result, findings = check_sources(item, kept.statistics.to_json())
            elif isinstance(item, UntrustedTarget):
                result, findings = _check_target(run, engines, prepared, kept, item)
            else:
                result, findings = result_of(item, counts[item.name]), None
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
            f"{failed[0]['change']} The flagged rows: {run.workspace.url(folder)}"
        )
    return results


def _check_partitions(
    run: Run, prepared: Prepared, kept: Kept, checks: list[Check], folder: str
) -> dict[str, CheckCounts]:
    workspace, workers = run.workspace, run.config.workers
    grams = {}
    for item in checks:
        if isinstance(item, Contamination):
            items = evaluation_items(item.files, run.config.storage)
            grams = evaluation_grams(items, item.n)
    partitions = [name for name, totals in prepared.partitions.items() if totals.num_shards]
    digests = {name: f"{run.folder}/digests/{name}.parquet" for name in partitions}
    reporter().begin("check", len(partitions), "partitions")
    done = run_tasks(
        check_partition,
        (
            {
                "partition": CheckPartition(
                    shard_paths(prepared, name), kept.paths.get(name), f"{folder}/{name}.parquet", digests[name]
                )
            }
            for name in partitions
        ),
        workers,
        shared={"context": CheckContext(workspace, checks, grams)},
        done=lambda number: reporter().advance("check", number),
        together=together(workers, len(partitions)),
    )
    totals = {item.name: CheckCounts() for item in checks}
    for found in done:
        for name, counts in found.items():
            totals[name] += counts
    reporter().end("check")
    if "exact_duplicates" in totals:
        for counts in _shared_digests(run, list(digests.values()), folder):
            totals["exact_duplicates"] += counts
    return totals


def _shared_digests(run: Run, paths: list[str], folder: str) -> Iterator[CheckCounts]:
    """Look at the digests of all partitions, one range of them after the other; each file is opened once."""
    workspace, workers = run.workspace, run.config.workers
    buckets = min(MAX_BUCKETS, len(paths))
    groups = [paths[start : start + MAX_BUCKETS] for start in range(0, len(paths), MAX_BUCKETS)]
    gathered = [f"{run.folder}/digests/from-{number:05d}.arrow" for number in range(len(groups))]
    bounds = run_tasks(
        gather_digests,
        ({"paths": group, "out_path": path} for group, path in zip(groups, gathered, strict=True)),
        workers,
        shared={"storage": workspace, "num_buckets": buckets},
    )
    files = SliceFiles(gathered, np.array(list(bounds), dtype=np.int64).reshape(len(groups), buckets + 1))
    return run_tasks(
        shared_digests,
        ({"bucket": n, "out_path": f"{folder}/duplicates-{n:02}.parquet"} for n in range(buckets)),
        workers,
        shared={"storage": workspace, "files": files},
    )


def _check_target(
    run: Run, engines: Engines, prepared: Prepared, kept: Kept, item: UntrustedTarget
) -> tuple[CheckResult, pa.Table]:
    """Score a sample of kept responses under other prompts and compare with their own scores."""
    counts, warning, findings = CheckCounts(), None, FINDING.empty_table()
    columns = [*SHARD.names, "target_logprobs"]
    sample = sample_kept(run, kept, item.rows, None, columns, _loss_at_the_end) if kept.has_scores else None
    if sample is not None and sample.num_rows > 1:
        other_prompts = shuffled(sample)
        shard_folder = f"{run.folder}/shuffled"
        write_parquet(run.workspace, shard_path(shard_folder, 0), SHARD, [other_prompts])
        num_tokens = int(pc.sum(pc.list_value_length(other_prompts["input_ids"])).as_py())
        shard = Shards(shard_folder, "b", 1, other_prompts.num_rows, num_tokens)
        store = ScoreStore(run.workspace, f"{run.policy_id(run.config.target)}{SHUFFLED_SUFFIX}")
        title = "score responses under shuffled prompts"
        score_shards(run, engines, Scoring(run.config.target, title, store_id=store.policy_id), [shard])
        found = store.read("b", array_of(other_prompts, "row_key"))
        usable = np.flatnonzero(found.finite())
        if len(usable):
            real = mean_scores([sample["target_logprobs"][int(row)].as_py() for row in usable])
            other = mean_scores([found.take(np.array([row])).tolist() for row in usable])
            flagged, warning = trust(real, other, item)
            counts, findings = flagged.counts(len(usable), 0.0), flagged.table(item.name, sample.take(usable))
    result = result_of(item, counts)
    return {**result, "warning": warning}, findings


def _loss_at_the_end(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Rows [N] whose loss is one run at their end: they can be moved behind another prompt."""
    loss = pc.list_value_length(table["target_logprobs"]).to_numpy(zero_copy_only=False)
    response = pc.list_value_length(table["input_ids"]).to_numpy() - table["prompt_len"].to_numpy()
    return np.asarray(loss == response)
