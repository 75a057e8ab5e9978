"""What a method says of itself, and what all weights methods share.

Weights methods give log weights [L]; all share what is done with them:

    weight_t = exp(clip(log weight_t, lo_w, hi_w))

and `normalize`, which divides the weights by their mean over the response or the dataset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from grape_service.errors import UserError
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import Int64s, segment_sums

if TYPE_CHECKING:
    from torch import Tensor

Float64s = npt.NDArray[np.float64]


class SelectKeys(BaseModel):
    """Keys of the select section that belong to a method: its module adds them in a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True)


class Window(SelectKeys):
    """A short stretch of a response before a step."""

    steps: int | None = Field(None, ge=1)
    """So many steps."""
    tokens: int | None = Field(None, ge=1)
    """So many tokens."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Window:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("a window needs exactly one of: steps, tokens")
        return self


@dataclass(frozen=True)
class SelectMethod:
    """A method that gives each candidate a number."""

    name: str
    score: Callable[[MethodBatch, Any], Float64s]
    """Of a batch, under the settings of the select section; NaN for a candidate that never wins."""
    statistics: tuple[str, ...]
    """That its batch holds, in the order of STATISTICS."""
    better: Literal["largest", "smallest"] = "largest"
    columns: tuple[str, ...] = ()
    """The pool's, that its batch holds."""
    source: str = ""
    is_default: bool = False
    bound: Callable[[MethodBatch, Int64s], Float64s] | None = None
    """(batch of candidates' first counted tokens, how many each has in all [N]) -> the most that their scores can still
    reach [N]: never less, rounding included, than `score` of all their tokens. None where tokens that are not known
    may raise a score beyond that, so that no candidate can be stopped early (score.race)."""
    keys: type[SelectKeys] = SelectKeys
    cuts_steps: bool = False
    """Whether its batch says which step each token is in."""
    scores_windows: bool = False
    """Whether each step is scored once more in its `window`, and its batch has those log-probabilities."""

    @property
    def own_keys(self) -> tuple[str, ...]:
        """Keys that no other method has."""
        return tuple(self.keys.model_fields)

    def oriented(self, scores: Float64s) -> Float64s:
        """Scores such that the largest wins."""
        return -scores if self.better == "smallest" else scores


class WeightsKeys(BaseModel):
    """Keys of the weights section: those of every method; a method's module adds its own in a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True)

    method: str = "pear"
    weight_clip: tuple[float, float] = (-10.0, 5.0)
    """Bounds of the log weight, of every method."""
    normalize: Literal["none", "sequence", "dataset"] = "none"
    """Scale weights to a mean of 1 over each response or over the dataset, of every method."""


@dataclass(frozen=True)
class TokenWeights:
    """Weights [L] in float64, and for each response [N] how many of its tokens each clip held."""

    weights: Float64s
    ratio_low: Int64s
    ratio_high: Int64s
    weight_low: Int64s
    weight_high: Int64s

    def held(self) -> tuple[Int64s, Int64s, Int64s, Int64s]:
        """How many tokens each clip held, in the order of the fields."""
        return self.ratio_low, self.ratio_high, self.weight_low, self.weight_high


@dataclass(frozen=True)
class WeightsMethod:
    """A method that gives each token with loss a weight: by `log_weights`, or by `compare` of two policies."""

    name: str
    keys: type[WeightsKeys]
    source: str
    statistics: tuple[str, ...] = ()
    """What it needs of the target beside log-probabilities."""
    log_weights: Callable[[MethodBatch, Any], Float64s] | None = None
    """Log weight of each token [L] of a batch under settings of `keys`, before its clip; may be -inf."""
    compare: Callable[[Float64s, Int64s, Any], TokenWeights] | None = None
    """Weights from log ratios [L] of target and behavior, NaN where not known, offsets [N + 1] and settings;
    `normalize: dataset` is left to the caller."""
    online: Callable[[Tensor, Tensor, Tensor, Any], Tensor] | None = None
    """Its twin in torch, for a trainer that makes the weights again at each step: (target_n, behavior_n, sequence_n,
    settings) -> weights [n], float32, without gradient; see `pear_weights_n`."""
    is_default: bool = False

    @property
    def needs_behavior(self) -> bool:
        """Whether it compares the target with the policy that wrote the response."""
        return self.compare is not None

    @property
    def own_keys(self) -> tuple[str, ...]:
        """Keys that no other method has."""
        return tuple(name for name in self.keys.model_fields if name not in WeightsKeys.model_fields)


def clipped_weights(log_weights: Float64s, offsets: Int64s, config: WeightsKeys) -> TokenWeights:
    """Weights from log weights [L], which may be -inf; `normalize: dataset` is left to the caller."""
    low, high = config.weight_clip
    with np.errstate(over="ignore"):
        weights = np.exp(np.clip(log_weights, low, high))
    if not np.isfinite(weights).all():
        raise UserError("a weight is not finite: give weights.weight_clip an upper bound such as 5")
    if config.normalize == "sequence":
        lengths = np.diff(offsets)
        weights *= np.repeat(lengths / np.maximum(segment_sums(weights, offsets), np.finfo(float).tiny), lengths)
    none = np.zeros(len(offsets) - 1, dtype=np.int64)
    return TokenWeights(
        weights, none, none, segment_sums(log_weights < low, offsets), segment_sums(log_weights > high, offsets)
    )
