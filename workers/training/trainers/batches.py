"""Groups of a release's rows -> the tensors of a micro-batch, padded or packed.

Besides what a model takes, a batch carries one value for each of its n tokens with loss, row after
row: loss_weights [n], behavior_logprobs [n] (NaN where not known), has_behavior [n] and sequence [n],
the number of the token's row in the batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from workers.training.trainers.rows import LocalRows

OWN_KEYS = ("loss_weights", "behavior_logprobs", "has_behavior", "sequence")


class RowCollator:
    """Called with examples {"rows": [indices]}; an example without rows becomes one token without loss."""

    def __init__(self, rows: LocalRows, pad_token_id: int, packing: bool):
        self.rows = rows
        self.pad_token_id = pad_token_id
        self.layout = DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=packing)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences: list[dict[str, Any]] = []
        weights, behaviors, has_behaviors, numbers = [], [], [], []
        number = 0
        for example in examples:
            ids, labels = [], []
            for row in (self.rows.row(index) for index in example["rows"]):
                mask = row.loss_mask
                ids.append(row.input_ids)
                labels.append(np.where(mask, row.input_ids, -100))
                count = int(mask.sum())
                behavior = row.behavior_logprobs
                weights.append(row.loss_weights[mask])
                behaviors.append(np.full(count, np.nan, np.float32) if behavior is None else behavior[mask])
                has_behaviors.append(np.full(count, behavior is not None))
                numbers.append(np.full(count, number))
                number += 1
            if not ids:
                ids, labels = [np.array([self.pad_token_id])], [np.array([-100])]
            sequences.append(
                {
                    "input_ids": np.concatenate(ids).astype(np.int64),
                    "labels": np.concatenate(labels).astype(np.int64),
                    "seq_lengths": [len(part) for part in ids],
                }
            )
        batch = self.layout(sequences)
        batch["loss_weights"] = torch.from_numpy(_joined(weights, np.float32))
        batch["behavior_logprobs"] = torch.from_numpy(_joined(behaviors, np.float32))
        batch["has_behavior"] = torch.from_numpy(_joined(has_behaviors, np.bool_))
        batch["sequence"] = torch.from_numpy(_joined(numbers, np.int64))
        return batch


def _joined(parts: list[Any], dtype: Any) -> Any:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
