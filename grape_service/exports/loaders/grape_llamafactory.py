"""LLaMA-Factory v1's SFT trainer on a release's own tokens and weights.

    USE_V1=1 python grape_llamafactory.py config.yaml

Takes the config of `llamafactory-cli sft`. The loss of a step is sum(w * nll) / tokens with loss over all its
micro-batches and processes. Needs nothing of the service that wrote this file.
"""

from typing import Any

from llamafactory.v1.core.utils.rendering import Renderer
from llamafactory.v1.trainers.sft_trainer import SFTTrainer


class ReleaseRenderer(Renderer):
    """Gives the tokens, labels and weights of a row in the place of rendering its messages."""

    def process_samples(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [model_input(sample) for sample in samples]


def model_input(sample: dict[str, Any]) -> dict[str, Any]:
    """A row as v1 batches it; labels are -100 on tokens without loss, and v1 counts the others."""
    ids, mask = sample["input_ids"], sample["loss_mask"]
    weights = sample.get("loss_weights") or [float(has_loss) for has_loss in mask]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "position_ids": list(range(1, len(ids) + 1)),
        "labels": [token if has_loss else -100 for token, has_loss in zip(ids, mask, strict=True)],
        "loss_weights": weights,
    }


class WeightedTrainer(SFTTrainer):
    """v1's trainer, whose loss of a micro-batch is divided by its tokens with loss: fit() weighs micro-batches by
    them."""

    def __init__(self, *arguments: Any, renderer: Renderer, **more: Any) -> None:
        super().__init__(*arguments, renderer=ReleaseRenderer(renderer.template, renderer.processor), **more)

    def compute_loss(self, batch: dict[str, Any]) -> Any:
        weights = batch["loss_weights"].to(self.device, non_blocking=True)[..., 1:]
        num_tokens = (batch["labels"] != -100).sum().clamp(min=1).to(self.device)
        return (-self.compute_log_probs(self.model, batch) * weights).sum() / num_tokens


def main() -> None:
    """`run_sft` of v1 with WeightedTrainer."""
    from llamafactory.v1.trainers import sft_trainer

    sft_trainer.SFTTrainer = WeightedTrainer  # what its run_sft makes
    sft_trainer.run_sft()


if __name__ == "__main__":
    main()
