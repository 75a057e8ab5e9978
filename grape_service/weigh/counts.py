"""Counts of the weigh stage, which add up over partitions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from grape_service.config.methods import WeightsConfig
from grape_service.rows.counts import Counts
from grape_service.weigh.totals import WeightTotals


@dataclass
class AlignedCounts(Counts):
    """How rows of other tokens than the target's were compared."""

    rows: int = 0
    rows_below: int = 0
    """Of which less was compared one with one than behavior.min_coverage."""
    tokens: int = 0
    """The target's, with loss."""
    single: int = 0
    """Those of them in spans of one token each."""
    spans: dict[str, int] = field(default_factory=dict)
    """Spans by how many of the target's tokens they have."""

    def figures(self) -> dict[str, float]:
        """What a report shows: the share of tokens compared one with one, the mean and the longest span."""
        compared = sum(int(size) * number for size, number in self.spans.items())
        return {
            "coverage": self.single / self.tokens if self.tokens else float("nan"),
            "mean_span": compared / sum(self.spans.values()) if self.spans else float("nan"),
            "longest_span": max(map(int, self.spans), default=0),
        }


@dataclass
class WeighCounts(Counts):
    """What was weighed and what was not."""

    rows_in: int = 0
    prompts_in: int = 0
    rows: int = 0
    prompts: int = 0
    weighed_rows: int = 0
    uniform_rows: int = 0
    missing: dict[str, dict[str, int]] = field(default_factory=dict)
    """Kept rows without a behavior policy, by source and reason, whether they have weight 1 or are left out."""
    aligned: dict[str, AlignedCounts] = field(default_factory=dict)
    """By source, rows whose behavior policy has another tokenizer, those below behavior.min_coverage among them."""
    dropped_rows: int = 0
    """Rows left out because they have no behavior policy."""
    failed_rows: dict[str, int] = field(default_factory=dict)
    """Rows that a policy could not score, by reason."""
    failed_prompts: int = 0
    """Prompts left out with a row that could not be scored."""
    rows_of_failed_prompts: int = 0
    unknown_tokens: int = 0
    """Tokens of weighed rows whose log ratio is not known (turn ends), so that it counts as 0."""
    recorded_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens by source whose behavior's log-probability was recorded at a temperature other than 1 and is processed."""
    recorded_same: dict[str, int] = field(default_factory=dict)
    """Those of them for which it is the target's own at temperature 1: then the numbers are raw."""
    sources: dict[str, WeightTotals] = field(default_factory=dict)
    """Sums over weights by source, before `normalize: dataset`."""
    self_weights: WeightTotals = field(default_factory=WeightTotals)
    """PEAR: the same sums if both policies were the target and every score exact. Other methods: over the kept rows
    that the target scored again, the weights of the first scoring."""
    self_weights_repeat: WeightTotals = field(default_factory=WeightTotals)
    """PEAR: what the target against itself really gets, over the kept rows that it scored again. Other methods: the
    weights of the second scoring."""
    noise_squares: float = 0.0
    """Sum over the tokens of `self_weights_repeat` of the squared difference between the two scorings."""

    @property
    def scoring_noise(self) -> float | None:
        """Root mean square difference of a token's log-probability between two scorings by the target."""
        return (
            math.sqrt(self.noise_squares / self.self_weights_repeat.tokens) if self.self_weights_repeat.tokens else None
        )

    @property
    def totals(self) -> WeightTotals:
        """Sums over all sources."""
        totals = WeightTotals()
        for source in sorted(self.sources):
            totals += self.sources[source]
        return totals


def dataset_factor(counts: WeighCounts, weights: WeightsConfig) -> float:
    """What `normalize: dataset` multiplies weights by, from the counts of all partitions; else 1."""
    totals = counts.totals
    return totals.tokens / totals.sum if weights.normalize == "dataset" and totals.sum else 1.0
