"""The reduce half of prepare: a partition's rows, from all pieces, become shards of whole prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.schema import Config
from grape_service.pool.column_types import Kind, arrow_type, to_array
from grape_service.pool.lines import beginning
from grape_service.prepare.counts import (
    SAME_CONTENT,
    Example,
    MapSummary,
    PartitionCounts,
    Rejects,
    ShardCounts,
    column_names,
    largest,
    pack_ids,
)
from grape_service.prepare.plan import Piece, PreparePlan, reject_path
from grape_service.prepare.result import Prepared
from grape_service.rows.columns import LOSS_TOKEN, MAPPED, REJECT, SHARD
from grape_service.rows.keys import partition_index
from grape_service.rows.messages import shown_content
from grape_service.rows.ragged import Int64s, offsets_from_lengths
from grape_service.storage.concurrent_map import concurrent_map
from grape_service.storage.once import once
from grape_service.storage.parquet import write_parquet
from grape_service.storage.slices import read_slice
from grape_service.storage.storage import Storage

SAME_ID = "candidate_id is used twice"
TWO_PROMPTS = "prompt_id names two different prompts"
WRITES_IN_FLIGHT = 4
"""Shards that are written at the same time: most of a write's time is waiting for the disk or S3."""


def shard_folder(plan_folder: str, partition: str) -> str:
    """Where a partition's shards are in the workspace."""
    return f"{plan_folder}/shards/{partition}"


def shard_path(folder: str, number: int) -> str:
    """A shard in its folder."""
    return f"{folder}/shard-{number:05d}.parquet"


def shard_schema(other_columns: dict[str, Kind]) -> pa.Schema:
    """SHARD and the pool's other columns, by name."""
    names = column_names(other_columns)
    fields = [pa.field(names[name], arrow_type(kind)) for name, kind in other_columns.items()]
    return pa.schema([*SHARD, *sorted(fields, key=lambda field: field.name)])


def reduce_partition(
    plan: PreparePlan, partition: str, config: Config, summary: MapSummary, storage: Storage
) -> PartitionCounts:
    """Write a partition's shards and rejects; returns at once what a finished task counted, whose shards are there.

    Rows are ordered by a digest of prompt_id, then by candidate_id: neither the pool's order nor its
    files have a part in a shard. Of exact duplicates the one with the smallest candidate_id stays, of two
    contents under one candidate_id the one with the smaller digest, of two prompts under one prompt_id too.
    """
    folder = shard_folder(plan.folder, partition)
    found = once(
        storage,
        f"{plan.folder}/partitions/{partition}.json",
        lambda: _reduce(plan, partition, config, summary, storage).to_json(),
        lambda value: has_shards(folder, len(value["shards"]), storage),
    )
    return PartitionCounts.from_json(found)


def has_shards(folder: str, number: int, storage: Storage) -> bool:
    """Whether the first `number` shards of a partition's folder are there: one listing."""
    there = {info.path for info in storage.list(folder)} if number else set()
    return all(shard_path(folder, place) in there for place in range(number))


def _reduce(
    plan: PreparePlan, partition: str, config: Config, summary: MapSummary, storage: Storage
) -> PartitionCounts:
    index = partition_index(partition)
    counts = PartitionCounts(partition)
    _write_piece_rejects(plan, index, summary, storage, counts)
    buckets = [read_slice(storage, *summary.dealt.find(bucket), MAPPED) for bucket in plan.buckets_of(index)]
    table = pa.concat_tables(buckets).combine_chunks()
    del buckets
    if table.num_rows:
        kept, left_out = _choose(table)
        _write_left_out(plan, partition, table, left_out, summary, storage, counts)
        _write_shards(plan, partition, config, table, kept, summary, storage, counts)
        _describe(table, kept, counts)
    return counts


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Numbers [N] that compare as the column's values do."""
    return pc.rank(column, sort_keys="ascending", tiebreaker="dense").to_numpy().astype(np.int64)


def _same_as_before(*sorted_keys: npt.NDArray) -> npt.NDArray[np.bool_]:
    """Which places [N] of sorted keys equal the place before in all of them."""
    same = np.ones(len(sorted_keys[0]), dtype=bool)
    same[:1] = False
    for key in sorted_keys:
        same[1:] &= key[1:] == key[:-1]
    return same


