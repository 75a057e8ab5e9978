"""Figures of a race: intervals, and statistics that say what they lack."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binomtest

from grape_service.config.methods import RaceRisk, ScoreConfig, SelectConfig
from grape_service.report.race import race_figures, wilson
from grape_service.report.statistics import SelectStatistics
from grape_service.select.choose import Candidates, Detail, choose
from grape_service.select.counts import SelectCounts

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("found", "number"), [(0, 5), (5, 5), (3, 7), (998, 1000), (1, 1)])
def test_the_interval_is_wilsons(found: int, number: int) -> None:
    theirs = binomtest(found, number).proportion_ci(method="wilson")
    assert wilson(found, number) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)


def test_figures_for_the_manifest() -> None:
    counts = SelectCounts(candidates=10, stopped_candidates=4, loss_tokens=1000, stopped_tokens=250)
    assert race_figures(ScoreConfig(), counts) is None
    exact = race_figures(ScoreConfig(race="exact"), counts)
    assert exact is not None
    assert (exact["spared_share"], exact["stopped"], "same" in exact) == (0.25, 4, False)
    risk = ScoreConfig(race=RaceRisk(risk=0.01, audit=0.1))
    figures = race_figures(risk, counts)
    assert figures is not None
    assert (figures["same"], figures["interval"], figures["audited"]) == (None, None, 0)
    counts.audited, counts.audited_same = 20, 19
    figures = race_figures(risk, counts)
    assert figures is not None
    assert figures["same"] == 0.95
    assert figures["interval"] == pytest.approx(list(wilson(19, 20)))


def statistics_of(scores: list[float], reach: list[float] | None) -> SelectStatistics:
    """Of two prompts with three candidates each."""
    candidates = Candidates(
        prompts=np.array([0, 0, 0, 1, 1, 1]),
        num_prompts=2,
        ties=np.arange(6),
        sources=pa.array(["a", "b", "b", "a", "b", "a"]),
        loss_tokens=np.array([10, 20, 30, 10, 20, 30]),
        scores=np.array(scores),
        failed=np.zeros(6, dtype=bool),
        detail=Detail(pa.array(["p", "q"]), np.array([10, 20, 30, 10, 20, 30]), None),
        reach=np.array(reach) if reach is not None else None,
        distinct=np.array([3, 3]),
    )
    statistics = SelectStatistics.empty(["a", "b"])
    statistics.add_candidates(candidates, choose(candidates, SelectConfig()))
    return statistics


def test_stopped_candidates_have_lost_and_have_no_score() -> None:
    nan = float("nan")
    whole = statistics_of([-1, -2, -3, -1, -2, -4], None)
    raced = statistics_of([-1, nan, nan, -1, -2, -4], [nan, -1.0001, -1.5, nan, nan, nan])
    for name in ("candidates", "kept", "prompts_with", "wins", "beats", "lengths"):
        assert getattr(raced, name).tolist() == getattr(whole, name).tolist(), name
    for name in ("contested", "winner_tokens", "rival_tokens"):
        assert getattr(raced, name) == getattr(whole, name), name
    assert raced.stopped.tolist() == [0, 2]
    assert (raced.compared, whole.compared) == (1, 2)
    assert (raced.at_least, int(raced.margins.sum()), int(whole.margins.sum())) == (1, 1, 2)
    assert (int(raced.scores.sum()), int(whole.scores.sum())) == (4, 6)
    assert raced.agree["mean"] == 1
    assert raced.to_json()["chance"] == pytest.approx(1 / 3, abs=1e-3)
    assert raced.to_json()["stopped"] == [0, 2]
    closest = [row[2] for row in raced.examples.chosen["closest"]]
    assert closest == ["q"], "a margin that may be larger is not the closest"
