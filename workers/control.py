"""The control of PEAR weights: some kept rows are scored a second time by the target, which ought to agree with itself.

Weights are importance ratios, so what the engine's rounding alone does to them has to be known. The second scoring
packs the rows in another way: each is alone with its prompt, not among the other candidates.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from grape_service.digests import prompt_order
from grape_service.parquet import read_row_groups, write_parquet
from grape_service.schemas import SHARD
from grape_service.scores import TWICE_SUFFIX, ScoreStore
from grape_service.weigh import TWICE_PARTITION
from workers.run import Run
from workers.scoring import Engines, ShardFile, score_shards

MAX_ROWS = 256
MAX_TOKENS = 2**17


def score_twice(run: Run, engines: Engines, kept_paths: Mapping[str, str]) -> None:
    """Score a sample of kept rows again, if the target's engine is up: for this alone none is started."""
    target = run.config.target
    sample = sample_rows(run, kept_paths) if engines.are_up(target) else None
    if sample is None:
        return
    path = f"{run.folder}/derived/twice/shard-00000.parquet"
    write_parquet(run.workspace, path, SHARD, [sample])
    tokens = int(pc.sum(pc.list_value_length(sample["input_ids"])).as_py())
    shard = ShardFile(path, TWICE_PARTITION, sample.num_rows, tokens)
    score_shards(run, engines, target, [shard], "score control", store_id=twice_store(run).policy_id)


def twice_store(run: Run) -> ScoreStore:
    """Where second scorings by the target are kept."""
    return ScoreStore(run.workspace, f"{run.policy_id(run.config.target)}{TWICE_SUFFIX}")


def sample_rows(run: Run, kept_paths: Mapping[str, str]) -> pa.Table | None:
    """A kept row of each of some prompts, the same ones each time, of at most MAX_TOKENS tokens; None without any."""
    found: list[pa.Table] = []
    rows = tokens = 0
    for partition in sorted(kept_paths):
        for table in read_row_groups(run.workspace, kept_paths[partition], SHARD.names):
            ids = table["prompt_id"].to_pylist()
            first = [row for row, prompt_id in enumerate(ids) if row == 0 or ids[row - 1] != prompt_id]
            lengths = pc.list_value_length(table["input_ids"]).to_pylist()
            chosen = []
            for row in sorted(first, key=lambda row: prompt_order(ids[row])):
                if rows == MAX_ROWS or tokens + lengths[row] > MAX_TOKENS:
                    break
                chosen.append(row)
                rows, tokens = rows + 1, tokens + lengths[row]
            found.append(table.take(chosen))
            if len(chosen) < len(first):
                return _whole(found)
    return _whole(found)


def _whole(found: list[pa.Table]) -> pa.Table | None:
    table = pa.concat_tables(found).combine_chunks() if found else None
    return table if table is not None and table.num_rows else None
