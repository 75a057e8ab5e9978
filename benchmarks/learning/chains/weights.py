"""The arms: how the tokens of one pool are weighed, by the product's own formulas, with a sceptic's two controls.

Shapes: N responses, L tokens with loss of all together, `offsets` [N + 1] where each begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.config.methods import WeightsConfig
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import Int64s
from grape_service.weigh.batch import token_weights
from grape_service.weigh.pear import log_ratios, pear_weights

Float64s = npt.NDArray[np.float64]
TOKEN = WeightsConfig.model_validate({"method": "pear", "level": "token"})


@dataclass(frozen=True)
class Arm:
    """How the loss is weighed: by `config`, and where `online` at each step from the model as it is then."""

    name: str
    config: WeightsConfig | None = None
    online: bool = False
    control: str | None = None  # what is done to the weights of `config`


def _pear(level: str, normalize: str = "none") -> WeightsConfig:
    return WeightsConfig.model_validate({"method": "pear", "level": level, "normalize": normalize})


ARMS = (
    Arm("uniform"),
    Arm("token", _pear("token")),
    Arm("sequence", _pear("sequence")),
    Arm("block", _pear("block")),
    Arm("online", _pear("token"), online=True),
    Arm("shuffled", _pear("token"), control="shuffled"),
    Arm("ramp", _pear("token"), control="ramp"),
    Arm("probability", WeightsConfig(method="probability")),
    Arm("token-dataset", _pear("token", "dataset")),
    Arm("sequence-dataset", _pear("sequence", "dataset")),
    Arm("block-dataset", _pear("block", "dataset")),
    Arm("online-sequence", _pear("token", "sequence"), online=True),
)
"""loss: online refuses normalize: dataset, whose mean a step does not know, so it is normalised by sequence."""


def weights_of(arm: Arm, target: Float64s, behavior: Float64s, offsets: Int64s, seed: int) -> Float64s:
    """The weights column [L] of an arm from both policies' log-probabilities [L]; ones for those without a column."""
    if arm.config is None or arm.online:
        return np.ones(len(target))
    if arm.config.method == "pear":
        weights = pear_weights(log_ratios(target, behavior), offsets, arm.config).weights
    else:
        ids = pa.array([str(row) for row in range(len(offsets) - 1)])
        batch = MethodBatch(np.arange(len(ids)), ids, ids, offsets, {"logprob": target.astype(np.float32)}, {})
        weights = token_weights(batch, arm.config).weights
    if arm.control == "shuffled":
        weights = shuffled(weights, offsets, seed)
    elif arm.control == "ramp":
        weights = ramp(weights, offsets)
    if arm.config.normalize == "dataset":
        weights = weights / weights.mean()
    return weights


def shuffled(weights: Float64s, offsets: Int64s, seed: int) -> Float64s:
    """Each response's own weights in a random order: what is left of them is how much a response counts."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(part) for part in np.split(weights, offsets[1:-1])])


def ramp(weights: Float64s, offsets: Int64s) -> Float64s:
    """For each token the mean weight of all tokens that stand as far from their response's end: what is left of the
    weights is where in the response a token stands."""
    left = np.repeat(offsets[1:], np.diff(offsets)) - 1 - np.arange(len(weights))
    return (np.bincount(left, weights=weights) / np.bincount(left))[left]


def spread(weights: Float64s, offsets: Int64s, target: Float64s, behavior: Float64s) -> dict[str, float]:
    """What the weights are like: mean, effective share of the tokens, of the responses by their mean weight, and how
    much of the weights' variance their place alone explains."""
    row_means = np.add.reduceat(weights, offsets[:-1]) / np.diff(offsets)
    by_place = ramp(weights, offsets)
    ratios = log_ratios(target, behavior)
    return {
        "mean": float(weights.mean()),
        "ess_tokens": float(weights.sum() ** 2 / (len(weights) * (weights**2).sum())),
        "ess_rows": float(row_means.sum() ** 2 / (len(row_means) * (row_means**2).sum())),
        "explained_by_place": float(by_place.var() / weights.var()) if weights.var() > 0 else 0.0,
        "smallest": float(weights.min()),
        "largest": float(weights.max()),
        "ratio_mean": float(ratios.mean()),
        "ratio_below_clip": float((ratios < TOKEN.ratio_clip[0]).mean()),
        "ratio_above_clip": float((ratios > TOKEN.ratio_clip[1]).mean()),
    }
