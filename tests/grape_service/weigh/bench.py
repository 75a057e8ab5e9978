"""A partition with kept rows and stores, to be weighed."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq

from grape_service.config.schema import Config
from grape_service.rows.columns import BEHAVIOR_ROW_COLUMNS
from grape_service.score.store import ScoreStore
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.counts import WeighCounts
from grape_service.weigh.lookup import Stores
from grape_service.weigh.partition import WeighContext, WeighPartition, weigh_partition
from tests.made_rows import Row, put_shards

GAMMA = 0.9


POLICY = {"model": "writer"}
BY_SOURCE = {"sources": {"w": {"column": "behavior_logprobs"}}}


def config(behavior: dict, weights: dict | None = None, select: dict | None = None) -> Config:
    return Config.model_validate(
        {
            "name": "test",
            "pool": {"path": "pool.jsonl"},
            "target": {"model": "model", "dtype": "float32"},
            "behavior": behavior,
            "select": select or {"method": "all"},
            "weights": {"method": "pear", "gamma": GAMMA, "ratio_clip": (-5, 5), **(weights or {})},
            "output": {"path": "out"},
        }
    )


class Bench:
    """A partition with kept rows and stores to put scores into."""

    def __init__(self, folder: str, rows: list[Row]):
        self.storage = Storage(folder)
        self.rows = rows
        self.target = ScoreStore(self.storage, "target")
        self.writer = ScoreStore(self.storage, "writer")
        self.repeat = ScoreStore(self.storage, "target-repeat")
        shards = put_shards(self.storage, [rows])
        context = SelectContext(self.storage, config({"column": "c"}), None, frozenset())
        select_partition(context, SelectPartition("b", shards, "kept.parquet"))

    def put_behavior_rows(
        self,
        rows: list[Row],
        differs: tuple[str, ...] = (),
        spans: dict[str, tuple[list[int], list[int]]] | None = None,
    ) -> None:
        """The writer renders each row in its own way, so that it has another key; `spans` are those of its tokens,
        where its tokenizer is another."""
        of_rows = [(spans or {}).get(row.candidate_id, (None, None)) for row in rows]
        table = pa.table(
            {
                "prompt_id": [row.prompt_id for row in rows],
                "candidate_id": [row.candidate_id for row in rows],
                "target_row_key": [row.key for row in rows],
                "row_key": [other_key(row) for row in rows],
                "turn_end_differs": [row.candidate_id in differs for row in rows],
                "target_spans": [ours for ours, _ in of_rows],
                "own_spans": [theirs for _, theirs in of_rows],
            },
            schema=BEHAVIOR_ROW_COLUMNS,
        )
        write_parquet(self.storage, "behavior/writer/shard-00000.parquet", table.schema, [table])

    def weigh(
        self, settings: Config, temperatures: dict[float, ScoreStore] | None = None, observer=None
    ) -> WeighCounts:
        assert settings.behavior is not None
        num_policies = len(settings.behavior.policies())
        stores = Stores(self.target, [self.writer] * num_policies, temperatures or {}, self.repeat)
        files = [["behavior/writer/shard-00000.parquet"]] * num_policies
        partition = WeighPartition("b", "kept.parquet", files, "weighed.parquet")
        return weigh_partition(WeighContext(self.storage, settings, stores), partition, observer)

    def weighed(self) -> dict[str, dict]:
        with pq.ParquetFile(self.storage.full("weighed.parquet")) as file:
            return {row["candidate_id"]: row for row in file.read().to_pylist()}


def other_key(row: Row) -> bytes:
    return bytes(255 - byte for byte in row.key)


def token_weights(deltas: list[float], gamma: float = GAMMA) -> list[float]:
    last = len(deltas) - 1
    return [gamma ** (last - place) * math.exp(math.fsum(deltas[place + 1 :])) for place in range(len(deltas))]
