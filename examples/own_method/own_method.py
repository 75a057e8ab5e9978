"""A select and a weights method of one's own: plain functions of numpy arrays.

A select method gives one number for each candidate of a batch, a weights method one weight for each token with loss.
What they need is said above them, and only that is made and read.
"""

from __future__ import annotations

import numpy as np

from grape_service import uses
from grape_service.rows.method_batch import MethodBatch


@uses(statistics=["rank"], columns=["correct"])
def first_guesses(batch: MethodBatch) -> np.ndarray:
    """Share of a response's tokens that are the target's first guess, plus 1 where the pool calls it correct."""
    hits = np.add.reduceat(batch.statistics["rank"] == 1, batch.offsets[:-1], dtype=np.float64)
    correct = batch.columns["correct"].fill_null(False).to_numpy(zero_copy_only=False)
    return hits / np.diff(batch.offsets) + correct


@uses(statistics=["logprob", "entropy"])
def surprising_places(batch: MethodBatch) -> np.ndarray:
    """A weight of 1 where a token is as surprising as the target expects of one there, less where it is more so."""
    return np.exp(np.minimum(0.0, batch.statistics["logprob"] + batch.statistics["entropy"]))
