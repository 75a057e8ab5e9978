"""The audit of a sampler: recorded log-probabilities against the same policy's scoring engine.

A sampler's numbers are what weights are made of, and there are many ways to record others: after the temperature, of
another adapter, a token off. A share of the samples goes through the scoring engine, and how far the two are apart
stands in the manifest; where that is more than the precision explains, the numbers are refused.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from grape_service.config.policy import RecordedBehavior
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.rows.ragged import Int64s, segment_sums

AUDITED_SHARE = 0.01
LEAST_AUDITED, MOST_AUDITED = 64, 4096
"""Samples of a policy that are scored again."""
TOLERANCE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.06}
"""dtype -> mean absolute difference of a token that two engines in that precision may have."""


@dataclass(frozen=True)
class Drift:
    """How far recorded log-probabilities are from those of the scoring engine; all in nats."""

    samples: int
    tokens: int
    mean: float  # of the absolute difference of a token
    percentile_99: float
    largest: float
    sequence_mean: float  # of the absolute difference of a response's mean log-probability
    sequence_largest: float
    tolerance: float  # of `mean`

    @property
    def is_too_large(self) -> bool:
        return not self.mean <= self.tolerance

    def to_json(self) -> JsonObject:
        """For the manifest."""
        return asdict(self)


def drift_of(
    recorded: npt.NDArray[np.floating], scored: npt.NDArray[np.floating], offsets: Int64s, dtype: str
) -> Drift:
    """The drift of N responses: recorded and scored log-probabilities [L] with the responses' offsets [N + 1]."""
    difference = np.asarray(recorded, np.float64) - np.asarray(scored, np.float64)
    size = np.abs(difference)
    lengths = np.maximum(np.diff(offsets), 1)
    means = np.abs(segment_sums(difference, offsets)) / lengths
    return Drift(
        samples=len(offsets) - 1,
        tokens=len(size),
        mean=float(size.mean()) if len(size) else 0.0,
        percentile_99=float(np.quantile(size, 0.99)) if len(size) else 0.0,
        largest=float(size.max(initial=0.0)),
        sequence_mean=float(means.mean()) if len(means) else 0.0,
        sequence_largest=float(means.max(initial=0.0)),
        tolerance=TOLERANCE[dtype],
    )


def is_audited(key: bytes, samples: int) -> bool:
    """Whether the sample of a key is among those that are scored again, of so many: it follows from the key."""
    share = min(max(AUDITED_SHARE * samples, LEAST_AUDITED), MOST_AUDITED) / max(samples, 1)
    return int.from_bytes(key[:8], "big") < share * 2**64


def refuse_drift(config: Config, name: str, drift: Drift) -> None:
    """Raises UserError where a config makes weights of the numbers of a policy of which an audit found that they are
    not the policy's."""
    behavior = config.compared_behavior
    if drift.is_too_large and behavior is not None and isinstance(behavior.of_source(name), RecordedBehavior):
        raise UserError(
            f"the recorded log-probabilities of gather.policies.{name} are not the policy's: its scoring engine "
            f"differs by {drift.mean:.3g} a token on average (allowed: {drift.tolerance:g}); score them again with "
            f"behavior.sources.{name}: {{model: ...}}, or set weights to null"
        )


def refuse_drifted(config: Config, counts: JsonObject) -> None:
    """`refuse_drift` of every policy that sampled rows of a release, whose manifest has these counts: what the run that
    gathered them let pass without weights is asked again by whoever makes weights of them."""
    for name, gathered in (counts.get("gather") or {}).items():
        if gathered.get("audit"):
            refuse_drift(config, name, Drift(**gathered["audit"]))
