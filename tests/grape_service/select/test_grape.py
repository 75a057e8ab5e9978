"""GRAPE scores and ranks: by hand, against a float64 loop, and by property."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grape_service.methods.select.grape import grape_scores
from grape_service.rows.ragged import offsets_from_lengths, segment_sums
from grape_service.select.ranking import places_within_groups, rank_candidates

pytestmark = pytest.mark.quick


def test_score_by_hand():
    # Row 0: (-1 -2 -3) / 3 = -2; row 1 counts its first token alone; row 2 has nothing but a turn end.
    logprobs = np.array([-1.0, -2.0, -3.0, -0.5, -9.0, -0.1], dtype=np.float32)
    counted = np.array([1, 1, 1, 1, 0, 0], dtype=bool)
    scores = grape_scores(logprobs, counted, np.array([0, 3, 5, 6]))
    assert scores[:2].tolist() == [-2.0, -0.5]
    assert np.isnan(scores[2])


def test_a_score_is_length_normalised():
    logprobs = np.array([-1.0, -1.0, -1.0, -1.0, -1.5], dtype=np.float32)
    scores = grape_scores(logprobs, np.ones(5, dtype=bool), np.array([0, 4, 5]))
    assert scores[0] > scores[1]  # though its sum is smaller


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_log_probability_makes_no_score(bad):
    logprobs = np.array([-1.0, bad, -2.0], dtype=np.float32)
    scores = grape_scores(logprobs, np.ones(3, dtype=bool), np.array([0, 2, 3]))
    assert np.isnan(scores[0])
    assert scores[1] == -2.0


def test_a_bad_log_probability_that_does_not_count_does_no_harm():
    logprobs = np.array([-1.0, np.nan], dtype=np.float32)
    assert grape_scores(logprobs, np.array([True, False]), np.array([0, 2])).tolist() == [-1.0]


def test_ranks_and_margins_by_hand():
    # Prompt 1 has scores -1, -3, none; prompt 0 has a tie at -2, which the smaller id wins.
    prompts = np.array([1, 1, 1, 0, 0])
    scores = np.array([-3.0, -1.0, np.nan, -2.0, -2.0])
    ranking = rank_candidates(prompts, scores, np.array([2, 3, 4, 1, 0]))
    assert ranking.rank.tolist() == [2, 1, 0, 2, 1]
    np.testing.assert_array_equal(ranking.margin, [np.nan, 2.0, np.nan, np.nan, 0.0])


def test_no_candidates_at_all():
    nothing = np.zeros(0, dtype=np.int64)
    ranking = rank_candidates(nothing, np.zeros(0), nothing)
    assert len(ranking.rank) == len(ranking.margin) == 0
    assert len(grape_scores(np.zeros(0), np.zeros(0, dtype=bool), np.array([0]))) == 0


@st.composite
def ragged_rows(draw):
    lengths = draw(st.lists(st.integers(0, 40), min_size=0, max_size=30))
    offsets = offsets_from_lengths(lengths)
    seed = draw(st.integers(0, 2**32))
    generator = np.random.default_rng(seed)
    logprobs = -generator.exponential(2.0, offsets[-1]).astype(np.float32)
    counted = generator.random(offsets[-1]) < 0.8
    return logprobs, counted, offsets


@given(ragged_rows())
def test_scores_equal_a_float64_loop(rows):
    logprobs, counted, offsets = rows
    scores = grape_scores(logprobs, counted, offsets)
    for row in range(len(offsets) - 1):
        values = [float(logprobs[place]) for place in range(offsets[row], offsets[row + 1]) if counted[place]]
        if values:
            assert scores[row] == pytest.approx(sum(values) / len(values), rel=1e-12)
        else:
            assert np.isnan(scores[row])


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([-3.0, -2.0, -1.0, float("nan")])), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
)
def test_order_never_changes_a_rank(rows, random):
    prompts, scores = (np.array(column) for column in zip(*rows, strict=True))
    ties = np.arange(len(rows))  # the place of its id among all ids belongs to a row
    expected = rank_candidates(prompts, scores, ties)
    shuffled = np.array(random.sample(range(len(rows)), len(rows)))
    ranking = rank_candidates(prompts[shuffled], scores[shuffled], ties[shuffled])
    np.testing.assert_array_equal(ranking.rank, expected.rank[shuffled])
    np.testing.assert_array_equal(ranking.margin, expected.margin[shuffled])


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 0)), min_size=1, max_size=30))
def test_ranks_equal_a_loop(rows):
    prompts, scores = (np.array(column) for column in zip(*rows, strict=True))
    ranking = rank_candidates(prompts, scores, np.arange(len(rows)))
    for prompt in set(prompts.tolist()):
        members = sorted(np.flatnonzero(prompts == prompt), key=lambda row: (-scores[row], row))
        for place, row in enumerate(members):
            assert ranking.rank[row] == place + 1
            if place + 1 < len(members):
                assert ranking.margin[row] == scores[row] - scores[members[place + 1]]
                assert ranking.margin[row] >= 0
            else:
                assert np.isnan(ranking.margin[row])


@given(hnp.arrays(np.int64, st.integers(0, 30), elements=st.integers(0, 5)).map(np.sort))
def test_places_within_groups(groups):
    seen: dict[int, int] = {}
    for group, place in zip(groups.tolist(), places_within_groups(groups).tolist(), strict=True):
        assert place == seen.get(group, 0)
        seen[group] = place + 1


@settings(max_examples=30)
@given(st.lists(st.integers(0, 20), max_size=20), st.integers(0, 2**32))
def test_segment_sums_depend_on_their_row_alone(lengths, seed):
    offsets = offsets_from_lengths(lengths)
    values = np.random.default_rng(seed).normal(size=offsets[-1]) * 1e6
    sums = segment_sums(values, offsets)
    for row, length in enumerate(lengths):
        alone = values[offsets[row] : offsets[row + 1]].copy()
        assert sums[row] == segment_sums(alone, np.array([0, length]))[0]
        assert sums[row] == pytest.approx(sum(alone.tolist()), rel=1e-9, abs=1e-6)
