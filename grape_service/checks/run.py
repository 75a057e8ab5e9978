"""The checks on one partition: its shards for those that look at all rows, its kept file for the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.checks import texts, tokens
from grape_service.checks.findings import CheckCounts, Flagged
from grape_service.config.checks import Check, ExactDuplicates
from grape_service.rows.columns import FINDING, RESPONSE_DIGEST
from grape_service.storage.parquet import read_row_groups, read_tables, write_parquet
from grape_service.storage.slices import SliceFiles, read_slice, write_slices
from grape_service.storage.storage import Storage

SHARD_READS = ["prompt_id", "candidate_id", "input_ids", "loss_mask"]
KEPT_READS = [*SHARD_READS, "messages", "num_prompt_messages", "truncated"]
CHUNK_ROWS = 4096

Grams = dict[int, npt.NDArray[np.uint64]]
ON_KEPT: dict[str, Callable[[pa.Table, Any], Flagged]] = {
    "language": texts.language,
    "refusal": texts.refusal,
    "boilerplate": texts.boilerplate,
    "truncation": texts.truncation,
    "repetition": tokens.repetition,
}


@dataclass(frozen=True)
class CheckContext:
    """What the checks of every partition share."""

    storage: Storage
    checks: list[Check]
    grams: Grams  # of evaluation sets


@dataclass(frozen=True)
class CheckPartition:
    """One partition: what is looked at, and where what was found goes."""

    shards: Sequence[str]
    kept_path: str | None  # None where nothing is kept
    out_path: str  # of its FINDINGs
    digests_path: str  # of its RESPONSE_DIGESTs, sorted, for `shared_digests`


def check_partition(context: CheckContext, partition: CheckPartition) -> dict[str, CheckCounts]:
    """Write the findings of one partition, and for exact_duplicates the digests of its responses; counts by check (a
    Ray task)."""
    storage, checks = context.storage, context.checks
    counts = {check.name: CheckCounts() for check in checks}
    by_name = {check.name: check for check in checks}

    def look(name: str, table: pa.Table, test: Callable[[pa.Table, Any], Flagged], settings: Any) -> pa.Table:
        started = time.monotonic()
        flagged = test(table, settings)
        counts[name] += flagged.counts(table.num_rows, time.monotonic() - started)
        return flagged.table(name, table)

    def findings() -> Iterator[pa.Table]:
        if "near_duplicates" in by_name:
            settings = by_name["near_duplicates"]
            for table in read_tables(storage, partition.shards, SHARD_READS):
                yield look("near_duplicates", table, tokens.near_duplicates, settings)
        if partition.kept_path is None:
            return
        for group in read_row_groups(storage, partition.kept_path, KEPT_READS):
            for start in range(0, group.num_rows, CHUNK_ROWS):
                table = group.slice(start, CHUNK_ROWS).combine_chunks()
                for check in checks:
                    if check.name in ON_KEPT:
                        yield look(check.name, table, ON_KEPT[check.name], check)
                    elif check.name == "contamination":
                        yield look(check.name, table, texts.contamination, context.grams)

    write_parquet(storage, partition.out_path, FINDING, findings())
    duplicates = by_name.get("exact_duplicates")
    if isinstance(duplicates, ExactDuplicates):
        started = time.monotonic()
        found = _digests(storage, partition.shards, duplicates.min_tokens)
        in_order = found.sort_by("digest")
        write_parquet(storage, partition.digests_path, RESPONSE_DIGEST, [in_order], row_group_bytes=2**20)
        rows = found.num_rows
        counts["exact_duplicates"] += CheckCounts(rows, 0, time.monotonic() - started)
    return counts


def _digests(storage: Storage, shards: Sequence[str], min_tokens: int) -> pa.Table:
    tables = [RESPONSE_DIGEST.empty_table()]
    for table in read_tables(storage, shards, SHARD_READS):
        ids = [table["prompt_id"], table["candidate_id"]]
        found = pa.table([tokens.response_digests(table, min_tokens), *ids], schema=RESPONSE_DIGEST)
        tables.append(found.filter(pc.is_valid(found["digest"])))
    return pa.concat_tables(tables).combine_chunks()


def gather_digests(storage: Storage, paths: Sequence[str], num_buckets: int, out_path: str) -> list[int]:
    """The digests of some partitions in one file, a slice for each of `num_buckets` ranges (a Ray task); its bounds."""
    tables = [table for path in paths for table in read_row_groups(storage, path)]
    table = pa.concat_tables([RESPONSE_DIGEST.empty_table(), *tables])
    buckets = table["digest"].to_numpy() // np.uint64(-(-(2**64) // num_buckets))
    return write_slices(storage, out_path, table, buckets.astype(np.int64), num_buckets)


def shared_digests(storage: Storage, files: SliceFiles, bucket: int, out_path: str) -> CheckCounts:
    """Responses that stand under several prompts, of one range of digests (a Ray task)."""
    started = time.monotonic()
    table = read_slice(storage, files, bucket, RESPONSE_DIGEST)
    prompts = table.group_by("digest").aggregate([("prompt_id", "count_distinct")])
    shared = prompts.filter(pc.greater(prompts["prompt_id_count_distinct"], 1))
    rows = table.join(shared, "digest", join_type="inner").sort_by(
        [("digest", "ascending"), ("prompt_id", "ascending"), ("candidate_id", "ascending")]
    )
    details = [f"this response stands under {n} prompts" for n in rows["prompt_id_count_distinct"].to_pylist()]
    places = list(range(rows.num_rows))
    flagged = Flagged(places, ["same response under several prompts"] * len(places), list(details))
    write_parquet(storage, out_path, FINDING, [flagged.table("exact_duplicates", rows)])
    return flagged.counts(0, time.monotonic() - started)
