"""The weighted SFT loss in torch. Shapes: n tokens with loss of a micro-batch, flat, row after row.

    loss = sum_i w_i * l_i / (tokens with loss in the global batch),   l = -log p  or  -p log p (DFT)

`pear_weights` is grape_service.weigh.pear in torch, for weights that are recomputed at each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grape_service.config.methods import WeightsConfig


def token_losses_n(log_probs_n: Tensor, base_loss: str) -> Tensor:
    """Loss of each token [n] from log p of each token [n], before its weight."""
    if base_loss == "dft":
        return -log_probs_n * log_probs_n.detach().exp()
    return -log_probs_n


def pear_weights_n(target_n: Tensor, behavior_n: Tensor, sequence_n: Tensor, config: WeightsConfig) -> Tensor:
    """PEAR weights [n], float32, without gradient (arXiv 2602.01058, section 3).

    `target_n`, `behavior_n`: log-probabilities; NaN in `behavior_n` is a ratio that is not known, whose delta is 0.
    `sequence_n`: the response of each token, ascending. All n tokens are tokens with loss.
    """
    ratios_n = target_n.detach().double() - behavior_n.double()
    known_n = ~ratios_n.isnan()
    ratios_n = ratios_n.nan_to_num(0.0)
    _, row_n, lengths_s = torch.unique_consecutive(sequence_n, return_inverse=True, return_counts=True)
    num_rows = len(lengths_s)

    def row_sums_s(values_n: Tensor) -> Tensor:
        return torch.zeros(num_rows, dtype=torch.float64, device=values_n.device).index_add_(0, row_n, values_n)

    if config.center == "sequence":
        means_s = row_sums_s(ratios_n) / row_sums_s(known_n.double()).clamp(min=1)
        ratios_n = ratios_n - means_s[row_n]
    delta_n = ratios_n.clamp(*config.ratio_clip) * known_n

    ends_s = lengths_s.cumsum(0)
    last_n = (ends_s - 1)[row_n]
    running_n = delta_n.cumsum(0)
    if config.level == "sequence":
        log_weights_n = row_sums_s(delta_n)[row_n]
    else:
        start_n = (ends_s - lengths_s)[row_n]
        size = config.block_size if config.level == "block" else 1
        block_n = (torch.arange(len(delta_n), device=delta_n.device) - start_n) // size
        block_end_n = torch.minimum(start_n + (block_n + 1) * size - 1, last_n)
        log_gamma = torch.log(torch.tensor(config.gamma, dtype=torch.float64)).item()
        log_weights_n = (last_n - block_end_n) * log_gamma + running_n[last_n] - running_n[block_end_n]
    weights_n = log_weights_n.clamp(*config.weight_clip).exp()
    if config.normalize == "sequence":
        weights_n = weights_n * (lengths_s / row_sums_s(weights_n))[row_n]
    return weights_n.float()


def online_weights_n(target_n: Tensor, behavior_n: Tensor, sequence_n: Tensor, config: WeightsConfig) -> Tensor:
    """Weights [n] of a method that the trainer can make again from the model's own log p, as `pear_weights_n`.

    probability: the token's probability under the model that is trained, which makes nll the loss of DFT.
    """
    if config.method == "pear":
        return pear_weights_n(target_n, behavior_n, sequence_n, config)
    assert config.method == "probability", "settings are checked before training"
    weights_n = target_n.detach().double().clamp(*config.weight_clip).exp()
    if config.normalize == "sequence":
        _, row_n, lengths_s = torch.unique_consecutive(sequence_n, return_inverse=True, return_counts=True)
        sums_s = torch.zeros(len(lengths_s), dtype=torch.float64, device=weights_n.device).index_add_(
            0, row_n, weights_n
        )
        weights_n = weights_n * (lengths_s / sums_s)[row_n]
    return weights_n.float()


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
