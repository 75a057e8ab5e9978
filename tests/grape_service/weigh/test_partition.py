"""The weigh stage on real files: kept rows and the scores of both policies in, weights and counts out."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from grape_service.config.methods import WeightsConfig
from grape_service.errors import StageError, UserError
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.storage.parquet import write_parquet
from grape_service.weigh.behavior import (
    add_census,
    behavior_census,
    refuse_missing,
)
from grape_service.weigh.counts import WeighCounts, dataset_factor
from grape_service.weigh.lookup import Stores
from grape_service.weigh.partition import WeighContext, WeighPartition, weigh_partition
from tests.grape_service.weigh.bench import BY_SOURCE, POLICY, Bench, config, other_key, token_weights
from tests.made_rows import Row, put_scores

pytestmark = pytest.mark.quick


MISSING = [
    Row("p", "person", "person", recorded=[-1, -1, -1]),
    Row("p", "good", "w", recorded=[-1, -1, -1]),
    Row("q", "top p", "w", recorded=[-1, -1, -1], sampling={"top_p": 0.9}),
    Row("q", "top k", "w", recorded=[-1, -1, -1], sampling={"top_k": 20}),
    Row("q", "greedy", "w", recorded=[0, 0, 0], sampling={"temperature": 0}),
    Row("q", "nothing", "w"),
    Row("q", "unknown", "w", recorded=[float("nan")] * 3),
    Row("q", "infinite", "w", recorded=[-1, -math.inf, -1]),
    Row("r", "nobody", None, recorded=[-1, -1, -1]),
]


@pytest.fixture
def missing_bench(tmp_path) -> Bench:
    bench = Bench(str(tmp_path), MISSING)
    put_scores(bench.target, {row.key: [-1, -1, -1] for row in MISSING})
    return bench


def test_rows_without_a_behavior_stop_the_run(missing_bench):
    settings = config(BY_SOURCE)
    with pytest.raises(
        UserError, match=r"1 kept row of source '\(none\)' cannot be weighed \(source has no behavior\)"
    ):
        missing_bench.weigh(settings)
    assert not missing_bench.storage.exists("weighed.parquet")
    census = behavior_census(missing_bench.storage, "kept.parquet", settings.behavior)
    assert {source: sum(reasons.values()) for source, reasons in census.items()} == {"(none)": 1, "person": 1, "w": 6}
    both = add_census(census, census)
    assert both["w"]["sampled with top-p, top-k or min-p, which cut the support"] == 4
    with pytest.raises(UserError, match="2 kept rows of source"):
        refuse_missing(both)
    refuse_missing({})


def test_rows_without_a_behavior_weigh_1(missing_bench):
    counts = missing_bench.weigh(config({**BY_SOURCE, "missing": "uniform"}))
    weighed = missing_bench.weighed()
    assert list(weighed) == [row.candidate_id for row in MISSING]
    assert [name for name, row in weighed.items() if row["weight_source"] == "pear"] == ["good"]
    for name, row in weighed.items():
        if name != "good":
            assert row["weights"] == [1.0] * 3
            assert row["behavior_logprobs"] is None
    assert (counts.uniform_rows, counts.weighed_rows, counts.dropped_rows) == (8, 1, 0)
    assert set(counts.sources) == {"w"}


def test_rows_without_a_behavior_are_left_out(missing_bench):
    counts = missing_bench.weigh(config({**BY_SOURCE, "missing": "drop"}))
    assert list(missing_bench.weighed()) == ["good"]
    assert (counts.dropped_rows, counts.rows, counts.prompts, counts.prompts_in) == (8, 1, 1, 3)
    assert sum(counts.missing["w"].values()) == 6


def test_a_row_that_its_policy_cannot_render_is_nobodys(tmp_path):
    rows = [Row("p", "x"), Row("p", "y")]
    bench = Bench(str(tmp_path), rows)
    bench.put_behavior_rows(rows[:1])
    put_scores(bench.target, {row.key: [-1, -1, -1] for row in rows})
    put_scores(bench.writer, {other_key(rows[0]): [-1, -1, -1]})
    counts = bench.weigh(config({**POLICY, "missing": "uniform"}))
    assert counts.missing == {"a": {"its behavior policy cannot render it as the target does": 1}}
    assert bench.weighed()["y"]["weight_source"] == "uniform"


def test_a_prompt_with_a_row_that_could_not_be_scored_is_left_out(tmp_path):
    rows = [Row(prompt, f"{prompt}{number}") for prompt in "pqrs" for number in range(2)]
    bench = Bench(str(tmp_path), rows)
    bench.put_behavior_rows(rows)
    put_scores(bench.target, {row.key: [-1, -1, -1] for row in rows if row.candidate_id != "p0"})
    behavior = {other_key(row): [-1.0, -1.0, -1.0] for row in rows if row.candidate_id != "q1"}
    behavior[other_key(rows[4])] = [-1.0, float("nan"), -1.0]  # r0: not an unknown token, a bad score
    put_scores(bench.writer, behavior)
    counts = bench.weigh(config(POLICY))
    assert list(bench.weighed()) == ["s0", "s1"]
    assert counts.failed_rows == {"not scored by the target": 1, "not scored by its behavior policy": 2}
    assert (counts.failed_prompts, counts.rows_of_failed_prompts, counts.prompts) == (3, 6, 1)


@pytest.mark.parametrize("short", ["target", "writer", "recorded"])
def test_scores_that_do_not_fit_their_rows_are_errors(tmp_path, short):
    recorded = short == "recorded"
    rows = [Row("p", "x", recorded=[-1, -1] if recorded else None)]
    bench = Bench(str(tmp_path), rows)
    bench.put_behavior_rows(rows)
    put_scores(bench.target, {rows[0].key: [-1] * (2 if short == "target" else 3)})
    put_scores(bench.writer, {other_key(rows[0]): [-1] * (2 if short == "writer" else 3)})
    with pytest.raises(StageError, match=f"{rows[0].key.hex()} has 3 tokens with loss but 2"):
        bench.weigh(config({"column": "behavior_logprobs"} if recorded else POLICY))


def test_normalize_dataset_makes_a_mean_of_1(tmp_path):
    rows = [Row("p", "x", recorded=[-1, -2, -3]), Row("q", "y", num_loss=6, recorded=[-1.0] * 7)]
    bench = Bench(str(tmp_path), rows)
    put_scores(bench.target, {row.key: [-1.5] * row.num_scores for row in rows})
    settings = config({"column": "behavior_logprobs"}, {"normalize": "dataset"})
    counts = bench.weigh(settings)
    weights = [weight for row in bench.weighed().values() for weight in row["weights"]]
    factor = dataset_factor(counts, settings.weights)
    assert np.mean(weights) * factor == pytest.approx(1.0, rel=1e-6)
    assert dataset_factor(counts, WeightsConfig()) == 1.0


def test_scores_that_the_kept_rows_bring_need_no_store(tmp_path):
    rows = [Row("p", "x", recorded=[-1, -2, -3]), Row("p", "y", recorded=[-1, -2, -3])]
    bench = Bench(str(tmp_path), rows)
    put_scores(bench.target, {rows[0].key: [-1.5, -1.5, -1.5], rows[1].key: [-9, -9, -9]})
    settings = config({"column": "behavior_logprobs"}, select={"method": "grape"})
    partition = SelectPartition("b", ["shards/b/shard-00000.parquet"], "kept.parquet")
    select_partition(SelectContext(bench.storage, settings, bench.target, frozenset()), partition)
    weigh_partition(
        WeighContext(bench.storage, settings, Stores()), WeighPartition("b", "kept.parquet", [], "weighed.parquet")
    )
    [row] = bench.weighed().values()
    np.testing.assert_allclose(row["weights"], token_weights([-0.5, 0.5, 1.5]), rtol=1e-6)
    assert row["grape_rank"] == 1


def test_an_empty_partition_is_an_empty_file(tmp_path):
    bench = Bench(str(tmp_path), [])
    counts = bench.weigh(config({"column": "behavior_logprobs"}))
    assert counts == WeighCounts()
    assert bench.weighed() == {}


class Seen:
    def __init__(self):
        self.tokens = 0
        self.sources: list[str] = []

    def add_weights(self, batch):
        self.tokens += len(batch.weights)
        self.sources += batch.sources.to_pylist()
        assert len(batch.ratios) == len(batch.weights) == batch.offsets[-1]


def test_an_observer_sees_every_weight_and_the_bytes_are_the_same(missing_bench):
    seen = Seen()
    settings = config({**BY_SOURCE, "missing": "uniform"})
    missing_bench.weigh(settings, observer=seen)
    assert (seen.tokens, seen.sources) == (3, ["w"])
    first = missing_bench.storage.read("weighed.parquet")
    missing_bench.weigh(settings)
    assert missing_bench.storage.read("weighed.parquet") == first


def test_rows_that_are_dropped_and_rows_of_failed_prompts_are_counted_once(tmp_path):
    rows = [
        Row("p", "person", "person"),  # dropped, were it not for the next one, with which its whole prompt goes
        Row("p", "not scored", "w", recorded=[-1, -1, -1]),
        Row("q", "nobody", None),  # dropped
        Row("q", "good", "w", recorded=[-1, -1, -1]),
    ]
    bench = Bench(str(tmp_path), rows)
    put_scores(bench.target, {row.key: [-1, -1, -1] for row in rows if row.candidate_id != "not scored"})
    counts = bench.weigh(config({**BY_SOURCE, "missing": "drop"}))
    assert list(bench.weighed()) == ["good"]
    assert (counts.rows_in, counts.rows, counts.rows_of_failed_prompts, counts.dropped_rows) == (4, 1, 2, 1)


def test_a_candidate_that_was_rendered_twice_or_from_other_tokens_stops_the_run(tmp_path):
    rows = [Row("p", "x", "w"), Row("q", "y", "w")]
    bench = Bench(str(tmp_path), rows)
    put_scores(bench.target, {row.key: [-1, -1, -1] for row in rows})
    put_scores(bench.writer, {other_key(row): [-1, -1, -1] for row in rows})
    bench.put_behavior_rows([*rows, rows[0]])
    with pytest.raises(StageError, match="rendered twice"):
        bench.weigh(config(POLICY))
    path = bench.storage.full("behavior/writer/shard-00000.parquet")
    bench.put_behavior_rows(rows)
    table = pq.read_table(path)
    place = table.column_names.index("target_row_key")
    swapped = table.set_column(place, table.schema.field(place), table["target_row_key"].take([1, 0]))
    write_parquet(bench.storage, "behavior/writer/shard-00000.parquet", table.schema, [swapped])
    with pytest.raises(StageError, match=r"candidate 'x' of prompt 'p' was rendered .* from other tokens"):
        bench.weigh(config(POLICY))
