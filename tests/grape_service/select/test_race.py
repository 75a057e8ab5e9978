"""Racing: with certain bounds the same candidates are kept, with the same ranks and scores, as when all is scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from grape_service.config.methods import SelectConfig
from grape_service.methods import SELECT
from grape_service.methods.select.grape import grape_bounds, grape_scores
from grape_service.rows.ragged import gather_rows, offsets_from_lengths, segment_sums
from grape_service.select.choose import Candidates, Choice, choose
from grape_service.select.limits import within_token_limits
from grape_service.select.race import (
    Contest,
    Known,
    SourceResults,
    Standing,
    least_kept,
    next_known,
    race,
    still_running,
)
from grape_service.select.race_risk import likely_reach, student_quantile

pytestmark = pytest.mark.quick


@dataclass
class Pool:
    """Candidates [N] with the tokens of their rows [U], as an engine that is asked would score them."""

    prompts: list[int]
    rows: list[int]
    sources: list[int]
    logprobs: list[list[float]]  # of each row
    turn_ends: list[bool]  # whether a row's last token is one
    keep: list[int]
    select: SelectConfig

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        return offsets_from_lengths([len(row) for row in self.logprobs])

    @property
    def values(self) -> npt.NDArray[np.float32]:
        return np.array([value for row in self.logprobs for value in row], dtype=np.float32)

    @property
    def counted(self) -> npt.NDArray[np.bool_]:
        counted = np.ones(int(self.offsets[-1]), dtype=bool)
        if not self.select.count_turn_end:
            counted[self.offsets[1:][np.array(self.turn_ends)] - 1] = False
        return counted

    def contest(self) -> Contest:
        rows = np.array(self.rows)
        lengths = np.diff(self.offsets)[rows]
        return Contest(
            np.array(self.prompts),
            rows,
            within_token_limits(lengths, self.select),
            np.array(self.sources),
            np.array(self.keep),
            self.select.min_margin or 0.0,
        )

    def stand(self, progress: Known) -> Standing:
        known = progress.known_tokens()
        values = np.where(known, progress.statistics["logprob"], 0).astype(np.float32)
        scores = grape_scores(values, self.counted, self.offsets)
        scores[~progress.whole] = np.nan
        taken = self.counted & known
        offsets = offsets_from_lengths(segment_sums(taken, self.offsets))
        totals = segment_sums(self.counted, self.offsets)
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = np.where(totals > 0, grape_bounds(values[taken], offsets, totals), np.inf)
            mean = np.where(np.diff(offsets) > 0, reach * totals / np.diff(offsets), -np.inf)
        return Standing(scores, reach, mean)

    def begin(self) -> Known:
        return Known.of(self.offsets, ["logprob"])

    def more(self, rows, begins, ends) -> dict[str, npt.NDArray[np.float32]]:
        return {"logprob": self.values[gather_rows(self.offsets[:-1][rows] + begins, ends - begins)]}

    def run(self) -> tuple[Known, Standing]:
        progress = self.begin()
        return progress, race(self.contest(), progress, self.stand, self.more)

    def choice(self, scores, failed, reach=None) -> Choice:
        """What is kept by scores, and the most that others reach, of rows [U]."""
        rows = np.array(self.rows)
        return choose(
            Candidates(
                prompts=np.array(self.prompts),
                num_prompts=len(self.keep),
                ties=np.arange(len(rows)),
                sources=pa.array([str(source) for source in self.sources]),
                loss_tokens=np.diff(self.offsets)[rows],
                scores=scores[rows],
                failed=failed[rows],
                responses=rows,
                keep=np.array(self.keep),
                reach=None if reach is None else reach[rows],
                distinct=np.array(
                    [
                        len({r for p, r in zip(self.prompts, self.rows, strict=True) if p == n})
                        for n in range(len(self.keep))
                    ]
                ),
            ),
            self.select,
        )

    def raced(self) -> tuple[Choice, Known]:
        progress, standing = self.run()
        stopped = ~progress.whole & ~progress.failed
        return self.choice(standing.scores, progress.failed, np.where(stopped, standing.reach, np.nan)), progress

    def scored(self) -> Choice:
        """What is kept where every token is scored; a row with a value that is not finite has failed."""
        bad = segment_sums(~np.isfinite(self.values), self.offsets) > 0
        scores = grape_scores(self.values, self.counted, self.offsets)
        return self.choice(np.where(bad, np.nan, scores), bad)


# Few values, so that ties are common; long rows of one value, so that sums round.
VALUES = st.sampled_from([0.0, -0.1, -0.3, -1.0, -1.0000001, -2.5, -30.0])
ROWS = st.lists(VALUES, min_size=1, max_size=40) | st.tuples(VALUES, st.integers(1, 300)).map(lambda p: [p[0]] * p[1])


@st.composite
def pools(draw: st.DrawFn, failing: bool = False) -> Pool:
    num_prompts = draw(st.integers(1, 3))
    logprobs = draw(st.lists(ROWS, min_size=1, max_size=8))
    if failing and draw(st.booleans()):
        row = draw(st.sampled_from(logprobs))
        row[draw(st.integers(0, len(row) - 1))] = float("nan")
    candidates = [(prompt, draw(st.integers(0, len(logprobs) - 1))) for prompt in range(num_prompts)]
    candidates += draw(
        st.lists(st.tuples(st.integers(0, num_prompts - 1), st.integers(0, len(logprobs) - 1)), max_size=12)
    )
    candidates.sort(key=lambda one: one[0])
    keep = draw(st.integers(1, 3))
    by_prompt = draw(st.lists(st.integers(1, 4), min_size=num_prompts, max_size=num_prompts) | st.none())
    limits = draw(st.sampled_from([{}, {"min_response_tokens": 3}, {"max_response_tokens": 20}]))
    margin = draw(st.sampled_from([None, None, 0.0, 0.05, 0.7]))
    return Pool(
        [prompt for prompt, _ in candidates],
        [row for _, row in candidates],
        [draw(st.integers(0, 2)) for _ in candidates],
        logprobs,
        [draw(st.booleans()) for _ in logprobs],
        by_prompt or [keep] * num_prompts,
        SelectConfig(keep=keep, min_margin=margin, count_turn_end=draw(st.booleans()), min_candidates=1, **limits),
    )


def assert_same_kept(raced: Choice, scored: Choice, prompts: npt.NDArray) -> None:
    kept = scored.kept
    assert raced.kept.tolist() == kept.tolist()
    assert raced.left_out.tolist() == scored.left_out.tolist()
    assert raced.ranking is not None
    assert scored.ranking is not None
    assert raced.ranking.rank[kept].tolist() == scored.ranking.rank[kept].tolist()
    at_least = raced.ranking.at_least[kept]
    mine, true = raced.ranking.margin[kept], scored.ranking.margin[kept]
    assert mine[~at_least].tolist() == pytest.approx(true[~at_least].tolist(), abs=0, rel=0, nan_ok=True)
    assert (mine[at_least] <= true[at_least]).all()


@settings(max_examples=600)
@given(pools())
@example(
    Pool([0, 0], [0, 1], [0, 0], [[-0.1] * 300, [-0.1] * 299], [False, False], [1], SelectConfig(min_candidates=1))
)
def test_exact_racing_keeps_what_no_racing_keeps(pool: Pool) -> None:
    raced, progress = pool.raced()
    assert_same_kept(raced, pool.scored(), np.array(pool.prompts))
    assert (
        progress.known[np.array(pool.rows)[raced.kept]].tolist()
        == progress.total[np.array(pool.rows)[raced.kept]].tolist()
    ), "a kept row is whole"


@settings(max_examples=300)
@given(pools(failing=True))
def test_a_failure_takes_its_prompt_out_where_it_was_met_and_nothing_else_changes(pool: Pool) -> None:
    raced, progress = pool.raced()
    scored = pool.scored()
    met = progress.failed
    prompts = np.array(pool.prompts)
    out = {int(prompt) for prompt in prompts[met[np.array(pool.rows)]]}
    for prompt in range(len(pool.keep)):
        mine = prompts == prompt
        if prompt in out:
            assert not raced.kept[mine].any()
        elif scored.left_out[prompt] != 1:  # no candidate of it fails anywhere
            assert raced.kept[mine].tolist() == scored.kept[mine].tolist()
    # A row that fails behind the place where it was stopped is one that could not have been kept.
    whole = replace(pool, logprobs=[[0.0 if v != v else v for v in row] for row in pool.logprobs])
    bad = segment_sums(~np.isfinite(pool.values), pool.offsets) > 0
    for prompt in set(range(len(pool.keep))) - out:
        hidden = (prompts == prompt) & bad[np.array(pool.rows)]
        assert not (whole.scored().kept & hidden).any() or whole.select.min_margin is not None


@settings(max_examples=200)
@given(pools(), st.randoms(use_true_random=False))
def test_what_is_known_is_not_scored_again_and_changes_nothing(pool: Pool, random) -> None:
    progress = pool.begin()
    for row, values in enumerate(pool.logprobs):
        known = random.randint(0, len(values))
        begin = int(pool.offsets[row])
        progress.statistics["logprob"][begin : begin + known] = values[:known]
        progress.known[row] = known
    asked = [progress.known.copy()]

    def more(rows, begins, ends):
        assert (begins == asked[-1][rows]).all()
        known = asked[-1].copy()
        known[rows] = ends
        asked.append(known)
        return pool.more(rows, begins, ends)

    standing = race(pool.contest(), progress, pool.stand, more)
    stopped = ~progress.whole
    raced = pool.choice(standing.scores, progress.failed, np.where(stopped, standing.reach, np.nan))
    assert_same_kept(raced, pool.scored(), np.array(pool.prompts))
    again = progress.known.copy()
    race(pool.contest(), progress, pool.stand, lambda *_: pytest.fail("nothing is left to score"))
    assert (progress.known == again).all()


@settings(max_examples=100)
@given(pools())
def test_where_sources_lead_changes_what_is_scored_but_not_what_is_kept(pool: Pool) -> None:
    progress = pool.begin()
    results = SourceResults({0: 5.0, 1: -5.0}, {0: 3, 1: 3})
    standing = race(pool.contest(), progress, pool.stand, pool.more, results)
    stopped = ~progress.whole
    raced = pool.choice(standing.scores, progress.failed, np.where(stopped, standing.reach, np.nan))
    assert_same_kept(raced, pool.scored(), np.array(pool.prompts))


@given(st.lists(st.floats(-100, 0, width=32), min_size=1, max_size=200), st.data())
def test_no_score_is_larger_than_its_bound(values: list[float], data: st.DataObject) -> None:
    known = data.draw(st.integers(0, len(values)))
    array = np.array(values, dtype=np.float32)
    bound = grape_bounds(array[:known], np.array([0, known]), np.array([len(values)]))[0]
    exact = sum((Fraction(float(value)) for value in array), Fraction(0)) / len(values)
    score = grape_scores(array, np.ones(len(array), dtype=bool), np.array([0, len(array)]))[0]
    assert Fraction(float(bound)) >= exact
    assert bound >= score
    reference = sum(float(value) for value in array[:known]) / len(values)
    assert bound == pytest.approx(reference, rel=1e-12)


def test_by_hand() -> None:
    """Candidate a: mean -1 over 10 tokens. Of b, with -4 a token, 3 tokens are enough: -12 / 10 < -1."""
    contest = Contest(*(np.array(x) for x in ([0, 0], [0, 1])), np.ones(2, bool), np.zeros(2, int), np.array([1]))
    scores = np.array([-1.0, np.nan])
    assert least_kept(contest, scores).tolist() == [-1.0]
    for known, runs in ((2, True), (3, False)):
        reach = np.array([np.nan, -4.0 * known / 10])
        assert still_running(contest, scores, reach, np.array([True, False])).tolist() == [False, runs]
    tie = np.array([np.nan, -1.0])
    assert still_running(contest, scores, tie, np.array([True, False])).tolist() == [False, True]


def test_a_far_worse_candidate_costs_few_tokens() -> None:
    long = Pool(
        [0, 0, 0], [0, 1, 2], [0, 0, 0], [[-0.2] * 400, [-2.0] * 400, [-0.25] * 400], [False] * 3, [1], SelectConfig()
    )
    progress, _ = long.run()
    assert progress.known.tolist()[0] == 400
    assert progress.known.tolist()[1] < 60
    assert 320 <= progress.known.tolist()[2] < 340  # 400 * 0.2 / 0.25 = 320


def test_a_wave_of_favourites_comes_before_the_others_are_read_further() -> None:
    pool = Pool([0, 0], [0, 1], [0, 1], [[-0.2] * 100, [-0.3] * 100], [False] * 2, [1], SelectConfig())
    progress, results = pool.begin(), SourceResults()
    waves = []
    while True:
        standing = pool.stand(progress)
        running = still_running(pool.contest(), standing.scores, standing.reach, progress.whole)
        if not running.any():
            break
        target = next_known(pool.contest(), progress, standing, running, results)
        waves.append(target.tolist())
        for row in np.flatnonzero(target > progress.known):
            span = slice(int(pool.offsets[row]), int(pool.offsets[row] + target[row]))
            progress.statistics["logprob"][span] = pool.values[span]
        progress.known = target
    assert waves == [[12, 12], [100, 12], [100, 68]]


def test_rows_that_cannot_be_divided_are_scored_in_one_wave() -> None:
    long = Pool([0, 0], [0, 1], [0, 0], [[-0.2] * 400, [-2.0] * 400], [False] * 2, [1], SelectConfig())
    progress = long.begin()
    progress.undivided[1] = True
    waves = []

    def more(rows, begins, ends):
        waves.append({int(row): (int(begin), int(end)) for row, begin, end in zip(rows, begins, ends, strict=True)})
        return long.more(rows, begins, ends)

    race(long.contest(), progress, long.stand, more)
    assert [wave[1] for wave in waves if 1 in wave] == [(0, 400)]


def made_rows(random: np.random.Generator, rows: int, length: int) -> npt.NDArray[np.float32]:
    """log p of rows [rows, length] about a mean of each row's own, neighbours alike."""
    noise = random.normal(0, 0.4, size=(rows, length))
    noise[:, 1:] += 0.5 * noise[:, :-1]
    return np.minimum(random.normal(-1.5, 0.25, size=(rows, 1)) + noise, 0).astype(np.float32)


