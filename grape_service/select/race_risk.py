"""What a row's score is unlikely to exceed, by its known tokens and the spread of those that compete beside it.

Row i has k counted tokens of n known, with mean m_i; its score will be (k m_i + (n - k) r_i) / n, where r_i is the mean
of the rest. The pool says how far a mean of later tokens is from one of earlier tokens: over all rows, the known tokens
are cut in halves of h tokens, and with d_i the second half's mean less the first's

    s^2 = mean of d_i^2 / (2 / h_i)          the variance of one token, as far as it shows in means of many
    tau^2 = variance of m_i - mean of s^2 / k_i, at least 0          the rows' own spread

s^2 has all that makes neighbours alike, and drift, in it. Low means rise again, so r_i is expected at

    m_i + (1 - w_i) max(0, mean of all m - m_i),   w_i = tau^2 / (tau^2 + s^2 / k_i)

with a variance of s^2 (1 / k_i + 1 / (n - k_i)). The limit is Student's quantile of that at the stated risk, with as
many degrees of freedom as there are rows less one. It is an estimate: the audit says how good.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from grape_service.methods.base import Float64s
from grape_service.rows.ragged import Int64s, gather_rows, offsets_from_lengths, segment_sums

LEAST_TOKENS = 32
"""Known tokens below which nothing is said of a row, nor learnt from it."""
LEAST_ROWS = 8
"""Rows below which nothing is said of any."""


def likely_reach(
    values: npt.NDArray[np.floating], offsets: Int64s, totals: Int64s, bounds: Float64s, risk: float
) -> Float64s:
    """What the mean of each row [U] exceeds with a chance of `risk` at most, and never its bound.

    `values` [K] are log p of the known counted tokens of the rows, cut at `offsets` [U + 1], of `totals` [U] in all;
    `bounds` [U] are certain.
    """
    known = np.diff(offsets)
    told = known >= LEAST_TOKENS
    if told.sum() < LEAST_ROWS:
        return bounds
    half = known // 2
    first, second = (_means(values, offsets[:-1] + begin, half) for begin in (np.zeros_like(half), half))
    spread = float(((second - first)[told] ** 2 * half[told] / 2).mean())
    means = _means(values, offsets[:-1], known)
    of_rows = max(0.0, float(means[told].var(ddof=1) - (spread / known[told]).mean()))
    rest = np.maximum(totals - known, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = of_rows / (of_rows + spread / known) if of_rows + spread > 0 else np.ones(len(known))
        expected = means + (1 - own) * np.maximum(0.0, float(means[told].mean()) - means)
        away = student_quantile(risk, int(told.sum()) - 1) * np.sqrt(spread * (1 / known + 1 / rest))
    limit = (known * means + rest * np.minimum(expected + away, 0.0)) / np.maximum(totals, 1)
    return np.where(told & (totals > known), np.fmin(limit, bounds), bounds)


def student_quantile(risk: float, degrees: int) -> float:
    """What a Student-t variable of `degrees` of freedom exceeds with a chance of `risk`, within 1% from 7 degrees on
    and for risks of 0.001 to 0.2: its expansion about the normal's (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(1 - risk)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def _means(values: npt.NDArray[np.floating], starts: Int64s, lengths: Int64s) -> Float64s:
    """Mean of each stretch [U] of flat values; NaN of none."""
    sums = segment_sums(
        np.asarray(values, dtype=np.float64)[gather_rows(starts, lengths)], offsets_from_lengths(lengths)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums / lengths)
