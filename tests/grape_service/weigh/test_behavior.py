"""Whose numbers a row is compared with: recorded, scored, raw or processed, or nobody's."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.errors import UserError
from grape_service.score.store import ScoreStore
from grape_service.storage.parquet import write_parquet
from grape_service.weigh.behavior import (
    behavior_census,
    recorded_temperatures,
    unsaid_temperature,
)
from grape_service.weigh.counts import WeighCounts
from tests.grape_service.weigh.bench import BY_SOURCE, GAMMA, POLICY, Bench, config, other_key, token_weights
from tests.made_rows import Row, put_scores

pytestmark = pytest.mark.quick


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


def test_a_behavior_policy_with_another_tokenizer(tmp_path):
    rows = [Row("p", "x", "w", num_loss=3), Row("q", "low", "w", num_loss=3)]
    bench = Bench(str(tmp_path), rows)
    # x: a token with one, two with three, the turn end with none. low: four with three, which is nobody's.
    bench.put_behavior_rows(rows, spans={"x": ([0, 1, 1, -1], [0, 1, 1, 1, -1]), "low": ([0, 0, 0, 0], [0, 0, 0])})
    put_scores(bench.target, {rows[0].key: [-1, -2, -0.5, -4], rows[1].key: [-1, -3, -1, -1]})
    put_scores(bench.writer, {other_key(rows[0]): [-1.5, -1, -1, -0.25, -9], other_key(rows[1]): [-1, -2, -1]})
    counts = bench.weigh(config({**POLICY, "align": "bytes", "min_coverage": 0.25, "missing": "uniform"}))
    weighed = bench.weighed()
    # Deltas 0.5, twice (-2.5 + 2.25) / 2, and 0 for the turn end.
    np.testing.assert_allclose(weighed["x"]["weights"], token_weights([0.5, -0.125, -0.125, 0]), rtol=1e-6)
    assert weighed["x"]["behavior_logprobs"] == [-1.5, -1.875, -0.375, -4]
    assert weighed["x"]["behavior_known"] == [True, True, True, False]
    assert weighed["low"]["weights"] == [1, 1, 1, 1]
    reason = "fewer of its tokens than behavior.min_coverage are compared one with one"
    assert counts.missing == {"w": {reason: 1}}
    assert counts.aligned["w"].to_json() == {
        "rows": 2, "rows_below": 1, "tokens": 8, "single": 1, "spans": {"1": 1, "2": 1, "4": 1}
    }  # fmt: skip
    assert counts.aligned["w"].figures() == {"coverage": 1 / 8, "mean_span": 7 / 3, "longest_span": 4}
    assert WeighCounts.from_json(counts.to_json()) == counts
    with pytest.raises(UserError, match=reason):
        bench.weigh(config({**POLICY, "align": "bytes", "min_coverage": 0.25}))
    put_scores(bench.writer, {other_key(rows[0]): [-1.5, -1]})  # the first file of a row wins
    bench.weigh(config({**POLICY, "align": "bytes", "min_coverage": 0.25, "missing": "uniform"}))


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


def test_a_temperature_that_was_not_scored_is_a_failure(tmp_path):
    rows = [Row("p", "x", recorded=[-1, -1, -1], sampling={"temperature": 0.5})]
    bench = Bench(str(tmp_path), rows)
    put_scores(bench.target, {rows[0].key: [-1, -1, -1]})
    counts = bench.weigh(config({"column": "behavior_logprobs", "recorded": "processed"}))
    assert bench.weighed() == {}
    assert counts.failed_rows == {"not scored by the target": 1}


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"top_k": 1}, "sampled with top-p, top-k or min-p, which cut the support"),
        ({"top_k": 2}, "sampled with top-p, top-k or min-p, which cut the support"),
        ({"min_p": 0.01}, "sampled with top-p, top-k or min-p, which cut the support"),
        ({"top_p": 0.999}, "sampled with top-p, top-k or min-p, which cut the support"),
        ({"top_k": 0, "top_p": 1, "min_p": 0}, None),
        ({"top_k": -1}, None),
    ],
)
def test_what_cuts_the_support(tmp_path, sampling, reason):
    bench = Bench(str(tmp_path), [Row("p", "x", "w", recorded=[-1, -1, -1], sampling=sampling)])
    census = behavior_census(bench.storage, "kept.parquet", config(BY_SOURCE).behavior)
    assert census == ({"w": {reason: 1}} if reason else {})


def test_two_prompts_that_the_target_renders_alike_keep_their_own_behavior(tmp_path):
    rows = [Row("p", "x", "w"), Row("q", "y", "w")]
    bench = Bench(str(tmp_path), rows)
    table = pq.read_table(bench.storage.full("kept.parquet"))
    same = pa.array([rows[0].key] * 2, pa.binary(16))
    table = table.set_column(0, table.schema.field(0), same)
    write_parquet(bench.storage, "kept.parquet", table.schema, [table])
    bench.put_behavior_rows(rows)
    written = pq.read_table(bench.storage.full("behavior/writer/shard-00000.parquet"))
    written = written.set_column(
        written.column_names.index("target_row_key"), written.schema.field("target_row_key"), same
    )
    write_parquet(bench.storage, "behavior/writer/shard-00000.parquet", written.schema, [written])
    put_scores(bench.target, {rows[0].key: [-1, -1, -1]})
    put_scores(bench.writer, {other_key(rows[0]): [-2, -2, -2], other_key(rows[1]): [-0.5, -0.5, -0.5]})
    bench.weigh(config(POLICY))
    weighed = bench.weighed()
    assert weighed["x"]["behavior_logprobs"] == [-2, -2, -2]
    assert weighed["y"]["behavior_logprobs"] == [-0.5, -0.5, -0.5]
