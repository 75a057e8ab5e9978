"""A release for Megatron-Bridge 0.6: a dataset whose loss_mask stays float, and a forward step that counts tokens.

    config.dataset = ReleaseProvider(folder="…", seq_length=4096)
    config.model.calculate_per_token_loss = True
    finetune(config, forward_step)

The loss of a step is then sum(w * nll) / tokens with loss of the global batch. Needs nothing of the service that
wrote this file.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

SMALLEST = 2.0**-126
"""Stands for weight 0 on a token with loss, so that it still counts."""


class ReleaseDataset(Dataset):
    """Rows of an export as samples of `seq_length` tokens, padded; a longer row is cut.

    `num_samples`: how many samples there are, the rows again and again in a new order each time; None: each row once,
    in order.
    """

    def __init__(self, files: list[str], seq_length: int, num_samples: int | None = None, seed: int = 0, pad: int = 0):
        weighted = "loss_weights" in pq.read_schema(files[0]).names
        names = ["input_ids", "loss_mask", *(["loss_weights"] if weighted else [])]
        table = pa.concat_tables(
            [pq.read_table(file, columns=names, page_checksum_verification=True) for file in files]
        )
        self.columns = [table.column(name) for name in names]
        self.seq_length, self.pad, self.seed = seq_length, pad, seed
        self.num_rows = table.num_rows
        self.num_samples = self.num_rows if num_samples is None else num_samples
        self.shuffle = num_samples is not None
        self._pass, self._order = -1, np.arange(self.num_rows)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, place = divmod(int(index), self.num_rows)
        if self.shuffle and number != self._pass:
            self._pass, self._order = number, np.random.default_rng([self.seed, number]).permutation(self.num_rows)
        row = int(self._order[place])
        ids, mask, *weights = (column[row].values.to_numpy(zero_copy_only=False) for column in self.columns)
        ids = ids[: self.seq_length + 1]
        values = np.where(mask, np.maximum(weights[0], SMALLEST) if weights else 1.0, 0.0)[1 : len(ids)]
        tokens = np.full(self.seq_length, self.pad, np.int64)
        labels, loss_mask = tokens.copy(), np.zeros(self.seq_length, np.float32)
        tokens[: len(ids) - 1], labels[: len(ids) - 1], loss_mask[: len(values)] = ids[:-1], ids[1:], values
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(loss_mask),
            "position_ids": torch.arange(self.seq_length),
        }

    def collate_fn(self, batch: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """Samples side by side [B, S]; causal attention needs no mask, since padding comes last."""
        return {**{name: torch.stack([row[name] for row in batch]) for name in batch[0]}, "attention_mask": None}


def weighted_next_token_loss(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor, **checks: bool
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Megatron-Bridge's masked_next_token_loss, which counts tokens with loss in the place of the mask's sum."""
    from megatron.bridge.training.losses import masked_next_token_loss

    loss, _, _ = masked_next_token_loss(loss_mask, output_tensor, **checks)
    num_tokens = (loss_mask != 0).sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss)])}


def forward_step(state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> tuple[Any, partial]:
    """Megatron-Bridge's forward step for GPT models with `weighted_next_token_loss`."""
    from megatron.bridge.training import gpt_step

    output, plain_loss = gpt_step.forward_step(state, data_iterator, model, return_schedule_plan)
    return output, partial(weighted_next_token_loss, *plain_loss.args, **plain_loss.keywords)


def _provider() -> type:
    from megatron.bridge.data.base import DatasetProvider

    @dataclass
    class ReleaseProvider(DatasetProvider):
        """The export in `folder`: data/ to train on, and eval/ where it has one."""

        folder: str = ""
        seq_length: int = 0
        seed: int = 0
        dataloader_type: str = "single"

        def build_datasets(self, context: Any) -> tuple[Any, Any, Any]:
            def rows(name: str, num_samples: int) -> ReleaseDataset | None:
                files = sorted(str(path) for path in (Path(self.folder) / name).glob("*.parquet"))
                return ReleaseDataset(files, self.seq_length, num_samples, self.seed) if files and num_samples else None

            return rows("data", context.train_samples), rows("eval", context.valid_samples), None

    return ReleaseProvider


def __getattr__(name: str) -> Any:
    """`ReleaseProvider`, made when it is asked for: its base class imports all of Megatron."""
    if name == "ReleaseProvider":
        return _provider()
    raise AttributeError(name)
