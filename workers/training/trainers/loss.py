"""The weighted SFT loss in torch. Shapes: n tokens with loss of a micro-batch, flat, row after row.

    loss = sum_i w_i * l_i / (tokens with loss in the global batch),   l = -log p  or  -p log p (DFT)

Weights that are recomputed at each step are made by the twin in torch of their method (grape_service/methods/weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grape_service.config.methods import WeightsConfig
from grape_service.methods import WEIGHTS
from grape_service.methods.weights.pear import pear_weights_n

__all__ = ["LossTotals", "online_weights_n", "pear_weights_n", "token_losses_n"]


def token_losses_n(log_probs_n: Tensor, base_loss: str) -> Tensor:
    """Loss of each token [n] from log p of each token [n], before its weight."""
    if base_loss == "dft":
        return -log_probs_n * log_probs_n.detach().exp()
    return -log_probs_n


def online_weights_n(target_n: Tensor, behavior_n: Tensor, sequence_n: Tensor, config: WeightsConfig) -> Tensor:
    """Weights [n] of a method that the trainer can make again from the model's own log p, as `pear_weights_n`."""
    online = WEIGHTS[config.method].online
    assert online is not None, "settings are checked before training"
    return online(target_n, behavior_n, sequence_n, config)


@dataclass
class LossTotals:
    """Running sums over the tokens with loss since the last line of metrics, kept on the device."""

    names: tuple[str, ...] = ("tokens", "loss", "nll", "entropy", "top1", "weight", "weight_squares", "all_tokens")
    sums: Tensor | None = None
    extremes: Tensor | None = None  # [-smallest weight, largest weight]

    def add(
        self,
        losses_n: Tensor,
        log_probs_n: Tensor,
        weights_n: Tensor,
        entropy_n: Tensor,
        top1_n: Tensor,
        all_tokens: int,
    ) -> None:
        """Add a micro-batch: loss with its weight, log p, weight, entropy, whether the token was the likeliest."""
        w_n = weights_n.double()
        sums = torch.stack(
            [
                torch.tensor(float(len(w_n)), dtype=torch.float64, device=w_n.device),
                losses_n.detach().double().sum(),
                -log_probs_n.detach().double().sum(),
                entropy_n.detach().double().sum(),
                top1_n.double().sum(),
                w_n.sum(),
                (w_n * w_n).sum(),
                torch.tensor(float(all_tokens), dtype=torch.float64, device=w_n.device),
            ]
        )
        limits = torch.stack([-w_n.min(), w_n.max()]) if len(w_n) else torch.full((2,), -torch.inf).to(sums)
        self.sums = sums if self.sums is None else self.sums + sums
        self.extremes = limits if self.extremes is None else torch.maximum(self.extremes, limits)

    def figures(self, all_reduce: bool) -> dict[str, float]:
        """Means over the tokens with loss of every process, and a fresh start; empty if there were none."""
        if self.sums is None or self.extremes is None:
            return {}
        sums, extremes = self.sums, self.extremes
        self.sums = self.extremes = None
        if all_reduce:
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
        total = dict(zip(self.names, sums.tolist(), strict=True))
        tokens = total["tokens"]
        if tokens == 0:
            return {}
        minus_smallest, largest = extremes.tolist()
        return {
            "weighted_loss": total["loss"] / tokens,
            "nll": total["nll"] / tokens,
            "entropy": total["entropy"] / tokens,
            "token_accuracy": total["top1"] / tokens,
            "weight_mean": total["weight"] / tokens,
            "weight_min": -minus_smallest,
            "weight_max": largest,
            "ess": total["weight"] ** 2 / (tokens * total["weight_squares"]) if total["weight_squares"] else 0.0,
            "loss_tokens": tokens,
            "tokens": total["all_tokens"],
        }
