"""Weights by probability and entropy: by hand and against a float64 loop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grape_service.config.methods import WeightsConfig
from grape_service.weigh.batch import token_weights
from tests.grape_service.select.test_methods import batch_of

pytestmark = pytest.mark.quick


def test_probability_by_hand() -> None:
    batch = batch_of([2, 1], logprob=[math.log(0.5), -20.0, 0.0])
    weighed = token_weights(batch, WeightsConfig(method="probability"))
    assert weighed.weights.tolist() == pytest.approx([0.5, math.exp(-10), 1.0])
    assert (weighed.weight_low.tolist(), weighed.weight_high.tolist()) == ([1, 0], [0, 0])


def test_entropy_by_hand() -> None:
    # An entropy of 3 nats is a weight of 1, of 1.5 one of a half, of none the lower clip.
    batch = batch_of([3], logprob=[-1, -1, -1], top20_entropy=[3.0, 1.5, 0.0])
    weighed = token_weights(batch, WeightsConfig(method="entropy"))
    assert weighed.weights.tolist() == pytest.approx([1.0, 0.5, math.exp(-10)])
    squared = token_weights(batch, WeightsConfig(method="entropy", alpha=2, scale=1.5))
    assert squared.weights.tolist() == pytest.approx([4.0, 1.0, math.exp(-10)])


def test_against_a_float64_loop_and_normalized() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 40, 30).tolist()
    batch = batch_of(
        lengths, logprob=-random.exponential(3, sum(lengths)), top20_entropy=random.uniform(0, 3, sum(lengths))
    )
    for method in ("probability", "entropy"):
        config = WeightsConfig(method=method, weight_clip=(-4, -0.1), normalize="sequence")
        weighed = token_weights(batch, config)
        start = 0
        for length in lengths:
            made = []
            for place in range(start, start + length):
                log_weight = float(batch.statistics["logprob"][place])
                if method == "entropy":
                    log_weight = math.log(float(batch.statistics["top20_entropy"][place]) / 3)
                made.append(math.exp(min(max(log_weight, -4), -0.1)))
            mean = sum(made) / length
            expected = [value / mean for value in made]
            assert weighed.weights[start : start + length].tolist() == pytest.approx(expected, rel=1e-9)
            start += length
