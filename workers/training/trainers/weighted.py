"""TRL's SFT trainer with a weight for each token's loss.

    loss of a step = sum(w * l) / (tokens with loss in the global batch)

over all micro-batches of the step in all processes. transformers counts the tokens of the step over both;
DDP averages gradients over processes, so each process multiplies by their number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from trl import SFTTrainer

from grape_service.config.methods import WeightsConfig
from grape_service.config.training import SftSettings
from workers.training.trainers.batches import OWN_KEYS
from workers.training.trainers.loss import LossTotals, online_weights_n, token_losses_n
from workers.training.trainers.output import EndsAtLastStep


def has_dropout(config: PretrainedConfig) -> bool:
    """Whether a model drops activations while it trains."""
    return any(
        isinstance(value, float) and value > 0
        for name, value in config.get_text_config().to_dict().items()
        if "dropout" in name or name.endswith("pdrop")
    )


class WeightedSFTTrainer(EndsAtLastStep, SFTTrainer):
    """SFT on batches of `RowCollator`, with the loss of `settings`; `pear` is for loss: online."""

    loss_is_scaled_for_ga = True  # type: ignore[assignment]

    def __init__(self, settings: SftSettings, pear: WeightsConfig | None, **arguments: Any):
        super().__init__(**arguments)
        # Have transformers count the tokens of a step whatever the model's forward accepts: compute_loss uses it.
        self.model_accepts_loss_kwargs = True
        self.settings = settings
        self.pear = pear
        config: PretrainedConfig = self.accelerator.unwrap_model(self.model).config
        self.has_dropout = has_dropout(config) or (settings.lora is not None and settings.lora.dropout > 0)
        self._totals = {"train": LossTotals(), "eval": LossTotals()}

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: a checkpoint has our card, which knows the release."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Loss of a micro-batch such that those of a step, averaged over processes, add up to the step's loss."""
        assert not return_outputs, "the logits are never made"
        own = {key: inputs[key] for key in OWN_KEYS}
        inputs = {key: value for key, value in inputs.items() if key not in OWN_KEYS}
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, fused_lm_head=True)
        mask = inputs["labels"][:, 1:] != -100
        log_probs_n = outputs.log_probs[mask].float()
        weights_n = self._weights_n(model, inputs, own, log_probs_n.detach(), mask)
        losses_n = weights_n * token_losses_n(log_probs_n, self.settings.base_loss)

        training = model.training
        all_tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
        self._totals["train" if training else "eval"].add(
            losses_n, log_probs_n, weights_n, outputs.entropy[mask], outputs.is_top1[mask], all_tokens
        )
        # `log_probs` as a whole keeps the graph where a micro-batch has no token with loss.
        total = losses_n.sum() + 0.0 * outputs.log_probs.sum()
        num_tokens = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / num_tokens.clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        return loss

    def _weights_n(
        self, model: nn.Module, inputs: dict[str, Any], own: dict[str, Tensor], log_probs_n: Tensor, mask: Tensor
    ) -> Tensor:
        if self.settings.loss == "uniform":
            return torch.ones_like(log_probs_n)
        column_n = own["loss_weights"].to(log_probs_n)
        if self.settings.loss == "column" or not len(column_n):
            return column_n
        assert self.pear is not None
        if self.has_dropout and model.training:
            model.eval()
            with torch.no_grad():
                log_probs_n = model(**inputs, fused_lm_head=True).log_probs[mask].float()
            model.train()
        online_n = online_weights_n(log_probs_n, own["behavior_logprobs"], own["sequence"], self.pear)
        return torch.where(own["has_behavior"], online_n, column_n) if self.pear.needs_behavior else online_n

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures over the tokens since the last line."""
        is_eval = "eval_loss" in logs
        if is_eval or "loss" in logs:
            figures = self._totals["eval" if is_eval else "train"].figures(self.accelerator.num_processes > 1)
            weighted_loss = figures.pop("weighted_loss", None)
            if is_eval and weighted_loss is not None:
                logs["eval_loss"] = weighted_loss
            logs.update({f"eval_{key}" if is_eval else key: value for key, value in figures.items()})
        super().log(logs, start_time)
