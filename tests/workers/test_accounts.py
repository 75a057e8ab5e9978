"""Counts of neighbouring stages that do not add up stop the run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from grape_service.config.gather import VerifyConfig
from grape_service.errors import StageError
from grape_service.gather.candidates import GatherCounts
from grape_service.prepare.counts import Rejects
from grape_service.prepare.finish import check_prepared
from grape_service.prepare.result import PartitionTotals, Prepared
from grape_service.select.counts import SelectCounts
from grape_service.weigh.counts import WeighCounts
from workers.scoring.work import ScoreTotals
from workers.stages.accounts import check_gathered, check_scored, check_selected, check_weighed

pytestmark = pytest.mark.quick

PREPARED = Prepared(
    "id",
    1,
    rows_in=10,
    filtered=2,
    rejects=Rejects({"bad": 1}),
    left_out=Rejects({"twice": 1}),
    rows=6,
    prompts=3,
    partitions={"b": PartitionTotals(1, 6, 3, 60, 30)},
)
SELECTED = SelectCounts(
    prompts=3,
    candidates=6,
    kept_prompts=2,
    kept_rows=2,
    failed_candidates=1,
    prompts_left_out={"failed candidate": 1},
    rows_left_out={"failed candidate": 2, "not chosen": 2},
)
WEIGHED = WeighCounts(rows_in=2, weighed_rows=1, failed_rows={"not scored by the target": 1}, rows_of_failed_prompts=1)


def test_samples_are_there_or_failed_and_have_verdicts() -> None:
    verify = VerifyConfig(method="regex", pattern="x")
    counts = GatherCounts(prompts=4, wanted=8, samples=6, right=3, wrong=2, unknown=1)
    check_gathered("a", counts, 2, verify)
    check_gathered("a", replace(counts, right=0, wrong=0, unknown=0), 2, VerifyConfig())
    with pytest.raises(StageError, match=r"gather\.policies\.a: 2 of 8 samples are not there, and 1 failures"):
        check_gathered("a", counts, 1, verify)
    with pytest.raises(StageError, match=r"gather\.policies\.a: samples"):
        check_gathered("a", replace(counts, unknown=0), 2, verify)


def test_what_adds_up_goes_on() -> None:
    check_prepared(PREPARED)
    check_scored("score", 6, ScoreTotals(rows=3, reused=2, failed=1))
    check_selected(PREPARED, SELECTED)
    check_weighed(2, WEIGHED, [ScoreTotals(failed=1)])


@pytest.mark.parametrize("changed", [{"rows_in": 11}, {"filtered": 1}, {"rows": 5}, {"rejects": Rejects()}])
def test_a_row_of_the_pool_that_is_lost(changed: dict[str, int]) -> None:
    with pytest.raises(StageError, match="only these are accounted for"):
        check_prepared(replace(PREPARED, **changed))


@pytest.mark.parametrize("changed", [{"rows": 2}, {"reused": 3}, {"failed": 0}])
def test_a_row_that_is_not_scored(changed: dict[str, int]) -> None:
    with pytest.raises(StageError, match="score: rows: of 6 only these are accounted for"):
        check_scored("score", 6, replace(ScoreTotals(rows=3, reused=2, failed=1), **changed))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"candidates": 5}, "prepared rows: of 6"),
        ({"prompts": 2}, "prepared prompts: of 3"),
        ({"kept_rows": 1}, "select: rows: of 6"),
        ({"kept_prompts": 1}, "select: prompts: of 3"),
        ({"unexplained_failures": 1}, "1 rows lack a score or another statistic, and no failure was reported"),
        ({"not_finite": 1}, "the stored scores of 1 rows are not finite"),
    ],
)
def test_a_row_that_select_loses(changed: dict[str, int], sentence: str) -> None:
    with pytest.raises(StageError, match=sentence):
        check_selected(PREPARED, replace(SELECTED, **changed))


def test_a_row_that_weigh_loses() -> None:
    for kept_rows, changed in ((3, {}), (2, {"weighed_rows": 0}), (2, {"dropped_rows": 1})):
        with pytest.raises(StageError, match="only these are accounted for"):
            check_weighed(kept_rows, replace(WEIGHED, **changed), [ScoreTotals(failed=1)])
    with pytest.raises(StageError, match="1 rows lack a score, and 0 failures were reported"):
        check_weighed(2, WEIGHED, [])
