"""Sums over tokens with weights: what reports, `normalize: dataset` and the control of a target against itself need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.methods.base import TokenWeights
from grape_service.rows.counts import Counts
from grape_service.rows.ragged import Int64s, segment_sums

MANTISSA_BITS = 53


class ClipShares(TypedDict):
    """Shares of the tokens that each clip held; NaN of no tokens."""

    ratio_low: float
    ratio_high: float
    weight_low: float
    weight_high: float


class WeightFigures(ClipShares):
    """What a report shows of the sums."""

    mean: float
    effective_share: float


@dataclass
class WeightTotals(Counts):
    """Sums over tokens with weights, from which every figure of a report follows; can be added."""

    rows: int = 0
    tokens: int = 0
    sum: float = 0.0
    sum_squares: float = 0.0
    ratio_low: int = 0
    ratio_high: int = 0
    weight_low: int = 0
    weight_high: int = 0
    parts: dict[int, int] = field(default_factory=dict, compare=False, repr=False)
    """`sum` exactly, as the sum of parts[e] * 2 ** (e - 53): so it is the same in any order and any batches, whatever
    the size of the weights. Not in the JSON form."""

    def __post_init__(self) -> None:
        if not self.parts and self.sum:
            self.parts = _parts_by_group(np.array([self.sum]), np.zeros(1, np.int64), 1)[0]

    def __add__(self, other: WeightTotals) -> WeightTotals:
        total = super().__add__(other)
        total.sum = _exact_sum(total.parts)
        return total

    def to_json(self) -> JsonObject:
        """Plain numbers."""
        return {name: value for name, value in super().to_json().items() if name != "parts"}

    @classmethod
    def from_json(cls, value: JsonObject) -> WeightTotals:
        """The inverse of to_json; what is added to the sum from here on is added to it as rounded."""
        return super().from_json({**value, "parts": {}})

    @property
    def mean(self) -> float:
        """Mean weight; NaN of no tokens."""
        return self.sum / self.tokens if self.tokens else float("nan")

    @property
    def effective_share(self) -> float:
        """Effective sample size (sum w)^2 / (n * sum w^2), from 1/n to 1; NaN of no tokens."""
        return self.sum**2 / (self.tokens * self.sum_squares) if self.sum_squares else float("nan")

    def clip_shares(self) -> ClipShares:
        """Share of the tokens that each clip held."""

        def share(tokens: int) -> float:
            return tokens / self.tokens if self.tokens else float("nan")

        return {
            "ratio_low": share(self.ratio_low),
            "ratio_high": share(self.ratio_high),
            "weight_low": share(self.weight_low),
            "weight_high": share(self.weight_high),
        }

    def figures(self) -> WeightFigures:
        """What a report shows of the sums."""
        return {"mean": self.mean, "effective_share": self.effective_share, **self.clip_shares()}


def totals_by_group(weights: TokenWeights, offsets: Int64s, groups: Int64s, num_groups: int) -> list[WeightTotals]:
    """WeightTotals of each group of responses; `groups` [N] holds a number from 0 for each.

    Raises UserError where the weights of a response add up to no finite number.
    """
    lengths = np.diff(offsets)
    row_sums = segment_sums(weights.weights, offsets)
    if not np.isfinite(row_sums).all():
        raise UserError("the weights of a response add up to no finite number: give weights.weight_clip an upper bound")
    with np.errstate(over="ignore"):
        row_squares = segment_sums(weights.weights * weights.weights, offsets)

    def per_group(values: npt.NDArray) -> npt.NDArray:
        return np.bincount(groups, weights=values, minlength=num_groups)

    columns = [np.ones(len(lengths)), lengths, row_squares]
    columns += [weights.ratio_low, weights.ratio_high, weights.weight_low, weights.weight_high]
    sums = np.stack([per_group(column) for column in columns], axis=1)
    parts = _parts_by_group(row_sums, groups, num_groups)
    return [
        WeightTotals(int(r), int(t), _exact_sum(part), float(q), int(rl), int(rh), int(wl), int(wh), part)
        for (r, t, q, rl, rh, wl, wh), part in zip(sums, parts, strict=True)
    ]


def _parts_by_group(values: npt.NDArray[np.float64], groups: Int64s, num_groups: int) -> list[dict[int, int]]:
    """`WeightTotals.parts` of the finite values [N] of each group."""
    mantissas, exponents = np.frexp(values)
    whole = np.ldexp(mantissas, MANTISSA_BITS).astype(np.int64)
    keys, places = np.unique(np.stack([groups, exponents], axis=1), axis=0, return_inverse=True)
    high, low = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
    np.add.at(high, places.ravel(), whole >> 27)  # in two halves, which int64 holds of 2 ** 36 values
    np.add.at(low, places.ravel(), whole & (2**27 - 1))
    parts: list[dict[int, int]] = [{} for _ in range(num_groups)]
    for (group, exponent), more, less in zip(keys.tolist(), high.tolist(), low.tolist(), strict=True):
        parts[group][exponent] = (more << 27) + less
    return parts


def _exact_sum(parts: dict[int, int]) -> float:
    """The sum that parts stand for, rounded once."""
    smallest = min(parts, default=0)
    whole = sum(part << (exponent - smallest) for exponent, part in parts.items())
    shift = smallest - MANTISSA_BITS
    return float(whole << shift) if shift >= 0 else whole / (1 << -shift)
