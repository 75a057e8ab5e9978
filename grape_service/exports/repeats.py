"""Weights for trainers that take none: a row occurs as often as its mean weight says.

A row of mean weight w occurs w / (mean over the rows) times, rounded up or down with a digest of the row as the die:
right in the mean, and the same for the same release. What a token weighs within its row is lost.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from grape_service.errors import UserError
from grape_service.exports.effects import EFFECTS
from grape_service.exports.rows import WeightTotals, loss_spans, row_weights, split_batches
from grape_service.exports.summary import Target
from grape_service.release.load import Release
from grape_service.rows.ragged import Int64s

NEEDED = ["prompt_id", "candidate_id", "loss_mask", "loss_weights"]


class Repeats:
    """How often each row of a release occurs; looks at all training rows once, before any is written."""

    def __init__(self, release: Release, target: Target):
        self.drop_weights = target.drop_weights
        self.seen = WeightTotals()
        for _ in self.seen.watch(split_batches(release, NEEDED, target, "train")):
            pass
        if self.seen.rows and not self.seen.tokens:
            raise UserError(
                f"no token of {release.reference} has loss, so no row would occur: export a release whose "
                "responses have tokens with loss"
            )
        if self.seen.weighted and not self.seen.total and not self.drop_weights:
            raise UserError(
                f"all loss weights of {release.reference} are 0, so no row would occur: make the release with other "
                "weights, or export it with --drop-weights"
            )
        self.resample = self.seen.weighted and not target.drop_weights and self.seen.total > 0
        self.left_out = self.without_loss = 0

    def copies(self, batch: pa.RecordBatch, split: str) -> Int64s:
        """Copies of each row [N] of a batch with the columns NEEDED: none of one without a token with loss; rows for
        evaluation occur once."""
        has_loss = loss_spans(batch) > 0
        if split == "train":
            self.without_loss += int(np.count_nonzero(~has_loss))
        if not self.resample or split != "train":
            return has_loss.astype(np.int64)
        shares = row_weights(batch) * (self.seen.rows / self.seen.total)
        identities = zip(batch.column("prompt_id"), batch.column("candidate_id"), strict=True)
        copies = [
            num_copies(share, f"{prompt}|{candidate}")
            for share, (prompt, candidate) in zip(shares.tolist(), identities, strict=True)
        ]
        self.left_out += copies.count(0)
        return np.array(copies, np.int64)

    def sentence(self, to: str, trainer: str, written: int) -> str:
        """What became of the weights, once all rows were written."""
        rows = self.seen.rows
        if self.resample:
            return (
                f"{trainer} takes no token weights: {rows} rows became {written}, each repeated in proportion to its "
                f"mean weight ({self.left_out} not at all), and {EFFECTS[to][self.seen.level].words}."
            )
        kept = "without their loss weights, as asked" if self.seen.weighted else self.seen.unweighted_words
        gone = f" {self.without_loss} more have no token with loss and are left out." if self.without_loss else ""
        return f"{rows - self.without_loss} rows {kept}, for {trainer}.{gone}"


def num_copies(share: float, identity: str) -> int:
    """`share` rounded up or down with the row's digest as the die, so that it is right in the mean."""
    die = int.from_bytes(hashlib.sha256(f"grape-copies|{identity}".encode()).digest()[:8], "big") / 2**64
    return int(share + die)
