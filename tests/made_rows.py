"""Made-up shards and scores: rows of known tokens, written as the prepare stage writes them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from grape_service.rows.columns import LOSS_TOKEN, LOSS_TURN_END, SHARD
from grape_service.rows.ragged import offsets_from_lengths
from grape_service.score.store import ScoreStore
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage


@dataclass
class Row:
    """A candidate: `num_loss` response tokens after `prompt_len` others, then a turn end unless it has none."""

    prompt_id: str
    candidate_id: str
    source: str | None = "a"
    prompt_len: int = 3
    num_loss: int = 2
    turn_end: bool = True
    recorded: list[float] | None = None
    sampling: dict[str, Any] | None = None
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> bytes:
        return hashlib.sha256(f"{self.prompt_id}|{self.candidate_id}".encode()).digest()[:16]

    @property
    def num_scores(self) -> int:
        return self.num_loss + self.turn_end

    def as_dict(self) -> dict[str, Any]:
        mask = [0] * self.prompt_len + [LOSS_TOKEN] * self.num_loss + [LOSS_TURN_END] * self.turn_end
        start = int.from_bytes(self.key[:2], "big")
        messages = [
            {"role": "user", "content": f"question {self.prompt_id}"},
            {"role": "assistant", "content": f"answer {self.candidate_id}"},
        ]
        return {
            "row_key": self.key,
            "prompt_id": self.prompt_id,
            "candidate_id": self.candidate_id,
            "source": self.source,
            "input_ids": [start + place for place in range(len(mask))],
            "loss_mask": mask,
            "prompt_len": self.prompt_len,
            "truncated": False,
            "messages": json.dumps(messages),
            "num_prompt_messages": 1,
            "tools": None,
            "recorded_logprobs": self.recorded,
            "sampling": json.dumps(self.sampling) if self.sampling is not None else None,
            **self.other,
        }


def row_table(rows: list[Row], other: list[pa.Field] | None = None) -> pa.Table:
    return pa.Table.from_pylist([row.as_dict() for row in rows], schema=pa.schema([*SHARD, *(other or [])]))


def put_shards(storage: Storage, shards: list[list[Row]], other: list[pa.Field] | None = None) -> list[str]:
    """Write one shard for each list of rows and give the paths."""
    paths = [f"shards/b/shard-{number:05}.parquet" for number in range(len(shards))]
    schema = pa.schema([*SHARD, *(other or [])])
    for path, rows in zip(paths, shards, strict=True):
        write_parquet(storage, path, schema, [row_table(rows, other)])
    return paths


def put_scores(store: ScoreStore, scores: dict[bytes, list[float]], partition: str = "b") -> None:
    """Store log-probabilities by row key."""
    flat = np.array([value for values in scores.values() for value in values], dtype=np.float32)
    offsets = offsets_from_lengths([len(values) for values in scores.values()])
    store.write(partition, pa.array(list(scores), type=pa.binary(16)), offsets, flat, {})


def even_scores(rows: dict[str, float], all_rows: list[Row]) -> dict[bytes, list[float]]:
    """The same log-probability for each token of a row, by candidate_id; rows that are not named have none."""
    return {row.key: [rows[row.candidate_id]] * row.num_scores for row in all_rows if row.candidate_id in rows}
