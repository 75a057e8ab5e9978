"""A pool prepared in one process, with words as tokens: for tests of prepare and of what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from grape_service.config.schema import Config
from grape_service.prepare.counts import PartitionCounts, ShardCounts, summarise_map
from grape_service.prepare.deal import deal_group, next_level
from grape_service.prepare.finish import finish_prepare
from grape_service.prepare.map import map_piece
from grape_service.prepare.plan import FAN_OUT, PreparePlan, plan_prepare
from grape_service.prepare.reduce import reduce_partition, shard_paths
from grape_service.prepare.result import Prepared
from grape_service.rows.candidate import Candidate, Rejection, Rendered, RendersCandidates
from grape_service.rows.columns import MAPPED
from grape_service.rows.messages import response_messages
from grape_service.storage.storage import Storage


class WordRenderer:
    """A token a word: its length and first letter. Rejects what is longer than `max_tokens`."""

    def __init__(self, max_tokens: int = 10_000):
        self.max_tokens = max_tokens

    def render(self, candidates: Sequence[Candidate]) -> list[Rendered | Rejection]:
        return [self._one(candidate) for candidate in candidates]

    def _one(self, candidate: Candidate) -> Rendered | Rejection:
        prompt = _words(" ".join(message["content"] for message in candidate.prompt))
        response = _words(" ".join(message["content"] for message in response_messages(candidate.response)))
        ids = np.array([*prompt, 1, *response, 2], dtype=np.int32)
        if len(ids) > self.max_tokens:
            return Rejection("longer than max_tokens", f"{len(ids)} tokens")
        mask = np.repeat(np.array([0, 1, 2], dtype=np.uint8), [len(prompt) + 1, len(response), 1])
        recorded = None
        if candidate.recorded_logprobs is not None:
            recorded = np.append(np.asarray(candidate.recorded_logprobs, np.float32), np.float32(np.nan))
            recorded = np.resize(recorded, len(response) + 1)
        return Rendered(ids, mask, len(prompt) + 1, recorded)


def _words(text: str) -> list[int]:
    return [100 * len(word) + ord(word[0]) % 100 for word in text.split()]


def make_config(path: Path | str, **keys: Any) -> Config:
    """A config for that pool; `keys` go over its sections."""
    return Config.model_validate(
        {
            "name": "test",
            "pool": {"path": str(path), **keys.pop("pool", {})},
            "target": {"model": "nowhere"},
            "output": {"path": "out"},
            **keys,
        }
    )


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """Rows as a .jsonl file; bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else orjson.dumps(row)) + b"\n" for row in rows))
    return path


def prepare(
    config: Config, storage: Storage, renderer: RendersCandidates | None = None, fan_out: int = FAN_OUT
) -> tuple[PreparePlan, Prepared]:
    """All of prepare, one task after the other."""
    renderer = renderer or WordRenderer()
    plan = replace(plan_prepare(config, "words", storage), fan_out=fan_out)
    counts = [map_piece(plan, piece, config, renderer, storage) for piece in plan.pieces]
    summary = summarise_map(plan, counts, config)
    for bits in plan.level_bits[1:]:
        dealt = summary.dealt
        bounds = [deal_group(plan, dealt, bits, *group, MAPPED, storage) for group in dealt.groups(plan.fan_out)]
        summary.dealt = next_level(plan, dealt, bits, bounds)
    partitions = (reduce_partition(plan, partition, config, summary, storage) for partition in plan.partitions)
    return plan, finish_prepare(plan, summary, partitions, config, storage)


def all_rows(storage: Storage, prepared: Prepared) -> pa.Table:
    """The rows of all shards, in order."""
    paths = [path for name in sorted(prepared.partitions) for path in shard_paths(prepared, name)]
    return pa.concat_tables([read_shard(storage, path) for path in paths])


def read_shard(storage: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
    """A shard's rows."""
    with storage.open(path) as file:
        return pq.read_table(file, columns=columns)


def partition_shards(storage: Storage, prepared: Prepared, partition: str) -> list[tuple[str, ShardCounts]]:
    """(path, counts) of each shard of a partition, in order."""
    counts = PartitionCounts.from_json(storage.read_json(f"{prepared.folder}/partitions/{partition}.json"))
    return list(zip(shard_paths(prepared, partition), counts.shards, strict=True))


def all_rejects(storage: Storage, plan: PreparePlan) -> list[dict[str, Any]]:
    """The reject tables, by file name (without folder) and row."""
    rows: list[dict[str, Any]] = []
    for info in storage.list(f"{plan.folder}/rejects"):
        with storage.open(info.path) as file:
            rows += pq.read_table(file).to_pylist()
    for row in rows:
        row["file"] = row["file"].rsplit("/", 1)[-1]
    return sorted(rows, key=lambda row: (row["file"], row["row"]))
