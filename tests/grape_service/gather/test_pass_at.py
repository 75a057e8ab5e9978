"""pass@k against every way to draw k of n samples."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grape_service.gather.pass_at import pass_at

pytestmark = pytest.mark.quick


def by_drawing(right: int, judged: int, k: int) -> Fraction:
    """The share of all sets of k samples that hold a right one."""
    samples = [place < right for place in range(judged)]
    drawn = [any(chosen) for chosen in itertools.combinations(samples, k)]
    return Fraction(sum(drawn), len(drawn))


@given(st.lists(st.integers(0, 9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), max_size=6))
def test_it_is_the_mean_over_all_drawings(prompts: list[tuple[int, int]]) -> None:
    for k in range(1, 10):
        expected = [by_drawing(c, n, k) for c, n in prompts if n >= k]
        value, used = pass_at([c for c, _ in prompts], [n for _, n in prompts], k)
        assert used == len(expected)
        if expected:
            assert value == pytest.approx(float(sum(expected) / len(expected)), abs=1e-12)
        else:
            assert value is None


def test_many_samples_lose_no_digit() -> None:
    n, c, k = 10_000, 3, 100
    assert pass_at([c], [n], k)[0] == pytest.approx(1 - comb(n - c, k) / comb(n, k), rel=1e-12)


def test_by_hand() -> None:
    # Of 4 samples 1 is right: one drawn is right in 1 of 4, one of two drawn in 3 of 6.
    assert pass_at([1], [4], 1) == (0.25, 1)
    assert pass_at([1], [4], 2) == (0.5, 1)
    assert pass_at(np.array([1, 4, 0]), np.array([4, 4, 1]), 2) == (0.75, 2)