def _choose(table: pa.Table) -> tuple[Int64s, dict[str, Int64s]]:
    """Rows that stay, in their final order, and those left out by reason."""
    order = table["prompt_order"].to_numpy()
    prompt, candidate = _codes(table["prompt_id"]), _codes(table["candidate_id"])
    prompt_digest, content = _codes(table["prompt_digest"]), _codes(table["content_digest"])
    key, rest = _codes(table["row_key"]), table["rest_digest"].to_numpy()
    place = [table[name].to_numpy() for name in ("place", "segment", "piece")]
    left_out: dict[str, Int64s] = {}

    rows = np.lexsort((*place, rest, key, candidate, content, prompt_digest, prompt, order))
    starts = ~_same_as_before(prompt[rows])
    first_of_prompt = rows[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    other_prompt = prompt_digest[rows] != prompt_digest[first_of_prompt]
    left_out[TWO_PROMPTS] = rows[other_prompt]
    rows = rows[~other_prompt]

    duplicate = _same_as_before(prompt[rows], content[rows])
    left_out[SAME_CONTENT] = rows[duplicate]
    rows = rows[~duplicate]

    rows = rows[np.lexsort((content[rows], candidate[rows], prompt[rows], order[rows]))]
    duplicate_id = _same_as_before(prompt[rows], candidate[rows])
    left_out[SAME_ID] = rows[duplicate_id]
    return rows[~duplicate_id], left_out


def _write_left_out(
    plan: PreparePlan,
    partition: str,
    table: pa.Table,
    left_out: dict[str, Int64s],
    summary: MapSummary,
    storage: Storage,
    counts: PartitionCounts,
) -> None:
    batches: list[pa.RecordBatch] = []
    for reason, rows in left_out.items():
        if len(rows):
            found = table.select(["piece", "segment", "place", "prompt_id", "candidate_id", "messages"])
            found = found.take(pa.array(rows))
            texts = [last_text(messages) for messages in found["messages"].to_pylist()]
            found = found.drop_columns(["messages"]).append_column("text", pa.array(texts, pa.string()))
            found = found.append_column("reason", pa.array([reason] * len(rows)))
            found = found.append_column("detail", pa.nulls(len(rows), pa.string()))
            batch = _rejects(plan, found, found["piece"].to_pylist(), summary, counts.duplicates)
            batches.append(batch)
    if batches:
        rejects = pa.Table.from_batches(batches).sort_by([("file", "ascending"), ("row", "ascending")])
        write_parquet(storage, f"{plan.folder}/rejects/{partition}.parquet", REJECT, [rejects])


def last_text(messages: str) -> str:
    """The beginning of a conversation's last message, to be shown."""
    return beginning(shown_content(orjson.loads(messages)[-1].get("content")))


def _write_piece_rejects(
    plan: PreparePlan, partition: int, summary: MapSummary, storage: Storage, counts: PartitionCounts
) -> None:
    """The reject tables of every num_partitions-th piece: only now are rows of files known by number."""
    for piece in plan.pieces[partition :: plan.num_partitions]:
        if summary.num_reject_files[piece.index]:
            rejects = _piece_rejects(plan, piece, summary, storage, counts.piece_rejects)
            write_parquet(storage, f"{plan.folder}/rejects/{piece.name}.parquet", REJECT, rejects)


def _piece_rejects(
    plan: PreparePlan, piece: Piece, summary: MapSummary, storage: Storage, count: Rejects
) -> Iterator[pa.RecordBatch]:
    for number in range(summary.num_reject_files[piece.index]):
        path = reject_path(plan, piece, number)
        with storage.open(path) as file, pa.ipc.open_file(file) as reader:
            for index in range(reader.num_record_batches):
                batch = pa.Table.from_batches([reader.get_batch(index)])
                yield _rejects(plan, batch, [piece.index] * batch.num_rows, summary, count)


def _rejects(
    plan: PreparePlan, found: pa.Table, pieces: list[int], summary: MapSummary, count: Rejects
) -> pa.RecordBatch:
    """Rows with segment and place as rows of REJECT, counted."""
    files, rows = [], []
    places = zip(pieces, found["segment"].to_pylist(), found["place"].to_pylist(), strict=True)
    reasons, details = found["reason"].to_pylist(), found["detail"].to_pylist()
    for (piece, segment, place), reason, detail in zip(places, reasons, details, strict=True):
        file = plan.files[plan.pieces[piece].segments[segment].file].url
        row = summary.first_rows[piece][segment] + place
        count.count(reason, Example(file, row, detail))
        files.append(file)
        rows.append(row)
    columns: dict[str, Any] = {"file": files, "row": rows, "reason": reasons, "detail": details}
    for name in ("prompt_id", "candidate_id", "text"):
        columns[name] = found[name].to_pylist()
    return pa.RecordBatch.from_pydict(columns, schema=REJECT)


def _write_shards(
    plan: PreparePlan,
    partition: str,
    config: Config,
    table: pa.Table,
    kept: Int64s,
    summary: MapSummary,
    storage: Storage,
    counts: PartitionCounts,
) -> None:
    schema = shard_schema(summary.other_columns)
    lengths = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)[kept]
    loss = table["num_loss"].to_numpy().astype(np.int64)[kept]
    prompt = _codes(table["prompt_id"])[kept]
    starts = np.append(np.flatnonzero(~_same_as_before(prompt)), len(kept))
    counts.prompts = len(starts) - 1
    sizes, numbers = np.unique(np.diff(starts), return_counts=True)
    counts.prompt_sizes = {str(size): number for size, number in zip(sizes.tolist(), numbers.tolist(), strict=True)}
    folder = shard_folder(plan.folder, partition)

    def shards() -> Iterator[tuple[str, pa.Table]]:
        for number, (start, end) in enumerate(_cuts(starts, lengths, config.workers.shard_tokens)):
            _count_shard(counts, int(lengths[start:end].sum()), int(loss[start:end].sum()), end - start)
            rows = table.take(pa.array(kept[start:end]))
            yield shard_path(folder, number), _shard(rows, schema, summary.other_columns)

    def write(shard: tuple[str, pa.Table]) -> None:
        write_parquet(storage, shard[0], schema, [shard[1]])

    for _ in concurrent_map(write, shards(), WRITES_IN_FLIGHT):
        pass
    counts.max_tokens = int(lengths.max(initial=0))


