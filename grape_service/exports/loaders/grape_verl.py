"""A release for verl's SFT trainer: data.custom_cls.path=.../grape_verl.py data.custom_cls.name=ReleaseDataset

Gives verl the release's own tokens, and loss_weights in the place of loss_mask: verl's loss multiplies each
token's log-probability with it. Needs nothing of the service that wrote this file.
"""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset


class ReleaseDataset(Dataset):
    """Rows of the release's Parquet files, in memory; for data.pad_mode=no_padding."""

    def __init__(
        self, parquet_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1
    ) -> None:
        files = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        if config.get("pad_mode", "no_padding") != "no_padding":
            raise ValueError("loss weights reach verl's loss with data.pad_mode=no_padding alone")
        self.max_length = config.get("max_length", None)
        self.truncation = config.get("truncation", "error")
        names = pq.read_schema(files[0]).names
        weights = "loss_weights" if "loss_weights" in names else "loss_mask"
        columns = ["input_ids", weights]
        tables = [pq.read_table(file, columns=columns, page_checksum_verification=True) for file in files]
        table = pa.concat_tables(tables)
        self.rows = table if max_samples is None or max_samples < 0 else table.slice(0, max_samples)

    def __len__(self) -> int:
        return self.rows.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids, weights = (column[index].values.to_numpy(zero_copy_only=False) for column in self.rows.columns)
        input_ids = torch.tensor(input_ids, dtype=torch.long)
        weights = torch.tensor(weights, dtype=torch.float32)
        if self.max_length is not None and len(input_ids) > self.max_length:
            if self.truncation == "error":
                raise ValueError(
                    f"row {index} has {len(input_ids)} tokens, more than data.max_length {self.max_length}"
                )
            input_ids, weights = input_ids[: self.max_length], weights[: self.max_length]
        return {"input_ids": input_ids, "position_ids": torch.arange(len(input_ids)), "loss_mask": weights}
