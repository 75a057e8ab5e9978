"""The select stage: the best candidates of each prompt are kept, as Ray tasks over partitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.errors import StageError, UserError
from grape_service.prepare.reduce import shard_paths
from grape_service.prepare.result import Prepared
from grape_service.progress.reporter import reporter
from grape_service.report.statistics import SelectStatistics
from grape_service.report.sums import source_names
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import prompt_order
from grape_service.score.stopped import stopped_store
from grape_service.score.store import ScoreStore
from grape_service.select.choose import FAILED_CANDIDATE, LEFT_OUT_REASONS
from grape_service.select.counts import SelectCounts
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.storage.parquet import array_of, read_row_groups, read_tables
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.scoring.failures import failure_files
from workers.stages.accounts import check_selected
from workers.stages.score import complete_keys
from workers.stages.windows import forget_windows

CUT_PROMPTS = 20_000
"""Of larger pools, the report lays the methods that cut steps beside the others in about so many prompts."""


def select(run: Run, prepared: Prepared) -> Kept:
    """Keep the best candidates of each prompt."""
    config = run.config
    partitions = [partition for partition, totals in prepared.partitions.items() if totals.num_shards]
    store = ScoreStore(run.workspace, run.policy_id(config.target)) if config.select.needs_scores else None
    paths = {partition: f"{run.folder}/kept/{partition}.parquet" for partition in partitions}
    names = source_names(prepared.sources, prepared.without_source)
    failures = failure_files(run.workspace, run.run_id, store.policy_id) if store is not None else {}
    store = store.with_folders() if store is not None else None
    stopped = stopped_store(store).with_folders() if store is not None and config.score.race != "off" else None
    stop_ids = run.target_renderer.stop_ids
    cut_share = min(1.0, CUT_PROMPTS / max(prepared.prompts, 1))
    context = SelectContext(run.workspace, config, store, stop_ids, run.target_tokenizer, stopped, cut_share)
    with run.stage("select"):
        reporter().begin("select", len(paths), "partitions")
        done = run_tasks(
            select_task,
            (
                {
                    "partition": SelectPartition(name, shard_paths(prepared, name), path),
                    "failures": failures.get(name, []),
                }
                for name, path in paths.items()
            ),
            config.workers,
            shared={"context": context, "names": names},
            done=lambda number: reporter().advance("select", number),
            together=together(config.workers, len(paths)),
        )
        total, statistics = SelectCounts(), SelectStatistics.empty(names)
        kept = {}
        for (partition, path), (counts, found) in zip(paths.items(), done, strict=True):
            total += counts
            statistics += found
            if counts.kept_rows:
                kept[partition] = path
        reporter().end("select")
    if store is not None and (total.unexplained_failures or total.not_finite):
        for key in complete_keys(config, prepared):
            store.forget_complete(key)
        forget_windows(store, prepared, config.select)
    check_selected(prepared, total)
    if total.kept_rows == 0:
        reasons = ", ".join(f"{reason}: {n:,}" for reason, n in total.prompts_left_out.items())
        sentence = f"no prompt is left after selection ({reasons or 'the pool has no rows'})"
        if total.prompts_left_out.get(
            LEFT_OUT_REASONS[FAILED_CANDIDATE]
        ):  # an engine's fault, which the next run may not meet
            raise StageError(f"{sentence}: run again to score the failed rows once more")
        raise UserError(sentence)
    return Kept(kept, total, config.select.needs_scores, statistics, config.statistics)


def select_task(
    context: SelectContext, partition: SelectPartition, failures: Sequence[str], names: list[str]
) -> tuple[SelectCounts, SelectStatistics]:
    """select_partition and its statistics for the report (a Ray task); `failures` are files of rows that failed."""
    statistics = SelectStatistics.empty(names)
    keys = [array_of(table, "row_key") for table in read_tables(context.storage, failures, ["row_key"])]
    failed = pa.concat_arrays(keys) if keys else None
    return select_partition(context, partition, failed, statistics), statistics


@dataclass
class Kept:
    """What selection left: a file of kept rows for each partition that has any."""

    paths: dict[str, str]  # partition -> path in the workspace
    counts: SelectCounts
    has_scores: bool  # whether target_logprobs are in the files
    statistics: SelectStatistics
    target_statistics: tuple[str, ...] = ()  # of the target's that its rows have or get, beside log-probabilities


def sample_kept(
    run: Run,
    kept: Kept,
    max_rows: int,
    max_tokens: int | None = None,
    columns: Sequence[str] = tuple(SHARD.names),
    usable: Callable[[pa.Table], npt.NDArray[np.bool_]] | None = None,
) -> pa.Table | None:
    """A kept row of each of some prompts, the same ones each time; None without any.

    `usable` says which rows of a table [N] may be taken; without it all may. `max_tokens` bounds their input_ids.
    """
    found: list[pa.Table] = []
    rows = tokens = 0
    for partition in sorted(kept.paths):
        for table in read_row_groups(run.workspace, kept.paths[partition], list(columns)):
            ids = table["prompt_id"].to_pylist()
            may = usable(table) if usable is not None else np.ones(len(ids), dtype=bool)
            first = [row for row, prompt_id in enumerate(ids) if row == 0 or ids[row - 1] != prompt_id]
            lengths = pc.list_value_length(table["input_ids"]).to_pylist()
            chosen: list[int] = []
            for row in sorted(first, key=lambda row: prompt_order(ids[row])):
                if not may[row]:
                    continue
                if rows == max_rows or (max_tokens is not None and tokens + lengths[row] > max_tokens):
                    return _joined([*found, _taken(table, chosen)])
                chosen.append(row)
                rows, tokens = rows + 1, tokens + lengths[row]
            found.append(_taken(table, chosen))
    return _joined(found)


def _taken(table: pa.Table, rows: list[int]) -> pa.Table:
    return table.take(pa.array(rows, pa.int64()))


def _joined(found: list[pa.Table]) -> pa.Table | None:
    table = pa.concat_tables(found).combine_chunks() if found else None
    return table if table is not None and table.num_rows else None