def _count_shard(counts: PartitionCounts, tokens: int, loss_tokens: int, rows: int) -> None:
    counts.shards.append(ShardCounts(rows, tokens, loss_tokens))
    counts.rows += rows
    counts.tokens += tokens
    counts.loss_tokens += loss_tokens


def _cuts(starts: Int64s, lengths: Int64s, shard_tokens: int) -> Iterator[tuple[int, int]]:
    """(first row, end) of each shard: whole prompts of `shard_tokens` tokens at most, or one larger prompt."""
    tokens = offsets_from_lengths(lengths)
    begin = 0
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if start > begin and tokens[end] - tokens[begin] > shard_tokens:
            yield begin, start
            begin = start
    if len(lengths):
        yield begin, len(lengths)


def _shard(rows: pa.Table, schema: pa.Schema, other_columns: dict[str, Kind]) -> pa.Table:
    others = [orjson.loads(other) for other in rows["other"].to_pylist()]
    values = {name: rows[name] for name in SHARD.names}
    names = column_names(other_columns)
    for name, kind in other_columns.items():
        values[names[name]] = to_array([other.get(name) for other in others], kind)
    return pa.table([values[name] for name in schema.names], schema=schema)


def _describe(table: pa.Table, kept: Int64s, counts: PartitionCounts) -> None:
    """Token ids in use, sources, recorded log-probabilities.

    Turn ends may differ between policies, so they are not among the ids.
    """
    rows = pa.array(kept)
    mask = pc.list_flatten(table["loss_mask"]).to_numpy() == LOSS_TOKEN
    counts.used_ids = pack_ids(pc.list_flatten(table["input_ids"]).to_numpy()[mask])
    counts.truncated = pc.sum(table["truncated"].take(rows)).as_py() or 0
    sources = _value_counts(table["source"].take(rows))
    counts.without_source = sources.pop(None, 0)
    counts.sources = largest(sources)
    recorded = pc.is_valid(table["recorded_logprobs"].take(rows))
    counts.recorded = pc.sum(recorded).as_py() or 0
    if counts.recorded:
        sampling = _value_counts(table["sampling"].take(rows).filter(recorded))
        counts.sampling = {"null" if value is None else value: number for value, number in sampling.items()}
        counts.sampling = largest(counts.sampling)


def _value_counts(column: pa.ChunkedArray) -> dict[Any, int]:
    found = pc.value_counts(column)
    return dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True))


LISTINGS_IN_FLIGHT = 16
"""Folders that are listed at the same time: all of a listing's time is waiting for the disk or S3."""


@dataclass(frozen=True)
class ShardPaths(Sequence[str]):
    """Paths of the shards in a folder, in order, made as they are asked for: a pool may have millions."""

    folder: str
    number: int

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        numbers = range(self.number)[place]
        if isinstance(numbers, range):
            return [shard_path(self.folder, number) for number in numbers]
        return shard_path(self.folder, numbers)


def shard_paths(prepared: Prepared, partition: str) -> ShardPaths:
    """Paths of a partition's shards; relative to the workspace."""
    return ShardPaths(shard_folder(prepared.folder, partition), prepared.partitions[partition].num_shards)


def are_all_there(prepared: Prepared, storage: Storage) -> bool:
    """Whether no shard of a prepared pool is gone: one listing for each partition."""

    def is_there(partition: str) -> bool:
        paths = shard_paths(prepared, partition)
        return has_shards(paths.folder, paths.number, storage)

    return all(concurrent_map(is_there, prepared.partitions, LISTINGS_IN_FLIGHT))
