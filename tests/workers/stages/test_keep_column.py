"""A column for `select.keep` that cannot be used is found before a model is loaded."""

from pathlib import Path

import pytest

from grape_service.config.methods import SelectConfig
from grape_service.errors import UserError
from grape_service.prepare.reduce import shard_paths
from grape_service.score.shards import Shards
from grape_service.storage.storage import Storage
from tests.prepared_pools import make_config, prepare, write_jsonl
from workers.stages.score import look_at_keep


@pytest.mark.parametrize(("last", "sentence"), [(2, None), (0, "has 0 in the column 'n'"), (1, "has both")])
def test_every_shard_of_a_partition_is_looked_at(tmp_path: Path, last: int, sentence: str | None) -> None:
    rows = [{"prompt": f"q {n // 2}", "response": f"a {n}", "n": 2} for n in range(40)]
    rows[-1]["n"] = last
    storage = Storage(str(tmp_path / "workspace"))
    pool = write_jsonl(tmp_path / "p.jsonl", rows)
    _, prepared = prepare(make_config(pool, workers={"shard_tokens": 60}), storage)
    ((partition, totals),) = prepared.partitions.items()
    assert totals.num_shards > 1
    folder = shard_paths(prepared, partition).folder
    shards = Shards(folder, partition, totals.num_shards, totals.rows, totals.tokens)
    select = SelectConfig(keep={"column": "n"})
    if sentence is None:
        look_at_keep(shards, storage, select)
    else:
        with pytest.raises(UserError, match=sentence):
            look_at_keep(shards, storage, select)
