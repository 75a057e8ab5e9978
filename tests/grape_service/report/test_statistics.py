"""Statistics against plain loops, and the same whatever the partitioning and the order."""

from __future__ import annotations

import numpy as np
import pytest

from grape_service.report.statistics import SelectStatistics, WeighStatistics
from grape_service.report.sums import EXAMPLES_EACH, MAX_SOURCES, OTHER_SOURCES, Moments, source_names
from tests.grape_service.report.made_report import NAMES, candidates, chosen, weight_batch

pytestmark = pytest.mark.quick


def of_parts(sizes: list[int]) -> SelectStatistics:
    parts, start = [], 0
    for size in sizes:
        part, found = SelectStatistics.empty(NAMES), candidates(size, start)
        part.add_candidates(found, chosen(found))
        parts.append(part)
        start += size
    return sum(reversed(parts), SelectStatistics.empty(NAMES))


def test_partitions_and_their_order_do_not_matter() -> None:
    whole = of_parts([60]).to_json()
    assert of_parts([1, 20, 39]).to_json() == whole
    assert of_parts([30, 30]).to_json() == whole
    assert len(whole["examples"]["random"]) == EXAMPLES_EACH


def test_figures_against_a_loop() -> None:
    found = candidates(50)
    choice = chosen(found)
    stats = SelectStatistics.empty(NAMES)
    stats.add_candidates(found, choice)
    assert found.scores is not None
    assert found.detail is not None
    names = found.sources.to_pylist()
    beats, agree_sum, agree_short, margins = np.zeros((3, 3), dtype=int), 0, 0, {}
    for prompt in range(50):
        rows = np.flatnonzero(found.prompts == prompt)
        winner = max(rows, key=lambda row: found.scores[row])
        assert choice.kept[winner]
        for row in rows:
            if row != winner:
                beats[NAMES.index(names[winner]), NAMES.index(names[row])] += 1
        tokens = found.detail.counted_tokens
        agree_sum += max(rows, key=lambda row: found.scores[row] * tokens[row]) == winner
        agree_short += min(rows, key=lambda row: tokens[row]) == winner
        ordered = sorted(found.scores[rows], reverse=True)
        margins[f"prompt-{prompt}"] = ordered[0] - ordered[1]
    assert (stats.beats == beats).all()
    assert stats.agree["sum"] == agree_sum
    assert stats.agree["shortest"] == agree_short
    assert stats.agree["mean"] == 50
    assert stats.wins.sum() == stats.contested == 50
    assert [row[2] for row in stats.examples.chosen["closest"]] == sorted(margins, key=margins.__getitem__)[:3]
    assert [row[2] for row in stats.examples.chosen["clearest"]] == sorted(margins, key=lambda p: -margins[p])[:3]
    logs = np.log2(found.detail.counted_tokens)
    assert stats.to_json()["overall"] == pytest.approx(np.corrcoef(logs, found.scores)[0, 1], abs=1e-3)


def test_sources_beyond_the_largest_are_counted_together() -> None:
    names = source_names({f"s{i:02}": 100 - i for i in range(40)}, without_source=500)
    assert names[0] == "(none)"
    assert len(names) == MAX_SOURCES + 1
    assert names[-1] == OTHER_SOURCES
    assert source_names({}) == [OTHER_SOURCES]


def test_weights_by_position_and_what_the_last_tenth_holds() -> None:
    batch = weight_batch(200, collapse=True)
    parts = [WeighStatistics.empty(NAMES) for _ in range(2)]
    parts[0].add_weights(batch)
    parts[1].add_weights(weight_batch(100, seed=1, collapse=True))
    plain = (parts[0] + parts[1]).to_json()
    assert plain == (parts[1] + parts[0]).to_json()
    assert sum(map(sum, plain["weights"])) == batch.offsets[-1] + weight_batch(100, seed=1).offsets[-1]
    assert plain["last_tenth"] > 0.5
    assert plain["position_mean"][-1] > plain["position_mean"][0]
    even = WeighStatistics.empty(NAMES)
    even.add_weights(weight_batch(200))
    assert even.to_json()["last_tenth"] == pytest.approx(0.1, abs=0.03)
    assert even.to_json()["position_q50"][10] == pytest.approx(1.0, rel=0.15)


def test_correlation_is_undefined_without_spread() -> None:
    assert Moments.of(np.ones(5), np.arange(5.0)).correlation() is None
    assert Moments.of(np.arange(5.0), -np.arange(5.0)).correlation() == pytest.approx(-1)
