"""The checks on one partition: its shards for those that look at all rows, its kept file for the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.checks import texts, tokens
from grape_service.checks.findings import FINDING, CheckCounts, Flagged
from grape_service.config.checks import Check, ExactDuplicates
from grape_service.storage.parquet import read_row_groups, read_tables, write_parquet
from grape_service.storage.slices import SliceFiles, read_slice, write_slices
from grape_service.storage.storage import Storage

TOKEN_COLUMNS = ["prompt_id", "candidate_id", "input_ids", "loss_mask"]
KEPT_COLUMNS = [*TOKEN_COLUMNS, "messages", "num_prompt_messages", "truncated"]
DIGEST = pa.schema(
    [pa.field("digest", pa.uint64()), pa.field("prompt_id", pa.string()), pa.field("candidate_id", pa.string())]
)
CHUNK_ROWS = 4096

Grams = dict[int, npt.NDArray[np.uint64]]
ON_KEPT: dict[str, Callable[[pa.Table, Any], Flagged]] = {
    "language": texts.language,
    "refusal": texts.refusal,
    "boilerplate": texts.boilerplate,
    "truncation": texts.truncation,
    "repetition": tokens.repetition,
}


def check_partition(
    storage: Storage,
    shards: Sequence[str],
    kept_path: str | None,
    checks: list[Check],
    grams: Grams,
    out_path: str,
    digests_path: str,
) -> dict[str, CheckCounts]:
    """Write the findings of one partition (FINDING) to `out_path` and count them (a Ray task).

    For exact_duplicates the digests of its responses go to `digests_path`, sorted; see `shared_digests`.
    """
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
            for table in read_tables(storage, shards, TOKEN_COLUMNS):
                yield look("near_duplicates", table, tokens.near_duplicates, settings)
        if kept_path is None:
            return
        for group in read_row_groups(storage, kept_path, KEPT_COLUMNS):
            for start in range(0, group.num_rows, CHUNK_ROWS):
                table = group.slice(start, CHUNK_ROWS).combine_chunks()
                for check in checks:
                    if check.name in ON_KEPT:
                        yield look(check.name, table, ON_KEPT[check.name], check)
                    elif check.name == "contamination":
                        yield look(check.name, table, texts.contamination, grams)

    write_parquet(storage, out_path, FINDING, findings())
    duplicates = by_name.get("exact_duplicates")
    if isinstance(duplicates, ExactDuplicates):
        started = time.monotonic()
        found = _digests(storage, shards, duplicates.min_tokens)
        write_parquet(storage, digests_path, DIGEST, [found.sort_by("digest")], row_group_bytes=2**20)
        rows = found.num_rows
        counts["exact_duplicates"] += CheckCounts(rows, 0, time.monotonic() - started)
    return counts


def _digests(storage: Storage, shards: Sequence[str], min_tokens: int) -> pa.Table:
    tables = [DIGEST.empty_table()]
    for table in read_tables(storage, shards, TOKEN_COLUMNS):
        ids = [table["prompt_id"], table["candidate_id"]]
        found = pa.table([tokens.response_digests(table, min_tokens), *ids], schema=DIGEST)
        tables.append(found.filter(pc.is_valid(found["digest"])))
    return pa.concat_tables(tables).combine_chunks()


def gather_digests(storage: Storage, paths: Sequence[str], num_buckets: int, out_path: str) -> list[int]:
    """The digests of some partitions in one file, a slice for each of `num_buckets` ranges (a Ray task); its bounds."""
    tables = [table for path in paths for table in read_row_groups(storage, path)]
    table = pa.concat_tables([DIGEST.empty_table(), *tables])
    buckets = table["digest"].to_numpy() // np.uint64(-(-(2**64) // num_buckets))
    return write_slices(storage, out_path, table, buckets.astype(np.int64), num_buckets)


def shared_digests(storage: Storage, files: SliceFiles, bucket: int, out_path: str) -> CheckCounts:
    """Responses that stand under several prompts, of one range of digests (a Ray task)."""
    started = time.monotonic()
    table = read_slice(storage, files, bucket, DIGEST)
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
