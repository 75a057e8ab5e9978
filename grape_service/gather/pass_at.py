"""pass@k: the chance that at least one of k samples of a prompt is right, estimated from n of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def pass_at(right: npt.ArrayLike, judged: npt.ArrayLike, k: int) -> tuple[float | None, int]:
    """The mean of 1 - C(n - c, k) / C(n, k) over prompts with n judged samples [P] of which c are right [P], and over
    how many prompts it is: those with n >= k; None where there is none.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1), as the product of 1 - k / i for
    i = n - c + 1 .. n, in which no large number is made.
    """
    c, n = np.asarray(right, np.int64), np.asarray(judged, np.int64)
    assert ((c >= 0) & (c <= n)).all(), "of n samples at most n are right"
    usable = n >= k
    if not usable.any():
        return None, 0
    return float(np.mean([_of_prompt(*one, k) for one in zip(c[usable], n[usable], strict=True)])), int(usable.sum())


def _of_prompt(c: int, n: int, k: int) -> float:
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1, dtype=np.float64)))