def test_what_is_unlikely_happens_as_seldom_as_is_said() -> None:
    """Of rows as the estimate takes them to be, the share whose mean ends above the limit is at most the risk."""
    random = np.random.default_rng(5)
    above = total = 0
    for _ in range(60):
        values = made_rows(random, 40, 300)
        known = 60
        offsets, totals = np.arange(41) * known, np.full(40, 300)
        bounds = grape_bounds(values[:, :known].ravel(), offsets, totals)
        limit = likely_reach(values[:, :known].ravel(), offsets, totals, bounds, 0.05)
        assert (limit <= bounds).all()
        assert (limit >= values[:, :known].astype(np.float64).mean(axis=1) * 1.5).all()
        above += int((values.astype(np.float64).mean(axis=1) > limit).sum())
        total += 40
    assert above / total <= 0.05
    assert limit.mean() < bounds.mean() - 0.1, "it says more than the bound"


@pytest.mark.parametrize("risk", [0.001, 0.01, 0.05, 0.2])
def test_the_quantile_is_students(risk: float) -> None:
    for degrees in (7, 12, 50, 2000):
        assert student_quantile(risk, degrees) == pytest.approx(stats.t.isf(risk, degrees), rel=0.01)


def test_the_limit_by_hand() -> None:
    """Eight rows of 32 known tokens of 64: s^2 from halves that differ by 0.1, no spread of rows left beside it."""
    half = np.concatenate([np.full(16, -1.0), np.full(16, -1.1)])
    values, offsets, totals = np.tile(half, 8).astype(np.float64), np.arange(9) * 32, np.full(8, 64)
    spread = 0.1**2 * 16 / 2
    away = student_quantile(0.01, 7) * np.sqrt(spread * 2 / 32)
    expected = (32 * -1.05 + 32 * min(0.0, -1.05 + away)) / 64
    assert likely_reach(values, offsets, totals, np.full(8, -0.525), 0.01) == pytest.approx(min(expected, -0.525))
    few = likely_reach(values[:224], offsets[:8], totals[:7], np.full(7, -0.525), 0.01)
    assert few.tolist() == [-0.525] * 7, "seven rows say nothing"


def test_only_methods_with_a_bound_say_so() -> None:
    assert SELECT["grape"].bound is not None
    assert [name for name, method in SELECT.items() if method.bound is None] == ["local", "rsr", "steps", "surprise"]
