"""A pool of drawn lengths, an engine that counts what it is asked, and races over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from grape_service.config.loading import parse_config
from grape_service.config.schema import Config
from grape_service.rows.columns import LOSS_TOKEN, LOSS_TURN_END, SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import TokenBatch
from grape_service.score.shards import Shards
from grape_service.score.stopped import stopped_store
from grape_service.score.store import ScoreStore
from grape_service.select.counts import SelectCounts
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.select.race_rows import Race
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from tests.made_rows import Row
from workers.engines.transformers.engine import TransformersEngine
from workers.scoring.actor import ScoringActor, ScoringSpec
from workers.scoring.unscored import plan_partition
from workers.scoring.work import UnitResult

PROMPTS, CANDIDATES = 6, 7
STATISTICS = ("entropy",)


@dataclass
class Asked:
    """What an engine was asked for: rows with their tokens, the loss among them."""

    loss_tokens: int = 0
    calls: int = 0
    fail_in_call: int | None = None
    missing_token: int | None = None


class CountingEngine(TransformersEngine):
    """The real engine, which counts what it is asked for."""

    asked: Asked

    def score_statistics(
        self, batch: TokenBatch, names: Sequence[str], temperature: float = 1.0
    ) -> dict[str, npt.NDArray[np.float32]]:
        asked = self.asked
        asked.calls += 1
        if asked.calls == asked.fail_in_call:
            raise KeyboardInterrupt("killed between two waves")
        asked.loss_tokens += int(batch.mask.sum())
        scores = super().score_statistics(batch, names, temperature)
        if asked.missing_token is not None:
            hit = np.flatnonzero((batch.input_ids == asked.missing_token) & batch.mask)
            for row in np.unique(np.searchsorted(batch.offsets, hit, side="right") - 1):
                for values in scores.values():
                    values[batch.loss_offsets[row] : batch.loss_offsets[row + 1]] = np.nan
        return scores


def rows_of_pool(seed: int = 0) -> list[dict[str, Any]]:
    """Candidates of random tokens, easier and harder ones; some have the same tokens."""
    random = np.random.default_rng(seed)
    rows = []
    for prompt in range(PROMPTS):
        question = random.integers(0, 500, size=int(random.integers(5, 20))).tolist()
        for candidate in range(CANDIDATES):
            length = int(random.integers(3, 90))
            answer = random.integers(0, 500, size=length).tolist()
            if candidate % 2:  # a token that repeats is easy for this model, or hard
                answer = np.repeat(random.integers(0, 500, size=length // 6 + 1), 6)[:length].tolist()
            if candidate == CANDIDATES - 1:
                answer = rows[-3]["input_ids"][len(question) : -1]
            ids = [*question, *answer, 2]
            mask = [0] * len(question) + [LOSS_TOKEN] * len(answer) + [LOSS_TURN_END]
            row = Row(f"p{prompt}", f"c{candidate}", source="ab"[candidate % 2]).as_dict()
            key = row_keys(np.array(ids, np.int32), np.array(mask, np.uint8), np.array([0, len(ids)]))[0].as_py()
            rows.append({**row, "row_key": key, "input_ids": ids, "loss_mask": mask, "prompt_len": len(question)})
    return rows


class Bench:
    """A workspace with one partition in two shards, and an actor with its engine."""

    def __init__(self, folder: Path, model: str, rows: list[dict[str, Any]]):
        self.storage = Storage(str(folder))
        self.model = model
        self.rows = rows
        middle = PROMPTS // 2 * CANDIDATES
        for number, part in enumerate((rows[:middle], rows[middle:])):
            path = f"shards/b/shard-{number:05}.parquet"
            write_parquet(self.storage, path, SHARD, [pa.Table.from_pylist(part, schema=SHARD)])
        tokens = sum(len(row["input_ids"]) for row in rows)
        self.shards = Shards("shards/b", "b", 2, len(rows), tokens)
        self.store = ScoreStore(self.storage, "target")
        self.keys = pa.array([row["row_key"] for row in rows], pa.binary(16))
        self.asked = Asked()

    def config(self, race: Any, **select: Any) -> Config:
        return parse_config(
            {
                "name": "test",
                "pool": {"path": "unused"},
                "target": {"model": self.model, "dtype": "float32"},
                "output": {"path": "out"},
                "select": select,
                "score": {"race": race, "statistics": ["entropy"]},
            }
        )

    def score(self, config: Config, run_id: str = "run") -> list[UnitResult]:
        """What the score stage does, in this process; each time with a fresh engine."""
        race = Race.of(config.select, config.score)
        stopped = stopped_store(self.store)
        planned = plan_partition(self.shards, self.store, stopped, f"todo-{run_id}", 4096, STATISTICS, race)
        engine = CountingEngine(config.target, self.model, max_batch_tokens=256)
        engine.asked = self.asked
        spec = ScoringSpec(config.target, "target", self.storage, run_id, "compatible", {})
        actor = ScoringActor(spec)
        actor.engine = engine
        results = [actor.score(number, unit, "target") for number, unit in enumerate(planned.units())]
        found = [result for result in results if result is not None]
        rows = sum(one.scored + one.reused + one.stopped + one.failed for one in found)
        assert rows + planned.stored + planned.stopped == len(self.rows)
        self.done = actor.tokens_done
        self.through = actor.tokens_done - actor.tokens_spared
        assert self.through == sum(one.tokens for one in found)
        return found

    def select(self, config: Config, failures: pa.Array | None = None) -> tuple[list[dict[str, Any]], SelectCounts]:
        stopped = stopped_store(self.store) if config.score.race != "off" else None
        context = SelectContext(self.storage, config, self.store, frozenset(), None, stopped)
        paths = [f"shards/b/shard-{number:05}.parquet" for number in range(2)]
        counts = select_partition(context, SelectPartition("b", paths, "kept.parquet"), failures)
        with pq.ParquetFile(self.storage.full("kept.parquet")) as file:
            return file.read().to_pylist(), counts

    def run(self, config: Config) -> tuple[list[dict[str, Any]], SelectCounts]:
        self.score(config)
        return self.select(config)

    @property
    def all_tokens(self) -> int:
        """Tokens with loss of distinct rows."""
        return sum({row["row_key"]: sum(m > 0 for m in row["loss_mask"]) for row in self.rows}.values())
