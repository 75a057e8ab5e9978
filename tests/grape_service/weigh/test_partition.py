"""The weigh stage on real files: kept rows and the scores of both policies in, weights and counts out."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.config.methods import WeightsConfig
from grape_service.config.schema import Config
from grape_service.errors import StageError, UserError
from grape_service.score.store import ScoreStore
from grape_service.select.partition import select_partition
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.behavior import (
    add_census,
    behavior_census,
    recorded_temperatures,
    refuse_missing,
    unsaid_temperature,
)
from grape_service.weigh.counts import WeighCounts, dataset_factor
from grape_service.weigh.lookup import BEHAVIOR_ROW_COLUMNS, BehaviorScores
from grape_service.weigh.partition import weigh_partition
from tests.made_rows import Row, put_scores, put_shards

GAMMA = 0.9
POLICY = {"model": "writer"}


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
        select_partition(self.storage, "b", shards, None, config({"column": "c"}), None, "kept.parquet")

    def put_behavior_rows(self, rows: list[Row], differs: tuple[str, ...] = ()) -> None:
        """The writer renders each row in its own way, so that it has another key."""
        table = pa.table(
            {
                "target_row_key": [row.key for row in rows],
                "row_key": [other_key(row) for row in rows],
                "turn_end_differs": [row.candidate_id in differs for row in rows],
            },
            schema=BEHAVIOR_ROW_COLUMNS,
        )
        write_parquet(self.storage, "behavior/writer/shard-00000.parquet", table.schema, [table])

    def weigh(
        self, settings: Config, temperatures: dict[float, ScoreStore] | None = None, observer=None
    ) -> WeighCounts:
        assert settings.behavior is not None
        scores = [BehaviorScores(self.writer, ["behavior/writer/shard-00000.parquet"])] * len(
            settings.behavior.policies()
        )
        return weigh_partition(
            self.storage,
            "b",
            "kept.parquet",
            self.target,
            scores,
            settings,
            "weighed.parquet",
            temperatures,
            observer,
            self.repeat,
        )

    def weighed(self) -> dict[str, dict]:
        with pq.ParquetFile(self.storage.full("weighed.parquet")) as file:
            return {row["candidate_id"]: row for row in file.read().to_pylist()}


def other_key(row: Row) -> bytes:
    return bytes(255 - byte for byte in row.key)


def token_weights(deltas: list[float], gamma: float = GAMMA) -> list[float]:
    last = len(deltas) - 1
    return [gamma ** (last - place) * math.exp(math.fsum(deltas[place + 1 :])) for place in range(len(deltas))]


def test_a_behavior_policy_with_its_own_rendering(tmp_path):
    rows = [Row("p", "x", "w", num_loss=2), Row("q", "y", "w", num_loss=1), Row("q", "z", "w", num_loss=1)]
    bench = Bench(str(tmp_path), rows)
    bench.put_behavior_rows(rows, differs=("y",))
    put_scores(bench.target, {rows[0].key: [-1, -2, -0.5], rows[1].key: [-1, -3], rows[2].key: [-1, -3]})
    put_scores(
        bench.writer,
        {other_key(rows[0]): [-1.5, -1, -0.25], other_key(rows[1]): [-1, -2], other_key(rows[2]): [-1, -2]},
    )
    put_scores(bench.repeat, {rows[2].key: [-1.5, -3.25]})
    counts = bench.weigh(config(POLICY))
    weighed = bench.weighed()
    np.testing.assert_allclose(weighed["x"]["weights"], token_weights([0.5, -1.0, -0.25]), rtol=1e-6)
    assert weighed["x"]["target_logprobs"] == [-1, -2, -0.5]
    assert weighed["x"]["behavior_logprobs"] == [-1.5, -1, -0.25]
    # The turn ends of y are other tokens: a delta of 0, and the target's value in the behavior's place.
    np.testing.assert_allclose(weighed["y"]["weights"], [GAMMA, 1.0], rtol=1e-6)
    assert weighed["y"]["behavior_logprobs"] == [-1, -3]
    np.testing.assert_allclose(weighed["z"]["weights"], [GAMMA * math.exp(-1), 1.0], rtol=1e-6)
    assert {row["weight_source"] for row in weighed.values()} == {"pear"}
    assert (counts.rows_in, counts.rows, counts.weighed_rows, counts.uniform_rows) == (3, 3, 3, 0)
    assert (counts.prompts_in, counts.prompts, counts.unknown_tokens) == (2, 2, 1)
    assert counts.totals.tokens == 7
    assert counts.totals.sum == pytest.approx(sum(sum(row["weights"]) for row in weighed.values()))
    assert counts.self_weights.sum == pytest.approx(1 + GAMMA + GAMMA**2 + 2 * (1 + GAMMA))
    assert counts.self_weights_repeat.tokens == 2
    assert counts.self_weights_repeat.sum == pytest.approx(sum(token_weights([0.5, 0.25])))
    assert counts.scoring_noise == pytest.approx(math.sqrt((0.5**2 + 0.25**2) / 2))
    assert WeighCounts.from_json(counts.to_json()) == counts
    assert (counts + counts).sources["w"].tokens == 14


def test_recorded_log_probabilities(tmp_path):
    nan = float("nan")
    rows = [
        Row("p", "whole", recorded=[-1, -2, -3]),
        Row("p", "no turn end", recorded=[-1, -2, nan]),
        Row("p", "cool", recorded=[-1, -2, -3], sampling={"temperature": 0.5}),
        Row("p", "at 1", recorded=[-1, -2, -3], sampling={"temperature": 1.0, "top_p": 1.0, "top_k": -1}),
    ]
    bench = Bench(str(tmp_path), rows)
    put_scores(bench.target, {row.key: [-1.5, -1.5, -1.5] for row in rows})
    cool = ScoreStore(bench.storage, "target-at-0.5")
    put_scores(cool, {rows[2].key: [-1, -2.5, -2]})
    settings = config({"column": "behavior_logprobs", "recorded": "processed"})
    assert recorded_temperatures(bench.storage, "kept.parquet", settings.behavior) == [0.5]
    counts = bench.weigh(settings, {0.5: cool})
    weighed = bench.weighed()
    np.testing.assert_allclose(weighed["whole"]["weights"], token_weights([-0.5, 0.5, 1.5]), rtol=1e-6)
    np.testing.assert_allclose(weighed["no turn end"]["weights"], token_weights([-0.5, 0.5, 0.0]), rtol=1e-6)
    assert weighed["no turn end"]["behavior_logprobs"] == [-1, -2, -1.5]
    np.testing.assert_allclose(weighed["cool"]["weights"], token_weights([0.0, -0.5, 1.0]), rtol=1e-6)
    assert weighed["cool"]["target_logprobs"] == [-1.5, -1.5, -1.5]  # a release shows temperature 1
    assert weighed["at 1"]["weights"] == weighed["whole"]["weights"]
    assert counts.unknown_tokens == 1


@pytest.mark.parametrize("said", ["by the config", "by the row"])
def test_raw_numbers_are_compared_with_the_target_as_it_is(tmp_path, said):
    by_row = {"logprobs": "raw"} if said == "by the row" else {}
    rows = [Row("p", "x", recorded=[-1, -2, -3], sampling={"temperature": 0.7, **by_row})]
    bench = Bench(str(tmp_path), rows)
    put_scores(bench.target, {rows[0].key: [-1, -2, -3]})
    settings = config({"column": "behavior_logprobs", **({} if by_row else {"recorded": "raw"})})
    assert recorded_temperatures(bench.storage, "kept.parquet", settings.behavior) == []
    bench.weigh(settings)
    np.testing.assert_allclose(bench.weighed()["x"]["weights"], token_weights([0.0, 0.0, 0.0]), rtol=1e-6)


def test_a_temperature_of_which_nobody_says_whether_it_is_in_the_numbers_is_refused(tmp_path):
    rows = [Row("p", "x", recorded=[-1, -2, -3], sampling={"temperature": 0.7})]
    bench = Bench(str(tmp_path), rows)
    behavior = config({"column": "behavior_logprobs"}).behavior
    with pytest.raises(UserError, match=r"temperature 0\.7, .* behavior\.recorded to raw .* or to processed"):
        recorded_temperatures(bench.storage, "kept.parquet", behavior)
    assert unsaid_temperature([None, '{"temperature":0.7}'], behavior) == 0.7
    assert unsaid_temperature(['{"temperature":0.7,"logprobs":"raw"}', '{"temperature":1}'], behavior) is None


def test_processed_numbers_that_are_the_targets_own_before_the_temperature_are_counted(tmp_path):
    rows = [Row("p", "x", "s", recorded=[-1, -2, -3], sampling={"temperature": 0.5})]
    bench = Bench(str(tmp_path), rows)
    put_scores(bench.target, {rows[0].key: [-1, -2, -3]})
    cool = ScoreStore(bench.storage, "target-at-0.5")
    put_scores(cool, {rows[0].key: [-0.5, -2.5, -4]})
    counts = bench.weigh(config({"column": "behavior_logprobs", "recorded": "processed"}), {0.5: cool})
    assert (counts.recorded_tokens, counts.recorded_same) == ({"s": 3}, {"s": 3})


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
BY_SOURCE = {"sources": {"w": {"column": "behavior_logprobs"}}}


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
    assert counts.missing == {"a": {"its behavior policy's template cannot render it": 1}}
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


def test_a_temperature_that_was_not_scored_is_a_failure(tmp_path):
    rows = [Row("p", "x", recorded=[-1, -1, -1], sampling={"temperature": 0.5})]
    bench = Bench(str(tmp_path), rows)
    put_scores(bench.target, {rows[0].key: [-1, -1, -1]})
    counts = bench.weigh(config({"column": "behavior_logprobs", "recorded": "processed"}))
    assert bench.weighed() == {}
    assert counts.failed_rows == {"not scored by the target": 1}


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
    select_partition(bench.storage, "b", ["shards/b/shard-00000.parquet"], bench.target, settings, None, "kept.parquet")
    weigh_partition(bench.storage, "b", "kept.parquet", None, [], settings, "weighed.parquet")
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
