"""TRL's SFTTrainer with a weight for each token's loss: sum(w * nll) / (tokens with loss in the global batch).

Rows have input_ids, labels and loss_weights of one length, aligned with the token that is predicted. Needs TRL
1.16 or newer and nothing else of the service that wrote this file.
"""

from typing import Any

import torch
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


class WeightCollator:
    """Pads rows, their weights with 0."""

    def __init__(self, pad_token_id: int) -> None:
        self.layout = DataCollatorForLanguageModeling(pad_token_id=pad_token_id)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.layout([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
        weights = [torch.tensor(row["loss_weights"], dtype=torch.float32) for row in rows]
        batch["loss_weights"] = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)
        return batch


class WeightedSFTTrainer(SFTTrainer):
    """SFTTrainer for rows with loss_weights; packing is not for it."""

    loss_is_scaled_for_ga = True  # type: ignore[assignment]

    def __init__(self, model: Any, args: SFTConfig, train_dataset: Any, processing_class: Any = None, **more: Any):
        if args.packing or args.padding_free:
            raise ValueError("rows with loss_weights are padded: set packing and padding_free to False")
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.name_or_path)
        args.remove_unused_columns = False
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        pad_token_id = processing_class.pad_token_id
        collator = WeightCollator(processing_class.eos_token_id if pad_token_id is None else pad_token_id)
        super().__init__(model, args, collator, train_dataset=train_dataset, processing_class=processing_class, **more)
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        inputs = {**inputs, "use_cache": False}
        weights = inputs.pop("loss_weights")[:, 1:]
        outputs = model(**inputs, fused_lm_head=True)
        num_tokens = outputs.label_mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = -(weights.to(outputs.log_probs) * outputs.log_probs).sum() / num_tokens.clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return loss
