"""A row's life: each stage writes the columns that rows/columns.py declares, and no other module declares any."""

from __future__ import annotations

import ast
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import grape_service
from grape_service.checks.run import CheckContext, CheckPartition, check_partition
from grape_service.config.checks import ChecksConfig
from grape_service.prepare.reduce import shard_paths
from grape_service.release.rows import final_batches, write_kept_rows
from grape_service.release.writer import write_part
from grape_service.rows.columns import (
    FINDING,
    RESPONSE_DIGEST,
    SCORE,
    SCORE_FIELDS,
    SHARD,
    WEIGHED_COLUMNS,
    computed_fields,
    kept_columns,
    release_schema,
)
from grape_service.rows.ragged import list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.score.store import ScoreStore
from grape_service.select.partition import SELECT_READS, SelectContext, SelectPartition, select_partition
from grape_service.storage.parquet import array_of, write_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.lookup import Stores
from grape_service.weigh.partition import WeighContext, WeighPartition, weigh_partition
from tests.prepared_pools import all_rows, make_config, prepare, write_jsonl

ELSEWHERE = {
    "exports/axolotl.py",  # a trainer's format
    "gather/candidates.py",  # rows of a pool, in the shape that prepare reads
    "release/pool_files.py",  # files that a version was made from, no rows of it
    "training/trainers/rows.py",  # a trainer's own copy, read by the process that wrote it
}


def test_columns_are_declared_in_one_module():
    package = Path(grape_service.__file__).parent
    declaring = []
    for path in [*package.rglob("*.py"), *(package.parent / "workers").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "pa.field"
                and isinstance(node.args[0], ast.Constant)
            ):
                declaring.append(path)
    assert {"/".join(path.parts[-2:]) for path in declaring} - {"rows/columns.py"} == {
        "/".join(Path(name).parts[-2:]) for name in ELSEWHERE
    }


def test_what_each_stage_writes_is_what_is_declared(tmp_path):
    pool = [
        {"prompt": f"say number {n}", "response": f"{word} it is {n}", "source": word, "level": n}
        for n in range(4)
        for word in ("indeed", "perhaps")
    ]
    path = write_jsonl(tmp_path / "pool.jsonl", pool)
    weights = {"weights": {"method": "entropy"}, "select": {"method": "rsr", "max_source_share": 0.5}}
    config, storage = make_config(path, **weights), Storage(str(tmp_path / "workspace"))
    _, prepared = prepare(config, storage)
    [partition] = [name for name, totals in prepared.partitions.items() if totals.num_shards]
    shards = list(shard_paths(prepared, partition))
    level = pa.field("level", pa.int64())
    assert columns_of(storage, shards[0]) == [*SHARD, level]

    rows = all_rows(storage, prepared).combine_chunks()
    offsets, mask = list_offsets_and_values(array_of(rows, "loss_mask"))
    lengths = segment_sums(mask > 0, offsets)
    ones = -pa.array([1.0] * int(lengths.sum())).to_numpy() * 1.0
    store = ScoreStore(storage, "target")
    beside = {"rank": -ones, "top20_entropy": -ones}
    scores = store.write(partition, rows["row_key"], offsets_from_lengths(lengths), ones, {}, statistics=beside)
    assert columns_of(storage, scores) == [
        SCORE.field("row_key"),
        *(SCORE_FIELDS[name] for name in ("logprob", *beside)),
    ]

    # What is said to be read is enough for a choice, and the rest of the row is passed on.
    context = SelectContext(storage, config, store, frozenset({2}))
    select_partition(context, SelectPartition(partition, shards, "kept.parquet"))
    made = computed_fields(config.statistics, has_select_score=True)
    assert columns_of(storage, "kept.parquet") == [*SHARD, level, *kept_columns(made)]
    light = [pq.read_table(storage.full(path)) for path in shards]
    for item in SHARD:
        if item.name not in SELECT_READS and item.nullable:
            place = light[0].column_names.index(item.name)
            light = [table.set_column(place, item, pa.nulls(table.num_rows, item.type)) for table in light]
    write_parquet(storage, "light.parquet", light[0].schema, light)
    select_partition(context, SelectPartition(partition, ["light.parquet"], "kept-light.parquet"))
    kept, of_light = (pq.read_table(storage.full(f"{name}.parquet")) for name in ("kept", "kept-light"))
    assert of_light["candidate_id"].to_pylist() == kept["candidate_id"].to_pylist()

    checks = ChecksConfig.model_validate({"repetition": "warn", "exact_duplicates": "warn"}).enabled()
    paths = CheckPartition(shards, "kept.parquet", "found.parquet", "digests.parquet")
    check_partition(CheckContext(storage, checks, {}), paths)
    assert columns_of(storage, "found.parquet") == list(FINDING)
    assert columns_of(storage, "digests.parquet") == list(RESPONSE_DIGEST)

    weigh_partition(
        WeighContext(storage, config, Stores()), WeighPartition(partition, "kept.parquet", [], "weighed.parquet")
    )
    assert columns_of(storage, "weighed.parquet") == [*SHARD, level, *kept_columns(made), *WEIGHED_COLUMNS[1:]]

    schema = release_schema([], [level], made)
    entry = write_part(storage, "version", 0, schema, final_batches(storage, "weighed.parquet", [], [level], 1.0, made))
    assert columns_of(storage, f"version/{entry.path}") == list(schema)

    write_kept_rows(storage, f"version/{entry.path}", entry.sha256, storage, "again.parquet", [level], [2], True, made)
    assert columns_of(storage, "again.parquet") == [*SHARD, level, *kept_columns(made)]


def columns_of(storage: Storage, path: str) -> list[pa.Field]:
    return list(pq.read_schema(storage.full(path)).remove_metadata())
